"""A program of matches on worlds of growing size, played by all ranks of a job, within a time budget."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

from ringfa3_launch.bench.arena import Arena, warm
from ringfa3_launch.bench.case import RING_PEERS
from ringfa3_launch.bench.guard import Stuck
from ringfa3_launch.bench.match import OURS, Match, Outcome
from ringfa3_launch.bench.ours import make_meshes
from ringfa3_launch.bench.shard import Place, free
from ringfa3_launch.rank import RankInfo, nccl_options, pick_device

WARM_TOKENS = 256  # a rank
ASSUMED = {"cuda": 250e12, "cpu": 2e9}  # operations a second and rank, before the first match has shown better
SLOWER = 0.6  # of the best rate seen: what slower entries and backward passes reach
OVERHEAD = {"cuda": 0.7, "cpu": 0.2}  # seconds that an entry takes beside its calls: inputs, exact rows, libraries
GRACE = 90.0  # seconds past the budget after which a process that still runs is ended; what was kept is on disk
MAKING = 60.0  # seconds that groups may take; many ranks need a few

Tell = Callable[[str, int], None]


@dataclass(frozen=True)
class Program:
    """What the ranks have to know.

    Args:
        matches: in the order in which they are played; a match's world is its case's.
        device: "cuda" or "cpu".
        seed: of the random inputs.
        limit: seconds that an entry's first call may take.
        budget: seconds for everything; a match that would not fit is skipped. None: no limit.
    """

    matches: tuple[Match, ...]
    device: str
    seed: int = 0
    limit: float = 120.0
    budget: float | None = None


@dataclass(frozen=True)
class Played:
    """What came of a program on this rank.

    Args:
        outcomes: of the matches whose world this rank was in.
        skipped: (match, reason) of those that were not played.
    """

    outcomes: tuple[Outcome, ...]
    skipped: tuple[tuple[str, str], ...] = ()


Keep = Callable[[Played, bool], None]


def perform(
    info: RankInfo, program: Program, listener: connection.Connection | Tell | None, keep: Keep | None = None
) -> Played:
    """Play the program. Every rank must call it; ranks beyond a match's world wait.

    Args:
        listener: where rank 0 reports progress: called with, or sent, (text, steps done).
        keep: called on rank 0 after every match with everything so far, so that a run which is cut short leaves it, and
            whether that was the last one.

    Raises:
        Stuck: a call hangs; what was measured before has been kept.
    """
    device = pick_device(info.local_rank, info.local_world, program.device)
    if info.rank > 0 or listener is None:
        listener = _nobody
    tell = _sender(listener) if isinstance(listener, connection.Connection) else listener
    tell("the ranks are up, making groups", 0)
    with _ended(MAKING):
        stage = _Stage(info, program, device)
    with _ended(None if program.budget is None else program.budget + GRACE):
        outcomes: list[Outcome] = []
        skipped: list[tuple[str, str]] = []
        for match in program.matches:
            reason = stage.refusal(match)
            if reason:
                skipped.append((match.name, reason))
                tell(f"{match.name}: skipped, {reason}", 1)
                continue
            tell(match.name, 0)
            outcome = stage.play(match)
            if outcome is not None:
                outcomes.append(outcome)
                tell(_summary(outcome), 1)
            if keep is not None and info.rank == 0:
                keep(Played(tuple(outcomes), tuple(skipped)), False)
        if keep is not None and info.rank == 0:
            keep(Played(tuple(outcomes), tuple(skipped)), True)
        stage.end()
        return Played(tuple(outcomes), tuple(skipped))


class _Stage:
    """This rank's groups and arenas, and the clock of the whole program."""

    def __init__(self, info: RankInfo, program: Program, device: torch.device) -> None:
        self.info, self.program, self.device = info, program, device
        self.began, self.stuck = time.monotonic(), ""
        self.rate, self.measured = ASSUMED[device.type], False
        self.waiting = dist.new_group(timeout=timedelta(days=1), backend="gloo")  # sleep beyond a world, however long
        # gloo: a rank alone sends nothing, and an NCCL communicator of its own takes all ranks to make
        self.alone = Place(0, _members_only([info.rank], timedelta(hours=2)), device)
        self.meshes = make_meshes(_transports(program), device)
        self.arenas: dict[int, Arena | None] = {}
        for world in sorted({match.case.world for match in program.matches}):
            self.arenas[world] = self._arena(world)
        self.warmed: set[tuple[object, ...]] = set()

    def refusal(self, match: Match) -> str:
        """Why this match is not to be played, the same on every rank; "" to play it."""
        return self._told(self.stuck or self._too_late(match))

    def end(self) -> None:
        """Raise Stuck, on every rank, if a call hung."""
        stuck = self._told(self.stuck)
        if stuck:
            raise Stuck(stuck)

    def play(self, match: Match) -> Outcome | None:
        """The match's outcome; None on a rank beyond its world, and where it ended in the middle."""
        arena = self.arenas[match.case.world]
        if arena is None:
            return None
        try:
            key = (match.case.world, match.case.direction, tuple(e.transport for e in match.entries))
            if key not in self.warmed:
                self.warmed.add(key)
                warm(arena, match, WARM_TOKENS)
            outcome = arena.play(match)
        except Stuck as error:
            self.stuck = f"a call hangs: {error}"
            return None
        rates = [SLOWER * 1e12 * rate for name in outcome.ours if (rate := outcome.rate(name))]
        if rates:
            self.rate = max(self.rate, *rates) if self.measured else max(rates)
            self.measured = True
        free(self.device)
        return outcome

    def _told(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        told: list[Any] = [text]
        dist.broadcast_object_list(told, 0, group=self.waiting)
        said: str = told[0]
        return said

    def _arena(self, world: int) -> Arena | None:
        """The arena of a world, None on a rank beyond it. All ranks must call: groups are made together."""
        ranks = list(range(world))
        group = dist.new_group(ranks, pg_options=nccl_options() if self.device.type == "cuda" else None)
        own = [match for match in self.program.matches if match.case.world == world]
        wanted = any(entry.method in RING_PEERS for match in own for entry in match.entries)
        rivals = dist.new_group(ranks, timeout=timedelta(seconds=600)) if wanted and world > 1 else None
        if self.info.rank >= world:
            for _ in range(1 + (rivals is not None) + (world > 1)):  # for those that the members make: see there
                _members_only([self.info.rank], timedelta(hours=2))
            return None
        control = _members_only(ranks, timedelta(hours=2)) if world > 1 else None
        return Arena(
            Place(self.info.rank, group, self.device), self.alone, rivals, control,
            meshes=self.meshes, limit=self.program.limit, seed=self.program.seed,
        )  # fmt: skip

    def _too_late(self, match: Match) -> str:
        if self.program.budget is None:
            return ""
        left = self.program.budget - (time.monotonic() - self.began)
        need = estimate(match, self.rate, self.device.type)
        return f"needs about {need:.0f} s of the {max(0.0, left):.0f} s left" if need > left else ""


def estimate(match: Match, rate: float, device: str) -> float:
    """Seconds that a match takes, where a rank reaches `rate` operations a second."""
    a_round = sum(entry.case.flops / entry.case.world / rate for entry in match.entries)
    rounds = max(match.seconds, (1 + match.fewest) * a_round) if match.seconds else 0.0
    return OVERHEAD[device] * len(match.entries) + a_round + rounds


def _transports(program: Program) -> list[str]:
    return [entry.transport for match in program.matches for entry in match.entries if entry.method == OURS]


def _members_only(ranks: list[int], timeout: timedelta) -> dist.ProcessGroup:
    """A gloo group that its members alone make.

    Where the default group is NCCL's and bound to a device, torch has those beyond a new group split its communicator,
    even for a group of gloo's, whose members do not: everybody would hang. And members meet under a name that torch
    makes of how many groups they are in: all ranks stay in equally many.
    """
    made = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


@contextlib.contextmanager
def _ended(seconds: float | None) -> Iterator[None]:
    """A block that takes longer ends the process (status 1), which first tells stderr where all its threads are.

    Even while a library holds the interpreter's lock, as torch does while it splits a communicator. One at a time.
    """
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _summary(outcome: Outcome) -> str:
    rates = ", ".join(f"{name} {outcome.rate(name):.4g}" for name in outcome.timings)
    absent = f"; {len(outcome.missing)} missing" if outcome.missing else ""
    return f"{outcome.match.name}: TFLOP/s a rank: {rates}{absent} ({outcome.wall:.0f} s)"


def _nobody(text: str, done: int) -> None:
    """Progress of a rank that nobody listens to."""


def _sender(outbox: connection.Connection) -> Tell:
    return lambda text, done: outbox.send((text, done))
