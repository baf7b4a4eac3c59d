"""Hops: which keys each rank needs of each other's shard, and what each of its rows sees of them."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringfa3.layout import Dealing, Ints32
from ringfa3.mask import Mask
from ringfa3_kernels import Visible

Needs = tuple[tuple[slice | None, ...], ...]

LONGEST = 2**30  # positions, and sums of two of them, must fit int32


def checked_length(name: str, value: Any) -> int:
    """The length as an int. To be done before a cache is asked, which takes 64.0 and True for 64 and 1.

    Raises:
        ValueError: not an integer, or out of range; says so by this name.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= operator.index(value) < LONGEST:
        raise ValueError(f"{name}: wanted an integer in [0, 2**30), got {value!r}")
    return operator.index(value)


@dataclass(frozen=True, eq=False)
class Hop:
    """One source's share of this rank's keys.

    Args:
        source: rank whose shard the keys are from.
        keys: which of its keys, a slice of local indices; the plan's `needs[rank][source]`.
        visible: what each of this rank's rows sees of that slice (index 0 is its first key), on the plan's device.
    """

    source: int
    keys: slice
    visible: Visible


def needs_of(mask: Mask, rows: Dealing, keys: Dealing) -> Needs:
    """Hulls of what each rank sees of each source, from the first and the last position of each of its runs.

    Bounds ascend, so a run's rows see nothing outside [lo(first), hi(last)); a run that sees nothing of a source does
    not widen the hull. O(runs * world), whatever the number of rows.
    """
    world = len(rows.lengths)
    points = np.unique(rows.ends)
    zero = np.zeros(world, np.int32)
    local = []
    for bound, end in zip(_bounds(mask, points, rows, keys), rows.ends, strict=True):
        counts = np.zeros((bound.shape[0], world, points.size), np.int32)
        for row, count in zip(bound, counts, strict=True):
            keys.below(row, range(world), zero, count)
        local.append(counts[:, :, np.searchsorted(points, end)])  # [B, source, run]
    begin, end = local
    empty = begin >= end
    begin = np.where(empty, LONGEST, begin).min(0)
    end = np.where(empty, 0, end).max(0)
    hands = np.cumsum([0, *map(len, rows.runs)]).tolist()
    needs: list[tuple[slice | None, ...]] = []
    for a, b in itertools.pairwise(hands):
        hull = zip(begin[:, a:b].min(1, initial=LONGEST).tolist(), end[:, a:b].max(1, initial=0).tolist(), strict=True)
        needs.append(tuple(slice(i, j) if i < j else None for i, j in hull))
    return tuple(needs)


def hops_of(
    mask: Mask, rows: Dealing, keys: Dealing, needs: tuple[slice | None, ...], rank: int, device: torch.device
) -> tuple[Tensor, tuple[Hop, ...]]:
    """The rank's positions on the device, and its hops; everything goes there in one transfer."""
    world = len(rows.lengths)
    order = [(rank - distance) % world for distance in range(world)]
    wanted = {source: hull for source in order if (hull := needs[source]) is not None}
    sources = list(wanted)
    positions = rows.positions(rank)
    bounds = _bounds(mask, positions, rows, keys)
    n, B = positions.size, bounds[0].shape[0]
    block = -(-B * n // 4) * 4  # 16 bytes: Triton compiles another kernel for pointers that are less aligned
    size = 2 * len(sources) * block
    packed = torch.empty(size + n, dtype=torch.int32, pin_memory=device.type == "cuda")
    host = packed.numpy()
    host[size:] = positions
    local = host[:size].reshape(2, len(sources), block)[..., : B * n].reshape(2, len(sources), B, n)
    begins = np.array([hull.start for hull in wanted.values()], np.int32)
    sizes = np.array([hull.stop for hull in wanted.values()], np.int32) - begins
    if sources:
        for bound, out in zip(bounds, local, strict=True):
            for b in range(B):
                keys.below(bound[b], sources, begins, out[:, b])
        np.maximum(local, 0, out=local)
        np.minimum(local, sizes[:, None, None], out=local)
    sent = packed.to(device, non_blocking=True)
    there = sent[:size].view(2, len(sources), block)[..., : B * n]
    if mask.batch is not None:
        there = there.unflatten(-1, (B, n))
    hops = tuple(
        Hop(source, hull, Visible(there[0, i], there[1, i], _kind(local[:, i], int(sizes[i]))))
        for i, (source, hull) in enumerate(wanted.items())
    )
    return sent[size:].long(), hops


def widened(keys: slice | None, block: int, length: int) -> slice | None:
    """The smallest slice that holds these keys of a shard and ends at multiples of `block` keys, or with the shard."""
    if keys is None:
        return None
    return slice(keys.start // block * block, min(-(-keys.stop // block) * block, length))


def widened_hop(hop: Hop, keys: slice | None) -> Hop:
    """The hop with more keys around those that its rows see."""
    if keys is None or keys == hop.keys:
        return hop
    before = hop.keys.start - keys.start
    return Hop(hop.source, keys, Visible(hop.visible.lo + before, hop.visible.hi + before))


def _bounds(mask: Mask, positions: Ints32, rows: Dealing, keys: Dealing) -> tuple[NDArray[Any], NDArray[Any]]:
    """Global key intervals of ascending positions, always [B or 1, n]; cross attention sees every key."""
    if mask.full:
        return np.zeros_like(positions)[None], np.full_like(positions, keys.seqlen)[None]
    lo, hi = mask.bounds(positions, rows.seqlen)
    return np.atleast_2d(lo), np.atleast_2d(hi)


def _kind(local: NDArray[np.int32], Sk: int) -> Literal["full", "causal", "intervals"]:
    """Visible's kind of the bounds [lo or hi, B, n]: exact, and cheap because the bounds ascend."""
    lo, hi = local
    if lo[:, -1].any():
        return "intervals"
    if (hi[:, 0] == Sk).all():
        return "full"
    Sq = lo.shape[1]
    if (hi[:, 0] != max(0, 1 + Sk - Sq)).any() or (hi[:, -1] != Sk).any():
        return "intervals"
    causal = np.arange(1 + Sk - Sq, 1 + Sk, dtype=np.int32)
    return "causal" if (hi == np.maximum(causal, 0)).all() else "intervals"
