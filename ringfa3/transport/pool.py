"""A pool: the shared buffers and flags of the ranks of one host, kept between calls and layers.

A channel is a buffer of every member and the flags on it. Its owner fills it once all who read it last have done so
(`vacate`), and offers it to readers; each of them fetches what it needs. Buffers grow when a call needs larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringfa3.errors import RankFailed
from ringfa3.transport.cargo import Cargo, Form, Parcel
from ringfa3.transport.commons import Commons, Mark, Queue
from ringfa3.transport.flags import CHANNELS
from ringfa3.transport.tally import Tally

SHARD, SPARE, GRADIENT, SUM = range(CHANNELS)  # SPARE: the hierarchy's second shard; SUM: not a buffer of its own
GRAIN = 2 << 20  # bytes; physical GPU memory is mapped in such pages
ROWS = 8  # contiguous copies that are preferred to one of rows
VIEWS = 1024  # that are kept of buffers: packed training has others in every step
GROWTH = 8  # a buffer that grows does so by an eighth at least: lengths that creep up must not make one each


class Pool:
    """See the module.

    Args:
        commons: of the members; ranks are numbered as there, `members` gives their ranks in the group.
    """

    def __init__(self, commons: Commons) -> None:
        self.commons = commons
        self.members = commons.meeting.members
        self.tally = Tally()
        self.rank, self.world = commons.flags.rank, commons.flags.world
        self._buffers: dict[int, tuple[Tensor, ...]] = {}
        self._parcels: dict[tuple[int, int, Form, int, int], Parcel] = {}  # views of the buffers
        self._slots: dict[tuple[int, int, tuple[int, ...], torch.dtype, int], Tensor] = {}  # views of the buffers
        self._graphed: set[int] = set()  # channels whose buffers a CUDA graph holds on to
        self._kept: list[tuple[Tensor, ...]] = []  # grown out of, but in a graph
        self._last: dict[int, Mark] = {}  # the end of the last call, by capture

    def begin(self) -> Queue:
        """The caller's queue, after the calls before this one, whatever queue they were on.

        A call that is captured into a CUDA graph comes after those captured with it; the order of replays and of
        other calls is up to whoever replays.
        """
        queue = self.commons.here()
        capture = self.commons.capture()
        if capture in self._last:
            queue.follow(self._last[capture])
        return queue

    def end(self, queue: Queue, *beside: Queue) -> None:
        """The call is queued; what it had done beside the caller's queue is waited for there."""
        for other in beside:
            queue.follow(other.mark())
        capture = self.commons.capture()
        # marks of captures that are over are of no use to anybody
        self._last = {number: mark for number, mark in self._last.items() if number == 0} | {capture: queue.mark()}

    def beside(self, number: int, queue: Queue) -> Queue:
        """One of our own queues, after everything that the caller's was given so far."""
        other = self.commons.beside(number)
        other.follow(queue.mark())
        return other

    def buffers(self, channel: int, size: int) -> tuple[Tensor, ...]:
        """Every member's buffer, uint8, of at least this size, which all of them give alike.

        Raises:
            RuntimeError: larger ones are needed in the middle of a CUDA graph capture.
            MemoryError: some rank has no room, on every rank.
        """
        held = self._buffers.get(channel)
        capturing = self.commons.capture() != 0
        if held is None or held[0].numel() < size:
            if capturing:
                raise RuntimeError("transport: its buffers would grow, which a capture cannot do: run once before it")
            grown = size if held is None else max(size, held[0].numel() + held[0].numel() // GROWTH)
            self.commons.drain()
            self.commons.meeting.exchange(None)  # nobody reads the old ones any more
            if held is not None and channel in self._graphed:
                self._kept.append(held)
                self._graphed.discard(channel)
            self._buffers.pop(channel, None)
            self._parcels.clear()
            self._slots.clear()
            held = None  # first let go, then take: both may not fit
            held = self._buffers[channel] = self.commons.share(-(-grown // GRAIN) * GRAIN)
        if capturing:
            self._graphed.add(channel)
        return held

    def give_back(self) -> None:
        """Let go of all buffers but those in CUDA graphs; the next call makes its own. Every member must call.

        Not within a CUDA graph capture, nor beside calls that another thread of this process makes.

        Raises:
            RankFailed: a member does not come.
        """
        self.commons.drain()
        self.commons.meeting.exchange(None)  # nobody reads them any more
        self._kept += [held for channel, held in self._buffers.items() if channel in self._graphed]
        for views in (self._buffers, self._parcels, self._slots, self._graphed):
            views.clear()

    def parcel(self, channel: int, member: int, cargo: Cargo, keys: slice) -> Parcel:
        """The message with these keys of a shard like the cargo that lies at the front of a member's buffer."""
        key = channel, member, cargo.form, keys.start, keys.stop
        found = self._parcels.get(key)
        if found is None:
            if len(self._parcels) >= VIEWS:
                self._parcels.clear()
            with torch.inference_mode(False):  # else calls outside of it could not write there
                buffer = self._buffers[channel][member]
                found = self._parcels[key] = cargo.room(keys, view(buffer, (cargo.size(keys),), cargo.dtype))
        return found

    def slot(self, channel: int, member: int, size: tuple[int, ...], dtype: torch.dtype, *, offset: int) -> Tensor:
        """A tensor in a member's buffer, from this byte on."""
        key = channel, member, size, dtype, offset
        found = self._slots.get(key)
        if found is None:
            if len(self._slots) >= VIEWS:
                self._slots.clear()
            with torch.inference_mode(False):  # as above
                found = self._slots[key] = view(self._buffers[channel][member], size, dtype, offset=offset)
        return found

    def vacate(self, queue: Queue, channel: int, hop: int, readers: Sequence[int] | None = None) -> None:
        """What the queue does next comes after these readers (all, where None) have read our buffer."""
        asked = [r for r in (range(self.world) if readers is None else readers) if r != self.rank]
        if asked:
            queue.run(self.commons.flags.emptied(queue.number, channel, asked, hop))

    def offer(self, queue: Queue, channel: int, readers: Sequence[int]) -> None:
        """These readers may read our buffer, once the queue is here. Each of them must fetch."""
        if readers:
            queue.run(self.commons.flags.fill(channel, readers))

    def fetch(self, queue: Queue, channel: int, owner: int, hop: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy from the owner's buffer, once it has offered it to us, pairs as `Queue.copy` takes them."""
        queue.run(self.commons.flags.filled(queue.number, channel, owner, hop))
        queue.copy(pairs)
        self.tally.received[hop] += sum(target.nbytes for target, _ in pairs)
        queue.run(self.commons.flags.empty(channel, owner))

    def waiting(self) -> tuple[int, int] | None:
        """(rank of the group waited for, hop) where one of this rank's queues, or its host, waits now, else None."""
        awaited = self.commons.meeting.awaited  # buffers grow: the host waits
        if awaited is not None:
            return awaited, 0
        found = self.commons.flags.waiting(self.rank)
        return None if found is None else (self.members[found[0]], found[1])

    def release(self) -> None:
        """End this rank's waits, for a rank that will not come; what is computed then is worth nothing.

        Whoever gives this rank's queues more gets RankFailed. From any thread; returns at once.
        """
        rank, hop = self.waiting() or (self.members[self.rank], None)
        peer = self.commons.peers[self.members.index(rank)]
        message = "its process has ended" if peer.dead() else "the call was given up while it was waited for"
        failure = RankFailed(rank, peer.host, hop, message)
        self.commons.meeting.failure = failure
        self.commons.release(failure)


def pieces(target: Tensor, source: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two tensors of one shape as few pairs that can be copied whole. The target is contiguous.

    The source's parts are contiguous too; or, rather than more than `ROWS` of those, rows of one pitch: 2-D.
    """
    if source.is_contiguous():
        return [(target, source)]
    rows = pitched(source)
    if rows is not None and rows.shape[0] > ROWS:
        return [(target.view(rows.shape), rows)]
    return [pair for t, s in zip(target, source, strict=True) for pair in pieces(t, s)]


def pitched(x: Tensor) -> Tensor | None:
    """A view of x in two dimensions, whose rows are contiguous and as long as can be; None where it has none."""
    width, dim = 1, x.ndim
    while dim and x.stride(dim - 1) == width:
        dim -= 1
        width *= x.shape[dim]
    pitch, step = x.stride(dim - 1), x.stride(dim - 1)
    for size, stride in zip(reversed(x.shape[:dim]), reversed(x.stride()[:dim]), strict=True):
        if size > 1 and stride != step:
            return None
        step *= size
    return x.as_strided((x.numel() // width, width), (pitch, 1))


def view(buffer: Tensor, size: Sequence[int], dtype: torch.dtype, *, offset: int = 0) -> Tensor:
    """A tensor in a buffer of bytes, from this byte on."""
    count = torch.Size(size).numel() * dtype.itemsize
    return buffer[offset : offset + count].view(dtype).view(tuple(size))
