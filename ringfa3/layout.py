"""Layouts: who holds which positions. Every layout deals sorted positions, as a few (start, stop, step) runs a rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ringfa3.mask import Mask

Run = tuple[int, int, int]  # start, stop, step of some positions, as range's; never empty
Ints32 = NDArray[np.int32]

# Chunks that `balanced` deals each rank. On 64K tokens of 16 to 1000 random documents, 16 leave worlds of 2 to 32
# within 0.14% of the mean; 32 chunks are hardly better (0.13%), and the kernels' tiles straddle twice as many seams.
CHUNKS_PER_RANK = 16
CHUNK_ROWS = 128  # below this many rows a chunk is less than one tile: fewer chunks, down to 4 a rank


class Layout(ABC):
    """A rule that deals the positions of a sequence to ranks; a value (hashable, equal by content).

    Another layout is a frozen dataclass that derives from this and implements `runs`; `deal` checks that every position
    goes to one rank.
    """

    name: ClassVar[str]

    @abstractmethod
    def runs(self, seqlen: int, world: int, rank: int) -> list[Run]:
        """The rank's positions as (start, stop, step): ranges, none empty, each beginning after the one before ends."""

    def positions(self, seqlen: int, world: int, rank: int) -> NDArray[np.int64]:
        """The rank's positions, ascending: int64 [n]."""
        runs = [np.arange(*run) for run in self.runs(seqlen, world, rank)]
        return np.concatenate(runs) if runs else np.arange(0)


@dataclass(frozen=True)
class Contiguous(Layout):
    """Rank r holds the r-th of `world` pieces; their lengths differ by at most one."""

    name = "contiguous"

    def runs(self, seqlen: int, world: int, rank: int) -> list[Run]:
        return _chunks([rank], world, seqlen)


@dataclass(frozen=True)
class Zigzag(Layout):
    """Of 2 * world pieces, within one row of each other, rank r holds the r-th and the r-th last: equal causal work."""

    name = "zigzag"

    def runs(self, seqlen: int, world: int, rank: int) -> list[Run]:
        return _chunks([rank, 2 * world - 1 - rank], 2 * world, seqlen)


@dataclass(frozen=True)
class Striped(Layout):
    """Rank r holds positions r, r + world, r + 2 * world, ...: equal work on every hop, for causal masks."""

    name = "striped"

    def runs(self, seqlen: int, world: int, rank: int) -> list[Run]:
        return [(rank, seqlen, world)] if rank < seqlen else []


@dataclass(frozen=True)
class Balanced(Layout):
    """Chunks dealt so that every rank has the same number of the mask's visible pairs, and of rows; see `balanced`."""

    mask: Mask
    name = "balanced"

    def runs(self, seqlen: int, world: int, rank: int) -> list[Run]:
        chunks, hands = _balance(self.mask, seqlen, world)
        return _chunks(hands[rank], chunks, seqlen)


def balanced(mask: Mask) -> Balanced:
    """The layout that gives every rank the same number of pairs visible under the mask, and the same number of rows.

    The sequence is cut into chunks (16 a rank; fewer where they would be shorter than 128 rows, down to 4), whose
    lengths differ by at most one row. Sorted by their visible pairs, they are dealt to and fro (to
    the last rank, back to the first, ...); then the ranks that have most and least swap chunks while that brings them
    together. So every rank gets the same number of chunks, and two ranks' pairs differ by less than the costliest
    chunk's (each round adds at most its own spread, and rounds are slices of a sorted list); usually by 0.1% (a window:
    by what its first, short rows lack, as no rank may have more rows). Deterministic.
    """
    return Balanced(mask)


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Contiguous(), Zigzag(), Striped())}


