"""Pages: which rank keeps which token of which sequence, and in which slot of its cache. Accounting only, no tensors.

Every rank holds an equal Pages and does the same to it in the same order, so that all of them know everybody's tables
and a full rank is seen by all. Local keys ascend by position: a sequence only grows at its end, or is cut there.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ringfa3.inference.share import Share
from ringfa3.layout import Run, deal, resolve

Ints32 = NDArray[np.int32]
Ints64 = NDArray[np.int64]
Copies = tuple[tuple[int, int], ...]  # (source page, destination page)

_NONE: Ints64 = np.zeros(0, np.int64)  # what most ranks get of one token


class CacheFull(RuntimeError):
    """A rank has fewer free pages than an append needs; nothing was changed, on any rank.

    Args:
        rank: the first rank that lacks pages.
        wanted: pages that the append needs there.
        free: pages that are free there.
    """

    def __init__(self, rank: int, wanted: int, free: int) -> None:
        self.rank, self.wanted, self.free = rank, wanted, free
        super().__init__(f"cache full on rank {rank}: wanted {wanted} more pages, {free} are free")

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheFull, (self.rank, self.wanted, self.free)


@dataclass(frozen=True, eq=False)
class Placed:
    """Where appended tokens go.

    Args:
        start: global position of the first.
        count: how many.
        positions: per rank int64 [n], the global positions that it keeps, ascending.
        slots: per rank int64 [n], where: page * page_size + offset.
        copies: per rank (source, destination) pages, to be copied in all layers before anything is written: all those
            of one `append_all` before any of its tokens. No destination is a source there; the order does not matter.
    """

    start: int
    count: int
    positions: tuple[Ints64, ...]
    slots: tuple[Ints64, ...]
    copies: tuple[Copies, ...]


class Pages:
    """The page tables of all ranks.

    Tokens are dealt so that no rank fills first. With the ranks rotated by start + sequence, appends of up to
    2 * world - 1 tokens go round one by one (position p to rank (p + sequence) % world) and longer ones as zigzag,
    which is equal work in a causal prefill. Rotating by the start too evens out, over the chunks of a long prompt, what
    a chunk's length leaves unequal.

    A fork shares its parent's pages. Who appends to a page that is partly filled and shared gets a copy of it.

    Where no layer sees further back than `reach`, `trim` forgets what no later token will see, in whole pages. A rank's
    table, runs and local counts are of what it keeps; lengths and positions count from the sequence's first token.

    Args:
        world: number of ranks.
        pages: pages on each of them.
        page_size: tokens in a page.
        reach: how many positions before its own a token sees at most, in any layer; None: all.
    """

    def __init__(self, world: int, pages: int, page_size: int, *, reach: int | None = None) -> None:
        for name, value in (("world", world), ("pages", pages), ("page_size", page_size)):
            _check_int(name, value, 1)
        if reach is not None:
            _check_int("reach", reach, 0)
        self.world, self.pages, self.page_size, self.reach = world, pages, page_size, reach
        self._sequences: dict[int, list[Share]] = {}  # a share per rank
        self._free = [list(range(pages - 1, -1, -1)) for _ in range(world)]  # stacks: page 0 goes first
        self._references = [np.zeros(pages, np.int32) for _ in range(world)]  # tables that hold the page

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences there are, oldest first."""
        return tuple(self._sequences)

    def create(self, sequence: int) -> None:
        """Begin an empty sequence; takes no pages. Raises ValueError where there is one of that number."""
        self._new(sequence)
        self._sequences[sequence] = [Share() for _ in range(self.world)]

    def fork(self, parent: int, child: int) -> None:
        """Begin a sequence with the parent's tokens, in the same pages; takes none. Raises ValueError as `create`."""
        shares = self._shares(parent)
        self._new(child)
        for share, references in zip(shares, self._references, strict=True):
            references[_ints(share.table)] += 1
        self._sequences[child] = [share.copy() for share in shares]

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other one holds are free again. Raises ValueError for an unknown one."""
        for rank, share in enumerate(self._shares(sequence)):
            self._give_back(rank, share.table)
        del self._sequences[sequence]

    def trim(self, sequence: int) -> None:
        """Forget what no later token of the sequence will see; whole pages of it are given back.

        The sequence cannot be cut much shorter after that, see `cuts`. Raises ValueError for an unknown one.
        """
        shares = self._shares(sequence)
        if self.reach is None:
            return
        seen = self.length(sequence) - self.reach
        for rank, share in enumerate(shares):
            blocks = share.below(seen) // self.page_size
            if blocks > 0:
                share.drop(blocks * self.page_size)
                self._give_back(rank, share.table[:blocks])
                del share.table[:blocks]

    def cuts(self, sequence: int, length: int, *, grown: int = 0) -> bool:
        """Whether all that the tokens after the first `length` will see is kept, so that a truncation may go there.

        Args:
            grown: asked of the sequence as it will be with so many tokens more, and trimmed.

        Raises:
            ValueError: the sequence is unknown.
        """
        floor = max(share.floor for share in self._shares(sequence))
        if self.reach is None or length == 0:
            return True
        if grown:
            floor = max(floor, self.length(sequence) + grown - self.reach)
        return floor <= max(0, length - self.reach)

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens; whole pages past them are given back.

        Raises:
            ValueError: the sequence is unknown, or shorter than that, or what would be seen then is forgotten.
        """
        shares = self._shares(sequence)
        held = self.length(sequence)
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= held:
            raise ValueError(f"length: wanted at most the {held} tokens of sequence {sequence}, got {length!r}")
        if length < held and not self.cuts(sequence, length):
            raise ValueError(
                f"length: wanted 0, or the {held} tokens of sequence {sequence} less a few: what token {length} sees "
                f"is forgotten, got {length}"
            )
        for rank, share in enumerate(shares):
            share.truncate(length)
            kept = -(-share.length // self.page_size)
            if kept < len(share.table):
                self._give_back(rank, share.table[kept:])
                del share.table[kept:]

    def append(self, sequence: int, count: int) -> Placed:
        """Find a place for the next `count` tokens.

        Raises:
            CacheFull: some rank has too few free pages; nothing was changed.
            ValueError: the sequence is unknown, or count less than 1.
        """
        return self.append_all({sequence: count})[sequence]

    def append_all(self, appends: Mapping[int, int]) -> dict[int, Placed]:
        """Find places for the next tokens of several sequences, or (CacheFull) for none.

        Args:
            appends: tokens by sequence.
        """
        hands = {sequence: self._deal(sequence, count) for sequence, count in appends.items()}
        for rank, wanted in enumerate(self._wanted(hands)):
            if wanted > len(self._free[rank]):
                raise CacheFull(rank, wanted, len(self._free[rank]))
        return {sequence: self._place(sequence, appends[sequence], hand) for sequence, hand in hands.items()}

    def fits(self, appends: Mapping[int, int]) -> bool:
        """Whether `append_all` of these (tokens by sequence) would succeed. Raises ValueError as it does."""
        hands = {sequence: self._deal(sequence, count) for sequence, count in appends.items()}
        return all(wanted <= len(free) for wanted, free in zip(self._wanted(hands), self._free, strict=True))

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, on all ranks together, with those that are forgotten."""
        length = 0
        for share in self._shares(sequence):  # asked thrice for every token: a sum() takes twice as long
            length += share.length + share.dropped
        return length

    def used(self, rank: int) -> int:
        """Pages that some sequence holds on that rank."""
        return self.pages - len(self._free[rank])

    def free_pages(self, rank: int) -> int:
        """Pages that nobody holds on that rank."""
        return len(self._free[rank])

    def table(self, rank: int, sequence: int) -> list[int]:
        """The pages with that rank's tokens of a sequence, in order; the last may be partly filled."""
        return self._shares(sequence)[rank].table.tolist()

    def runs(self, rank: int, sequence: int) -> list[Run]:
        """The positions that rank keeps, as ascending (start, stop, step)."""
        share = self._shares(sequence)[rank]
        runs = zip(share.starts, share.sizes, share.steps, strict=True)
        return [(start, start + (size - 1) * step + 1, step) for start, size, step in runs]

    def positions(self, rank: int, sequence: int) -> Ints64:
        """The positions that rank keeps, ascending: int64 [n]. Without those that are forgotten."""
        return _positions(self.runs(rank, sequence))

    def local_length(self, rank: int, sequence: int) -> int:
        """How many tokens of a sequence that rank keeps."""
        return self._shares(sequence)[rank].length

    def below(self, rank: int, sequence: int, positions: ArrayLike) -> Ints32:
        """How many of the positions that rank keeps lie below each of these: a global bound becomes a local one.

        Args:
            positions: ints, any shape and order.

        Returns:
            int32, that shape.
        """
        share = self._shares(sequence)[rank]
        x = np.asarray(positions, np.int64)
        if x.size < 32:  # a bisection costs 0.5 us, arrays of the runs 10 us and more
            return np.array([share.below(each) for each in x.ravel().tolist()], np.int32).reshape(x.shape)
        starts, steps, sizes, before = (
            np.array([0, *column], np.int64) for column in (share.starts, share.steps, share.sizes, share.before)
        )
        steps[0] = 1  # an empty run before the first, for positions below it
        run = np.searchsorted(starts[1:], x)
        inside = (x - starts[run] + steps[run] - 1) // steps[run]
        return (before[run] + np.clip(inside, 0, sizes[run])).astype(np.int32)

    def below_each(self, rank: int, sequences: Sequence[int], positions: ArrayLike) -> Ints32:
        """`below` of a decode batch: int32 [B, n] for positions [B, n], row b's of the b-th sequence."""
        x = np.asarray(positions, np.int64)
        rows = zip(sequences, x.tolist(), strict=True)
        counts = [self._shares(sequence)[rank].below(each) for sequence, row in rows for each in row]
        return np.array(counts, np.int32).reshape(x.shape)

    def local_lengths(self, rank: int, sequences: Sequence[int]) -> Ints32:
        """How many tokens of each of these that rank keeps: int32 [B]."""
        return np.array([self._shares(sequence)[rank].length for sequence in sequences], np.int32)

    def block_tables(self, rank: int, sequences: Sequence[int], width: int | None = None) -> Ints32:
        """Their tables on that rank, filled up with -1: int32 [B, width].

        Args:
            width: blocks a row; None: those of the longest table.

        Raises:
            ValueError: a sequence is unknown, or has more blocks than width.
        """
        tables = [self._shares(sequence)[rank].table for sequence in sequences]
        longest = max(map(len, tables), default=0)
        width = longest if width is None else width
        if width < longest:
            raise ValueError(f"width: wanted at least the longest table's {longest} blocks, got {width}")
        blocks = np.full((len(tables), width), -1, np.int32)
        for row, table in zip(blocks, tables, strict=True):
            row[: len(table)] = _ints(table)
        return blocks

    def blocks(self, sequences: Sequence[int]) -> int:
        """Blocks of the longest table of these sequences on any rank: alike on all.

        Raises:
            ValueError: a sequence is unknown.
        """
        return max((len(share.table) for sequence in sequences for share in self._shares(sequence)), default=0)

    def audit(self) -> None:
        """Check the books. Raises RuntimeError that names what does not add up. Costs O(pages + runs)."""
        for rank, (free, references) in enumerate(zip(self._free, self._references, strict=True)):
            counted = np.zeros(self.pages, np.int64)
            for sequence, shares in self._sequences.items():
                share = shares[rank]
                share.audit(f"sequence {sequence} on rank {rank}", self.page_size)
                np.add.at(counted, _ints(share.table), 1)
            if not np.array_equal(counted, references):
                page = int(np.flatnonzero(counted != references)[0])
                raise RuntimeError(
                    f"page {page} of rank {rank}: {counted[page]} tables hold it, {references[page]} are counted"
                )
            if sorted(free) != np.flatnonzero(counted == 0).tolist():
                raise RuntimeError(f"rank {rank}: its free pages are not those that no table holds")
        for sequence, shares in self._sequences.items():
            held = np.sort(np.concatenate([self.positions(rank, sequence) for rank in range(self.world)]))
            length, floor = self.length(sequence), max(share.floor for share in shares)
            if not np.array_equal(held[held >= floor], np.arange(min(floor, length), length)):
                raise RuntimeError(f"sequence {sequence}: its ranks do not keep each position once")
            if (np.diff(held) == 0).any() or held.size != length - sum(share.dropped for share in shares):
                raise RuntimeError(f"sequence {sequence}: what its ranks have forgotten does not add up")
            if floor > 0 and (self.reach is None or floor > length - self.reach):
                raise RuntimeError(f"sequence {sequence}: what its next token sees is forgotten, from {floor} down")

    def _new(self, sequence: int) -> None:
        _check_int("sequence", sequence, 0)
        if sequence in self._sequences:
            raise ValueError(f"sequence: wanted a number not in use, got {sequence}")

    def _shares(self, sequence: int) -> list[Share]:
        try:
            return self._sequences[sequence]
        except (KeyError, TypeError):
            raise ValueError(
                f"sequence: wanted one of the {len(self._sequences)} there are, got {sequence!r}"
            ) from None

    def _deal(self, sequence: int, count: int) -> list[tuple[int, int, tuple[Run, ...]]]:
        """(rank, tokens, their runs) for each rank that gets some of the next tokens."""
        start = self.length(sequence)
        if count == 1:  # decode: every microsecond is paid once a token and sequence
            return [((start + sequence) % self.world, 1, ((start, start + 1, 1),))]
        _check_int("count", count, 1)
        turn, stop = (start + sequence) % self.world, start + count
        if count < 2 * self.world:
            return [
                ((turn + i) % self.world, -(-(count - i) // self.world), ((start + i, stop, self.world),))
                for i in range(min(count, self.world))
            ]
        dealing = deal(resolve("zigzag"), count, self.world)
        return [
            ((turn + i) % self.world, size, tuple((start + a, start + b, step) for a, b, step in runs))
            for i, (size, runs) in enumerate(zip(dealing.lengths, dealing.runs, strict=True))
        ]

    def _wanted(self, hands: Mapping[int, list[tuple[int, int, tuple[Run, ...]]]]) -> list[int]:
        """Pages that all these together need, by rank."""
        wanted = [0] * self.world
        tails: Counter[tuple[int, int]] = Counter()  # (rank, page): sequences that go on in that shared page
        for sequence, hand in hands.items():
            shares = self._sequences[sequence]
            for rank, size, _ in hand:
                share = shares[rank]
                room = len(share.table) * self.page_size - share.length
                if size > room:
                    wanted[rank] += -(-(size - room) // self.page_size)
                if room and self._references[rank][share.table[-1]] > 1:
                    tails[rank, share.table[-1]] += 1
        for (rank, page), count in tails.items():  # the last one that holds it needs no copy
            wanted[rank] += min(count, int(self._references[rank][page]) - 1)
        return wanted

    def _place(self, sequence: int, count: int, hand: list[tuple[int, int, tuple[Run, ...]]]) -> Placed:
        """Take the pages, which are there, and enter the tokens."""
        shares = self._sequences[sequence]
        start = hand[0][2][0][0]  # whoever comes first gets the first token
        positions, slots = [_NONE] * self.world, [_NONE] * self.world
        copies: list[Copies] = [()] * self.world
        for rank, size, runs in hand:
            share = shares[rank]
            table, first = share.table, share.length
            if first % self.page_size and self._references[rank][table[-1]] > 1:
                source = table[-1]
                self._references[rank][source] -= 1
                table[-1] = self._take(rank)
                copies[rank] = ((source, table[-1]),)
            while len(table) * self.page_size < first + size:
                table.append(self._take(rank))
            for run in runs:
                share.extend(run)
            if size == 1:
                positions[rank] = np.array((runs[0][0],), np.int64)
                slots[rank] = np.array((table[-1] * self.page_size + first % self.page_size,), np.int64)
                continue
            positions[rank] = _positions(runs)
            block, offset = np.divmod(np.arange(first, first + size), self.page_size)
            slots[rank] = _ints(table)[block] * np.int64(self.page_size) + offset
        return Placed(start, count, tuple(positions), tuple(slots), tuple(copies))

    def _take(self, rank: int) -> int:
        page = self._free[rank].pop()
        self._references[rank][page] = 1
        return page

    def _give_back(self, rank: int, table: array[int]) -> None:
        pages, references = _ints(table), self._references[rank]
        references[pages] -= 1
        self._free[rank] += pages[references[pages] == 0][::-1].tolist()


def _ints(table: array[int]) -> Ints32:
    """A view of a table; gone before the table may grow again (a viewed array refuses that)."""
    return np.frombuffer(table, np.int32) if table else np.zeros(0, np.int32)


def _positions(runs: Iterable[Run]) -> Ints64:
    pieces = [np.arange(*run, dtype=np.int64) for run in runs]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: wanted an int, at least {least}, got {value!r}")
