"""Gather: one exchange brings every rank all the slices it needs, from their owners; for short sequences.

Each rank sends slices of its shard to whoever needs them (all its tensors in one message, uneven lengths as they are,
nothing padded) and then has hops to yield, its own first while the exchange is under way; shards are never
concatenated. Memory O(S). Backward: the same exchange, then each rank's fp32 dK, dV go straight to the owner, who sums
them in rank order.
"""

from __future__ import annotations

from collections.abc import Iterator

from ringfa3.plan import Hop, Plan
from ringfa3.transport.cargo import Cargo, Parcel, Tensors
from ringfa3.transport.packing import Piece, add, room, zeros
from ringfa3.transport.route import hull, length
from ringfa3.transport.transport import KV, Shard
from ringfa3.transport.wire import Flight, Message, Wire


class Gather:
    """All slices at once; see the module."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def rotate(self, shard: Shard, plan: Plan) -> Iterator[tuple[Hop, Tensors]]:
        """See `Transport.rotate`."""
        cargo = Cargo.of(shard)
        try:
            parcels, flight = self.exchange(cargo, plan)
            hops = list(plan.hops)
            if hops and hops[0].source == plan.rank:
                hop = hops.pop(0)
                yield hop, cargo.read(hop.keys)
            flight.land()
            for hop in hops:
                yield hop, parcels[hop.source].read(hop.keys)
        finally:
            self.wire.settle()

    def rotate_backward(self, kv: KV, plan: Plan) -> GatherHoming:
        """See `Transport.rotate_backward`."""
        return GatherHoming(self, kv, plan)

    def exchange(self, cargo: Cargo, plan: Plan) -> tuple[dict[int, Parcel], Flight]:
        """Start sending slices of our shard to those who need them; returns what will come, by source."""
        parcels = {source: cargo.room(keys) for source, keys in _wanted(plan).items()}
        messages = [Message(source, parcel.data, send=False) for source, parcel in parcels.items()]
        readers = _readers(plan)
        keys = hull(readers.values())
        if keys is not None:
            packed = cargo.pack(keys)
            messages += [Message(reader, packed.cut(part).data, send=True) for reader, part in readers.items()]
        return parcels, self.wire.post(messages, 0, self.wire.mark())


class GatherHoming:
    """See `Homing`."""

    def __init__(self, gather: Gather, kv: KV, plan: Plan) -> None:
        self.gather, self.kv, self.plan = gather, kv, plan
        self._shares: dict[int, Piece] = {}  # of other ranks' shards, by source; to go to their owners
        self._own: Piece | None = None

    def __iter__(self) -> Iterator[tuple[Hop, Tensors, KV]]:
        first = True
        for hop, kv in self.gather.rotate(self.kv, self.plan):
            share = (room if first else zeros)(self.kv, hop.keys, gradient=self.plan.world)
            first = False
            yield hop, kv, share.read(hop.keys)
            if hop.source == self.plan.rank:
                self._own = share
            else:
                self._shares[hop.source] = share

    def home(self) -> KV:
        """See `Homing.home`."""
        wire, plan = self.gather.wire, self.plan
        arriving = {reader: room(self.kv, keys, gradient=plan.world) for reader, keys in _readers(plan).items()}
        messages = [Message(reader, piece.data, send=False) for reader, piece in arriving.items()]
        for source, keys in _wanted(plan).items():
            share = self._shares.get(source)
            if share is None or share.keys != keys:  # the owner expects what we said we need
                share = add(zeros(self.kv, keys, gradient=plan.world), share)
                assert share is not None
            messages.append(Message(source, share.data, send=True))
        try:
            wire.post(messages, plan.world, wire.mark()).land()
        finally:
            wire.settle()
        keys = slice(0, plan.kv_lengths[plan.rank])
        total = self._own
        if total is None or total.keys != keys:
            total = add(zeros(self.kv, keys, gradient=plan.world), total)
        for reader in sorted(arriving):
            total = add(total, arriving[reader])
        assert total is not None
        return total.read(keys)


def _wanted(plan: Plan) -> dict[int, slice]:
    """What this rank gets of each other rank's shard."""
    return {s: keys for s, keys in enumerate(plan.needs[plan.rank]) if s != plan.rank and keys and length(keys)}


def _readers(plan: Plan) -> dict[int, slice]:
    """What each other rank gets of this rank's shard."""
    rows = ((reader, needs[plan.rank]) for reader, needs in enumerate(plan.needs))
    return {reader: keys for reader, keys in rows if reader != plan.rank and keys and length(keys)}
