"""fp8 tensors with their scales (Quantized), how q, k and v become such, and how they become numbers again."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from ringfa3_kernels import dispatch
from ringfa3_kernels.types import Unsupported

Order = Literal["rows", "keys"]
BLOCK = 128  # rows that a block's scale covers, and what "keys" order pads to
FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
CAPABILITY = (8, 9)  # of the first GPUs that have them
SOURCES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor x [B, S, H, D] as fp8 data and fp32 scales: x is about data * scale.

    Args:
        data: e4m3 or e5m2, [B, S, H, D]. In order "keys" (v only) [B, H, D, S rounded up to 128]: keys run fastest,
            those of each group of 16 are permuted (`key_order`), and what lies past S is finite and means nothing.
        scale: fp32 [B, H, ceil(S / 128)], scale[b, h, i // 128] belongs to data[b, i, h]; [B, H, 1] where block is 0.
        block: 128, or 0 where one scale serves a whole head of a batch row (FlashAttention-3's descale arguments).
        length: S.
        seed: of the random signs of the rotation that q and k went through alike (`quantize`); None: not rotated.
        order: "rows" or "keys".

    `quantize` writes no NaN or infinity into v: what is not finite there makes its key NaN, in k. Scores are masked
    before they are used, values are not: 0 * NaN would reach rows that do not see the key.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not go together.
    """

    data: Tensor
    scale: Tensor
    block: int
    length: int
    seed: int | None = None
    order: Order = "rows"

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"Quantized order: wanted 'rows' or 'keys', got {self.order!r}")
        if self.block not in (0, BLOCK):
            raise ValueError(f"Quantized block: wanted {BLOCK}, or 0 for one scale a head, got {self.block}")
        if self.data.dtype not in FORMATS:
            raise ValueError(f"Quantized data: wanted dtype float8_e4m3fn or float8_e5m2, got {self.data.dtype}")
        if self.data.ndim != 4:
            raise ValueError(f"Quantized data: wanted 4 dimensions, got shape {list(self.data.shape)}")
        stored = self.length if self.order == "rows" else padded(self.length)
        if self.length < 0 or self.data.shape[1 if self.order == "rows" else 3] != stored:
            raise ValueError(
                f"Quantized data: wanted {stored} rows for length {self.length} in order {self.order!r}, "
                f"got shape {list(self.data.shape)}"
            )
        B, S, H, _ = self.shape
        wanted = (B, H, -(-S // BLOCK) if self.block else 1)
        if self.scale.dtype != torch.float32 or self.scale.shape != wanted:
            raise ValueError(
                f"Quantized scale: wanted float32 {list(wanted)}, got {self.scale.dtype} {list(self.scale.shape)}"
            )
        if self.scale.device != self.data.device:
            raise ValueError(f"Quantized scale: wanted data's device {self.data.device}, got {self.scale.device}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, S, H, D of what it stands for."""
        if self.order == "rows":
            B, _, H, D = self.data.shape
        else:
            B, H, D, _ = self.data.shape
        return B, self.length, H, D

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def rotated(self) -> bool:
        """Whether the rows went through the random-sign Hadamard transform."""
        return self.seed is not None

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale."""
        return self.data.nbytes + self.scale.nbytes

    def rows(self, start: int, stop: int) -> Quantized:
        """Rows start..stop as views; start is a multiple of 128, so that their scales are a slice too.

        Raises:
            ValueError: start or stop do not fit.
        """
        if not 0 <= start <= stop <= self.length or start % BLOCK:
            raise ValueError(
                f"Quantized rows: wanted 0 <= start <= stop <= {self.length}, start a multiple of {BLOCK}, "
                f"got {start}, {stop}"
            )
        end = start + padded(stop - start)
        data = self.data[:, start:stop] if self.order == "rows" else self.data[..., start:end]
        scale = self.scale[..., start // BLOCK : end // BLOCK] if self.block else self.scale
        return replace(self, data=data, scale=scale, length=stop - start)


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = BLOCK,
    rotate: bool | int = False,
    v_order: Order = "rows",
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Quantized, Quantized, Quantized]:
    """q, k and v as fp8 with scales, for `attend`; see `quantize_queries` and `quantize_keys`, which it calls."""
    return (
        quantize_queries(q, block=block, rotate=rotate, dtype=dtype),
        *quantize_keys(k, v, block=block, rotate=rotate, v_order=v_order, dtype=dtype),
    )


def quantize_queries(
    q: Tensor, *, block: int = BLOCK, rotate: bool | int = False, dtype: torch.dtype = torch.float8_e4m3fn
) -> Quantized:
    """q as fp8 with scales.

    A scale is a power of two, the least that brings what it covers into the format's range (times D ** -0.5 where
    rotated), so that dividing by it rounds nothing; it is at least 2^-60, and 1 where all is 0. What is not finite
    becomes NaN and does not count for the scale.

    Args:
        q: [B, S, H, D] bf16, fp16 or fp32, any strides.
        block: rows that share a scale: 128, or 0 for all rows of a batch row and head.
        rotate: multiply rows by a random orthogonal matrix beforehand: signs from a seed (True: seed 0, or an int from
            0 to 2^31 - 1), then a Hadamard matrix; D must be a power of two. It spreads outliers over the row, and
            q.k does not change if k is rotated with the same seed. Source: FlashAttention-3, section 3.3 (arXiv
            2407.08608).
        dtype: float8_e4m3fn, or float8_e5m2 for what needs range more than precision.

    Raises:
        ValueError: an argument is wrong; names it, what was wanted and what came.
        Unsupported: a GPU without fp8, or a head_dim that cannot be rotated.
    """
    _check("q", q)
    seed = _options(q, block, rotate, dtype)
    data, scale = _backend(q).quantize_queries(q, block=block, seed=seed, dtype=dtype)
    return Quantized(data, scale, block, q.shape[1], seed)


def quantize_keys(
    k: Tensor,
    v: Tensor,
    *,
    block: int = BLOCK,
    rotate: bool | int = False,
    v_order: Order = "rows",
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Quantized, Quantized]:
    """k and v as fp8 with scales, as `quantize_queries` says; v is not rotated.

    A row of v that holds what is not finite makes that row of k NaN and holds 0 there: rows that see the key become
    NaN, whole, and no others.

    Args:
        k, v: [B, S, H, D] bf16, fp16 or fp32, any strides; one shape and dtype.
        v_order: how v lies in memory: "rows", or "keys" as `hopper` wants it (see Quantized).
    """
    _check("k", k)
    _check("v", v)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"v: wanted k's shape, dtype and device, {list(k.shape)} {k.dtype} on {k.device}, "
            f"got {list(v.shape)} {v.dtype} on {v.device}"
        )
    if v_order not in get_args(Order):
        raise ValueError(f"v_order: wanted 'rows' or 'keys', got {v_order!r}")
    seed = _options(k, block, rotate, dtype)
    (kd, ks), (vd, vs) = _backend(k).quantize_keys(k, v, block=block, seed=seed, v_order=v_order, dtype=dtype)
    S = k.shape[1]
    return Quantized(kd, ks, block, S, seed), Quantized(vd, vs, block, S, None, v_order)


def dequantize(x: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """data * scale in rows [B, S, H, D] of `dtype`; a rotation stays, as q.k cancels it. Exact in fp32 and fp64."""
    wide = torch.promote_types(dtype, torch.float32)
    data = x.data.to(wide)
    if x.order == "keys":
        data = data.unflatten(3, (-1, 16))[..., key_order(x.device).argsort()].flatten(3)
        data = data[..., : x.length].permute(0, 3, 1, 2)
    scale = x.scale.to(wide).transpose(1, 2)  # [B, blocks, H]
    if x.block:
        scale = scale.repeat_interleave(x.block, 1)[:, : x.length]
    return (data * scale[..., None]).to(dtype)


def key_order(device: torch.device | str | None = None) -> Tensor:
    """int64 [16]: which key of its group of 16 lies at each place of "keys" order.

    There the scores that a thread of a warpgroup holds (keys 8 c + 2 t + b: c, b of its own, t its place among four)
    are, as they are, the fp8 operand of the next wgmma, which wants them at 4 t + 2 c + b.
    """
    return torch.arange(16, device=device).view(2, 4, 2).transpose(0, 1).flatten()


def padded(S: int) -> int:
    """Keys that "keys" order has room for."""
    return -(-S // BLOCK) * BLOCK


def unsupported_device(device: torch.device) -> str | None:
    """Why fp8 does not run on a device, or None if it does."""
    found = dispatch.capability(device)
    if device.type == "cpu" or (device.type == "cuda" and found >= CAPABILITY):
        return None
    wanted, got = (".".join(map(str, x)) for x in (CAPABILITY, found))
    got = f"one of capability {got}" if device.type == "cuda" else device.type
    return f"fp8 needs a CUDA device of capability {wanted} or newer (or the CPU), got {got}"


def _backend(x: Tensor) -> ModuleType:
    """The Triton kernel on GPUs, torch's operations on the CPU."""
    name = "portable.quantize" if x.is_cuda and dispatch.has_triton() else "quantize_torch"
    return importlib.import_module(f"ringfa3_kernels.{name}")


def _check(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: wanted a Tensor, got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name}: wanted 4 dimensions [B, S, H, D], got shape {list(x.shape)}")
    if x.dtype not in SOURCES:
        raise ValueError(f"{name}: wanted dtype bfloat16, float16 or float32, got {x.dtype}")
    if not 8 <= x.shape[3] <= 256 or x.shape[3] % 8:
        raise ValueError(f"{name}: wanted a head_dim that is a multiple of 8 from 8 to 256, got {x.shape[3]}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: wanted no requires_grad outside torch.no_grad(), as quantising records no gradient")


def _options(x: Tensor, block: int, rotate: bool | int, dtype: torch.dtype) -> int | None:
    """The rotation's seed, or None; raises as `quantize_queries` says."""
    if block not in (0, BLOCK):
        raise ValueError(f"block: wanted {BLOCK}, or 0 for one scale a head, got {block!r}")
    if dtype not in FORMATS:
        raise ValueError(f"dtype: wanted float8_e4m3fn or float8_e5m2, got {dtype}")
    if not isinstance(rotate, int) or not 0 <= rotate < 2**31:
        raise ValueError(f"rotate: wanted False, True or a seed from 0 to 2^31 - 1, got {rotate!r}")
    reason = unsupported_device(x.device)
    if reason is not None:
        raise Unsupported(reason)
    if rotate is False:
        return None
    D = x.shape[3]
    if D & (D - 1):
        raise Unsupported(f"a Hadamard rotation needs a head_dim that is a power of two, got {D}")
    return 0 if rotate is True else rotate
