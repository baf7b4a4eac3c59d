"""Launcher: how the ranks of a cluster are started and ended; the only thing in which local, torchrun and Ray differ.

A launcher starts processes, each of which makes a `Worker` (`cluster.worker`) and tells where it listens. All else
goes over the cluster's own connections to the workers: joining, calls, health, the end. A gang is started and killed as
one: the cluster calls `start`, when a rank fails `kill`, and `start` again with the next attempt's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ringfa3_launch.cluster.settings import Settings


class Member(Protocol):
    """A started rank, seen from the cluster."""

    @property
    def rank(self) -> int: ...

    @property
    def host(self) -> str:
        """Where its worker listens, as this process reaches it."""
        ...

    @property
    def port(self) -> int: ...

    def ended(self) -> str | None:
        """How its process ended ("signal SIGKILL", "exit code 1"); None while it lives. Asked ten times a second."""
        ...


class Launcher(Protocol):
    """Starts and ends gangs of `world` ranks, one gang at a time. One thread calls it."""

    @property
    def world(self) -> int: ...

    def start(self, settings: Settings, attempt: int) -> Sequence[Member]:
        """Start all ranks; returns, by rank, once the worker of each listens (it has not joined the others yet).

        Args:
            settings: for every rank's Worker; with the token that its connections ask for.
            attempt: 0, 1, 2, ...: which gang of this cluster it is.

        Raises:
            ChildProcessError: a rank ended while it started; names it.
            TimeoutError: not within settings.start_timeout.
        """
        ...

    def kill(self) -> None:
        """End all ranks of the last start at once, whatever they do, and wait for it. Where none live: does nothing."""
        ...

    def close(self) -> None:
        """`kill`, and release what gangs have in common (a placement group, a port)."""
        ...