def resolve(layout: str | Layout, mask: Mask | None = None) -> Layout:
    """The layout of that name; "balanced" balances the mask given here.

    Raises:
        ValueError: no layout has that name, or "balanced" came without a mask.
    """
    if isinstance(layout, Layout):
        return layout
    if layout == Balanced.name and mask is not None:
        return Balanced(mask)
    if not isinstance(layout, str) or layout not in LAYOUTS:
        names = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"layout: wanted {names}, 'balanced' with a mask, or a Layout, got {layout!r}")
    return LAYOUTS[layout]


class Counts(Protocol):
    """How many of each rank's positions lie below a place."""

    def below(self, x: Ints32, ranks: list[int], offsets: Ints32, out: Ints32) -> None:
        """See `Dealing.below`."""
        ...


@dataclass(frozen=True, eq=False)
class Dealing:
    """The positions of one sequence as they lie on all ranks.

    Args:
        seqlen: number of positions.
        runs: per rank its (start, stop, step).
        lengths: per rank how many positions it holds.
        owner: int64 [runs], whose run it is, rank 0's first.
        ends: int32 [2, runs], the first and the last position of each run.
    """

    seqlen: int
    runs: tuple[tuple[Run, ...], ...]
    lengths: tuple[int, ...]
    owner: NDArray[np.int64]
    ends: Ints32
    _counts: Counts

    def positions(self, rank: int) -> Ints32:
        """The rank's positions, ascending: int32 [n]."""
        runs = [np.arange(*run, dtype=np.int32) for run in self.runs[rank]]
        return np.concatenate(runs) if runs else np.arange(0, dtype=np.int32)

    def below(self, x: Ints32, ranks: Sequence[int], offsets: Ints32, out: Ints32) -> None:
        """How many of each rank's positions lie below x, less an offset: a global bound becomes a local one.

        Args:
            x: int32 [n], ascending, in [0, seqlen].
            ranks: whose positions to count.
            offsets: int32 [ranks].
            out: int32 [ranks, n], written.
        """
        self._counts.below(x, list(ranks), offsets, out)


@lru_cache(maxsize=64)
def deal(layout: Layout, seqlen: int, world: int) -> Dealing:
    """Every rank's runs, checked: each position went to exactly one rank.

    Raises:
        ValueError: the layout loses a position, deals it twice, or runs of one rank overlap.
    """
    runs = tuple(tuple(layout.runs(seqlen, world, rank)) for rank in range(world))
    start, stop, step = np.array([run for hand in runs for run in hand], np.int32).reshape(-1, 3).T
    owner = np.repeat(np.arange(world), [len(hand) for hand in runs])
    size = -(-(stop - start) // step)
    last = start + (size - 1) * step
    ascending = ((start[1:] > last[:-1]) | (owner[1:] != owner[:-1])).all()
    counts: Counts
    if (step == 1).all():
        order = np.argsort(start)
        once = np.array_equal(np.append(start[order], seqlen), np.append(0, stop[order]))
        counts = _Pieces(start[order], stop[order], owner[order], world)
    else:
        dealt = np.zeros(seqlen, np.int8)
        for run in (run for hand in runs for run in hand):
            dealt[slice(*run)] += 1
        once = bool((dealt == 1).all()) and last.max() < seqlen
        counts = _Strides(start, step, size, owner, world)
    if not (once and ascending and (size > 0).all()):
        raise ValueError(
            f"layout: wanted each of {seqlen} positions on one rank, ascending, got otherwise from {layout}"
        )
    lengths = np.bincount(owner, size, world).astype(int).tolist()
    return Dealing(seqlen, runs, tuple(lengths), owner, np.stack((start, last)), counts)


class _Pieces:
    """Counts for runs of step 1: they cut the sequence into pieces, within which only the owner's count grows."""

    def __init__(self, start: Ints32, stop: Ints32, owner: NDArray[np.int64], world: int) -> None:
        if not start.size:  # no positions at all: one empty piece
            start, stop, owner = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int64)
        self.start = start
        self.grows = (owner == np.arange(world)[:, None]).astype(np.int32)  # [world, pieces]: is it the rank's own
        held = self.grows * (stop - start)
        self.before = np.cumsum(held, 1, dtype=np.int32) - held  # what each rank holds before the piece

    def below(self, x: Ints32, ranks: list[int], offsets: Ints32, out: Ints32) -> None:
        # x ascends: consecutive x lie in one piece, so that np.repeat (4x faster than take) spreads the tables over x
        rows = np.diff(np.searchsorted(x, self.start), append=x.size)
        out[:] = np.repeat(self.grows[ranks], rows, axis=1)
        out *= x - np.repeat(self.start, rows)
        out += np.repeat(self.before[ranks] - offsets[:, None], rows, axis=1)


