"""What the ranks of one group keep between calls: their agreement; per device their wire, their lane, their pools."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from ringfa3.agree import Agreement
from ringfa3.lane import Lane
from ringfa3.transport.commons import Commons, HostCommons
from ringfa3.transport.cuda import CudaCommons
from ringfa3.transport.meeting import Meeting
from ringfa3.transport.place import Place, places
from ringfa3.transport.pool import Pool
from ringfa3.transport.wire import Wire
from ringfa3.watch import Watch


class Gang:
    """State of one process group, or of a lone process (group None). Made on first use, gone with the group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = None if group is None else ref(group)  # weak: the group is the key under which this is kept
        self._agreement: Agreement | None = None
        self._calls = 0
        self._wires: dict[torch.device, Wire] = {}
        self._lanes: dict[torch.device, Lane] = {}
        self._places: dict[torch.device, tuple[Place, ...]] = {}
        self._pools: dict[tuple[torch.device, tuple[int, ...]], Pool] = {}
        self._watches: WeakKeyDictionary[Agreement, Watch] = WeakKeyDictionary()

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
            self._agreement = Agreement(self._living())
        return self._agreement

    def watch(self, agreement: Agreement) -> Watch:
        """The watch over this group's ranks, as members of this agreement; made on first use, gone with either."""
        watch = self._watches.get(agreement)
        if watch is None:
            watch = self._watches[agreement] = Watch(agreement)
        return watch

    def number(self) -> int:
        """Of the next call: the same on every rank, as long as all make the same calls."""
        self._calls += 1
        return self._calls

    @property
    def rank(self) -> int:
        """This process's, in the group."""
        return 0 if self._group is None else dist.get_rank(self._living())

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

    def places(self, device: torch.device) -> tuple[Place, ...]:
        """Where the ranks are. The first call waits for all of them."""
        found = self._places.get(device)
        if found is None:
            group = self._living()
            name = f"places/{device.type}/{len(self._places)}"
            meeting = Meeting.of(group, name, range(dist.get_world_size(group)), device)
            found = self._places[device] = places(meeting, device)
        return found

    def pool(self, device: torch.device, members: Sequence[int]) -> Pool:
        """The memory that these ranks of the group share, for tensors on this device; see `Place.apart` for who can.

        The first call waits for the members.

        Raises:
            MemoryError: some member could not map it.
        """
        key = device, tuple(members)
        pool = self._pools.get(key)
        if pool is None:
            group = self._living()
            name = f"pool/{device.type}/{len(self._pools)}/{'-'.join(map(str, members))}"
            meeting = Meeting.of(group, name, members, device)
            peers = [self.places(device)[rank].peer for rank in members]
            commons: Commons
            if device.type == "cuda":
                commons = CudaCommons(meeting, peers, _of_members(group, members), device)
            else:
                commons = HostCommons(meeting, peers)
            pool = self._pools[key] = Pool(commons)
        return pool

    def alive(self) -> bool:
        """Whether the group still is one: it may be destroyed and yet be held on to."""
        group = None if self._group is None else self._group()
        try:
            return group is not None and bool(dist.get_process_group_ranks(group))
        except (KeyError, ValueError):
            return False

    def wires(self) -> tuple[Wire, ...]:
        """Those in use, for the watch."""
        return tuple(self._wires.values())

    def pools(self) -> tuple[Pool, ...]:
        """Those in use: a watchdog asks them who is waited for."""
        return tuple(self._pools.values())

    def _living(self) -> dist.ProcessGroup:
        group = None if self._group is None else self._group()
        assert group is not None  # a lone process has nobody to talk to
        return group


def gangs() -> tuple[Gang, ...]:
    """Those of all living groups that this process has made calls in."""
    return tuple(_gangs.values())


def _of_members(group: dist.ProcessGroup, members: Sequence[int]) -> str:
    """Name of a group of these ranks of the group alone, over which symmetric memory can meet; made by them alone."""
    if len(members) in (1, dist.get_world_size(group)):  # who is alone meets nobody
        return str(group.group_name)
    ranks = [dist.get_global_rank(group, rank) for rank in members]
    made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return str(made.group_name)


_gangs: WeakKeyDictionary[dist.ProcessGroup, Gang] = WeakKeyDictionary()
