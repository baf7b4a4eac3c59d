"""A watch over the ranks of a group: who dies, or stalls in the middle of a call, becomes RankFailed on every rank.

A host that is blocked in a device synchronise, or a stream that waits for a message, cannot be told anything. So each
rank has a thread that looks every now and then at what is under way. Where a message is awaited that nothing of our
own holds up, it asks whether the other processes live, and how long this has gone on. When a rank is found to have
failed the thread tells all other ranks by an alarm, whose watches do the same; keeps the error, which the agreement
raises from then on; and ends what is under way (NCCL's communicator is aborted), so that whoever was blocked goes on.

What counts as a stall: the device, or the host, has waited for one and the same message for longer than the
agreement's timeout. Time during which our own kernels hold the message up does not count, nor does time during which
the late rank's watch says that it is its kernels that do.

Processes of one machine are asked for; a rank on another machine is known by its standing, which its watch renews.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch.distributed import DistError

from ringfa3.agree import Agreement
from ringfa3.board import Note
from ringfa3.errors import RankFailed
from ringfa3.transport.wire import Wire

SILENCE = 10.0  # seconds: a living process may hold the interpreter's lock, and so its watch, for some
BEFORE_TORCH = 0.8  # of the process group's timeout, after which torch would end the process


class Pulled(Protocol):
    """Memory that ranks of one host pull from each other. Asked from the watch's thread."""

    def waiting(self) -> tuple[int, int] | None:
        """(rank, hop) that a queue of ours waits for now."""
        ...

    def release(self) -> None:
        """End our waits that have begun; what is queued behind them may begin others."""
        ...


class Part(Protocol):
    """What the ranks of a group, or of an axis of its mesh, keep for their calls: a Gang."""

    def alive(self) -> bool:
        """Whether there may be calls yet."""
        ...

    def wires(self) -> Sequence[Wire]:
        """Its messages."""
        ...

    def pools(self) -> Sequence[Pulled]:
        """Its memory."""
        ...


