"""Processes: ranks started as processes of this machine: on GPUs each afresh, on CPUs forked from one that waits."""

from __future__ import annotations

from ringfa3_launch.cluster.nursery import Forked, Nursery
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.cluster.spawn import LOOPBACK, Spawned
from ringfa3_launch.rank import RankInfo

__all__ = ["Forked", "Processes", "Spawned"]


class Processes:
    """Starts ranks as processes of this machine.

    Args:
        device: what they compute on, "cpu" or "cuda".
        alone: all of the cluster's ranks are on this machine.
    """

    def __init__(self, device: str, *, alone: bool = True) -> None:
        self._forks, self._alone = device == "cpu", alone
        self._nursery: Nursery | None = None

    def start(self, info: RankInfo, settings: Settings, *, host: str = LOOPBACK) -> Spawned | Forked:
        """A new rank; it does not listen yet."""
        if not self._forks:
            return Spawned(info, settings, host=host)
        if self._nursery is not None and self._nursery.gone:
            self.close()
        if self._nursery is None:
            self._nursery = Nursery(model=settings.model is not None, alone=self._alone)
        return self._nursery.fork(info, settings, host=host)

    def close(self) -> None:
        """End what ranks are forked from."""
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None
