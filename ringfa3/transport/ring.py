"""Ring: every rank passes shards to the next one, and the gradients of a shard follow it until they go home.

Forward, round t: rank r sends on the shard of rank r - t and receives that of r - t - 1, while step t computes with the
former. Only what a later rank on the ring needs travels, all of a shard's tensors in one message.

Backward, round t: besides the shard for step t + 1, the fp32 sum of dK, dV finished in step t - 1 is sent on, and the
previous rank's sum for the shard of step t arrives while step t computes our own share of it. The last rank that needs
a shard sends the sum straight to the owner, who has kept its own share. Every message has its other end in the same
round, so rounds complete in order and nothing can deadlock, whatever the world's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from ringfa3.plan import Hop, Plan
from ringfa3.transport.cargo import Cargo, Parcel, Tensors
from ringfa3.transport.packing import Piece, add, room, zeros
from ringfa3.transport.route import Needs, inbound, last, outbound
from ringfa3.transport.transport import KV, Shard
from ringfa3.transport.wire import Message, Wire

SHARD, GRADIENT = 0, 1  # kinds of message


class Ring:
    """Shards travel from neighbour to neighbour; see the module.

    Args:
        wire: the group's messages.
        buffers: pieces of a shard held at a time by a forward pass: the one computed with, the one arriving, and (3)
            one more, so that a message need not wait for the kernel before the one it runs beside.
    """

    def __init__(self, wire: Wire, *, buffers: int = 3) -> None:
        if buffers < 2:
            raise ValueError(f"buffers: wanted at least 2, one to read and one to fill, got {buffers}")
        self.wire, self.buffers = wire, buffers

    def rotate(self, shard: Shard, plan: Plan) -> Iterator[tuple[Hop, Tensors]]:
        """See `Transport.rotate`."""
        hops = {hop.source: hop for hop in plan.hops}
        cargo, leg = Cargo.of(shard), _Leg.of(plan)
        arriving = leg.arrives[1 : plan.world + 1]
        slots = self._slots(cargo, [leg.leaves[0], *arriving])
        held = leg.own(cargo, slots[0])
        free = [self.wire.mark()] * self.buffers  # of each slot, when its last reader is done
        try:
            for step, keys in enumerate(arriving):
                slot = (step + 1) % self.buffers
                coming = None if keys is None else cargo.room(keys, slots[slot])
                flight = self.wire.post(leg.pass_on(self.wire, step, held, coming), step, free[slot])
                if (hop := hops.get(leg.source(step))) is not None:
                    yield hop, _read(hop, cargo, held, own=step == 0)
                free[step % self.buffers] = self.wire.mark()
                flight.land()
                held = coming
        finally:
            self.wire.settle()

    def rotate_backward(self, kv: KV, plan: Plan) -> RingHoming:
        """See `Transport.rotate_backward`."""
        return RingHoming(self.wire, kv, plan)

    def _slots(self, cargo: Cargo, parcels: list[slice | None]) -> list[torch.Tensor]:
        """Flat buffers that the parcels take in turn, each as large as the largest it will hold."""
        sizes = [max(map(cargo.size, parcels[slot :: self.buffers]), default=0) for slot in range(self.buffers)]
        return [torch.empty(size, dtype=cargo.dtype, device=cargo.device) for size in sizes]


class RingHoming:
    """See `Homing`. Buffers come from the compute stream's allocator, and every round starts after it: see `Wire`."""

    def __init__(self, wire: Wire, kv: KV, plan: Plan) -> None:
        self.wire, self.kv, self.plan, self._leg = wire, kv, plan, _Leg.of(plan)
        self._sum: Piece | None = None  # of the previous step's shard, without its owner's share: to be sent on
        self._own: list[Piece] = []  # this rank's and the others' shares of its own shard's gradient

    def __iter__(self) -> Iterator[tuple[Hop, Tensors, KV]]:
        hops = {hop.source: hop for hop in self.plan.hops}
        cargo = Cargo.of(self.kv)
        held = self._leg.own(cargo)
        first = True
        try:
            for step in range(self.plan.world + (self.plan.world > 1)):
                keys = self._leg.arrives[step + 1]
                coming = None if keys is None else cargo.room(keys)
                messages = self._leg.pass_on(self.wire, step, held, coming)
                arriving = self._gradients(messages, step)
                flight = self.wire.post(messages, step, self.wire.mark())
                share = None
                hop = hops.get(self._leg.source(step)) if step < self.plan.world else None
                if hop is not None:
                    share = (room if first else zeros)(self.kv, hop.keys, gradient=self.plan.world)
                    first = False
                    yield hop, _read(hop, cargo, held, own=step == 0), share.read(hop.keys)
                flight.land()
                if step == 0:
                    self._own += [share] if share is not None else []
                else:
                    self._sum = self._summed(share, arriving, step)
                held = coming
        finally:
            self.wire.settle()

    def home(self) -> KV:
        """See `Homing.home`."""
        keys = slice(0, self.plan.kv_lengths[self.plan.rank])
        total: Piece | None = None
        for share in self._own:
            total = add(total, share)
        if total is None or total.keys != keys:
            total = add(zeros(self.kv, keys, gradient=self.plan.world), total)
        assert total is not None
        return total.read(keys)

    def _summed(self, share: Piece | None, arriving: Piece | None, step: int) -> Piece | None:
        """What goes on after this step: as wide as the next rank expects, which knows needs but not our hops."""
        source = self._leg.source(step)
        if step >= self.plan.world or step > self._leg.last[source]:
            return None
        keys = self._leg.summed(source, step)
        total = add(share, arriving)
        if keys is not None and (total is None or total.keys != keys):
            total = add(zeros(self.kv, keys, gradient=self.plan.world), total)
        return total

    def _gradients(self, messages: list[Message], step: int) -> Piece | None:
        """Add this round's messages with gradients; returns what will arrive for the shard of this step."""
        leg, rank, world = self._leg, self.plan.rank, self.plan.world
        if self._sum is not None:  # finished in the step before
            owner = leg.source(step - 1)
            home = step - 1 == leg.last[owner]
            messages.append(Message(owner if home else (rank + 1) % world, self._sum.data, send=True, kind=GRADIENT))
        arriving = None
        if 0 < step < world:
            source = leg.source(step)
            keys = leg.summed(source, step - 1)
            if keys is not None and step - 1 < leg.last[source]:
                arriving = room(self.kv, keys, gradient=world)
                messages.append(Message((rank - 1) % world, arriving.data, send=False, kind=GRADIENT))
        if step > 1 and step - 1 == leg.last[rank]:
            keys = leg.summed(rank, step - 1)
            assert keys is not None
            self._own.append(room(self.kv, keys, gradient=world))
            messages.append(Message((rank + step - 1) % world, self._own[-1].data, send=False, kind=GRADIENT))
        return arriving


