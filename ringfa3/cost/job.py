"""What is to be computed (Job) and how (Way), and what follows from both: who computes and needs how much."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ringfa3.hops import LONGEST, Needs, needs_of
from ringfa3.layout import Layout, deal, resolve
from ringfa3.mask import Mask
from ringfa3_kernels import Unsupported

TRANSPORTS = ("pull", "ring", "gather", "hierarchical", "ulysses")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Job:
    """One attention over a sharded sequence.

    Args:
        mask, seqlen: who sees what. A mask with documents per batch row says how many batch rows there are.
        world: ranks, one GPU each; hosts: on how many equal hosts they are, host 0's ranks first.
        Hq, Hkv, D: query heads, key/value heads, head_dim.
        dtype: "bf16", "fp16" or "fp32".
        batch: batch rows.
        backward: forward and backward, not forward alone.

    Raises:
        ValueError: an argument is wrong; names it, what was wanted and what came.
    """

    mask: Mask
    seqlen: int
    world: int
    Hq: int
    Hkv: int
    D: int
    dtype: str = "bf16"
    batch: int = 1
    hosts: int = 1
    backward: bool = False

    def __post_init__(self) -> None:
        for name in ("world", "Hq", "Hkv", "D", "batch", "hosts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")
        if not 1 <= self.seqlen < LONGEST:
            raise ValueError(f"seqlen: wanted one in [1, 2**30), got {self.seqlen}")
        if self.Hq % self.Hkv:
            raise ValueError(f"Hq: wanted a multiple of Hkv, got {self.Hq} and {self.Hkv}")
        if self.world % self.hosts:
            raise ValueError(f"hosts: wanted a divisor of the {self.world} ranks, got {self.hosts}")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype: wanted {', '.join(ITEMSIZE)}, got {self.dtype!r}")
        if self.mask.batch not in (None, self.batch):
            raise ValueError(f"batch: wanted the {self.mask.batch} rows of the mask's documents, got {self.batch}")
        self.mask.check(self.seqlen)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def operations(self) -> float:
        """Of all ranks together: 4 a visible pair, head and head_dim forward; 2.5 times that backward."""
        forward = 4.0 * _pairs(self.mask, self.seqlen) * self._copies * self.Hq * self.D
        return forward * (3.5 if self.backward else 1.0)

    @property
    def _copies(self) -> int:
        """How often the mask's pairs count: once a batch row, unless it says them row by row."""
        return self.batch if self.mask.batch is None else 1


