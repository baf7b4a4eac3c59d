"""What goes on between ranks of one host in a call: slices fetched from a shard's holder, and shares of gradients.

Both go through a pool, on queues of their own, beside what the caller's queue computes. Ranks here are the pool's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ringfa3.transport.cargo import Cargo, Parcel
from ringfa3.transport.commons import Mark, Queue
from ringfa3.transport.packing import Piece, dtype_of, room, shape
from ringfa3.transport.pool import GRADIENT, Pool, pieces
from ringfa3.transport.route import length
from ringfa3.transport.transport import KV

ALIGN = 256  # bytes: slots begin where any kernel's vector loads are aligned


@dataclass(frozen=True, eq=False)
class Wanted:
    """A slice to fetch: it is in the parcel that lies in the owner's buffer of this channel."""

    channel: int
    owner: int
    step: int
    keys: slice
    parcel: Parcel

    def pairs(self, target: Parcel) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What to copy: all at once where the slice is the whole parcel."""
        if self.keys == self.parcel.keys:
            return [(target.data, self.parcel.data)]
        parts = zip(target.cargo.tensors, self.parcel.read(self.keys), strict=True)
        return [pair for there, x in parts for pair in pieces(there, x)]


class Arrivals:
    """Slices on their way into landing buffers, at most `depth` of them, beside what the caller does with the last.

    Args:
        queue: the caller's; the buffers are from its allocator, and are filled in turn once it is done with them.
        cargo: what shards are like.
        wanted: in the order in which they will be taken.
    """

    def __init__(self, pool: Pool, queue: Queue, cargo: Cargo, wanted: Sequence[Wanted], depth: int) -> None:
        self.pool, self.queue, self._cargo, self._wanted = pool, queue, cargo, wanted
        sizes = [max([cargo.size(w.keys) for w in wanted[slot::depth]]) for slot in range(min(depth, len(wanted)))]
        self._slots = [torch.empty(size, dtype=cargo.dtype, device=cargo.device) for size in sizes]
        self._coming: deque[tuple[Parcel, Mark]] = deque()
        self._begun = 0
        self.beside = pool.beside(1, queue)
        for _ in self._slots:
            self._fetch()

    def take(self) -> Parcel:
        """The next slice, for what is given to the caller's queue from now on until `done`."""
        parcel, arrived = self._coming.popleft()
        self.queue.follow(arrived)
        return parcel

    def done(self) -> None:
        """The slice taken last may be overwritten."""
        if self._begun < len(self._wanted):
            self.beside.follow(self.queue.mark())
            self._fetch()

    def _fetch(self) -> None:
        if self._begun == len(self._wanted):
            return
        wanted = self._wanted[self._begun]
        target = self._cargo.room(wanted.keys, self._slots[self._begun % len(self._slots)])
        self._begun += 1
        self.pool.fetch(self.beside, wanted.channel, wanted.owner, wanted.step, wanted.pairs(target))
        self._coming.append((target, self.beside.mark()))


@dataclass(frozen=True)
class Share:
    """The slice `keys` of a gradient that one rank computes in a step, for another, who collects it."""

    step: int
    collector: int
    keys: slice


@dataclass(frozen=True, eq=False)
class Trade:
    """The shares that ranks of one host compute for each other in a pass, as one of them sees it.

    Args:
        mine: what it computes for others, in that order.
        coming: by step, who computes something for it then, the how manieth of theirs that is, and what.
        longest: keys in the longest share of all.
    """

    mine: tuple[Share, ...]
    coming: dict[int, tuple[int, int, Share]]
    longest: int

    @classmethod
    def of(cls, shares: Sequence[Sequence[Share]], rank: int) -> Trade:
        """For this rank, of all ranks' shares."""
        numbered = [(other, index, share) for other, each in enumerate(shares) for index, share in enumerate(each)]
        return cls(
            tuple(shares[rank]),
            {share.step: (other, index, share) for other, index, share in numbered if share.collector == rank},
            max((length(share.keys) for _, _, share in numbered), default=0),
        )


class Outbox:
    """Shares of gradients on their way to those who collect them, and those that come to us.

    Args:
        kv: k and v of a shard: what gradients look like.
        trade: whose shares go where.
        depth: shares of ours that may lie here, not yet collected, beside the one being computed: one less than this.
        world: ranks of the group, as `packing.room` takes it.
    """

    def __init__(self, pool: Pool, queue: Queue, kv: KV, trade: Trade, *, depth: int, world: int) -> None:
        self.pool, self.queue, self.kv, self.depth, self.world = pool, queue, kv, depth, world
        self.beside = pool.beside(2, queue)
        self._trade = trade
        self._dtype = dtype_of(kv, gradient=world)
        largest = prod(shape(kv, slice(0, trade.longest))) * self._dtype.itemsize
        self._size = -(-largest // ALIGN) * ALIGN
        if largest:
            pool.buffers(GRADIENT, depth * self._size)
        self._sent = 0
        self._coming: tuple[Piece, Mark] | None = None

    def slot(self) -> Piece:
        """Where our next share is to be computed."""
        index, shares = self._sent, self._trade.mine
        share = shares[index]
        if index == 0:
            self.pool.vacate(self.queue, GRADIENT, share.step)  # of the last call's
        else:
            awaited = {share.collector}  # an offer must not meet one that was not taken up
            if index >= self.depth:
                awaited.add(shares[index - self.depth].collector)
            self.pool.vacate(self.queue, GRADIENT, share.step, sorted(awaited))
        return self._piece(self.pool.rank, index, share.keys)

    def send(self) -> None:
        """Our share in the slot has been computed."""
        self.pool.offer(self.queue, GRADIENT, [self._trade.mine[self._sent].collector])
        self._sent += 1

    def fetch(self, step: int) -> None:
        """Begin to fetch what another rank computed for us in this step, if one did. At most one a step does."""
        if step not in self._trade.coming:
            return
        rank, index, share = self._trade.coming[step]
        piece = room(self.kv, share.keys, gradient=self.world)
        self.beside.follow(self.queue.mark())  # the piece's memory may have been another's until here
        pairs = pieces(piece.data, self._piece(rank, index, share.keys).data)
        self.pool.fetch(self.beside, GRADIENT, rank, step, pairs)
        self._coming = piece, self.beside.mark()

    def take(self) -> Piece | None:
        """The share that was begun to fetch last; None where there is none."""
        if self._coming is None:
            return None
        (piece, arrived), self._coming = self._coming, None
        self.queue.follow(arrived)
        return piece

    def _piece(self, rank: int, index: int, keys: slice) -> Piece:
        """In a rank's outbox, its index-th share, which has these keys."""
        offset = index % self.depth * self._size
        return Piece(keys, self.pool.slot(GRADIENT, rank, shape(self.kv, keys), self._dtype, offset=offset))
