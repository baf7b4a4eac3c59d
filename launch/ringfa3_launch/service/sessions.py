"""The attention sessions that are open: who may use one, how long it lives, and what is said once it is gone."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import torch

from ringfa3_launch.cluster.faults import SessionLost
from ringfa3_launch.service.bodies import NAMES, Described
from ringfa3_launch.service.contract import Attending
from ringfa3_launch.service.errors import Refusal, refusal
from ringfa3_launch.service.limits import check_work
from ringfa3_launch.service.state import Service

REMEMBERED = 1024  # ids of sessions that are gone and still answer 410


@dataclass
class Held:
    """One open session, and the one request that uses it."""

    id: str
    session: Attending
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    max_tokens: int
    restarts: int  # of the gang that holds it
    length: int = 0
    used: float = field(default_factory=time.monotonic)
    closed: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One request at a time, in the order in which they came.

        Raises:
            Refusal: it was closed meanwhile.
        """
        async with self.lock:
            if self.closed:
                raise gone()
            try:
                yield
            finally:
                self.used = time.monotonic()

    def check_keys(self, header: Mapping[str, Described]) -> None:
        """k and v fit to what is there, and there is room."""
        length = header["k"].shape[1] if len(header["k"].shape) == 4 else 0
        for name in ("k", "v"):
            self._check(name, header[name], (1, length, self.kv_heads, self.head_dim))
        self.check_room(length)

    def check_room(self, length: int) -> None:
        """So many tokens more fit."""
        room = self.max_tokens - self.length
        if length > room:
            raise Refusal.wrong("k", f"at most {room} tokens more", length, code="session_full")

    def check_rows(self, header: Mapping[str, Described], flops: float) -> None:
        """q fits, and it is not too much work."""
        rows = header["q"].shape[1] if len(header["q"].shape) == 4 else 0
        self._check("q", header["q"], (1, rows, self.heads, self.head_dim))
        if rows > self.length:
            raise Refusal.wrong("q", f"at most the session's {self.length} rows", rows)
        check_work(4.0 * self.heads * rows * self.length * self.head_dim, flops)

    def _check(self, name: str, each: Described, shape: tuple[int, ...]) -> None:
        if each.shape != shape or not shape[1]:
            raise Refusal.wrong(name, f"[1, S, {shape[2]}, {shape[3]}], S more than 0", list(each.shape))
        if each.dtype != self.dtype:
            raise Refusal.wrong(name, f"the session's dtype {self.dtype}", each.dtype)


class Sessions:
    """All that are open; those that nobody uses are closed."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._open: dict[str, Held] = {}
        self._gone: OrderedDict[str, Refusal] = OrderedDict()  # by id, and what is said of it
        self._opening = 0

    async def open(
        self, until: float, *, heads: int, kv_heads: int, head_dim: int, dtype: str, max_tokens: int
    ) -> Held:
        """A new session.

        Raises:
            Refusal: wrong, or too many.
            TimeoutError: not by then; it is closed as soon as it is there.
        """
        limits = self._service.limits
        if heads % kv_heads:
            raise Refusal.wrong("heads", f"a multiple of kv_heads {kv_heads}", heads)
        if max_tokens > limits.session_tokens:
            raise Refusal.wrong("max_tokens", f"at most {limits.session_tokens}", max_tokens)
        self._drop_lost()
        if len(self._open) + self._opening >= limits.sessions:
            raise Refusal.busy(f"sessions: {limits.sessions} of {limits.sessions} in use")

        async def opening() -> Held:
            self._opening += 1
            try:
                session = await self._service.call(
                    lambda: self._service.cluster.session(
                        heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, max_tokens=max_tokens
                    )
                )
            finally:
                self._opening -= 1
            id, restarts = secrets.token_urlsafe(18), self._service.cluster.restarts
            held = Held(id, session, heads, kv_heads, head_dim, NAMES[dtype], max_tokens, restarts)
            if time.monotonic() > until:  # nobody will ever know its id
                await self._service.call(session.close)
            else:
                self._open[id] = held
            return held

        async with asyncio.timeout(until - time.monotonic()):
            return await asyncio.shield(self._service.begin(opening()))

    def get(self, id: str) -> Held:
        """The session of this id.

        Raises:
            Refusal: 404, there never was one; 410, it is gone.
        """
        if id in self._gone:
            raise self._gone[id]
        if id not in self._open:
            raise Refusal(404, "id: wanted an open session's, got another", param="id", code="session_not_found")
        return self._open[id]

    async def close(self, id: str) -> None:
        """Close it, after the request that uses it."""
        held = self.get(id)
        async with held.turn():
            self._forget(held, gone())
            with suppress(Exception):  # lost with its gang: then there is nothing to free
                await self._service.call(held.session.close)

    def _forget(self, held: Held, why: Refusal) -> None:
        held.closed = True
        self._open.pop(held.id, None)
        self._gone[held.id] = why
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)

    def _drop_lost(self) -> None:
        """Those of a gang that is no more take no place. Each is as the cluster would say of it: lost."""
        for held in list(self._open.values()):
            if held.restarts != self._service.cluster.restarts:
                self._forget(held, refusal(SessionLost("the ranks that held it have failed")))

    async def tidy(self) -> None:
        """Close what nobody used for too long, for ever."""
        while True:
            await asyncio.sleep(min(10.0, self._service.limits.session_idle_s / 4))
            late = time.monotonic() - self._service.limits.session_idle_s
            for held in list(self._open.values()):
                if held.used < late and not held.lock.locked():
                    with suppress(Refusal):
                        await self.close(held.id)


def gone() -> Refusal:
    return Refusal(410, "the session is closed", code="session_closed")
