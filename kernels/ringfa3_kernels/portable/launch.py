"""Launches the portable kernels: outputs, tile bounds, descriptors, grids; no torch operation in a usual call."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringfa3_kernels.portable.backward import key_gradient_kernel, query_gradient_kernel
from ringfa3_kernels.portable.configs import CACHE_BYTES, INTERPRETED, DecodeConfig, TileConfig, padded, pick
from ringfa3_kernels.portable.forward import forward_kernel
from ringfa3_kernels.portable.positional import arguments
from ringfa3_kernels.positional import Positional
from ringfa3_kernels.types import Partial, Visible

LOG2E = 1.4426950408889634


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were defined)."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    into: Partial | None,
    out_dtype: torch.dtype,
    positional: Positional | None = None,
    config: TileConfig | None = None,
) -> Partial:
    """Launch the forward kernel; see `ringfa3_kernels.attend`. `config` replaces the table's choice (for tuning)."""
    if scale <= 0:  # the kernel takes its row maximum before it scales
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    B, Sq, Hq, D = q.shape
    Sk, Hkv = k.shape[1:3]
    config = config or _tiles("forward", q, positional)
    q, k, v = (_readable(x) for x in (q, k, v))
    if into is None:
        out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
        lse = torch.empty((B, Hq, Sq), dtype=torch.float32, device=q.device)
        out_in, lse_in = out, lse  # not read
    else:
        out_in, lse_in = into.out.contiguous(), into.lse.contiguous()
        out = out_in if out_dtype == out_in.dtype else torch.empty(q.shape, dtype=out_dtype, device=q.device)
        lse = lse_in
    row_tiles = triton.cdiv(Sq, config.block_m)
    tma = config.tma and _describable(k, v)
    unit = unit_of(q, k, v)
    with on_device(q):
        forward_kernel[(row_tiles * B * Hq,)](
            q,
            _moving(k, config.block_n, tma),
            _moving(v, config.block_n, tma),
            visible.lo.contiguous(),
            visible.hi.contiguous(),
            visible.key_tiles(config.block_m, config.block_n),
            out,
            lse,
            out_in,
            lse_in,
            *log2_domain(scale, softcap),
            *strides(unit, q, k, v),
            B,
            Sq,
            Sk,
            Hq,
            Hq // Hkv,
            row_tiles,
            max(1, CACHE_BYTES // (2 * Sk * D * k.element_size())) * (Hq // Hkv),
            int(visible.lo.ndim == 2),
            INTO=into is not None,
            **arguments(positional),
            **constants(config, D, tma, unit, softcap),
            **options(config),
        )
    if into is None:
        return Partial(out, lse)
    if lse is not into.lse:
        into.lse.copy_(lse)
    if out is out_in and out is not into.out:
        into.out.copy_(out)
    return Partial(into.out if out is out_in else out, into.lse)


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    visible: Visible,
    *,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    accumulate: bool,
    scale: float,
    softcap: float,
    positional: Positional | None = None,
    keys: TileConfig | None = None,
    queries: TileConfig | None = None,
) -> None:
    """Launch both backward kernels; see `ringfa3_kernels.attend_backward`.

    `keys` and `queries` replace the table's choice, and a kernel whose gradients are None is left out (for tuning).
    """
    q, k, v, dout = (_readable(x) for x in (q, k, v, dout))
    lse, delta = lse.contiguous(), delta.contiguous()
    bounds = visible.lo.contiguous(), visible.hi.contiguous()
    B, Sq, Hq, D = q.shape
    Sk, Hkv = k.shape[1:3]
    group = Hq // Hkv
    unit = unit_of(q, k, v, dout)
    steps = strides(unit, q, dout, k, v)
    scales = *log2_domain(scale, softcap), scale
    batched = int(visible.lo.ndim == 2)
    places = arguments(positional)
    with on_device(q):
        if dk is not None and dv is not None:
            config = keys or _tiles("keys", q, positional)
            tma = config.tma and _describable(q, dout)
            moving = (_moving(x, config.block_m, tma) for x in (q, dout))
            tiles = triton.cdiv(Sk, config.block_n)
            heads_in_cache = max(1, CACHE_BYTES // (2 * Sq * D * group * q.element_size()))
            key_gradient_kernel[(tiles * B * Hkv,)](
                *moving, k, v, *bounds, visible.query_tiles(config.block_m, config.block_n, Sk), lse, delta, dk, dv,
                *scales, *steps, B, Sq, Sk, Hkv, group, tiles, heads_in_cache, batched,
                ACCUMULATE=accumulate, **places, **constants(config, D, tma, unit, softcap), **options(config),
            )  # fmt: skip
        if dq is not None:
            config = queries or _tiles("queries", q, positional)
            tma = config.tma and _describable(k, v)
            moving = (_moving(x, config.block_n, tma) for x in (k, v))
            tiles = triton.cdiv(Sq, config.block_m)
            heads_in_cache = max(1, CACHE_BYTES // (2 * Sk * D * k.element_size())) * group
            query_gradient_kernel[(tiles * B * Hq,)](
                q, dout, *moving, *bounds, visible.key_tiles(config.block_m, config.block_n), lse, delta, dq,
                *scales, *steps, B, Sq, Sk, Hq, group, tiles, heads_in_cache, batched,
                ACCUMULATE=accumulate, **places, **constants(config, D, tma, unit, softcap), **options(config),
            )  # fmt: skip


def log2_domain(scale: float, softcap: float) -> tuple[float, float]:
    """to_log2 and cap, as the kernels' headers define them."""
    return (scale / softcap, softcap * LOG2E) if softcap else (scale * LOG2E, 0.0)


def constants(config: TileConfig, D: int, tma: bool, unit: int, softcap: float) -> dict[str, Any]:
    """Compile-time arguments that all three kernels take."""
    return {
        "HEAD_DIM": D,
        "BLOCK_D": padded(D),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TMA": tma,
        "UNIT": unit,
        "SOFTCAP": softcap != 0,
        "PRECISION": config.precision,
    }


def options(config: TileConfig | DecodeConfig) -> dict[str, Any]:
    """Compile options of a config. Triton 3.10 turns fp fusion off unless it is asked for."""
    cap = {} if config.maxnreg is None else {"maxnreg": config.maxnreg}
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True, **cap}


def _tiles(kernel: str, x: Tensor, positional: Positional | None) -> TileConfig:
    """The table's config for x's device, or the interpreter's."""
    if not x.is_cuda:
        return INTERPRETED
    return pick(kernel, x.shape[3], x.dtype, torch.cuda.get_device_capability(x.device), positional is not None)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _readable(x: Tensor) -> Tensor:
    """x where head_dim is contiguous and offsets inside a tile (at most 256 rows) fit int32, else a contiguous copy."""
    return x if x.stride(3) == 1 and x.stride(1) < 1 << 23 else x.contiguous()


def unit_of(*tensors: Tensor) -> int:
    """Elements of 16 bytes if every stride and pointer is a multiple of that: kernels then load 16 bytes at a time."""
    unit = 16 // tensors[0].element_size()
    whole = all(x.data_ptr() % 16 == 0 and not any(s % unit for s in x.stride()[:3]) for x in tensors)
    return unit if whole else 1


def strides(unit: int, *tensors: Tensor) -> list[int]:
    """Strides over batch, row and head of each tensor, in units."""
    return [s // unit for x in tensors for s in x.stride()[:3]]


def _describable(*tensors: Tensor) -> bool:
    """Whether TMA can read them: 16-byte pointers and strides, none of them 0 (an expanded tensor)."""
    return unit_of(*tensors) > 1 and all(s > 0 for x in tensors for s in x.stride())


def _moving(x: Tensor, rows: int, tma: bool) -> Tensor | TensorDescriptor:
    """What the kernel loads tiles of `rows` rows from."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, padded(x.shape[3])]) if tma else x
