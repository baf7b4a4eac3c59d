"""Hierarchical: pull inside a host, ring between hosts.

With rank (h, l) on host h: at outer step j it holds the shard of rank (h - j, l) in its shared buffer, whole as far as
this host and those further on need it. At inner step i it computes with the shard that its neighbour l - i holds, which
it fetches as `Pull` does. Meanwhile the shards of the next outer step come over the wire, rank (h - 1, l) to (h, l),
into a second shared buffer.

Backward: whoever holds a shard collects its neighbours' shares of that shard's gradient, in the order of inner steps,
and adds its own; the sum goes straight to the owner, one message an outer step, beside the next step's hops.

In each step every rank does first what others wait for (land and offer, post), then what waits for others (fetch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from ringfa3.plan import Hop, Plan
from ringfa3.transport.cargo import Cargo, Parcel, Tensors
from ringfa3.transport.commons import Queue
from ringfa3.transport.neighbours import Arrivals, Outbox, Share, Trade, Wanted
from ringfa3.transport.packing import Piece, add, room, zeros
from ringfa3.transport.place import apart, hosts_of
from ringfa3.transport.pool import SHARD, SPARE, Pool
from ringfa3.transport.route import hull, length
from ringfa3.transport.transport import KV, Shard
from ringfa3.transport.wire import Flight, Message, Wire

if TYPE_CHECKING:
    from ringfa3.gang import Gang  # which keeps what transports are made of

SHARDS, GRADIENTS = 0, 1  # kinds of message
BUFFERS = (SHARD, SPARE)  # of even and of odd outer steps


class Hierarchical:
    """Shards are fetched from neighbours, who get them over the wire; see the module.

    Args:
        pool: of this rank's host.
        wire: the group's messages.
        hosts: of every rank, its host's number, 0 ..; as many ranks on each.
        depth: as `Pull`'s.

    Raises:
        ValueError: hosts have different numbers of ranks.
    """

    def __init__(self, pool: Pool, wire: Wire, hosts: Sequence[int], *, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth: wanted at least 1, got {depth}")
        self.pool, self.wire, self.depth = pool, wire, depth
        self.hosts = by_host(hosts)

    @classmethod
    def of(
        cls,
        gang: Gang,
        device: torch.device,
        declared: Sequence[int] | None = None,
        names: tuple[str, ...] = (),
        *,
        called: str = "hierarchical",
    ) -> Hierarchical:
        """For a gang's ranks, on their hosts or on those declared. The first call waits for all ranks.

        Args:
            called: what the caller named, for errors.

        Raises:
            ValueError: hosts have different numbers of ranks, or ranks of one cannot read each other's memory.
        """
        found = gang.places(device)
        hosts = by_host(hosts_of(found) if declared is None else declared, called)
        for members in hosts:
            if reason := apart(found, members):
                raise ValueError(f"transport: wanted hosts whose ranks can read each other's memory, got: {reason}")
        rank = gang.rank
        members = next(members for members in hosts if rank in members)
        numbers = [next(h for h, others in enumerate(hosts) if r in others) for r in range(len(found))]
        return cls(gang.pool(device, members), gang.wire(device, names), numbers)

    def rotate(self, shard: Shard, plan: Plan) -> Iterator[tuple[Hop, Tensors]]:
        """See `Transport.rotate`."""
        hops = {hop.source: hop for hop in plan.hops}
        queue = self.pool.begin()
        tour = Tour(self, queue, Cargo.of(shard), plan)
        try:
            for outer in range(tour.H):
                tour.begin(outer)
                for inner in range(tour.L):
                    hop = hops.get(tour.source(outer, inner))
                    if hop is not None:
                        yield hop, tour.read(hop, outer, inner)
                        tour.done(inner)
        finally:
            tour.end()

    def rotate_backward(self, kv: KV, plan: Plan) -> HierarchicalHoming:
        """See `Transport.rotate_backward`."""
        return HierarchicalHoming(self, kv, plan)


class HierarchicalHoming:
    """See `Homing`."""

    def __init__(self, hierarchy: Hierarchical, kv: KV, plan: Plan) -> None:
        self.hierarchy, self.kv, self.plan = hierarchy, kv, plan
        self._sum: Piece | None = None  # of the gradient of the shard held here, over this host's ranks, so far
        self._total: Piece | None = None  # of our own shard's gradient, so far
        self._flight: tuple[Flight, Piece | None] | None = None  # a host's sum for our own shard, on its way

    def __iter__(self) -> Iterator[tuple[Hop, Tensors, KV]]:
        plan, kv = self.plan, self.kv
        hops = {hop.source: hop for hop in plan.hops}
        pool = self.hierarchy.pool
        queue = pool.begin()
        tour = Tour(self.hierarchy, queue, Cargo.of(kv), plan)
        trade = Trade.of(tour.shares(), pool.rank)
        outbox = Outbox(pool, queue, kv, trade, depth=self.hierarchy.depth, world=plan.world)
        first = True
        try:
            for outer in range(tour.H):
                tour.begin(outer)
                for inner in range(tour.L):
                    share = None
                    hop = hops.get(tour.source(outer, inner))
                    if hop is not None:
                        share = outbox.slot() if inner else room(kv, hop.keys, gradient=plan.world)
                        if not first:
                            share.data.zero_()
                        first = False
                        yield hop, tour.read(hop, outer, inner), share.read(hop.keys)
                        tour.done(inner)
                        if inner:
                            outbox.send()
                            share = None
                    self._sum = add(self._sum, outbox.take())  # came during this hop; after inner 0, the last of before
                    if inner == 0:
                        self._send(tour, outer - 1)
                        self._sum = share
                    outbox.fetch(outer * tour.L + inner)  # comes during the next one
            self._sum = add(self._sum, outbox.take())
            self._send(tour, tour.H - 1)
            self._land()
        finally:
            tour.end(outbox.beside)

    def home(self) -> KV:
        """See `Homing.home`."""
        keys = slice(0, self.plan.kv_lengths[self.plan.rank])
        if self._total is None or self._total.keys != keys:
            self._total = add(zeros(self.kv, keys, gradient=self.plan.world), self._total)
        assert self._total is not None
        return self._total.read(keys)

    def _send(self, tour: Tour, outer: int) -> None:
        """The sum of an outer step goes to its owner; that of the owner's shard from as far off comes here."""
        if outer < 0:
            return
        if outer == 0:
            self._total = self._sum
            return
        self._land()
        wire, messages, coming = self.hierarchy.wire, [], None
        if self._sum is not None:
            messages.append(Message(tour.source(outer, 0), self._sum.data, send=True, kind=GRADIENTS))
        keys = tour.collected(outer)
        if keys is not None:
            coming = room(self.kv, keys, gradient=self.plan.world)
            messages.append(Message(tour.reader(outer), coming.data, send=False, kind=GRADIENTS))
        self._flight = wire.post(messages, outer * tour.L, wire.mark()), coming

    def _land(self) -> None:
        """Add what the last message brought."""
        if self._flight is not None:
            flight, coming = self._flight
            flight.land()
            self._total = add(self._total, coming)
            self._flight = None


