"""Which tile a CTA computes next: order of tiles, their key bounds, and the counter that deals them out."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringfa3_kernels.hopper.gluon import again
from ringfa3_kernels.lasting import lasting
from ringfa3_kernels.types import Visible

CAUSAL = gl.constexpr(1)
INTERVALS = gl.constexpr(2)
FIELDS = gl.constexpr(5)  # of a row of the tile table: row tile, begin, unmasked begin, unmasked end, end
LIVE_TILES = gl.constexpr(5)  # after them, in every row: how many row tiles see a key
PITCH = gl.constexpr(8)  # int32 from row to row of the table
L2_BYTES = 32 << 20  # keys and values that a group of heads may keep in L2 while their row tiles take turns


@gluon.jit
def decode(t, work, C: gl.constexpr):
    """Tile number -> position in the order of row tiles, batch row, head. Row tiles of `work.wave` heads take turns."""
    per = again(work.num_m) * work.wave
    g = t // per
    r = t % per
    bh = g * work.wave + r % work.wave
    return r // work.wave, bh // work.heads, bh % work.heads


@gluon.jit
def bounds(slot, b, work, C: gl.constexpr):
    """Row tile at a position of the order, and its key blocks [begin, end); [full_begin, full_end) need no mask.

    There is always one block to visit: a tile that sees nothing gets one that is wholly masked.
    """
    Sk = again(work.Sk)  # else sums with it are hoisted to the kernel's entry and spill from there
    if C.MASK == INTERVALS:
        p = work.tiles + b * work.tiles_stride + slot * PITCH
        mi = gl.load(p)
        begin = gl.load(p + 1)
        full_begin = gl.load(p + 2)
        full_end = gl.load(p + 3)
        end = gl.load(p + 4)
    elif C.MASK == CAUSAL:
        mi = work.num_m - 1 - slot  # longest first
        begin = 0
        full_begin = 0
        shift = Sk - again(work.Sq)
        end = gl.minimum((Sk + C.BN - 1) // C.BN, ((mi + 1) * (C.BM // C.PACK) + shift + C.BN - 1) // C.BN)
        full_end = (mi * (C.BM // C.PACK) + shift + 1) // C.BN
    else:
        mi = slot
        begin = 0
        full_begin = 0
        end = (Sk + C.BN - 1) // C.BN
        full_end = end
    return mi, begin, full_begin, full_end, end


def tile_table(visible: Visible, rows: int, block_n: int) -> Tensor:
    """The row tiles of a mask, longest first (those that see nothing come last); computed on the device once a plan.

    Args:
        rows: query positions of a tile (BM, or BM / PACK).
        block_n: keys of a block.

    Returns:
        int32 [B or 1, row tiles, PITCH]: row tile, begin, unmasked begin, unmasked end, end (at least begin + 1), and
        how many row tiles see a key (at least 1; the largest over the batch). Blocks before unmasked begin are masked
        by lo, those from unmasked end on by hi.
    """
    return visible.kept(("row tiles, longest first", rows, block_n), lambda: _tile_table(visible, rows, block_n))


def _tile_table(visible: Visible, rows: int, block_n: int) -> Tensor:
    tiles = visible.key_tiles(rows, block_n)
    length = tiles[..., 3] - tiles[..., 0]
    order = torch.argsort(length, dim=-1, descending=True, stable=True)
    begin, full_begin, full_end, end = tiles.gather(1, order[..., None].expand(-1, -1, 4)).unbind(-1)
    end = torch.maximum(end, begin + 1)
    none = full_begin >= full_end  # no unmasked block: lo and hi may both cut through any
    full_begin, full_end = torch.where(none, end, full_begin), torch.where(none, begin, full_end)
    live = (length > 0).sum(-1).max().clamp(min=1).expand_as(begin)
    table = torch.stack([x.int() for x in (order, begin, full_begin, full_end, end, live)], -1)
    return torch.nn.functional.pad(table, (0, PITCH.value - FIELDS.value - 1)).contiguous()


def heads_per_wave(heads: int, group: int, Sk: int, D: int, *, masked: bool) -> int:
    """How many heads' row tiles take turns: as many as keep their keys and values in L2, a power of two.

    Under a mask the lengths differ and interleaving heads lets the longest tiles of all come first; without one it
    only costs locality (1 to 5% measured).

    Args:
        heads: B * heads; the result divides it.
        group: query heads that share keys.
        Sk, D: keys, and their 16-bit width.
    """
    wave = 1
    if masked:
        while wave * 2 * Sk * D * 4 / group <= L2_BYTES and heads % (wave * 2) == 0:
            wave *= 2
    return wave


def counter(device: torch.device) -> Tensor:
    """int32 [2], zero: next tile, CTAs done. The launch's last CTA resets it, so launches of one stream share one.

    Launches that may run at once never do: each stream has its own, and in a CUDA graph (which may be replayed beside
    the stream it was captured on) every launch has.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    return _stream_counter(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _stream_counter(device: torch.device, stream: int) -> Tensor:
    return lasting(lambda: torch.zeros(2, dtype=torch.int32, device=device), device)


@cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a device: CTAs of a persistent grid."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    quotient: int = triton.cdiv(a, b)
    return quotient
