"""Launches decode: how many pieces the keys are cut into, the scratch between the two kernels, their arguments."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ringfa3_kernels.portable.configs import DECODE_INTERPRETED, DecodeConfig, padded, pick_decode
from ringfa3_kernels.portable.decode import combine_kernel, decode_kernel
from ringfa3_kernels.portable.launch import log2_domain, on_device, options, strides, unit_of
from ringfa3_kernels.types import Partial, Visible

COLUMNS = 32  # of out that a program of the combine kernel writes: a cache line, and programs enough where rows are few
FEW = 4096  # programs of the combine kernel, one a row, above which a program takes more rows
PLENTY = 256  # sequences above which none is cut: at 512 what every program works out would spill
INTERPRETED = 2  # multiprocessors that the CPU stands for


def run_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    splits: int | None,
    config: DecodeConfig | None = None,
) -> Partial:
    """Launch both kernels, or one; see `ringfa3_kernels.decode`. `config` replaces the table's choice (for tuning)."""
    if scale <= 0:  # the kernel takes its row maximum before it scales
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q = q if q.stride(3) == 1 else q.contiguous()
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    lo, hi = visible.lo.contiguous(), visible.hi.contiguous()
    B, Sq, Hq, D = q.shape
    _, page, Hkv, _ = k_pages.shape
    group = Hq // Hkv
    config = config or _config(q, Sq * group)
    block_m = rows_of_tile(config, Sq * group)
    row_tiles = triton.cdiv(Sq * group, block_m)
    tiles = B * triton.cdiv(table.shape[1] * page, config.block_n)
    shares = splits or choose_shares(B, Hkv * row_tiles, tiles, config.programs * _processors(q.device))
    slots = shares + B - 1
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty((B, Hq, Sq), dtype=torch.float32, device=q.device)
    parts, parts_lse = out, lse
    if shares > 1:
        parts = torch.empty((slots, Sq, Hq, D), dtype=torch.float32, device=q.device)
        parts_lse = torch.empty((Sq, Hq, slots), dtype=torch.float32, device=q.device)
    unit = unit_of(q, k_pages, v_pages)
    far = max(k_pages.stride(1), v_pages.stride(1)) * config.block_n >= 1 << 31
    batched = int(visible.lo.ndim == 2)
    with on_device(q):
        decode_kernel[(slots * Hkv * row_tiles,)](
            q, k_pages, v_pages, table, lo, hi, parts, parts_lse, *log2_domain(scale, softcap),
            *strides(unit, q, k_pages, v_pages), table.stride(0),
            B, Sq, Hq, Hkv, group, row_tiles, shares, slots, batched,
            **constants(config, D, page, unit, softcap, block_m, B, whole=shares == 1, far=far), **options(config),
        )  # fmt: skip
        if shares > 1:
            merging = combine_constants(D, config.block_n, B * Sq * Hq, B, interpreted=not q.is_cuda)
            combine_kernel[(B * triton.cdiv(Sq * Hq, merging["BLOCK_R"]), triton.cdiv(D, merging["BLOCK_C"]))](
                parts, parts_lse, lo, hi, out, lse, B, Sq, Hq, shares, slots, batched, **merging
            )
    return Partial(out, lse)


def choose_shares(sequences: int, heads: int, tiles: int, resident: int) -> int:
    """How many pieces the keys of the batch are cut into, for each of `heads` (key/value heads times tiles of rows).

    As many as run at once, since their work is about equal; but none without a tile where every sequence is as long as
    its row of the block table. One, which means uncut sequences, where these alone are programs in plenty: every
    program looks at all sequences to know its own piece.

    Args:
        tiles: of keys that the block tables have room for, all sequences together.
        resident: programs that run at once on the whole device.
    """
    return 1 if sequences > PLENTY else max(1, min(resident // heads, tiles))


def rows_of_tile(config: DecodeConfig, rows: int) -> int:
    """BLOCK_M: the next power of two, from the 16 that tl.dot asks for to what the config allows."""
    return min(config.block_m, _at_least_16(rows))


def constants(
    config: DecodeConfig,
    D: int,
    page: int,
    unit: int,
    softcap: float,
    block_m: int,
    B: int,
    *,
    whole: bool,
    far: bool = False,
) -> dict[str, Any]:
    """Compile-time arguments of decode_kernel."""
    return {
        "HEAD_DIM": D,
        "BLOCK_D": padded(D),
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_B": 1 if B == 1 else _at_least_16(B),
        "PAGE": page,
        "UNIT": unit,
        "SOFTCAP": softcap != 0,
        "WHOLE": whole,
        "FAR": far,
        "PRECISION": config.precision,
    }


def combine_constants(D: int, block_n: int, rows: int, B: int, *, interpreted: bool = False) -> dict[str, int]:
    """Compile-time arguments of combine_kernel: where rows are few each has many slots, where many few."""
    same = {"HEAD_DIM": D, "BLOCK_N": block_n, "BLOCK_B": 1 if B == 1 else _at_least_16(B)}
    if interpreted:  # every program takes milliseconds
        return same | {"BLOCK_R": 16, "BLOCK_S": 4, "BLOCK_C": padded(D)}
    few = rows * triton.cdiv(D, COLUMNS) <= FEW
    return same | {"BLOCK_R": 1 if few else 8, "BLOCK_S": 64 if few else 8, "BLOCK_C": COLUMNS}


def _at_least_16(x: int) -> int:
    """The next power of two, from 16: smaller ones would only be more builds."""
    return max(16, int(triton.next_power_of_2(x)))


def _config(x: Tensor, rows: int) -> DecodeConfig:
    if not x.is_cuda:
        return DECODE_INTERPRETED
    return pick_decode(x.shape[3], x.dtype, torch.cuda.get_device_capability(x.device), rows)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else INTERPRETED
