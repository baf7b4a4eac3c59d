"""What the ranks of one group keep between calls: their agreement; per device their wire, their lane, their pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from ringfa3.agree import Agreement
from ringfa3.lane import Lane
from ringfa3.shards import lives
from ringfa3.transport.commons import Commons, HostCommons
from ringfa3.transport.cuda import CudaCommons
from ringfa3.transport.meeting import Meeting
from ringfa3.transport.party import Party
from ringfa3.transport.place import Place, places
from ringfa3.transport.pool import Pool
from ringfa3.transport.tally import Tally
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
        self._meetings: Counter[str] = Counter()  # begun, by name
        self._parties: list[Party] = []  # of the pools; their names are to last as long
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
            _announce(wire.tally)
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
            everybody = range(dist.get_world_size(self._living()))
            found = self._places[device] = places(self._meet("places", everybody, device), device)
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
            peers = [self.places(device)[rank].peer for rank in members]
            meeting = self._meet("pool", members, device)
            commons: Commons
            if device.type == "cuda":
                party = Party(meeting, _get_process_group_store(self._living()))
                commons = CudaCommons(meeting, peers, party.name, device)
                self._parties.append(party)
            else:
                commons = HostCommons(meeting, peers)
            pool = self._pools[key] = Pool(commons)
            _announce(pool.tally)
        return pool

    def settle(self) -> None:
        """Let what follows here come after all calls that were started."""
        for lane in self._lanes.values():
            lane.settle()

    def release_buffers(self) -> None:
        """Give back what the pools hold; see `Pool.give_back`. All members of every pool must call."""
        for pool in self.pools():
            pool.give_back()

    def alive(self) -> bool:
        """Whether the group still is one; see `shards.lives`."""
        group = None if self._group is None else self._group()
        return group is not None and lives(group)

    def wires(self) -> tuple[Wire, ...]:
        """Those in use, for the watch."""
        return tuple(self._wires.values())

    def pools(self) -> tuple[Pool, ...]:
        """Those in use: a watchdog asks them who is waited for."""
        return tuple(self._pools.values())

    def _meet(self, purpose: str, members: Sequence[int], device: torch.device) -> Meeting:
        """A new meeting of these ranks: numbered among those of them for this purpose, as others may be in more."""
        name = f"{purpose}/{device.type}/{'-'.join(map(str, members))}"
        self._meetings[name] += 1
        return Meeting.of(self._living(), f"{name}/{self._meetings[name]}", members, device)

    def _living(self) -> dist.ProcessGroup:
        group = None if self._group is None else self._group()
        assert group is not None  # a lone process has nobody to talk to
        return group


@contextmanager
def tallies() -> Iterator[Callable[[], Tally]]:
    """Within, the sum of what this process has moved: on groups that there are, and on those made or gone meanwhile.

    Yields:
        The sum until now; it never becomes less.
    """
    found: dict[int, Tally] = {}  # by id: one that is made now may be found twice
    _counting.append(found)
    try:
        for gang in tuple(_gangs.values()):
            made = [wire.tally for wire in gang.wires()] + [pool.tally for pool in gang.pools()]
            found |= {id(tally): tally for tally in made}
        yield lambda: sum(tuple(found.values()), Tally())
    finally:
        _counting[:] = [other for other in _counting if other is not found]


def _announce(tally: Tally) -> None:
    """A new wire's or pool's: whoever counts now keeps it, also when its group goes."""
    for found in tuple(_counting):
        found[id(tally)] = tally


_counting: list[dict[int, Tally]] = []
_gangs: WeakKeyDictionary[dist.ProcessGroup, Gang] = WeakKeyDictionary()
