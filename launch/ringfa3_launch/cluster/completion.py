"""Completion: a request to the engine of a cluster, as an iterator of its events; and what travels for it."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ringfa3_launch.cluster.callers import Stream
from ringfa3_launch.cluster.faults import Overloaded
from ringfa3_launch.cluster.gang import Gang

if TYPE_CHECKING:
    from ringfa3.inference.events import Event


REQUESTS = 1 << 40  # of one gang, whose engine counts from 1; a cluster's numbers never come twice


def cancel(gang: Gang, request: int) -> None:
    """Let this gang's leader end a request, if it is one of this gang's."""
    attempt, number = divmod(request, REQUESTS)
    if attempt == gang.attempt:
        gang.tell(0, {"do": "cancel", "request": number})


class Completion(Iterator[Any]):
    """The events of one request, as they come. Made by `RingCluster.complete`, when the engine has taken it.

    Args:
        gang: whose leader is asked.
        prompt: text, or token ids.
        sampling: a Sampling; None: its defaults.
        session: name of a conversation, or None.
    """

    def __init__(self, gang: Gang, prompt: str | Sequence[int], sampling: Any, *, session: str | None) -> None:
        from ringfa3.inference.sampling import Sampling

        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling: wanted a Sampling, got {type(sampling).__name__}")
        ids = None if isinstance(prompt, str) else [int(token) for token in prompt]
        header = {
            "do": "complete", "text": prompt if ids is None else None, "ids": ids, "session": session,
            "sampling": dataclasses.asdict(sampling),
        }  # fmt: skip
        self._events: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        self._over = False
        self._gang = gang
        self._number = gang.stream(header, Stream(self._events.put, self._events.put))
        accepted = self._events.get()
        if isinstance(accepted, Exception):
            self._over = True
            raise accepted
        error = accepted.get("error")
        if error is not None:
            self._finish()
            raise (Overloaded if error.get("kind") == "overloaded" else ValueError)(str(error.get("message")))
        self.request = gang.attempt * REQUESTS + int(accepted["request"])
        self.prompt_tokens = int(accepted["prompt_tokens"])

    def __next__(self) -> Event:
        """The next event.

        Raises:
            StopIteration: the last one, with its `finish`, has been.
            RankFailed: the ranks failed; the request is lost and may be made again.
        """
        if self._over:
            raise StopIteration
        answer = self._events.get()
        if isinstance(answer, Exception):
            self._over = True
            raise answer
        from ringfa3.inference.events import Event

        event = Event(**{**answer["event"], "request": self.request})
        if event.finish is not None:
            self._finish()
        return event

    def cancel(self) -> None:
        """End it at the next step; the event that says so still comes. Any thread; again: does nothing."""
        if not self._over:
            cancel(self._gang, self.request)

    def close(self) -> None:
        """`cancel`, and hear no more of it."""
        if not self._over:
            self.cancel()
            self._finish()

    def __enter__(self) -> Completion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            self.close()

    def _finish(self) -> None:
        self._over = True
        self._gang.forget(self._number)