class _Strides:
    """Counts for runs of any step, one pass over x for a rank's first runs, one for the second...: striped has one."""

    def __init__(self, start: Ints32, step: Ints32, size: Ints32, owner: NDArray[np.int64], world: int) -> None:
        hands = [owner == rank for rank in range(world)]
        most = max(int(hand.sum()) for hand in hands)
        self.table = np.zeros((3, world, most), np.int32)
        self.table[1] = 1
        for rank, hand in enumerate(hands):
            self.table[:, rank, : hand.sum()] = start[hand], step[hand], size[hand]

    def below(self, x: Ints32, ranks: list[int], offsets: Ints32, out: Ints32) -> None:
        out[:] = -offsets[:, None]
        for j in range(self.table.shape[2]):
            start, step, size = self.table[:, ranks, j, None]
            count = x + (step - 1 - start)
            count //= step[0, 0] if (step == step[0, 0]).all() else step  # numpy divides by a scalar far faster
            np.maximum(count, 0, out=count)
            np.minimum(count, size, out=count)
            out += count


def _chunks(numbers: Sequence[int], chunks: int, seqlen: int) -> list[Run]:
    """Runs of the numbered ones (ascending) of so many chunks, lengths within one of each other; neighbours joined."""
    runs: list[Run] = []
    for i in numbers:
        start, stop = i * seqlen // chunks, (i + 1) * seqlen // chunks
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop, 1)
        elif stop > start:
            runs.append((start, stop, 1))
    return runs


@lru_cache(maxsize=64)
def _balance(mask: Mask, seqlen: int, world: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """How many chunks there are, and which of them each rank gets."""
    rounds = min(CHUNKS_PER_RANK, max(4, seqlen // (CHUNK_ROWS * world)))
    chunks = rounds * world
    lo, hi = mask.bounds(np.arange(seqlen, dtype=np.int32), seqlen)
    hi -= lo
    total = np.zeros(seqlen + 1, np.int64)
    for row in np.atleast_2d(hi):
        total[1:] += row
    np.cumsum(total, out=total)
    pairs = np.diff(total[np.arange(chunks + 1) * seqlen // chunks])
    rows = np.argsort(-pairs, kind="stable").reshape(rounds, world)
    rows[1::2] = rows[1::2, ::-1].copy()
    return chunks, tuple(map(tuple, np.sort(_even_out(rows.T.copy(), pairs), 1).tolist()))


def _even_out(hands: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Chunks [world, rounds], swapped between the ranks that have most and least while that brings them together."""
    cost = pairs[hands]
    load = cost.sum(1)
    for _ in range(8 * len(load)):  # far more than the measured worlds needed before they stood within 0.1%
        most, least = int(load.argmax()), int(load.argmin())
        gap = int(load[most] - load[least])
        if gap * 1000 <= load[most]:
            break
        after = np.abs(gap - 2 * (cost[most][:, None] - cost[least]))  # the gap after each possible swap
        i, j = divmod(int(after.argmin()), cost.shape[1])
        if after[i, j] >= gap:
            break
        given = int(cost[most, i] - cost[least, j])
        load[most] -= given
        load[least] += given
        for x in (hands, cost):
            x[most, i], x[least, j] = x[least, j], x[most, i]
    return hands
