"""A paged cache as the CPU reads it: which keys a sequence's rows see, and those keys out of their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ringfa3_kernels.types import Visible


def hulls(visible: Visible, B: int) -> list[tuple[int, int]]:
    """For each sequence (start, stop): from the first key that a row of it sees to past the last; (0, 0) if none does.

    Synchronises the device of the bounds.
    """
    lo, hi = (x.expand(B, -1) for x in (visible.lo, visible.hi))
    seeing = hi > lo
    stops = torch.where(seeing, hi, 0).amax(1)
    starts = torch.minimum(torch.where(seeing, lo, stops[:, None]).amin(1), stops)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def check_numbers(block_table: Tensor, visible: Visible, pages: int, page: int) -> None:
    """Raise ValueError unless the table holds numbers of pages, [0, pages), for all keys inside the hulls."""
    for b, (start, stop) in enumerate(hulls(visible, block_table.shape[0])):
        used = block_table[b, start // page : -(-stop // page)]
        if stop > start and not 0 <= int(used.min()) <= int(used.max()) < pages:
            raise ValueError(
                f"block_table: wanted numbers in [0, {pages}) for keys {start}..{stop - 1} of sequence {b}, "
                f"got {int(used.min())}..{int(used.max())}"
            )


def read(x: Tensor, table: Tensor, start: int, stop: int) -> Tensor:
    """Keys start..stop-1 of a sequence, [stop - start, Hkv, D].

    Args:
        x: [P, page, Hkv, D].
        table: the sequence's row of the block table, [blocks].
    """
    page = x.shape[1]
    first = start // page
    keys = x.index_select(0, table[first : -(-stop // page)]).flatten(0, 1)  # half the time of x[...] on the CPU
    return keys[start - first * page : stop - first * page]


def within(visible: Visible, b: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Bounds lo, hi [Sq] of sequence b among the keys start..stop-1, counted from start."""
    lo, hi = ((x if x.ndim == 1 else x[b]) for x in (visible.lo, visible.hi))
    return (lo - start).clamp(0, stop - start), (hi - start).clamp(0, stop - start)


def mask(visible: Visible, b: int, start: int, stop: int) -> Tensor | None:
    """bool [Sq, stop - start]: which of these keys rows of sequence b see; None if all rows see all of them."""
    lo, hi = within(visible, b, start, stop)
    if int(lo.max()) == 0 and int(hi.min()) == stop - start:
        return None
    j = torch.arange(stop - start, dtype=torch.int32)
    return (j >= lo[:, None]) & (j < hi[:, None])
