"""What goes on between ranks of one host in a call: slices fetched from a shard's holder, and shares of gradients.

Both go through a pool, on queues of their own, beside what the caller's queue computes. Ranks here are the pool's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ringfa3.transport.cargo import Cargo, Parcel
from ringfa3.transport.commons import Mark, Queue
from ringfa3.transport.packing import Piece, room, shape
from ringfa3.transport.pool import GRADIENT, Pool, pieces, view
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
        sizes = [max((cargo.size(w.keys) for w in wanted[slot::depth]), default=0) for slot in range(depth)]
        self._slots = [torch.empty(size, dtype=cargo.dtype, device=cargo.device) for size in sizes] if wanted else []
        self._coming: deque[tuple[Parcel, Mark]] = deque()
        self._begun = 0
        self.beside = pool.beside(1, queue)
        for _ in range(depth):
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


class Outbox:
    """Shares of gradients on their way to those who collect them, and those that come to us.

    Args:
        kv: k and v of a shard: what gradients look like.
        shares: of every rank, what it computes for others, in that order.
        depth: shares of ours that may lie here, not yet collected, beside the one being computed: one less than this.
        world: ranks of the group, as `packing.room` takes it.
    """

    def __init__(
        self, pool: Pool, queue: Queue, kv: KV, shares: Sequence[Sequence[Share]], *, depth: int, world: int
    ) -> None:
        self.pool, self.queue, self.kv, self.depth, self.world = pool, queue, kv, depth, world
        self.beside = pool.beside(2, queue)
        self._shares = shares
        self._dtype = room(kv, slice(0, 0), gradient=world).data.dtype
        largest = max((size_of(kv, share.keys, self._dtype) for each in shares for share in each), default=0)
        self._size = -(-largest // ALIGN) * ALIGN
        self._buffers = pool.buffers(GRADIENT, depth * self._size) if largest else ()
        self._sent = 0
        self._coming: tuple[Piece, Mark] | None = None

    def slot(self) -> Piece:
        """Where our next share is to be computed."""
        index, shares = self._sent, self._shares[self.pool.rank]
        share = shares[index]
        if index == 0:
            self.pool.vacate(self.queue, GRADIENT, share.step)  # of the last call's
        else:
            awaited = {share.collector}  # an offer must not meet one that was not taken up
            if index >= self.depth:
                awaited.add(shares[index - self.depth].collector)
            self.pool.vacate(self.queue, GRADIENT, share.step, sorted(awaited))
        return self._piece(self.pool.rank, index)

    def send(self) -> None:
        """Our share in the slot has been computed."""
        self.pool.offer(self.queue, GRADIENT, [self._shares[self.pool.rank][self._sent].collector])
        self._sent += 1

    def fetch(self, step: int) -> None:
        """Begin to fetch what another rank computed for us in this step, if one did. At most one a step does."""
        for rank, shares in enumerate(self._shares):
            for index, share in enumerate(shares):
                if (share.step, share.collector) != (step, self.pool.rank):
                    continue
                piece = room(self.kv, share.keys, gradient=self.world)
                self.beside.follow(self.queue.mark())  # the piece's memory may have been another's until here
                pairs = pieces(piece.data, self._piece(rank, index).data)
                self.pool.fetch(self.beside, GRADIENT, rank, step, pairs)
                self._coming = piece, self.beside.mark()

    def take(self) -> Piece | None:
        """The share that was begun to fetch last; None where there is none."""
        if self._coming is None:
            return None
        (piece, arrived), self._coming = self._coming, None
        self.queue.follow(arrived)
        return piece

    def _piece(self, rank: int, index: int) -> Piece:
        """In a rank's outbox, its index-th share."""
        keys = self._shares[rank][index].keys
        offset = index % self.depth * self._size
        return Piece(keys, view(self._buffers[rank], shape(self.kv, keys), self._dtype, offset=offset))


def size_of(kv: KV, keys: slice | None, dtype: torch.dtype) -> int:
    """Bytes of a piece of a shard like kv."""
    return 0 if keys is None else torch.Size(shape(kv, keys)).numel() * dtype.itemsize
