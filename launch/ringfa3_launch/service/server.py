"""The process's HTTP server: uvicorn that first drains and then ends, with exit status 0, when it is told to end."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ringfa3_launch.service.protocol import BoundedProtocol

LOG = logging.getLogger("ringfa3.service")
CONNECTIONS = 4096  # open at once; more are answered 503 by uvicorn, many more are closed
IDLE_S = 75  # that a connection may be idle: longer than clients keep theirs, or they would ask into one just closed
GRACE_S = 5  # for connections to close, after the requests have ended
HASTE_S = 1  # the same, after a second signal


class Server(uvicorn.Server):
    """Serves the app on a listening socket until SIGTERM or SIGINT; a second signal breaks off what is in flight.

    Args:
        app: of `create_app`.
        drain_s: what requests in flight get after the first signal.
        listening: called once callers are let in.
    """

    def __init__(self, app: FastAPI, *, drain_s: float, listening: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                log_config=None,
                access_log=False,  # the app logs, with request ids
                server_header=False,
                proxy_headers=False,  # nobody is believed to be somebody else
                ws="none",
                lifespan="on",
                limit_concurrency=_connections(),
                timeout_keep_alive=IDLE_S,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._app, self._drain_s, self._listening = app, drain_s, listening
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """Called on a signal; from any thread."""
        assert self._loop is not None  # signals come here only while it serves
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._drain())
        elif not self._app.state.service.hurried:
            LOG.warning("told to end a second time: requests in flight are broken off")
            self._app.state.service.hurried = True
            self.config.timeout_graceful_shutdown = HASTE_S

    async def _drain(self) -> None:
        if inside := self._app.state.service.inside:
            LOG.warning(
                "told to end: waiting at most %g s for %d requests in flight; a second signal (Ctrl-C) breaks them off",
                self._drain_s,
                inside,
            )
        try:
            await self._app.state.service.drain(self._drain_s)
        finally:
            self.should_exit = True


def _connections() -> int:
    """How many, so that half of the files that this process may open are left for it: ranks are restarted with them."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if files == resource.RLIM_INFINITY else min(CONNECTIONS, files // 2)


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, port 0 takes a free one. Callers are refused until a Server listens on it.

    Raises:
        ValueError: the address is taken, is not this machine's, or is none.
    """
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 2^16
        raise ValueError(f"--port: wanted 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(f"--host, --port: wanted an address that is free, got {host} {port} ({error})") from None
    return bound
