"""Callers: who waits, in this process, for what ranks answer: one answer of each, or many of the leader."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ringfa3_launch.cluster.channel import Message
from ringfa3_launch.cluster.faults import Overloaded, SessionLost


class Waiting:
    """A caller that waits for answers of ranks.

    Attributes:
        held: ranks that keep their part of the call until its turn.
        answers: by rank.
    """

    def __init__(self, world: int) -> None:
        self.held: set[int] = set()
        self.answers: dict[int, Message] = {}
        self._world = world
        self._changed = threading.Condition()
        self._failure: Exception | None = None

    def arrived(self, rank: int, message: Message) -> None:
        """From a link's thread: what a rank says."""
        with self._changed:
            if message.header.get("held"):
                self.held.add(rank)
            else:
                self.answers[rank] = message
            self._changed.notify_all()

    def failed(self, error: Exception) -> None:
        """There will be no more answers."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def until(self, done: Callable[[], bool], deadline: float | None) -> None:
        """Wait until done().

        Raises:
            Exception: what it was told in `failed`.
            TimeoutError: not by the deadline (of the monotonic clock).
        """
        with self._changed:
            while not done():
                if self._failure is not None:
                    raise self._failure
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the ranks did not answer in time")
                self._changed.wait(left)

    def raise_refusal(self) -> None:
        """Raise why ranks refused the call, if one did; where others only follow it, what the first says."""
        refusals = [
            (rank, said.header["error"]) for rank, said in sorted(self.answers.items()) if said.header.get("error")
        ]
        if not refusals:
            return
        rank, error = next((each for each in refusals if each[1].get("kind") != "skipped"), refusals[0])
        kind, message = error.get("kind"), str(error.get("message"))
        if kind == "wrong":
            raise ValueError(message)
        if kind == "overloaded":
            raise Overloaded(f"rank {rank}: {message}")
        if kind == "gone":
            raise SessionLost(message)
        raise RuntimeError(f"rank {rank} of {self._world}: {message}")


class Stream:
    """Who hears of a completion: `event` with each message's header, `failed` once if the gang fails."""

    def __init__(self, event: Callable[[dict[str, Any]], None], failed: Callable[[Exception], None]) -> None:
        self._event, self.failed = event, failed

    def arrived(self, rank: int, message: Message) -> None:
        """From a link's thread: what the leader says."""
        self._event(message.header)
