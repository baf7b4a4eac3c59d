"""From tensors to a launch of the backward kernel: which variant, its descriptors, its tables, where dq gathers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringfa3_kernels.hopper import backward_schedule, configs, schedule
from ringfa3_kernels.hopper.backward import attend_backward as kernel
from ringfa3_kernels.hopper.configs import FULL, INTERVALS, BackwardConfig
from ringfa3_kernels.hopper.gluon import Constants
from ringfa3_kernels.hopper.launch import LOG2E, MASKS, OPTIONS, _descriptor, _softcap
from ringfa3_kernels.portable.launch import run_backward
from ringfa3_kernels.types import Kind, Visible


@dataclass(frozen=True)
class BackwardLaunch:
    """Arguments of one launch of the kernel; `run` may be called again (it adds to dq once more)."""

    args: tuple[Any, ...]
    config: BackwardConfig
    grid: tuple[int]

    def run(self) -> None:
        """Launch on the current stream."""
        kernel[self.grid](*self.args, C=constants(self.config), **OPTIONS)

    def warmup(self) -> None:
        """Compile, or find it in the cache; launch nothing."""
        kernel.warmup(*self.args, C=constants(self.config), grid=self.grid, **OPTIONS)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    visible: Visible,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool,
    scale: float,
    softcap: float,
    deterministic: bool,
    tile: BackwardConfig | None = None,
) -> None:
    """Gradients, added or stored; see `ringfa3_kernels.attend_backward`.

    CTAs add to dq in any order. With `deterministic` portable's kernel computes dq from its own walk over the keys
    (7 products instead of 5), and dk and dv, whose sums have one order, come from ours.
    """
    with torch.cuda.device(q.device):
        add_to = dq
        if not accumulate and not deterministic:
            add_to = dq.zero_() if dq.dtype == torch.float32 else torch.zeros_like(dq, dtype=torch.float32)
        prepare(
            dout,
            q,
            k,
            v,
            lse,
            delta,
            visible,
            dq=None if deterministic else add_to,
            dk=dk,
            dv=dv,
            accumulate=accumulate,
            scale=scale,
            softcap=softcap,
            tile=tile,
        ).run()
        if deterministic:
            run_backward(
                dout,
                q,
                k,
                v,
                lse,
                delta,
                visible,
                dq=dq,
                dk=None,
                dv=None,
                accumulate=accumulate,
                scale=scale,
                softcap=softcap,
            )
        elif add_to is not dq:
            dq.copy_(add_to)


def prepare(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    visible: Visible,
    *,
    dq: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool,
    scale: float,
    softcap: float,
    tile: BackwardConfig | None = None,
) -> BackwardLaunch:
    """A launch that adds to dq (fp32; None: leaves it out) and stores dk and dv, or adds to them.

    Args:
        tile: a tile other than the table's (tuning).
    """
    B, Sq, Hq, D = q.shape
    Sk, Hkv = k.shape[1:3]
    group = Hq // Hkv
    C = _config(
        D,
        visible.kind,
        q.dtype,
        Sk,
        softcap != 0,
        dq is not None,
        dk.dtype == torch.float32,
        accumulate,
        tile,
    )
    num_n = schedule.cdiv(Sk, C.BN)
    lse, delta = lse.contiguous(), delta.contiguous()
    bounds, tiles = lse, lse
    bounds_stride = tiles_stride = 0
    if C.MASK == INTERVALS:
        tiles = backward_schedule.tile_table(visible, C.BM, C.BN, Sk)
        bounds = backward_schedule.row_bounds(visible, C.BN, Sk)
        if visible.lo.ndim == 2:
            tiles_stride, bounds_stride = tiles.stride(0), bounds.stride(0)
    queries = dq if dq is not None else lse.new_empty(1, 1, 1, D)
    args = (
        _desc(q, C.BM, C.D),
        _desc(dout, C.BM, C.D),
        _desc(k, C.BN, C.D),
        _desc(v, C.BN, C.D),
        _desc(queries, C.QR, C.QD),
        _desc(dk, C.WN, C.WD),
        _desc(dv, C.WN, C.WD),
        lse,
        delta,
        bounds,
        bounds_stride,
        tiles,
        tiles_stride,
        float(scale),
        (softcap or scale) * LOG2E,
        scale / softcap if softcap else 0.0,
        num_n,
        backward_schedule.heads_per_wave(B * Hkv, group, Sq, D, masked=C.MASK != FULL),
        Hkv,
        group,
        Sq,
        Sk,
    )
    return BackwardLaunch(args, C, (num_n * B * Hkv,))


@lru_cache(maxsize=4096)
def _config(
    D: int,
    kind: Kind,
    dtype: torch.dtype,
    Sk: int,
    softcap: bool,
    queries: bool,
    wide: bool,
    accumulate: bool,
    tile: BackwardConfig | None,
) -> BackwardConfig:
    """The table's tile (or `tile`) and the call's variant of the kernel."""
    mask = MASKS[kind]
    base = tile or configs.BACKWARD_TABLE[configs.padded_head_dim(D), mask]
    if softcap and base.D == 64 and tile is None:
        base = replace(base, BM=64)  # with 128 rows the cap's slopes spill 1 KB a thread
    return replace(
        base,
        MASK=mask,
        TAIL=mask == FULL and Sk % base.BN != 0,
        SOFTCAP=_softcap(softcap, dtype),
        PRESCALE=dtype == torch.bfloat16,
        DQ=queries,
        WIDE=wide,
        ACCUMULATE=accumulate,
    )


@cache
def constants(config: BackwardConfig) -> Constants:
    """The config as the kernel takes it (one object, so that Triton finds its build by identity)."""
    return Constants(config)


def _desc(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks of rows and columns of one head of x [B, S, H, D]."""
    return _descriptor(x, tuple(x.shape), x.stride(), (1, rows, 1, columns))
