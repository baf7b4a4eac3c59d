"""A chunk of a sequence over the sharded cache: whose rows need which of whose cached keys, and what should travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ringfa3.cost.machine import Machine
from ringfa3.hops import Needs, hops_of, needs_of
from ringfa3.inference.pages import Pages, Placed
from ringfa3.inference.ranks import Ranks
from ringfa3.layout import Dealing, Ints32, Layout, Run, deal
from ringfa3.mask import Mask
from ringfa3.plan import Plan
from ringfa3_kernels import Visible

Way = Literal["pass-kv", "pass-q"]
WAYS = ("auto", "pass-kv", "pass-q")


@dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk of a sequence, in the cache already, under one mask: who holds what and needs what, alike on all ranks.

    Args:
        mask: who sees what.
        part: the chunk's positions, counted from its first, by rank.
        rows: the same positions, counted from the sequence's first.
        keys: the cached positions, by rank, without those skipped.
        skipped: per rank, how many of its first keys no row sees; whole pages, which need not be read.
        needs: needs[r][s], the slice of rank s's keys that rank r's rows see; None where they see none.
    """

    mask: Mask
    part: Dealing
    rows: Dealing
    keys: Dealing
    skipped: tuple[int, ...]
    needs: Needs

    @classmethod
    def of(cls, pages: Pages, sequence: int, placed: Placed, mask: Mask) -> Chunk:
        """The chunk that `placed` appended last to this sequence."""
        world, start, total = pages.world, placed.start, placed.start + placed.count
        first = mask.bounds(np.array([start]), total)[0]
        skipped = tuple(
            int(pages.below(rank, sequence, first)[0]) // pages.page_size * pages.page_size for rank in range(world)
        )
        lengths = tuple(pages.local_length(rank, sequence) - skipped[rank] for rank in range(world))
        counts = _Counts(pages, sequence, skipped)
        none = np.zeros((2, 0), np.int32)
        keys = Dealing(total, ((),) * world, lengths, none[0].astype(np.int64), none, counts)
        part = deal(Placement(tuple(_runs(x - start) for x in placed.positions)), placed.count, world)
        runs = tuple(tuple((a + start, b + start, step) for a, b, step in hand) for hand in part.runs)
        rows = Dealing(total, runs, part.lengths, part.owner, part.ends + np.int32(start), counts)
        return cls(mask, part, rows, keys, skipped, needs_of(mask, rows, keys))

    def plan(self, ranks: Ranks, device: torch.device) -> Plan:
        """For pass-KV: `ring_attention` of the chunk's rows over the ranks' keys, in one rank's view."""
        positions, hops = hops_of(self.mask, self.rows, self.keys, self.needs[ranks.rank], ranks.rank, device)
        return Plan(
            self.mask, Placement(self.part.runs), self.part.seqlen, sum(self.keys.lengths), ranks.world, ranks.rank,
            self.rows.lengths, self.keys.lengths, positions, hops, self.needs, self.part, ranks.group,
        )  # fmt: skip

    def local(self, rank: int, device: torch.device) -> tuple[slice, Visible] | None:
        """For pass-Q: the slice of a rank's keys that the chunk's rows see, and what each of them, in the order of
        positions, sees of it; None where they see none."""
        hulls = [needs[rank] for needs in self.needs]
        seen = [(hull.start, hull.stop) for hull in hulls if hull is not None]
        if not seen:
            return None
        hull = slice(min(a for a, _ in seen), max(b for _, b in seen))
        world = len(self.needs)
        start, total = self.rows.seqlen - self.part.seqlen, self.rows.seqlen
        everything = Dealing(
            total, (((start, total, 1),),) * world, (total - start,) * world, self.rows.owner, self.rows.ends,
            self.rows._counts,  # not asked
        )  # fmt: skip
        wanted = tuple(hull if source == rank else None for source in range(world))
        (hop,) = hops_of(self.mask, everything, self.keys, wanted, rank, device)[1]
        return hull, hop.visible


