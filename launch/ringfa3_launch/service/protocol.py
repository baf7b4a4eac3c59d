"""HTTP as uvicorn speaks it by httptools, with what that lacks: a limit to a request's head, in bytes and in time."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 1024  # request line and headers
HEAD_S = 20.0  # from the connection, or a request's first byte, to the end of its headers
TOO_LARGE = b"431 Request Header Fields Too Large"
TOO_SLOW = b"408 Request Timeout"


class BoundedProtocol(HttpToolsProtocol):
    """One connection. One that says nothing, or never comes to an end, is closed."""

    _head: int = 0  # bytes of the head that is being read
    _reading: bool = True  # a head is being read
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._reading:
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin()

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def _begin(self) -> None:
        if self._late is None:
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
