"""A meeting: some ranks of a group tell each other small things through the group's store, round by round.

For what happens once in a while: making buffers, finding out where everybody is. A round is also a barrier.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import _get_process_group_store

from ringfa3.board import Peer, await_keys
from ringfa3.errors import RankFailed


class Meeting:
    """Rounds of exchanges between the members, who all take part in each, in the same order.

    Args:
        store: the group's own.
        name: of this meeting; no other of the group has it.
        members: ranks of the group.
        rank: this one, a member.
        timeout: seconds that a round waits for the last member.
    """

    def __init__(self, store: Store, name: str, members: Sequence[int], rank: int, timeout: float) -> None:
        self.members, self.rank, self.timeout = tuple(members), rank, timeout
        self.awaited: int | None = None  # member that a round waits for now: for a watchdog
        self.failure: RankFailed | None = None  # a watchdog's: ends the round that waits, and those to come
        self._store, self._name, self._round = store, name, 0

    @classmethod
    def of(cls, group: dist.ProcessGroup, name: str, members: Sequence[int], device: torch.device) -> Meeting:
        """A meeting of ranks of this group, with its timeout."""
        return cls(_get_process_group_store(group), name, members, dist.get_rank(group), timeout_of(group, device))

    def exchange(self, thing: Any) -> list[Any]:
        """What every member gave in this round, in the order of members; what JSON can hold.

        Raises:
            RankFailed: a member did not come within the timeout, or a watchdog has set `failure`.
        """
        self._round += 1
        prefix = f"ringfa3/{self._name}/{self._round}"
        self._store.set(f"{prefix}/{self.rank}", json.dumps(thing))
        keys = {member: f"{prefix}/{member}" for member in self.members}
        try:
            await_keys(self._store, keys, time.monotonic() + self.timeout, self.timeout, self._see)
        finally:
            self.awaited = None
        return [json.loads(self._store.get(key)) for key in keys.values()]

    def _see(self, member: int) -> None:
        self.awaited = member
        if self.failure is not None:
            raise self.failure

    def peers(self) -> tuple[Peer, ...]:
        """Who the members are. A round."""
        return tuple(Peer(**peer) for peer in self.exchange(asdict(Peer.here())))


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds after which the group's operations on such a device give up."""
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout.total_seconds()