@dataclass(frozen=True, eq=False)
class _Leg:
    """Which slices a rank passes on, step by step; worked out once a plan, and kept as long as it.

    Args:
        arrives: what came of the shard that is here, at steps 0 .. world + 1, the last two of which have none.
        leaves: what of it the next rank gets.
        last: by source; see `route.last`.
    """

    needs: Needs
    rank: int
    world: int
    arrives: tuple[slice | None, ...]
    leaves: tuple[slice | None, ...]
    last: tuple[int, ...]
    _sums: dict[tuple[int, int], slice | None] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> _Leg:
        """That of this plan's rank."""
        found = _legs.get(plan)
        if found is None:
            needs, rank, world = plan.needs, plan.rank, plan.world
            steps = [((rank - step) % world, step) for step in range(world + 2)]
            found = _legs[plan] = cls(
                needs,
                rank,
                world,
                tuple(outbound(needs, source, step) for source, step in steps),
                tuple(outbound(needs, source, step + 1) for source, step in steps),
                tuple(last(needs, source) for source in range(world)),
            )
        return found

    def source(self, step: int) -> int:
        """Whose shard is here at this step."""
        return (self.rank - step) % self.world

    def summed(self, source: int, step: int) -> slice | None:
        """Of the gradient of a shard, what has a sum when so many steps are done; see `route.inbound`."""
        if (source, step) not in self._sums:
            self._sums[source, step] = inbound(self.needs, source, step)
        return self._sums[source, step]

    def own(self, cargo: Cargo, out: torch.Tensor | None = None) -> Parcel | None:
        """What the others need of this rank's shard, packed."""
        keys = self.leaves[0]
        return None if keys is None else cargo.pack(keys, out)

    def pass_on(self, wire: Wire, step: int, held: Parcel | None, coming: Parcel | None) -> list[Message]:
        """The messages with shards of one round."""
        messages = []
        keys = self.leaves[step]
        if keys is not None:
            assert held is not None  # whoever gets a shard after us gets it from us
            if keys != held.keys:
                with wire.beside():  # a narrower slice is copied on the messages' stream
                    held = held.cut(keys)
            messages.append(Message((self.rank + 1) % self.world, held.data, send=True))
        if coming is not None:
            messages.append(Message((self.rank - 1) % self.world, coming.data, send=False))
        return messages


_legs: WeakKeyDictionary[Plan, _Leg] = WeakKeyDictionary()


def _read(hop: Hop, cargo: Cargo, held: Parcel | None, *, own: bool) -> Tensors:
    """The slice of its source's shard that a hop needs."""
    if own:
        return cargo.read(hop.keys)
    assert held is not None
    return held.read(hop.keys)