class Watch:
    """One rank's watch. Its thread runs until the watch, the agreement or the group is gone, or a rank has failed.

    Args:
        agreement: of the ranks to watch; its timeout is that for stalls. Held weakly.
        silence: seconds after which a rank of another machine whose standing stays the same counts as dead.
    """

    def __init__(self, agreement: Agreement, *, silence: float = SILENCE) -> None:
        if not silence > 0:
            raise ValueError(f"silence: wanted a positive number of seconds, got {silence}")
        self._agreement = weakref.ref(agreement)
        self._timeout, self._silence = agreement.timeout, silence
        self._board = agreement.board.apart()
        self._near = [rank for rank in agreement.others if agreement.peers[rank].near()]
        self._far = [rank for rank in agreement.others if rank not in self._near]
        self._parts: tuple[tuple[weakref.ref[Part], tuple[int, ...]], ...] = ()
        self._since: dict[int, tuple[_Wait, float]] = {}  # of each thing watched: what it awaits, and since when
        now = time.monotonic()
        self._signs = {rank: (-1, now) for rank in agreement.others}  # each rank's last beat, and when it came
        self._beat = 0
        self._others: list[_Standing | None] = [None] * agreement.world
        stop = threading.Event()
        self._end = weakref.finalize(self, stop.set)
        _start(f"ringfa3 watch, rank {agreement.rank}", _run, weakref.ref(self), stop, self._board.pause)

    def follow(self, part: Part, ranks: Sequence[int]) -> None:
        """Watch what goes on in this part, too; held weakly.

        Args:
            ranks: the agreement's number of each rank of the part.
        """
        if not any(known() is part for known, _ in self._parts):
            self._parts = (*self._parts, (weakref.ref(part), tuple(ranks)))

    def look(self) -> bool:
        """What the thread does again and again. False: there is nothing to watch over any more."""
        agreement = self._agreement()
        if agreement is None:
            return False
        parts = [(part, ranks) for known, ranks in self._parts if (part := known()) is not None and part.alive()]
        if self._parts and not parts:
            return False
        wires = [wire for part, _ in parts for wire in part.wires()]
        pools = [pool for part, _ in parts for pool in part.pools()]
        error = agreement.failure
        try:
            error = error or agreement.heard(self._board) or self._found(agreement, parts, wires)
        except RuntimeError as problem:
            error = self._helpless(agreement, wires, problem)
        if error is None:
            return True
        agreement.fail(error, self._board)
        for pool in pools:  # before communicators, whose abort frees memory and so waits for all queues
            pool.release()
        for wire in wires:
            if not wire.released:
                wire.released = True
                _start("ringfa3 release", wire.release)
        return bool(pools)  # their queues may run into new waits

    def _found(
        self, agreement: Agreement, parts: Sequence[tuple[Part, tuple[int, ...]]], wires: Sequence[Wire]
    ) -> RankFailed | None:
        """The failure that can be seen from here."""
        now = time.monotonic()
        waits = self._waits(parts, now)
        self._exchange(agreement.rank, waits[0] if waits else None, wires, now)
        hop = waits[0].hop if waits else None
        if waits or any(wire.captured for wire in wires):
            for rank in self._near:
                if agreement.peers[rank].dead():
                    return RankFailed(rank, agreement.peers[rank].host, hop, "its process has ended")
            for rank in self._far:
                if now - self._signs[rank][1] > self._silence:
                    message = f"no sign of life for {self._silence:g} s"
                    return RankFailed(rank, agreement.peers[rank].host, hop, message)
        timeout = min([self._timeout, *(BEFORE_TORCH * wire.patience for wire in wires)])
        for key, (wait, since) in self._since.items():
            if now - since > timeout:
                rank = self._culprit(wait, agreement)
                if self._computes(rank, now):
                    self._since[key] = wait, now
                    continue
                message = f"no message of it within {timeout:g} s"
                return RankFailed(rank, agreement.peers[rank].host, wait.hop, message)
        return None

    def _waits(self, parts: Sequence[tuple[Part, tuple[int, ...]]], now: float) -> list[_Wait]:
        """What is awaited at this moment; since when is kept."""
        waits: dict[int, _Wait] = {}
        for part, ranks in parts:
            for wire in part.wires():
                if (awaited := wire.waiting()) is not None:
                    waits[id(wire)] = _Wait(ranks[awaited.rank], awaited.hop, awaited.round)
            for pool in part.pools():
                if (pulled := pool.waiting()) is not None:
                    waits[id(pool)] = _Wait(ranks[pulled[0]], pulled[1], 0)
        before = self._since
        self._since = {
            key: before[key] if key in before and before[key][0] == wait else (wait, now) for key, wait in waits.items()
        }
        return list(waits.values())

    def _exchange(self, rank: int, wait: _Wait | None, wires: Sequence[Wire], now: float) -> None:
        """Renew our standing, read the others'."""
        self._beat += 1
        computing = wait is None and any(wire.computing() for wire in wires)
        rounds = sum(wire.rounds for wire in wires)
        standing = _Standing(self._beat, wait.rank if wait else None, computing, rounds)
        self._board.stand(standing.note())
        self._others = [None if note is None else _Standing.of(note) for note in self._board.standing()]
        self._others[rank] = standing
        for other, (beat, _) in self._signs.items():
            theirs = self._others[other]
            if theirs is not None and theirs.beat != beat:
                self._signs[other] = theirs.beat, now

    def _culprit(self, wait: _Wait, agreement: Agreement) -> int:
        """Whom all wait for: the rank that has posted the fewest rounds; else where the chain of waits ends."""
        posted = {r: standing.rounds for r in agreement.others if (standing := self._others[r]) is not None}
        ours = self._others[agreement.rank]
        last = min(posted, key=posted.__getitem__, default=None)
        if last is not None and ours is not None and posted[last] < ours.rounds:
            return last
        seen, rank = {agreement.rank}, wait.rank
        while rank not in seen:
            seen.add(rank)
            standing = self._others[rank]
            if standing is None or standing.awaited is None:
                return rank
            rank = standing.awaited
        return wait.rank  # they wait for each other: what is between them has failed

    def _computes(self, rank: int, now: float) -> bool:
        """Whether a watch that lives says that this rank's kernels are what holds its messages up."""
        standing = self._others[rank]
        return standing is not None and standing.computing and now - self._signs[rank][1] < self._silence

    def _helpless(self, agreement: Agreement, wires: Sequence[Wire], problem: RuntimeError) -> RankFailed | None:
        """What it means that looking failed: the device is lost, or the store."""
        said = (str(problem).splitlines() or [type(problem).__name__])[0]
        if not isinstance(problem, DistError):
            rank = agreement.rank
            return RankFailed(rank, agreement.peers[rank].host, None, f"its device failed: {said}")
        waits = [awaited for wire in wires if (awaited := wire.waiting()) is not None]
        if not waits:  # a gang that is being taken down
            return None
        return RankFailed(0, agreement.peers[0].host, waits[0].hop, f"the group's store, near it, is lost: {said}")


class _Wait(NamedTuple):
    """What is awaited, in the agreement's numbers; `turn` tells waits of one rank and hop apart."""

    rank: int
    hop: int
    turn: int


@dataclass(frozen=True)
class _Standing:
    """What a rank's watch says about it."""

    beat: int
    awaited: int | None
    computing: bool
    rounds: int

    def note(self) -> Note:
        """As a board keeps it."""
        awaited = 0 if self.awaited is None else self.awaited + 1
        return (self.beat & 0x7FFFFFFF) << 17 | 1 << 16 | awaited << 1 | self.computing, self.rounds

    @classmethod
    def of(cls, note: Note) -> _Standing:
        """What `note` made."""
        first, rounds = note
        awaited = first >> 1 & 0x7FFF
        return cls(first >> 17, awaited - 1 if awaited else None, bool(first & 1), rounds)


def _run(watch: weakref.ref[Watch], stop: threading.Event, pause: float) -> None:
    """The thread: it keeps the watch alive only while it looks."""
    _allow_captures()
    while not stop.wait(pause):
        here = watch()
        if here is None or not here.look():
            return
        del here


def _allow_captures() -> None:
    """Queries of this thread must not spoil a CUDA graph that another one is capturing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return  # no CUDA, no graphs
    thread_local = ctypes.c_int(1)
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(thread_local))


def _start(name: str, work: Callable[..., None], *args: object) -> None:
    thread = threading.Thread(target=work, args=args, name=name, daemon=True)
    _threads.add(thread)
    thread.start()


_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _stop(seconds: float = 1.0) -> None:
    """No thread may be inside torch while the interpreter ends; finalizers have told them to stop."""
    deadline = time.monotonic() + seconds
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