def cheaper(chunk: Chunk, *, heads: int, kv_heads: int, head_dim: int, itemsize: int, machine: Machine) -> Way:
    """Whether keys and values or queries should travel: which of the two the slowest rank is done with first.

    With n rows and K needed keys on a rank (K' of them from other ranks), N rows in the chunk, D = head_dim and
    e = itemsize, in bytes that one rank receives and operations that it does a layer:

    - pass-KV receives 2 Hkv D e K' beside the computation of 4 D Hq n K: the longer of both counts.
    - pass-Q receives (N - n) Hq D e of queries, then computes 4 D Hq times the pairs of all rows and its own keys, then
      receives 4 Hq (D + 1) n (fp32 out and lse) from every other rank with keys that its rows see: their sum counts.

    So pass-KV wins where the chunk is long (its transfers hide behind the computation), pass-Q where few new tokens
    follow a long cached context. The paper's rule of thumb, pass-Q where new tokens are a smaller share of all than
    2 Hkv / Hq, has no way home and no speeds in it. Keys are counted by the hulls of `Chunk.needs`, every rank comes to
    the same answer, and the machine's figures were measured (`Machine.sources`).

    Args:
        chunk: of a world of at least 2.
        heads, kv_heads, head_dim: of the layer: Hq, Hkv, D.
        itemsize: bytes of a number of q, k and v.
        machine: whose kernels and links.
    """
    rows, world = chunk.rows.lengths, len(chunk.needs)
    held = np.array([[0 if hull is None else hull.stop - hull.start for hull in needs] for needs in chunk.needs])
    others = ((held > 0) & ~np.eye(world, dtype=bool)).sum(1).tolist()  # ranks from which a rank's rows get Partials
    pull, link = machine.link("pull", world), machine.link("sendrecv", world)
    pair = 4.0 * head_dim * heads
    pass_kv = max(
        max(
            machine.kernel_seconds(pair * rows[r] * held[r].sum(), head_dim),
            sum(pull.seconds(2 * kv_heads * head_dim * itemsize * held[r, s]) for s in range(world) if s != r),
        )
        for r in range(world)
    )
    pass_q = (
        max(link.seconds(heads * head_dim * itemsize * (sum(rows) - n)) for n in rows)
        + max(machine.kernel_seconds(pair * np.dot(rows, held[:, r]), head_dim) for r in range(world))
        + max(link.seconds(4 * heads * (head_dim + 1) * n * senders) for n, senders in zip(rows, others, strict=True))
    )
    return "pass-q" if pass_q < pass_kv else "pass-kv"


@dataclass(frozen=True)
class Placement(Layout):
    """Where the positions of a chunk were placed.

    Args:
        hands: per rank its (start, stop, step).
    """

    hands: tuple[tuple[Run, ...], ...]
    name: ClassVar[str] = "placed"

    def runs(self, seqlen: int, world: int, rank: int) -> list[Run]:
        return list(self.hands[rank])


class _Counts:
    """For a Dealing of keys: how many of each rank's cached positions, those skipped left out, lie below a position."""

    def __init__(self, pages: Pages, sequence: int, skipped: tuple[int, ...]) -> None:
        self.pages, self.sequence, self.skipped = pages, sequence, skipped

    def below(self, x: Ints32, ranks: list[int], offsets: Ints32, out: Ints32) -> None:
        for row, rank, offset in zip(out, ranks, offsets, strict=True):
            row[:] = self.pages.below(rank, self.sequence, x) - (self.skipped[rank] + offset)


def _runs(positions: NDArray[np.int64]) -> tuple[Run, ...]:
    """Ascending positions as (start, stop, step), as few as one step each allows."""
    runs: list[Run] = []
    i, n = 0, positions.size
    gaps = np.diff(positions)
    while i < n:
        step = int(gaps[i]) if i + 1 < n else 1
        others = np.flatnonzero(gaps[i:] != step)
        stop = i + 1 + (int(others[0]) if others.size else n - 1 - i)
        runs.append((int(positions[i]), int(positions[stop - 1]) + 1, step))
        i = stop
    return tuple(runs)
