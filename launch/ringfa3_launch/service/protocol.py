"""HTTP as uvicorn speaks it by httptools, with what that lacks: limits to heads, to silence, and to connections."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 1024  # request line and headers
HEAD_S = 20.0  # from the connection, or a request's first byte, to the end of its headers
REST_S = 60.0  # for what comes after an answer and begins no request: blank lines, the rest of a body that was refused
TAKE_S, TAKE_BYTES = 30.0, 64 * 1024  # an answer that waits to be sent: so much of it has to be taken in so long
TOO_LARGE = b"431 Request Header Fields Too Large"
TOO_SLOW = b"408 Request Timeout"


class BoundedProtocol(HttpToolsProtocol):
    """One connection. One that says nothing, takes nothing, or never comes to an end, is closed."""

    _head: int = 0  # bytes of the head that is being read
    _reading: bool = True  # a head is being read
    _late: asyncio.TimerHandle | None = None
    _unsent: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._begin()
        limit = self.limit_concurrency
        if limit is not None and len(self.connections) > limit + limit // 4:  # uvicorn's own limit is to requests alone
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self._taken()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._reading:
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._refuse(TOO_LARGE)
        elif self._late is None and self.cycle is not None and self.cycle.response_complete:  # uvicorn waits for ever
            self._late = self.loop.call_later(REST_S, self._refuse, TOO_SLOW)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._end()
        self._begin()

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken()

    def _wait(self, size: int) -> None:
        """Look in a while whether enough was taken of so many bytes; nothing is added to them meanwhile."""
        self._unsent = self.loop.call_later(TAKE_S, self._look, size)

    def _look(self, before: int) -> None:
        size = self.transport.get_write_buffer_size()
        if before - size < TAKE_BYTES:
            self.transport.abort()
        else:
            self._wait(size)

    def _taken(self) -> None:
        if self._unsent is not None:
            self._unsent.cancel()
            self._unsent = None

    def _begin(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self._refuse, TOO_SLOW)
        self._reading, self._head = True, 0

    def _end(self) -> None:
        self._reading = False
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: bytes) -> None:
        self._end()
        if not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:  # else it would land in the middle of an answer
                self.transport.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
            self.transport.close()
