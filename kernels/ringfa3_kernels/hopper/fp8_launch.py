"""From Quantized tensors to a launch of the fp8 forward: which variant, its descriptors, its scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringfa3_kernels.hopper import configs, fp8_configs, schedule
from ringfa3_kernels.hopper.configs import CAUSAL, FULL, INTERVALS
from ringfa3_kernels.hopper.fp8 import attend_fp8
from ringfa3_kernels.hopper.fp8_configs import Fp8Config
from ringfa3_kernels.hopper.gluon import Constants
from ringfa3_kernels.hopper.launch import (
    LOG2E,
    MASKS,
    OPTIONS,
    TINY,
    _descriptor,
    _key_desc,
    _outputs,
    _query_desc,
    _tma,
)
from ringfa3_kernels.quantized import Quantized
from ringfa3_kernels.types import Kind, Partial, Visible


@dataclass(frozen=True)
class Fp8Launch:
    """Arguments of one launch of `attend_fp8`; `run` may be called again (the same buffers are written)."""

    args: tuple[Any, ...]
    config: Fp8Config
    grid: tuple[int]

    def run(self) -> None:
        """Launch on the current stream."""
        attend_fp8[self.grid](*self.args, C=constants(self.config), **OPTIONS)

    def warmup(self) -> None:
        """Compile, or find it in the cache; launch nothing."""
        attend_fp8.warmup(*self.args, C=constants(self.config), grid=self.grid, **OPTIONS)


def attend(
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
    """softmax(q k^T) v and its lse; see `ringfa3_kernels.attend`. v in order "keys"."""
    state = into
    if into is not None and not (_tma(into.out) and into.lse.is_contiguous()):
        state = Partial(into.out.contiguous().clone(), into.lse.contiguous().clone())
    with torch.cuda.device(q.device):
        result = Partial(*_outputs(q.data, state, out_dtype))
        counter = schedule.counter(q.device)
        sms = schedule.multiprocessors(q.device)
        prepare(q, k, v, visible, result, state, scale=scale, softcap=softcap, counter=counter, sms=sms).run()
    if into is None or state is into:
        return result if into is None or result.out is not into.out else into
    into.lse.copy_(result.lse)
    if out_dtype != torch.float32:
        return Partial(result.out, into.lse)
    into.out.copy_(result.out)
    return into


def prepare(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    visible: Visible,
    result: Partial,
    into: Partial | None,
    *,
    scale: float,
    softcap: float,
    counter: Tensor,
    sms: int,
    tile: Fp8Config | None = None,
) -> Fp8Launch:
    """A launch that attends to k and v, continues `into` where given, and writes `result`; as `launch.prepare`."""
    B, Sq, Hq, D = q.shape
    _, Sk, Hkv, _ = k.shape
    wide = result.out.dtype == torch.float32
    queries = q.data
    if scale < 0 and not softcap:
        flipped = torch.empty_strided(queries.shape, queries.stride(), dtype=torch.uint8, device=queries.device)
        torch.bitwise_xor(queries.view(torch.uint8), 0x80, out=flipped)  # the maximum needs scale > 0
        queries, scale = flipped.view(queries.dtype), -scale
    C = _config(D, visible.kind, Sq, Sk, Hq // Hkv, softcap != 0, into is not None, wide, tile)
    sizes = _sizes(C, B, Sq, Sk, Hq, Hkv, D)
    lo, hi, rows_stride, tiles = result.lse, result.lse, 0, counter
    if C.MASK == INTERVALS:
        lo, hi = visible.lo.contiguous(), visible.hi.contiguous()
        rows_stride = Sq if lo.ndim == 2 else 0
        tiles = schedule.tile_table(visible, C.BM // C.PACK, C.BN)
    state = into.out if into is not None and not wide else result.out
    unit = 16 // state.element_size()
    query = _query_desc(queries, Hkv, C)
    args = (
        query,
        _key_desc(k.data, C),
        _value_desc(v.data, C),
        query if wide else _query_desc(result.out, Hkv, C),
        query,  # in the place of the state's, which is not read by TMA
        state,
        *(x // unit for x in state.stride()[:3]),
        result.lse,
        lo,
        hi,
        rows_stride,
        tiles,
        tiles.stride(0) if C.MASK == INTERVALS and tiles.shape[0] > 1 else 0,
        counter,
        (softcap or scale or TINY) * LOG2E,
        scale / softcap if softcap else 0.0,
        *sizes,
        *_scales(q.scale, k.scale, v.scale),
        1 if q.block else 0,
    )
    return Fp8Launch(args, C, (min(sms, sizes[1]),))


def _scales(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """The scales as the kernel reads them, and the numbers from head to head of q's and of k's and v's."""
    q, k, v = (x if _in_rows(x) else x.contiguous() for x in (q, k, v))
    if _pitch(k) != _pitch(v):
        k, v = k.contiguous(), v.contiguous()
    return q, k, v, _pitch(q), _pitch(k)


