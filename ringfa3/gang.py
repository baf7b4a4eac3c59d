"""What the ranks of one group keep between calls: their agreement, and per device their wire and their lane."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from ringfa3.agree import Agreement
from ringfa3.lane import Lane
from ringfa3.transport.wire import Wire


class Gang:
    """State of one process group, or of a lone process (group None). Made on first use, gone with the group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = None if group is None else ref(group)  # weak: the group is the key under which this is kept
        self._agreement: Agreement | None = None
        self._calls = 0
        self._wires: dict[torch.device, Wire] = {}
        self._lanes: dict[torch.device, Lane] = {}

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Gang:
        """The state kept for this group (None: the default one); a lone process has nothing to keep."""
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is None:
            return cls(None)
        gang = _gangs.get(group)
        if gang is None:
            gang = _gangs[group] = cls(group)
        return gang

    def agreement(self) -> Agreement:
        """The group's agreement, with the default timeout. The first call waits for all ranks.

        Raises:
            RankFailed: a rank did not come.
        """
        if self._agreement is None:
            group = None if self._group is None else self._group()
            assert group is not None  # a lone process has nobody to agree with
            self._agreement = Agreement(group)
        return self._agreement

    def number(self) -> int:
        """Of the next call: the same on every rank, as long as all make the same calls."""
        self._calls += 1
        return self._calls

    def wire(self, device: torch.device, hosts: tuple[str, ...] = ()) -> Wire:
        """The group's messages between tensors on this device. On CUDA the first call waits for all ranks."""
        wire = self._wires.get(device)
        if wire is None:
            wire = self._wires[device] = Wire(self._group, device, hosts)
        return wire

    def lane(self, device: torch.device) -> Lane:
        """Where calls on this device run one after another."""
        lane = self._lanes.get(device)
        if lane is None:
            lane = self._lanes[device] = Lane(device)
        return lane


_gangs: WeakKeyDictionary[dist.ProcessGroup, Gang] = WeakKeyDictionary()
