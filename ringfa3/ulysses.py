"""Ulysses: the ranks that hold one shard between them trade positions for heads, attend, and trade back.

Each rank has all heads of its slice of the shard. Before the hops it sends every peer that peer's heads of them, and
gets its own heads of the peers' slices: the whole shard. Heads are dealt so that a rank's query heads are whole GQA
groups, or lie within one; a key/value head that several ranks want goes to each of them, and its gradients are summed
in the order of the ranks, in fp32, when they come home.

What travels is packed once per destination, K and V together, at its true length. Rows come first in the rooms where it
lands, [N, B, H, D], so that every message fills one slice of the whole and nothing has to be unpacked: kernels read
the transposed views. On the way home it is the head dim that grows, and joining the parts is the one copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringfa3.errors import RankFailed
from ringfa3.gang import Gang
from ringfa3.mesh import RING, ULYSSES, along
from ringfa3.plan import Hop, Plan
from ringfa3.shards import Group
from ringfa3.transport.cargo import Cargo, Tensors
from ringfa3.transport.packing import Piece, add, room, zeros
from ringfa3.transport.transport import KV, Shard
from ringfa3.transport.wire import Message, Wire
from ringfa3_kernels.door import state_dtype

Leg = tuple[Callable[[int], Tensor], Sequence[Tensor]]  # what goes to each peer, and where what it sends lands


@dataclass(frozen=True)
class Share:
    """The heads that one rank computes.

    Args:
        q, kv: query heads, and the key/value heads that they read.
        shared: other ranks read the same (then only) key/value head.
    """

    q: slice
    kv: slice
    shared: bool


def deal_heads(Hq: int, Hkv: int, world: int) -> tuple[Share, ...]:
    """Every rank's heads: ascending, whole GQA groups or a part of one, and as even as that allows.

    Raises:
        ValueError: there are fewer query heads than ranks.
    """
    if Hq < world:
        raise ValueError(f"q: wanted at least one query head for each of {world} Ulysses ranks, got {Hq}")
    group = Hq // Hkv
    if world <= Hkv:
        groups = [slice(rank * Hkv // world, (rank + 1) * Hkv // world) for rank in range(world)]
        return tuple(Share(slice(kv.start * group, kv.stop * group), kv, False) for kv in groups)
    shares = []
    for head in range(Hkv):
        ranks = (head + 1) * world // Hkv - head * world // Hkv
        cuts = [head * group + i * group // ranks for i in range(ranks + 1)]
        shares += [Share(slice(a, b), slice(head, head + 1), ranks > 1) for a, b in itertools.pairwise(cuts)]
    return tuple(shares)


@dataclass(frozen=True, eq=False)
class Heads:
    """The exchange between the ranks of one ulysses axis, for one call's shapes.

    Args:
        wire: the messages of their group.
        rank: this rank's in it.
        ranks: number of each of its ranks in the whole mesh, for errors.
        shares: heads that each rank computes.
        rows: positions that each rank holds; N in all.
        kv_rows: the same of the keys; rows, but for cross attention.
    """

    wire: Wire
    rank: int
    ranks: tuple[int, ...]
    shares: tuple[Share, ...]
    rows: tuple[int, ...]
    kv_rows: tuple[int, ...]

    @property
    def mine(self) -> Share:
        """The heads that this rank computes."""
        return self.shares[self.rank]

    def spread(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's heads of all positions, from all heads of its own.

        Args:
            q: [B, n, Hq, D]; k, v: [B, m, Hkv, D].

        Returns:
            q [B, N, h, D], and k, v [B, M, hkv, D] with their rows in one buffer, in turn; views.
        """
        B, _, _, D = q.shape
        queries = q.new_empty(sum(self.rows), B, _size(self.mine.q), D)
        pairs = k.new_empty(sum(self.kv_rows), B, 2, _size(self.mine.kv), D)
        places, pair_places = queries.split(self.rows), pairs.split(self.kv_rows)

        def pair(peer: int) -> Tensor:
            heads = self.shares[peer].kv
            return torch.stack([x[:, :, heads].transpose(0, 1) for x in (k, v)], 2)

        with self._exchange(0, (self._by_head(q), places), (pair, pair_places)):
            places[self.rank].copy_(self._by_head(q)(self.rank))
            for i, x in enumerate((k, v)):
                pair_places[self.rank][:, :, i].copy_(x[:, :, self.mine.kv].transpose(0, 1))
        k, v = pairs.transpose(0, 1).unbind(2)
        return queries.transpose(0, 1), k, v

    def home(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """All heads of this rank's positions, from its heads of all: out [B, N, h, D] to [B, n, Hq, D], lse likewise.

        Args:
            lse: [B, h, N].
        """
        outs, lses = out.split(self.rows, 1), lse.split(self.rows, 2)
        out_places, lse_places = self._by_peer(outs[self.rank], 2), self._by_peer(lses[self.rank], 1)
        with self._exchange(1, (outs.__getitem__, out_places), (lses.__getitem__, lse_places)):
            pass  # our own part stays where it is until the parts are joined
        return torch.cat(out_places, 2), torch.cat(lse_places, 1)

    def spread_gradients(self, dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """dout as `spread` does q; delta [B, Hq, n] to [B, h, N]."""
        B, _, _, D = dout.shape
        heads = _size(self.mine.q)
        whole = dout.new_empty(sum(self.rows), B, heads, D)
        places = whole.split(self.rows)
        own = delta[:, self.mine.q]
        deltas = [own if peer == self.rank else delta.new_empty(B, heads, n) for peer, n in enumerate(self.rows)]
        with self._exchange(0, (self._by_head(dout), places), (lambda peer: delta[:, self.shares[peer].q], deltas)):
            places[self.rank].copy_(self._by_head(dout)(self.rank))
        return whole.transpose(0, 1), torch.cat(deltas, 2)

    def home_gradients(self, dq: Tensor, dk: Tensor, dv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """All heads' gradients of this rank's positions, in this dtype, from its heads' of all positions."""
        dqs = dq.to(dtype).split(self.rows, 1)
        dks, dvs = dk.split(self.kv_rows, 1), dv.split(self.kv_rows, 1)
        kinds = [state_dtype(dtype) if share.shared else dtype for share in self.shares]
        B, m, _, D = dks[self.rank].shape
        places = self._by_peer(dqs[self.rank], 2)
        pairs = [
            dk.new_empty(2, B, m, _size(share.kv), D, dtype=kind)
            for share, kind in zip(self.shares, kinds, strict=True)
        ]

        def pair(peer: int) -> Tensor:
            both = dk.new_empty(2, *dks[peer].shape, dtype=kinds[self.rank])
            return _fill(both, dks[peer], dvs[peer])

        with self._exchange(1, (dqs.__getitem__, places), (pair, pairs)):
            _fill(pairs[self.rank], dks[self.rank], dvs[self.rank])
        dk, dv = torch.cat([x.to(dtype) for x in self._summed(pairs)], 3)
        return torch.cat(places, 2), dk, dv

    def _by_head(self, x: Tensor) -> Callable[[int], Tensor]:
        """What each peer gets of x [B, n, Hq, D]: views [n, B, h, D]."""
        return lambda peer: x[:, :, self.shares[peer].q].transpose(0, 1)

    def _by_peer(self, own: Tensor, dim: int) -> list[Tensor]:
        """Rooms for the query heads that each peer computes of our positions, in this dim; our own part is there."""
        shapes = [(*own.shape[:dim], _size(share.q), *own.shape[dim + 1 :]) for share in self.shares]
        return [own if peer == self.rank else own.new_empty(shape) for peer, shape in enumerate(shapes)]

    def _summed(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One part for every head: ranks that share one stand next to each other."""
        sums: list[Tensor] = []
        for rank, part in enumerate(parts):
            if rank and self.shares[rank].kv == self.shares[rank - 1].kv:
                sums[-1] += part
            else:
                sums.append(part)
        return sums

    @contextmanager
    def _exchange(self, hop: int, *legs: Leg) -> Iterator[None]:
        """Send and receive; what is done inside runs meanwhile, and afterwards everything has come."""
        messages = []
        for peer in (peer for peer in range(len(self.shares)) if peer != self.rank):
            for kind, (part, places) in enumerate(legs):
                sent = part(peer).contiguous()
                messages += [Message(peer, sent, send=True, kind=kind)] if sent.numel() else []
                messages += [Message(peer, places[peer], send=False, kind=kind)] if places[peer].numel() else []
        try:
            with numbered(self.ranks):
                flight = self.wire.post(messages, hop, self.wire.mark())
                yield
                flight.land()
        finally:
            self.wire.settle()


class Alone:
    """The transport of a ring of one rank.

    Args:
        shared: other ranks have shares of the same gradients: they stay fp32 until they are summed.
    """

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared

    def rotate(self, shard: Shard, plan: Plan) -> Iterator[tuple[Hop, Tensors]]:
        """See `Transport.rotate`."""
        cargo = Cargo.of(shard)
        for hop in plan.hops:
            yield hop, cargo.read(hop.keys)

    def rotate_backward(self, kv: KV, plan: Plan) -> AloneHoming:
        """See `Transport.rotate_backward`."""
        return AloneHoming(self, kv, plan)


class AloneHoming:
    """See `Homing`."""

    def __init__(self, alone: Alone, kv: KV, plan: Plan) -> None:
        self.alone, self.kv, self.plan = alone, kv, plan
        self._gradient = 2 if alone.shared else 1  # how many ranks add to it: one needs no wide sum
        self._own: Piece | None = None

    def __iter__(self) -> Iterator[tuple[Hop, Tensors, KV]]:
        for hop, kv in self.alone.rotate(self.kv, self.plan):
            self._own = room(self.kv, hop.keys, gradient=self._gradient)
            yield hop, kv, self._own.read(hop.keys)

    def home(self) -> KV:
        """See `Homing.home`."""
        keys = slice(0, self.plan.kv_lengths[0])
        total = self._own
        if total is None or total.keys != keys:
            total = add(zeros(self.kv, keys, gradient=self._gradient), total)
        assert total is not None
        return total.read(keys)


def exchange(plan: Plan, Hq: int, Hkv: int, device: torch.device, group: Group, hosts: Sequence[str]) -> Heads | None:
    """The exchange of heads for a call; None where the plan's ulysses axis has one rank or it has none.

    Args:
        group: the mesh, or the group for Ulysses alone.
        hosts: of all ranks of it, where known.
    """
    axes = plan.axes
    if axes is None or axes.ulysses == 1:
        return None
    peers = axes.peers(plan.rank)
    wire = Gang.of(_along(group, ULYSSES)).wire(device, tuple(hosts[peer] for peer in peers) if hosts else ())
    lengths, kv_lengths = (tuple(x[peer] for peer in peers) for x in (plan.lengths, plan.kv_lengths))
    return Heads(wire, peers.index(plan.rank), peers, deal_heads(Hq, Hkv, axes.ulysses), lengths, kv_lengths)


def ring_gang(plan: Plan, group: Group, hosts: tuple[str, ...]) -> tuple[Gang, tuple[str, ...]]:
    """The state of the group in which the plan's hops go round, and its ranks' hosts, where known."""
    gang = hop_gang(group)
    if plan.axes is None:
        return gang, hosts
    return gang, tuple(hosts[peer] for peer in ring_ranks(plan)) if hosts else ()


def hop_gang(group: Group) -> Gang:
    """The state of the group in which hops go round."""
    return Gang.of(_along(group, RING))


def ring_ranks(plan: Plan) -> Sequence[int]:
    """Who is on the ring in which the plan's hops go round, by their rank there: numbers in the group of all."""
    return range(plan.world) if plan.axes is None else plan.axes.ring_peers(plan.rank)


@contextmanager
def numbered(ranks: Sequence[int]) -> Iterator[None]:
    """Where a failure names a rank of an axis: it gets the rank's number among all, which `ranks` lists."""
    try:
        yield
    except RankFailed as failed:
        raise RankFailed(ranks[failed.rank], failed.host, failed.hop, failed.message) from failed


def parts(plan: Plan, group: Group) -> list[tuple[Gang, Sequence[int]]]:
    """The groups that a call's messages go through, each with its ranks' numbers in the group of all."""
    if plan.axes is None:
        return [(hop_gang(group), ring_ranks(plan))]
    axes = [(ULYSSES, plan.axes.peers(plan.rank)), (RING, ring_ranks(plan))]
    return [(Gang.of(_along(group, axis)), ranks) for axis, ranks in axes if len(ranks) > 1]


def _along(group: Group, axis: str) -> dist.ProcessGroup | None:
    """The process group along an axis of a mesh; every other group is its one axis itself."""
    if isinstance(group, DeviceMesh):
        return group.get_group() if group.ndim == 1 else along(group, axis)
    return group


def _fill(both: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The buffer [2, ...] with copies of a and b in its dtype."""
    both[0].copy_(a)
    both[1].copy_(b)
    return both


def _size(heads: slice) -> int:
    return int(heads.stop - heads.start)