def _in_rows(x: Tensor) -> bool:
    """Number n of head h and batch row b lies at (b * heads + h) * pitch + n: so do a tensor's and its slices'."""
    B, H, n = x.shape
    return (n == 1 or x.stride(2) == 1) and (B == 1 or x.stride(0) == H * _pitch(x)) and _pitch(x) >= n


def _pitch(x: Tensor) -> int:
    B, H, n = x.shape
    return x.stride(1) if H > 1 else x.stride(0) if B > 1 else n


def _value_desc(x: Tensor, C: Fp8Config) -> TensorDescriptor:
    """[B, H, D, S rounded up], keys fastest."""
    return _descriptor(x, tuple(x.shape), x.stride(), (1, 1, C.D, C.BN))


@lru_cache(maxsize=4096)
def _sizes(C: Fp8Config, B: int, Sq: int, Sk: int, Hq: int, Hkv: int, D: int) -> tuple[int, ...]:
    """As launch._sizes; keys and values are half as wide."""
    heads = Hkv if C.PACK > 1 else Hq
    num_m = -(-Sq // (C.BM // C.PACK))
    group = Hq // Hkv if C.PACK == 1 else 1
    wave = schedule.heads_per_wave(B * heads, group, Sk, D // 2, masked=C.MASK != FULL)
    return B * heads, num_m * B * heads, num_m, wave, heads, Hq // Hkv, Sq, Sk, D


@lru_cache(maxsize=4096)
def _config(
    D: int,
    kind: Kind,
    Sq: int,
    Sk: int,
    group: int,
    softcap: bool,
    into: bool,
    wide: bool,
    tile: Fp8Config | None,
) -> Fp8Config:
    """The table's tile (or `tile`) and the call's variant of the kernel."""
    mask = MASKS[kind]
    if mask == CAUSAL and Sq > Sk:
        mask = INTERVALS  # some rows see nothing, whole tiles of them too
    width = configs.padded_head_dim(D)
    base = tile or fp8_configs.TABLE[width, mask]
    pack = configs.packed_heads(group, Sq, base.BM)
    if pack > 1 and mask == CAUSAL:
        mask = INTERVALS
        base = tile or fp8_configs.TABLE[width, mask]
    return fp8_configs.variant(
        base,
        into=into,
        wide=wide,
        MASK=mask,
        ALIGNED=mask == CAUSAL and base.BM == base.BN and Sk % base.BN == 0 and (Sk - Sq) % base.BN == 0,
        TAIL=mask == FULL and Sk % base.BN != 0,
        SOFTCAP=configs.CAP_FAST if softcap else configs.NO_CAP,
        LIVE=mask == INTERVALS and (wide or not into),
        PACK=pack,
        EVEN=width == D,
    )


@cache
def constants(config: Fp8Config) -> Constants:
    """The config as the kernel takes it (one object, so that Triton finds its build by identity)."""
    return Constants(config)
