"""What the routes of one app share: the gang, the limits, who is inside, and threads for what blocks."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from ringfa3_launch.service.contract import Cluster, RankHealth
from ringfa3_launch.service.errors import Refusal, refusal
from ringfa3_launch.service.guard import Draining
from ringfa3_launch.service.limits import Gate, Limits
from ringfa3_launch.service.metrics import Metrics
from ringfa3_launch.service.streams import Stream

T = TypeVar("T")
DEADLINE = "x-deadline-s"  # a client may ask for less time than the server grants


@dataclass(frozen=True)
class Facts:
    """What does not change while the gang lives.

    Args:
        context: tokens that the model takes, prompt and answer together.
        vocab: token ids are below it.
        started: seconds since the epoch.
    """

    context: int | None
    vocab: int | None
    started: int


@dataclass
class Service:
    """One app's state.

    Args:
        log_text: whether prompts may be written to the log.
    """

    cluster: Cluster
    limits: Limits
    metrics: Metrics
    draining: Draining
    log_text: bool = False
    streams: set[Stream] = field(default_factory=set)

    def __post_init__(self) -> None:
        limits = self.limits
        self.completions = Gate("completions in flight", limits.completions)
        self.attentions = Gate("attention calls in flight", limits.attentions)
        self.bytes = Gate("bytes of tensors in memory", limits.tensor_bytes_together)
        self._calls = ThreadPoolExecutor(limits.attentions, "attention")
        self._looks = ThreadPoolExecutor(4, "look")
        self._tokens = ThreadPoolExecutor(1, "tokenizer")  # one: fast tokenizers do not like two threads at once
        self._facts: Facts | None = None
        self._names: OrderedDict[str, None] = OrderedDict()  # of conversations, the last used last
        self._begun: set[asyncio.Task[Any]] = set()
        self.hurried = False  # `drain` waits no more

    async def call(self, fn: Callable[[], T]) -> T:
        """fn(), which computes on the gang, in a thread.

        Raises:
            Refusal: what it raised, as a client is told of it.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._calls, fn)
        except Exception as error:
            raise refusal(error) from error

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Work that goes on when nobody waits for it any more."""
        task = asyncio.ensure_future(work)
        self._begun.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._begun.discard(task)
        if not task.cancelled():
            task.exception()  # who waited has it; where nobody did it need not be mourned

    async def converse(self, name: str) -> None:
        """This conversation goes on. The one that has been silent for longest is forgotten where there are too many."""
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self.limits.conversations:
            oldest, _ = self._names.popitem(last=False)
            self.begin(self.look(lambda: self.cluster.close_session(oldest), 60.0))  # nobody has to wait for that

    async def look(self, fn: Callable[[], T], seconds: float = 1.0) -> T:
        """fn(), which asks the gang how it is, in a thread.

        Raises:
            TimeoutError: it takes longer.
        """
        async with asyncio.timeout(seconds):
            return await asyncio.get_running_loop().run_in_executor(self._looks, fn)

    async def tokenize(self, fn: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._tokens, fn)

    async def facts(self) -> Facts:
        if self._facts is None:
            info = await self.look(self.cluster.info, 10.0)
            self._facts = Facts(info.get("max_length"), info.get("vocab"), int(time.time()))
        return self._facts

    async def ranks(self) -> Sequence[RankHealth]:
        """The ranks' health; none where the gang does not answer."""
        try:
            return await self.look(self.cluster.health)
        except Exception:
            return ()

    def until(self, request: Request) -> float:
        """The request's deadline, in seconds of time.monotonic().

        Raises:
            Refusal: the client's header is no positive number.
        """
        seconds = self.limits.deadline_s
        given = request.headers.get(DEADLINE)
        if given is not None:
            try:
                wanted = float(given)
            except ValueError:
                wanted = 0.0
            if not wanted > 0:
                raise Refusal.wrong("X-Deadline-S", "seconds, more than 0", "something else")
            seconds = min(seconds, wanted)
        began: float = request.scope["state"]["began"]
        return began + seconds

    @property
    def inside(self) -> int:
        """Completions and attention calls under way: those that `drain` waits for."""
        return self.completions.inside + self.attentions.inside

    async def drain(self, seconds: float) -> None:
        """Take no more requests, wait for those inside, and end what is left after so long."""
        self.draining.on = True
        until = time.monotonic() + seconds
        while self.inside and time.monotonic() < until and not self.hurried:
            await asyncio.sleep(0.05)
        for stream in list(self.streams):
            stream.fail(Refusal(503, "the server is shutting down", code="shutting_down", retry_after=5))

    def close(self) -> None:
        for pool in (self._calls, self._looks, self._tokens):
            pool.shutdown(wait=False, cancel_futures=True)


def note(request: Request, **notes: Any) -> None:
    """Add to the request's line in the log. Never text of a prompt."""
    request.scope["state"]["notes"].update(notes)


async def no_query(request: Request) -> None:
    """For routes that have no query parameters.

    Raises:
        Refusal: there is one.
    """
    for name in request.query_params:
        raise Refusal(400, f"{name[:64]}: not a parameter of this call", param=name[:64], code="unknown_parameter")
