"""From tensors to a launch of the forward kernel: which variant, its descriptors, its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringfa3_kernels.hopper import configs, schedule
from ringfa3_kernels.hopper.configs import CAUSAL, FULL, INTERVALS, Config
from ringfa3_kernels.hopper.forward import attend_forward
from ringfa3_kernels.hopper.gluon import Constants
from ringfa3_kernels.types import Kind, Partial, Visible

LOG2E = 1.4426950408889634
TINY = 1e-30  # stands for scale 0, so that -inf * scale stays -inf
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # fusion: off by default from Triton 3.10 on
MASKS: dict[Kind, int] = {"full": FULL, "causal": CAUSAL, "intervals": INTERVALS}


@dataclass(frozen=True)
class Launch:
    """Arguments of one launch of `attend_forward`; `run` may be called again (the same buffers are written)."""

    args: tuple[Any, ...]
    config: Config
    grid: tuple[int]

    def run(self) -> None:
        """Launch on the current stream."""
        attend_forward[self.grid](*self.args, C=constants(self.config), **OPTIONS)

    def warmup(self) -> None:
        """Compile, or find it in the cache; launch nothing."""
        attend_forward.warmup(*self.args, C=constants(self.config), grid=self.grid, **OPTIONS)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    into: Partial | None,
    out_dtype: torch.dtype,
) -> Partial:
    """softmax(q k^T) v and its lse; see `ringfa3_kernels.attend`."""
    state = into
    if into is not None and not (_tma(into.out) and into.lse.is_contiguous()):
        state = Partial(into.out.contiguous().clone(), into.lse.contiguous().clone())
    with torch.cuda.device(q.device):
        result = Partial(*_outputs(q, state, out_dtype))
        counter = schedule.counter(q.device)
        prepare(
            q,
            k,
            v,
            visible,
            result,
            state,
            scale=scale,
            softcap=softcap,
            counter=counter,
            sms=schedule.multiprocessors(q.device),
        ).run()
    if into is None or state is into:
        return result if into is None or result.out is not into.out else into
    into.lse.copy_(result.lse)
    if out_dtype != torch.float32:
        return Partial(result.out, into.lse)
    into.out.copy_(result.out)
    return into


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    result: Partial,
    into: Partial | None,
    *,
    scale: float,
    softcap: float,
    counter: Tensor,
    sms: int,
    tile: Config | None = None,
) -> Launch:
    """A launch that attends to k and v, continues `into` where given, and writes `result`.

    Args:
        result: its out, where fp32, and its lse are those of `into` where that is given.
        counter: int32 [2], zero, of no launch that may run at the same time.
        sms: CTAs at most.
        tile: a tile other than the table's (tuning).
    """
    B, Sq, Hq, D = q.shape
    Sk, Hkv = k.shape[1:3]
    wide = result.out.dtype == torch.float32
    if scale < 0 and not softcap:
        q, scale = -q, -scale  # the running maximum of scale * s needs scale > 0
    C = _config(D, visible.kind, q.dtype, Sq, Sk, Hq // Hkv, softcap != 0, into is not None, wide, tile)
    sizes = _sizes(C, B, Sq, Sk, Hq, Hkv, D)
    lo, hi, rows_stride, tiles = result.lse, result.lse, 0, counter
    if C.MASK == INTERVALS:
        lo, hi = visible.lo.contiguous(), visible.hi.contiguous()
        rows_stride = Sq if lo.ndim == 2 else 0
        tiles = schedule.tile_table(visible, C.BM // C.PACK, C.BN)
    state = into.out if into is not None and not wide else result.out
    unit = 16 // state.element_size()
    strides = [x // unit for x in state.stride()[:3]]
    query = _query_desc(q, Hkv, C)
    args = (
        query,
        _key_desc(k, C),
        _key_desc(v, C),
        query if wide else _query_desc(result.out, Hkv, C),
        _query_desc(into.out, Hkv, C) if into is not None and C.PREFETCH else query,
        state,
        *strides,
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
    )
    return Launch(args, C, (min(sms, sizes[1]),))


@lru_cache(maxsize=4096)
def _sizes(C: Config, B: int, Sq: int, Sk: int, Hq: int, Hkv: int, D: int) -> tuple[int, ...]:
    """The kernel's last arguments: pairs, ntiles, num_m, wave, heads, group, Sq, Sk, D."""
    heads = Hkv if C.PACK > 1 else Hq
    num_m = -(-Sq // (C.BM // C.PACK))
    wave = schedule.heads_per_wave(B * heads, Hq // Hkv if C.PACK == 1 else 1, Sk, D, masked=C.MASK != FULL)
    return B * heads, num_m * B * heads, num_m, wave, heads, Hq // Hkv, Sq, Sk, D


@lru_cache(maxsize=4096)
def _config(
    D: int,
    kind: Kind,
    dtype: torch.dtype,
    Sq: int,
    Sk: int,
    group: int,
    softcap: bool,
    into: bool,
    wide: bool,
    tile: Config | None,
) -> Config:
    """The table's tile (or `tile`) and the call's variant of the kernel."""
    mask = MASKS[kind]
    if mask == CAUSAL and Sq > Sk:
        mask = INTERVALS  # some rows see nothing, whole tiles of them too
    width = configs.padded_head_dim(D)
    base = tile or configs.pick(width, mask, Sk)
    pack = configs.packed_heads(group, Sq, base.BM)
    if pack > 1 and mask == CAUSAL:
        mask = INTERVALS
        base = tile or configs.pick(width, mask, Sk)
    return configs.variant(
        base,
        into=into,
        wide=wide,
        MASK=mask,
        ALIGNED=mask == CAUSAL and base.BM == base.BN and Sk % base.BN == 0 and (Sk - Sq) % base.BN == 0,
        TAIL=mask == FULL and Sk % base.BN != 0,
        SOFTCAP=_softcap(softcap, dtype),
        LIVE=mask == INTERVALS and (wide or not into),
        PACK=pack,
        EVEN=width == D,
    )


@cache
def constants(config: Config) -> Constants:
    """The config as the kernel takes it (one object, so that Triton finds its build by identity)."""
    return Constants(config)


def _softcap(softcap: bool, dtype: torch.dtype) -> int:
    if not softcap:
        return configs.NO_CAP
    return configs.CAP_FAST if dtype == torch.bfloat16 else configs.CAP_EXACT


def _outputs(q: Tensor, into: Partial | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where out and lse go: into's own memory, else new."""
    B, Sq, Hq, _ = q.shape
    if into is not None and out_dtype == torch.float32:
        return into.out, into.lse
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device) if into is None else into.lse
    return out, lse


def _query_desc(x: Tensor, Hkv: int, C: Config) -> TensorDescriptor:
    """[B, S, Hq, D] as [B, S, Hkv, group, D]: a block has WM / PACK positions of PACK heads (zeros past the group)."""
    B, S, Hq, D = x.shape
    sb, ss, sh, _ = x.stride()
    group = Hq // Hkv
    block = (1, C.WM // C.PACK, 1, C.PACK, C.D)
    return _descriptor(x, (B, S, Hkv, group, D), (sb, ss, sh * group, sh, 1), block)


def _key_desc(x: Tensor, C: Config) -> TensorDescriptor:
    return _descriptor(x, tuple(x.shape), x.stride(), (1, C.BN, 1, C.D))


def _descriptor(
    x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor:
    """What TMA is to read or write. Triton checks every descriptor that is made (4 us): here, every shape once."""
    if x.data_ptr() % 16:
        raise ValueError(f"TMA: wanted a pointer that is a multiple of 16 bytes, got {x.data_ptr():#x}")
    found = object.__new__(TensorDescriptor)
    vars(found).update(_described(shape, strides, block, x.dtype), base=x)
    return found


@lru_cache(maxsize=4096)
def _described(
    shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Any]:
    nothing = torch.empty(0, dtype=dtype, device="meta")
    checked: dict[str, Any] = vars(
        TensorDescriptor(nothing, list(shape), list(strides), list(block), _layout(block, dtype))
    )
    return checked


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Shared-memory layout that TMA writes and wgmma reads: 128-byte swizzle."""
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_DTYPES[dtype])


GLUON_DTYPES: Mapping[torch.dtype, Any] = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def _tma(x: Tensor) -> bool:
    """TMA can read x: fp32, head_dim contiguous, everything else a multiple of 16 bytes."""
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % 4 == 0 for s in x.stride()[:3])