@dataclass(frozen=True)
class Way:
    """How a job is done: a 2-D mesh of `ulysses` x the other ranks, which use the transport.

    Args:
        transport: of the ring axis, one of TRANSPORTS; "ulysses": there is no ring axis.
        layout: that deals positions over the ring axis.
        ulysses: ranks of the all-to-all over heads, neighbours on one host first; 1: none ("ulysses" alone takes all).
        depth: buffers of shards under way, for pull and (at least 2) ring and hierarchical.
    """

    transport: str
    layout: str | Layout = "zigzag"
    ulysses: int = 1
    depth: int = 3

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport: wanted {', '.join(TRANSPORTS)}, got {self.transport!r}")
        if self.ulysses < 1 or (self.transport == "ulysses" and self.ulysses > 1):
            raise ValueError(f"ulysses: wanted 1 or more ranks beside another transport, got {self.ulysses}")
        if self.depth < 2:
            raise ValueError(f"depth: wanted at least 2 buffers, one to read and one to fill, got {self.depth}")

    @property
    def layout_name(self) -> str:
        return self.layout if isinstance(self.layout, str) else self.layout.name

    def mesh(self, job: Job) -> tuple[int, int]:
        """(ulysses, ring) ranks.

        Raises:
            Unsupported: the job cannot be done this way; says why.
        """
        u = job.world if self.transport == "ulysses" else self.ulysses
        if job.world % u:
            raise Unsupported(f"ulysses: wanted a divisor of the {job.world} ranks, got {u}")
        if job.Hq % u:
            raise Unsupported(f"ulysses: wanted a divisor of the {job.Hq} query heads, got {u}")
        ring, a_host = job.world // u, job.world // job.hosts
        if 1 < u < a_host and a_host % u:
            raise Unsupported(f"ulysses: wanted a divisor of the {a_host} ranks of a host, got {u}")
        if self.transport == "pull" and ring > max(1, a_host // u):
            raise Unsupported(f"pull: wanted the ring axis's {ring} ranks on one host; across hosts use hierarchical")
        if self.transport == "hierarchical" and (job.hosts == 1 or u >= a_host or ring == 1):
            got = f"{job.hosts} host(s) of {a_host} ranks, mesh {u} x {ring}"
            raise Unsupported(f"hierarchical: wanted a ring axis over hosts, several of its ranks on each, got {got}")
        return u, ring

    def describe(self, job: Job) -> str:
        """For people: "pull, zigzag" or "2 x 4 ulysses x ring, striped"."""
        u, ring = self.mesh(job)
        if ring == 1:
            return "ulysses" if u > 1 else "one GPU"
        mesh = f"ulysses {u} x {self.transport} {ring}" if u > 1 else self.transport
        return f"{mesh}, {self.layout_name}"


@dataclass(frozen=True, eq=False)
class Work:
    """Who computes and needs how much of whose shard, summed over batch rows; [rank][source].

    Args:
        pairs: int64, visible (row, key) pairs.
        computed: int64, pairs of the tiles that a kernel computes, from the first to the last key that a tile sees.
        deepest: int32, keys that the row with most keys sees.
        rows: that each rank holds.
        needs: as `Plan.needs`.
    """

    pairs: NDArray[np.int64]
    computed: NDArray[np.int64]
    deepest: NDArray[np.int32]
    rows: tuple[int, ...]
    needs: Needs


@lru_cache(maxsize=64)
def work(mask: Mask, layout: Layout, seqlen: int, world: int, tile: int = 128) -> Work:
    """The exact work of every rank and hop: each position's interval, counted in each shard. O(seqlen * world).

    Args:
        tile: rows, and keys, of a kernel's tile.
    """
    dealing = deal(layout, seqlen, world)
    bounds = _bounds(mask, seqlen)
    pairs, computed = np.zeros((2, world, world), np.int64)
    tiles = [_tiles(dealing.positions(rank), tile) for rank in range(world)]
    deepest = np.zeros((world, world), np.int32)
    zero = np.zeros(1, np.int32)
    begin, end = (np.empty((1, seqlen), np.int32) for _ in range(2))
    for lo, hi in zip(*bounds, strict=True):
        for source in range(world):
            dealing.below(lo, [source], zero, begin)
            dealing.below(hi, [source], zero, end)
            for rank, (first, last, rows) in enumerate(tiles):
                left, right = begin[0, first] // tile, -(-end[0, last] // tile)
                seen_ends = np.where(end[0, last] > begin[0, first], right - left, 0)
                computed[rank, source] += (seen_ends.astype(np.int64) * rows).sum() * tile
            seen = np.subtract(end, begin, out=end)[0]
            for rank, hand in enumerate(dealing.runs):
                for run in hand:
                    part = seen[slice(*run)]
                    pairs[rank, source] += part.sum(dtype=np.int64)
                    deepest[rank, source] = max(deepest[rank, source], part.max(initial=0))
    return Work(pairs, computed, deepest, dealing.lengths, needs_of(mask, dealing, dealing))


def dealt(job: Job, layout: str | Layout, ring: int, tile: int) -> Work:
    """The work of the ring axis's ranks, pairs of all batch rows."""
    found = work(job.mask, resolve(layout, job.mask), job.seqlen, ring, tile)
    return Work(found.pairs * job._copies, found.computed * job._copies, found.deepest, found.rows, found.needs)


def _tiles(positions: NDArray[np.int32], tile: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """The first and the last position of each tile of a rank's rows, and how many it has."""
    starts = np.arange(0, positions.size, tile)
    stops = np.minimum(starts + tile, positions.size)
    return positions[starts], positions[stops - 1], stops - starts


@lru_cache(maxsize=16)
def _bounds(mask: Mask, seqlen: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """lo and hi of every position, [B or 1, S]."""
    lo, hi = mask.bounds(np.arange(seqlen, dtype=np.int32), seqlen)
    return np.atleast_2d(lo), np.atleast_2d(hi)


@lru_cache(maxsize=64)
def _pairs(mask: Mask, seqlen: int) -> int:
    return mask.pairs(seqlen)
