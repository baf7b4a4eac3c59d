"""Which rows a CTA of the backward visits: order of key tiles, their row blocks, and the rows that see each key."""

from __future__ import annotations

import torch
from torch import Tensor

from ringfa3_kernels.types import Visible

PITCH = 8  # int32 from row to row of the tile table
L2_BYTES = 40 << 20  # q, dout and fp32 dq that heads whose key tiles take turns may keep in L2


def tile_table(visible: Visible, block_m: int, block_n: int, Sk: int) -> Tensor:
    """The key tiles of a mask, longest first; computed on the device once a plan.

    Returns:
        int32 [B or 1, key tiles, PITCH]: key tile, begin, unmasked begin, unmasked end, end, in blocks of block_m rows.
        Every block of a tile that reaches past Sk needs the mask.
    """
    key = ("key tiles, longest first", block_m, block_n, Sk)
    return visible.kept(key, lambda: _tile_table(visible, block_m, block_n, Sk))


def _tile_table(visible: Visible, block_m: int, block_n: int, Sk: int) -> Tensor:
    tiles = visible.query_tiles(block_m, block_n, Sk)
    order = torch.argsort(tiles[..., 3] - tiles[..., 0], dim=-1, descending=True, stable=True)
    begin, full_begin, full_end, end = tiles.gather(1, order[..., None].expand(-1, -1, 4)).unbind(-1)
    tail = (order + 1) * block_n > Sk
    full_begin, full_end = torch.where(tail, end, full_begin), torch.where(tail, end, full_end)
    table = torch.stack([order.int(), begin, full_begin, full_end, end], -1)
    return torch.nn.functional.pad(table, (0, PITCH - table.shape[-1])).contiguous()


def row_bounds(visible: Visible, block_n: int, Sk: int) -> Tensor:
    """The rows that see each key, an interval because the keys' bounds are sorted; computed on the device once a plan.

    Row i sees key j iff lo[i] <= j < hi[i]: iff i is at least the first row whose hi is past j, and less than the first
    whose lo is.

    Returns:
        int32 [B or 1, 2, key tiles * block_n]: first row, and the first past the last; (Sq, 0) for keys past Sk.
    """
    return visible.kept(("rows of a key", block_n, Sk), lambda: _row_bounds(visible, block_n, Sk))


def _row_bounds(visible: Visible, block_n: int, Sk: int) -> Tensor:
    lo, hi = (torch.atleast_2d(x).contiguous() for x in (visible.lo, visible.hi))
    keys = torch.arange(Sk, device=lo.device, dtype=torch.int32).expand(lo.shape[0], -1).contiguous()
    bounds = torch.stack([torch.searchsorted(x, keys, right=True) for x in (hi, lo)], 1).int()
    past = bounds.new_zeros(lo.shape[0], 2, -Sk % block_n)
    past[:, 0] = visible.rows
    return torch.cat([bounds, past], -1)


def heads_per_wave(heads: int, group: int, Sq: int, D: int, *, masked: bool) -> int:
    """How many key/value heads' tiles take turns: under a mask as many as L2 holds the rows of, a power of two.

    Args:
        heads: B * Hkv; the result divides it.
        group: query heads of each.
        Sq, D: rows, each of 16-bit q and dout and fp32 dq.
    """
    wave = 1
    if masked:
        while wave * 2 * Sq * D * 8 * group <= L2_BYTES and heads % (wave * 2) == 0:
            wave *= 2
    return wave
