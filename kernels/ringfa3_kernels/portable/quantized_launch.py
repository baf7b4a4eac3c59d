"""Launches the portable forward on fp8: tile configs, outputs, scales, grid."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ringfa3_kernels.portable.configs import CACHE_BYTES, TileConfig, padded
from ringfa3_kernels.portable.launch import constants, interpreted, log2_domain, on_device, options, strides, unit_of
from ringfa3_kernels.portable.quantized_forward import quantized_forward_kernel
from ringfa3_kernels.quantized import Quantized
from ringfa3_kernels.types import Partial, Visible

# padded head_dim -> tile config, any device with fp8; sides divide 128. Not timed.
TABLE = {
    16: TileConfig(64, 64, 4, 3),
    32: TileConfig(64, 64, 4, 3),
    64: TileConfig(64, 64, 4, 3),
    128: TileConfig(64, 64, 8, 2),
    256: TileConfig(64, 32, 8, 2),
}
INTERPRETED = TileConfig(64, 64, 4, 1, precision="ieee")  # on the CPU


def run_quantized(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    into: Partial | None,
    out_dtype: torch.dtype,
) -> Partial:
    """Launch the forward on fp8; see `ringfa3_kernels.attend`."""
    rows, keys, values = (_readable(x.data) for x in (q, k, v))
    if scale < 0:  # the kernel takes its row maximum before it scales
        rows, scale = (rows.view(torch.uint8) ^ 0x80).view(rows.dtype), -scale
    B, Sq, Hq, D = q.shape
    Sk, Hkv = k.shape[1:3]
    config = TABLE[padded(D)] if rows.is_cuda else INTERPRETED
    if into is None:
        out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
        lse = torch.empty((B, Hq, Sq), dtype=torch.float32, device=q.device)
        out_in, lse_in = out, lse  # not read
    else:
        out_in, lse_in = into.out.contiguous(), into.lse.contiguous()
        out = out_in if out_dtype == out_in.dtype else torch.empty(q.shape, dtype=out_dtype, device=q.device)
        lse = lse_in
    scales = [x.scale.contiguous() for x in (q, k, v)]
    unit = unit_of(rows, keys, values)
    row_tiles = triton.cdiv(Sq, config.block_m)
    with on_device(rows):
        quantized_forward_kernel[(row_tiles * B * Hq,)](
            rows, keys, values, *scales, visible.lo.contiguous(), visible.hi.contiguous(),
            visible.key_tiles(config.block_m, config.block_n), out, lse, out_in, lse_in,
            *log2_domain(scale, softcap), *strides(unit, rows, keys, values),
            *(int(x.block > 0) for x in (q, k, v)), *(x.shape[2] for x in scales),
            B, Sq, Sk, Hq, Hq // Hkv, row_tiles, max(1, CACHE_BYTES // (2 * Sk * D)) * (Hq // Hkv),
            int(visible.lo.ndim == 2),
            INTO=into is not None, INTERPRETED=interpreted(),
            **constants(config, D, False, unit, softcap), **options(config),
        )  # fmt: skip
    if into is None:
        return Partial(out, lse)
    if lse is not into.lse:
        into.lse.copy_(lse)
    if out is out_in and out is not into.out:
        into.out.copy_(out)
    return Partial(into.out if out is out_in else out, into.lse)


def _readable(x: Tensor) -> Tensor:
    """x where head_dim is contiguous and offsets inside a tile fit int32, else a contiguous copy."""
    return x if x.stride(3) == 1 and x.stride(1) < 1 << 23 else x.contiguous()
