"""Pull: every rank reads what it needs of a shard from its owner, over NVLink with the copy engine; for one host.

Forward: each rank stages what others need of its shard in its shared buffer (a copy, queued before the first hop's
kernel) and offers it to them. Beside the hops, a queue of our own fetches slice after slice into a few landing
buffers, up to `depth` hops ahead; a hop waits for its own slice alone. No hop waits for another rank's hop.

Backward: the shards come the same way. A rank's share of another's gradient is computed right into its shared outbox
(`depth` slots in turn) and offered to the owner, who fetches it during the next hop and adds it after that hop, in the
order of steps: sums do not depend on timing. The rank's own shard comes last, so that the last share travels beside it.

At step t rank r computes with shard r - t, so owner s gets a share from rank s + t. Every rank gives its queues in each
step first what others wait for, then what waits for others: no cycle, even if all queues were one. Memory O(S / W).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ringfa3.plan import Hop, Plan
from ringfa3.transport.cargo import Cargo, Tensors
from ringfa3.transport.commons import Queue
from ringfa3.transport.neighbours import Arrivals, Outbox, Share, Trade, Wanted
from ringfa3.transport.packing import Piece, add, room, zeros
from ringfa3.transport.pool import SHARD, Pool
from ringfa3.transport.route import hull, length
from ringfa3.transport.transport import KV, Shard

DEPTH = 2


class Pull:
    """Shards are read from their owners' memory; see the module.

    Args:
        pool: of all ranks of the group, in its order.
        depth: landing buffers, among them that of the slice a hop computes with; and slots of the outbox.
    """

    def __init__(self, pool: Pool, *, depth: int = DEPTH) -> None:
        if depth < 1:
            raise ValueError(f"depth: wanted at least 1, got {depth}")
        self.pool, self.depth = pool, depth

    def rotate(self, shard: Shard, plan: Plan) -> Iterator[tuple[Hop, Tensors]]:
        """See `Transport.rotate`."""
        cargo, queue = Cargo.of(shard), self.pool.begin()
        arrivals = self.stage(queue, cargo, plan, range(plan.world))
        try:
            for hop in plan.hops:
                if hop.source == plan.rank:
                    yield hop, cargo.read(hop.keys)
                else:
                    yield hop, arrivals.take().read(hop.keys)
                    arrivals.done()
        finally:
            self.pool.end(queue, arrivals.beside)

    def rotate_backward(self, kv: KV, plan: Plan) -> PullHoming:
        """See `Transport.rotate_backward`."""
        return PullHoming(self, kv, plan)

    def stage(self, queue: Queue, cargo: Cargo, plan: Plan, steps: Sequence[int]) -> Arrivals:
        """Offer our shard to those who need it, and begin to fetch what we need, in the order of these steps."""
        pool, rank, routes = self.pool, plan.rank, Routes.of(plan)
        size = max(map(cargo.size, routes.offered)) * cargo.dtype.itemsize
        if size:
            pool.buffers(SHARD, size)
        keys = routes.offered[rank]
        if keys is not None:
            pool.vacate(queue, SHARD, 0)
            cargo.pack_into(pool.parcel(SHARD, rank, cargo, keys))
            pool.offer(queue, SHARD, routes.readers)
        wanted = []
        for step in steps:
            owner = (rank - step) % plan.world
            needed, whole = routes.wanted[owner], routes.offered[owner]
            if needed is not None and whole is not None:
                wanted.append(Wanted(SHARD, owner, step, needed, pool.parcel(SHARD, owner, cargo, whole)))
        return Arrivals(pool, queue, cargo, wanted, self.depth)


class PullHoming:
    """See `Homing`."""

    def __init__(self, pull: Pull, kv: KV, plan: Plan) -> None:
        self.pull, self.kv, self.plan = pull, kv, plan
        self._total: Piece | None = None  # of our own shard's gradient, so far

    def __iter__(self) -> Iterator[tuple[Hop, Tensors, KV]]:
        plan, kv, rank, world = self.plan, self.kv, self.plan.rank, self.plan.world
        pool = self.pull.pool
        hops = {(rank - hop.source) % world: hop for hop in plan.hops}
        steps = [*range(1, world), 0]
        queue = pool.begin()
        cargo = Cargo.of(kv)
        arrivals = self.pull.stage(queue, cargo, plan, steps)
        outbox = Outbox(pool, queue, kv, Routes.of(plan).trade, depth=self.pull.depth, world=world)
        first = True
        try:
            for step in steps:
                hop = hops.get(step)
                if hop is not None:
                    if step:
                        came = arrivals.take().read(hop.keys)
                        share = outbox.slot()
                    else:
                        came = cargo.read(hop.keys)
                        share = room(kv, hop.keys, gradient=world)
                    if not first:
                        share.data.zero_()
                    first = False
                    yield hop, came, share.read(hop.keys)
                    if step:
                        arrivals.done()
                        outbox.send()
                    else:
                        self._total = add(self._total, share)
                self._total = add(self._total, outbox.take())  # came during this hop
                outbox.fetch(step)  # comes during the next one
            self._total = add(self._total, outbox.take())
        finally:
            pool.end(queue, arrivals.beside, outbox.beside)

    def home(self) -> KV:
        """See `Homing.home`."""
        keys = slice(0, self.plan.kv_lengths[self.plan.rank])
        if self._total is None or self._total.keys != keys:
            self._total = add(zeros(self.kv, keys, gradient=self.plan.world), self._total)
        assert self._total is not None
        return self._total.read(keys)


@dataclass(frozen=True, eq=False)
class Routes:
    """Who fetches what from whom under a plan; worked out once, and kept as long as the plan.

    Args:
        offered: of every rank's shard, what others need; None where nothing.
        wanted: of every other rank's shard, what this rank needs.
        readers: who needs something of this rank's.
        trade: what ranks compute for the owners of the others' shards.
    """

    offered: tuple[slice | None, ...]
    wanted: tuple[slice | None, ...]
    readers: tuple[int, ...]
    trade: Trade

    @classmethod
    def of(cls, plan: Plan) -> Routes:
        """Those of this plan."""
        found = _known.get(plan)
        if found is None:
            ranks = range(plan.world)
            found = _known[plan] = cls(
                tuple(hull(_needed(plan, reader, owner) for reader in ranks) for owner in ranks),
                tuple(_needed(plan, plan.rank, owner) for owner in ranks),
                tuple(reader for reader in ranks if _needed(plan, reader, plan.rank) is not None),
                Trade.of(_shares(plan), plan.rank),
            )
        return found


_known: WeakKeyDictionary[Plan, Routes] = WeakKeyDictionary()


def _shares(plan: Plan) -> list[list[Share]]:
    """What every rank computes for the owners of the others' shards."""
    world = plan.world
    return [
        [
            Share(step, owner, keys)
            for step in range(1, world)
            if (keys := _needed(plan, rank, owner := (rank - step) % world)) is not None
        ]
        for rank in range(world)
    ]


def _needed(plan: Plan, reader: int, owner: int) -> slice | None:
    """What one rank has to fetch of another's shard; None where nothing."""
    keys = plan.needs[reader][owner]
    return keys if reader != owner and length(keys) else None
