"""Server-sent events: an answer that is sent as it comes into being, and stops when its reader leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringfa3_launch.service.errors import refusal
from ringfa3_launch.service.streams import departure

WAITING = b": waiting\n\n"  # a comment
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends what an iterator yields; closes the iterator when the client goes. An exception becomes a last event.

    Args:
        source: yields complete events (see `event`).
        ended: called in the end, whatever happened, even where the source was never asked.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None], ended: Callable[[], None]) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.source, self.ended = source, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(departure(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            self.ended()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.source) as source:
            try:
                async for part in source:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except Exception as error:  # the status is sent: the error can only be an event
                await send({"type": "http.response.body", "body": event(refusal(error).body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: dict[str, Any]) -> bytes:
    """One event of JSON."""
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