class Tour:
    """One call's shards on their way round the hosts, as rank (h, l) of (H, L) sees them."""

    def __init__(self, hierarchy: Hierarchical, queue: Queue, cargo: Cargo, plan: Plan) -> None:
        self.pool, self.wire, self.depth = hierarchy.pool, hierarchy.wire, hierarchy.depth
        self.queue, self.cargo, self.plan, self.hosts = queue, cargo, plan, hierarchy.hosts
        self.H, self.L = len(self.hosts), len(self.hosts[0])
        self.h = next(h for h, members in enumerate(self.hosts) if plan.rank in members)
        self.l = self.hosts[self.h].index(plan.rank)
        self._spans = _spans.setdefault(plan, {}).setdefault(tuple(map(tuple, self.hosts)), {})
        spans = [self.span(rank, outer) for rank in range(plan.world) for outer in range(self.H)]
        size = max(map(cargo.size, spans)) * cargo.dtype.itemsize
        for channel in BUFFERS[: self.H] if size else ():
            self.pool.buffers(channel, size)  # one size for both: nothing says which outer steps are the largest
        self._flight: Flight | None = None
        self._arrivals: Arrivals | None = None
        self._held: Parcel | None = None  # the shard of this outer step

    def source(self, outer: int, inner: int) -> int:
        """Whose shard this rank computes with."""
        return self.hosts[(self.h - outer) % self.H][(self.l - inner) % self.L]

    def reader(self, outer: int) -> int:
        """Who holds our shard at this outer step."""
        return self.hosts[(self.h + outer) % self.H][self.l]

    def span(self, rank: int, outer: int) -> slice | None:
        """What of a rank's shard reaches the host this many steps on: what is needed there and further on."""
        if (rank, outer) not in self._spans:
            home = next(h for h, members in enumerate(self.hosts) if rank in members)
            hosts = [self.hosts[(home + step) % self.H] for step in range(outer, self.H)]
            needs = (self.plan.needs[reader][rank] for members in hosts for reader in members if reader != rank)
            self._spans[rank, outer] = hull(needs)
        return self._spans[rank, outer]

    def collected(self, outer: int) -> slice | None:
        """What of our shard the host this many steps on needs, and so has a gradient for."""
        return hull(self.plan.needs[reader][self.plan.rank] for reader in self.hosts[(self.h + outer) % self.H])

    def shares(self) -> list[list[Share]]:
        """What every rank of this host computes for its neighbours."""
        made: list[list[Share]] = []
        for l in range(self.L):
            needs, mine = self.plan.needs[self.hosts[self.h][l]], []
            for outer in range(self.H):
                for inner in range(1, self.L):
                    holder = (l - inner) % self.L
                    keys = needs[self.hosts[(self.h - outer) % self.H][holder]]
                    if keys is not None and length(keys):
                        mine.append(Share(outer * self.L + inner, holder, keys))
            made.append(mine)
        return made

    def begin(self, outer: int) -> None:
        """The shards of this step are here, or on their way from neighbours; those of the next are under way."""
        owner, channel = self.source(outer, 0), BUFFERS[outer % 2]
        self._held = self._room(self.l, owner, outer)
        if self._flight is not None:
            self._flight.land()
        elif self._held is not None:
            self.pool.vacate(self.queue, channel, 0)
            self.cargo.pack_into(self._held)
        if self._held is not None:
            self.pool.offer(self.queue, channel, self._readers(owner))
        self._flight = self._pass_on(outer)
        wanted = []
        for inner in range(1, self.L):
            holder, source = (self.l - inner) % self.L, self.source(outer, inner)
            keys, there = self.plan.needs[self.plan.rank][source], self._room(holder, source, outer)
            if keys is not None and length(keys) and there is not None:
                wanted.append(Wanted(channel, holder, outer * self.L + inner, keys, there))
        self._arrivals = Arrivals(self.pool, self.queue, self.cargo, wanted, self.depth)

    def read(self, hop: Hop, outer: int, inner: int) -> Tensors:
        """The hop's tensors, for what is given to the caller's queue until `done`."""
        if (outer, inner) == (0, 0):
            return self.cargo.read(hop.keys)
        held = self._held
        if inner:
            assert self._arrivals is not None
            held = self._arrivals.take()
        assert held is not None
        return held.read(hop.keys)

    def done(self, inner: int) -> None:
        """The hop has been given to the caller's queue."""
        if inner and self._arrivals is not None:
            self._arrivals.done()

    def end(self, *beside: Queue) -> None:
        """Nothing more comes."""
        self.wire.settle()
        arrivals = () if self._arrivals is None else (self._arrivals.beside,)
        self.pool.end(self.queue, *arrivals, *beside)

    def _pass_on(self, outer: int) -> Flight:
        """Send what the next host needs of the shard held here, and let the next one come."""
        messages = []
        if outer + 1 < self.H:
            keys = self.span(self.source(outer, 0), outer + 1)
            if keys is not None:
                assert self._held is not None  # whoever gets a shard after us gets it from us
                messages.append(Message(self.reader(1), self._held.cut(keys).data, send=True, kind=SHARDS))
            coming = self._room(self.l, self.source(outer + 1, 0), outer + 1)
            if coming is not None:
                messages.append(Message(self.source(1, 0), coming.data, send=False, kind=SHARDS))
        if not messages:
            return self.wire.post((), outer * self.L)
        keeper = self.pool.beside(3, self.queue)
        self.pool.vacate(keeper, BUFFERS[(outer + 1) % 2], outer * self.L)
        return self.wire.post(messages, outer * self.L, keeper.mark())

    def _room(self, holder: int, owner: int, outer: int) -> Parcel | None:
        """Where a rank of this host holds that shard at this outer step."""
        keys = self.span(owner, outer)
        return None if keys is None else self.pool.parcel(BUFFERS[outer % 2], holder, self.cargo, keys)

    def _readers(self, owner: int) -> list[int]:
        """Which neighbours need this shard."""
        needs = self.plan.needs
        neighbours = enumerate(self.hosts[self.h])
        return [
            l for l, rank in neighbours if l != self.l and (keys := needs[rank][owner]) is not None and length(keys)
        ]


# of a plan and hosts, what `Tour.span` found; kept as long as the plan
_spans: WeakKeyDictionary[Plan, dict[tuple[tuple[int, ...], ...], dict[tuple[int, int], slice | None]]] = (
    WeakKeyDictionary()
)


def by_host(hosts: Sequence[int], called: str = "hierarchical") -> list[list[int]]:
    """Every host's ranks, in order.

    Raises:
        ValueError: they are not equally many.
    """
    members = [[rank for rank, h in enumerate(hosts) if h == host] for host in sorted(set(hosts))]
    if len({len(ranks) for ranks in members}) > 1:
        *counts, last = (str(len(ranks)) for ranks in members)
        got = f"{', '.join(counts)} and {last}"
        raise ValueError(f"transport: wanted the same number of ranks on every host for {called!r}, got {got}")
    return members
