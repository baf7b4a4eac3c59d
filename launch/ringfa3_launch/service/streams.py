"""A completion's events, from the thread that waits for the gang into the event loop; and how it is stopped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ringfa3_launch.service.contract import Cluster, Completing, Event
from ringfa3_launch.service.errors import Refusal, refusal


class Stream:
    """One completion under way.

    Work for it goes on until it ends or `cancel` is called; whoever opens it calls `cancel` in the end, whatever
    happened. `ended` is called on the event loop once the gang works on it no more: not before is its place free.

    Args:
        cluster: does the work.
        ids: the prompt.
        sampling: a ringfa3.inference.sampling.Sampling.
        session: as the engine's.
        until: the deadline, seconds of time.monotonic().
        ended: called without arguments.

    Raises:
        RuntimeError: the process may have no thread more; `ended` is not called then.
    """

    def __init__(
        self,
        cluster: Cluster,
        ids: Sequence[int],
        sampling: Any,
        *,
        session: str | None,
        until: float,
        ended: Callable[[], None],
    ) -> None:
        self._cluster, self._call, self._ended = cluster, (ids, sampling, session), ended
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # over the two below, which both threads read and write
        self._accepted: Completing | None = None
        self._cancelled = False
        threading.Thread(target=self._work, name="completion", daemon=True).start()
        self._timer = self._loop.call_later(max(0.0, until - time.monotonic()), self.fail, TimeoutError())

    async def batch(self, patience: float) -> list[Event]:
        """The events that came since the last call, waited for as long as `patience` (seconds); none is silence.

        Raises:
            Refusal: what the gang raised or `fail` was given, after the events that came before it.
        """
        events: list[Event] = []
        if self._news.empty() and self._error is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    self._take(events, await self._news.get())
        while not self._news.empty() and self._error is None:
            self._take(events, self._news.get_nowait())
        if self._error is not None and not events:
            raise refusal(self._error) from self._error
        return events

    def _take(self, events: list[Event], item: Event | BaseException) -> None:
        if isinstance(item, BaseException):
            self._error = item
        else:
            events.append(item)

    def fail(self, error: BaseException) -> None:
        """End it with this error, from the event loop: its reader gets it after what came before."""
        self._news.put_nowait(error)
        self.cancel()

    def cancel(self) -> None:
        """Have the gang stop at its next step, if it has not ended. Does not wait for it."""
        self._timer.cancel()
        with self._lock:
            work, self._cancelled = None if self._cancelled else self._accepted, True
        if work is not None:  # it may block, as every call to the gang
            threading.Thread(target=_stop, args=(work,), name="cancel", daemon=True).start()

    def _work(self) -> None:
        """The thread: wait for events, hand them over."""
        try:
            ids, sampling, session = self._call
            work = self._cluster.complete(ids, sampling, session=session)
            with self._lock:
                self._accepted, stop = work, self._cancelled
            if stop:
                _stop(work)
            for event in work:
                self._tell(self._news.put_nowait, event)
                if event.finish is not None:
                    return
            self._tell(self._news.put_nowait, Refusal(500, "the gang ended it without a finish", code="internal_error"))
        except BaseException as error:  # whatever it is, somebody waits for it in the other thread
            self._tell(self._news.put_nowait, error)
        finally:
            with self._lock:
                self._accepted, self._cancelled = None, True
            self._tell(self._ended)

    def _tell(self, fn: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(fn, *args)
        except RuntimeError:  # the loop has ended: nobody waits
            return


def _stop(work: Completing) -> None:
    with suppress(Exception):  # a gang that failed works on nothing; its streams say why
        work.cancel()


async def departure(receive: Callable[[], Any]) -> None:
    """Return when the client has gone, its request having been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
