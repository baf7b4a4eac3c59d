"""Commons: what the ranks of one host share (memory, flags), and queues that copy and wait; here on CPU.

All that differs between CPU and CUDA is in here and in `cuda`. A queue does copies and flag operations in order. On
CPU it does them at once, on the caller's thread: whatever does not deadlock so cannot deadlock on streams either, not
even where all of them share one hardware queue.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ringfa3.board import Peer, attach, create
from ringfa3.errors import RankFailed
from ringfa3.transport.flags import Flags, Op
from ringfa3.transport.meeting import Meeting

Mark = Any  # a point in a queue: an event; None where nothing is queued

SPINS = 50  # polls before giving the processor away
YIELD = 2e-4  # seconds of giving it away before sleeping
WATCH = 0.05  # seconds between looks at whether the one waited for lives


class Queue(Protocol):
    """Does what it is given, in order."""

    number: int  # among this rank's queues, for Flags; 0 is the caller's

    def run(self, ops: Sequence[Op]) -> None:
        """Flag operations. Memory written before is seen by whoever sees the flags."""
        ...

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copies (target, source): both contiguous, or the source 2-D with contiguous rows."""
        ...

    def mark(self) -> Mark:
        """After everything that was given so far."""
        ...

    def follow(self, mark: Mark) -> None:
        """What is given from now on comes after the mark, which may be another queue's."""
        ...


class Commons(Protocol):
    """Of the ranks of one host, on one device a rank. Making it, and `share`, are collective."""

    flags: Flags
    meeting: Meeting
    peers: Sequence[Peer]  # the members' processes

    def here(self) -> Queue:
        """The queue that the caller's work goes to."""
        ...

    def beside(self, number: int) -> Queue:
        """A queue of our own, 1 .. QUEUES - 1."""
        ...

    def share(self, size: int) -> tuple[Tensor, ...]:
        """A new buffer of every rank, uint8 [size]: ours, and the others' as they can be read from here.

        Raises:
            MemoryError: some rank has no room, on every rank.
        """
        ...

    def drain(self) -> None:
        """Wait until all queues of this process are done."""
        ...

    def capture(self) -> int:
        """Number of the CUDA graph capture that the caller's work goes to; 0 where it is done now."""
        ...

    def release(self, failure: RankFailed) -> None:
        """End this rank's waits, which have become pointless; later operations raise the failure."""
        ...


def flag_memory(meeting: Meeting) -> mmap.mmap:
    """Memory for the flags of a meeting's members, mapped by all of them. Collective.

    Raises:
        MemoryError: some rank could not map it, on every rank.
    """
    size = Flags.size(len(meeting.members))
    first = meeting.rank == meeting.members[0]
    path = _path()
    memory = create(path, size) if first else None
    try:
        told = meeting.exchange(str(path))[0]
        if not first:
            memory = attach(Path(told), size)
        _everywhere(meeting, memory is not None, size)
    finally:
        if first:  # everybody who could has it mapped by now
            path.unlink(missing_ok=True)
    assert memory is not None
    return memory


class HostCommons:
    """On CPU: buffers are files in /dev/shm."""

    def __init__(self, meeting: Meeting, peers: Sequence[Peer]) -> None:
        self.meeting = meeting
        self.flags = Flags(flag_memory(meeting), len(meeting.members), meeting.members.index(meeting.rank))
        self.peers = peers
        self.failure: RankFailed | None = None

    def here(self) -> Queue:
        """See `Commons`."""
        return HostQueue(self, 0)

    def beside(self, number: int) -> Queue:
        """See `Commons`."""
        return HostQueue(self, number)

    def share(self, size: int) -> tuple[Tensor, ...]:
        """See `Commons`."""
        path = _path()
        own = create(path, size)
        maps: list[mmap.mmap | None] = []
        try:
            for member, told in zip(self.meeting.members, self.meeting.exchange(str(path)), strict=True):
                maps.append(own if member == self.meeting.rank else attach(Path(told), size))
            _everywhere(self.meeting, None not in maps, size)
        finally:
            path.unlink(missing_ok=True)
        return tuple(torch.frombuffer(memory, dtype=torch.uint8) for memory in maps)

    def drain(self) -> None:
        """See `Commons`."""

    def capture(self) -> int:
        """See `Commons`."""
        return 0

    def release(self, failure: RankFailed) -> None:
        """See `Commons`. A thread that waits raises it."""
        self.failure = failure

    def failed(self, since: float) -> RankFailed | None:
        """Why it is of no use to wait any longer, if it is."""
        if self.failure is not None:
            return self.failure
        waiting = self.flags.waiting(self.flags.rank)
        if waiting is None:
            return None
        member, hop = waiting
        peer, rank = self.peers[member], self.meeting.members[member]
        if peer.dead():
            return RankFailed(rank, peer.host, hop, "its process has ended")
        if time.monotonic() - since > self.meeting.timeout:
            return RankFailed(rank, peer.host, hop, f"nothing came from it within {self.meeting.timeout:g} s")
        return None


class HostQueue:
    """Does everything at once."""

    def __init__(self, commons: HostCommons, number: int) -> None:
        self.number, self._commons = number, commons
        self._lock = threading.Lock()

    def run(self, ops: Sequence[Op]) -> None:
        """See `Queue`. Raises RankFailed where the rank waited for has died or does not come."""
        words = self._commons.flags.words
        if self._commons.failure is not None:
            raise self._commons.failure
        for op in ops:
            if op.wait:
                if words[op.word] != op.value:
                    self._wait(op)
                self._fence()
            else:
                self._fence()
                words[op.word] = op.value

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `Queue`."""
        for target, source in pairs:
            target.copy_(source)

    def mark(self) -> Mark:
        """See `Queue`."""
        return None

    def follow(self, mark: Mark) -> None:
        """See `Queue`."""

    def _fence(self) -> None:
        """No load or store moves across. Python has no fence, but a release and then an acquire are one on any CPU."""
        with self._lock:
            pass
        with self._lock:
            pass

    def _wait(self, op: Op) -> None:
        """Spins, then yields, then sleeps longer and longer, with an eye on the one waited for."""
        words = self._commons.flags.words
        for _ in range(SPINS):
            if words[op.word] == op.value:
                return
        start = watched = time.monotonic()
        pause = 0.0
        while words[op.word] != op.value:
            now = time.monotonic()
            if now - start < YIELD:
                os.sched_yield()
                continue
            if now - watched > WATCH:
                watched = now
                failure = self._commons.failed(start)
                if failure is not None and words[op.word] != op.value:  # not its last deed
                    raise failure
            pause = min(max(2 * pause, 2e-5), 2e-3)
            time.sleep(pause)


def _everywhere(meeting: Meeting, there: bool, size: int) -> None:
    """Raise on every rank where the memory is not mapped on all of them. A round."""
    missing = [member for member, ok in zip(meeting.members, meeting.exchange(there), strict=True) if not ok]
    if missing:
        ranks = ", ".join(map(str, missing))
        raise MemoryError(f"rank {ranks}: no room for {size} bytes of shared memory (is /dev/shm full?)")


def _path() -> Path:
    return Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp", f"ringfa3-{secrets.token_hex(8)}")
