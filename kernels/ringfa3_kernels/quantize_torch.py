"""Quantisation in torch's operations: what the CPU runs, and the twin that portable/quantize.py equals bit for bit."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ringfa3_kernels.quantized import BLOCK, key_order, padded

T = TypeVar("T", int, Tensor)
Pair = tuple[Tensor, Tensor]  # data and scale
NAN = 0x7F  # in both formats
# log2 of 1.75 * 2^n, the largest number of the format, without the fraction
RANGE = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
# biased exponent of the least scale, 2^-60: a kernel that keeps the output in units of the present block's scale of v
# would overflow where a block of tiny values follows others
SMALLEST = 67


def quantize_queries(q: Tensor, *, block: int, seed: int | None, dtype: torch.dtype) -> Pair:
    """Data [B, S, H, D] and scale; see `ringfa3_kernels.quantized.quantize_queries`."""
    x = q.float()
    return _rounded(x if seed is None else rotate(x, seed), block, dtype, 1.0 if seed is None else x.shape[3] ** -0.5)


def quantize_keys(
    k: Tensor, v: Tensor, *, block: int, seed: int | None, v_order: str, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Data and scale of k and of v; see `ringfa3_kernels.quantized.quantize_keys`."""
    k_data, k_scale = quantize_queries(k, block=block, seed=seed, dtype=dtype)
    x = v.float()
    whole = x.isfinite().all(-1, keepdim=True)  # rows without NaN and infinities
    k_data.view(torch.uint8).masked_fill_(~whole, NAN)
    v_data, v_scale = _rounded(x, block, dtype, 1.0)
    v_data.view(torch.uint8).masked_fill_(~x.isfinite(), 0)
    return (k_data, k_scale), (in_keys_order(v_data) if v_order == "keys" else v_data, v_scale)


def in_keys_order(data: Tensor) -> Tensor:
    """fp8 [B, S, H, D] as "keys" order has it: [B, H, D, S rounded up to 128], zeros where there are no keys."""
    S = data.shape[1]
    bits = F.pad(data.view(torch.uint8).permute(0, 2, 3, 1), (0, padded(S) - S))
    permuted: Tensor = bits.unflatten(3, (-1, 16))[..., key_order(data.device)].flatten(3)
    return permuted.view(data.dtype)


def rotate(x: Tensor, seed: int) -> Tensor:
    """Signs, then the Hadamard matrix without its factor D ** -0.5, along the last dimension of fp32 [..., D].

    The sums are those of the kernel, in its order.
    """
    D = x.shape[-1]
    x = x * signs(seed, D).to(x.device)
    for _ in range(D.bit_length() - 1):  # after each, the next bit of the index is the lowest
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        x = torch.cat([a + b, a - b], -1)
    return x


def signs(seed: int, D: int) -> Tensor:
    """fp32 [D] of 1 and -1: the highest bit of a hash of seed and place (MurmurHash3's finaliser)."""
    return 1.0 - 2.0 * (mixed(torch.arange(D) + salt(seed)) >> 31).float()


def salt(seed: int) -> int:
    """What a seed adds to places before they are hashed; below 2^31."""
    return mixed(seed) >> 1


def mixed(x: T) -> T:
    """A hash of 32-bit numbers held in int64 or int."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def head_amax(amax: Tensor) -> Tensor:
    """[B, H, blocks] -> [B, H, 1]; 0 where there are no blocks."""
    return F.pad(amax, (0, 1)).amax(-1, keepdim=True)


def _rounded(x: Tensor, block: int, dtype: torch.dtype, factor: float) -> Pair:
    """fp32 x [B, S, H, D] as data and scale; `factor` is what x still lacks."""
    finite = x.isfinite()
    x = x.masked_fill(~finite, 0.0)
    rows = x.abs().amax(-1).transpose(1, 2)  # [B, H, S]
    amax = F.pad(rows, (0, -rows.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK)).amax(-1)
    exponent = _exponent(amax if block else head_amax(amax), RANGE[dtype])
    inverse = ((254 - exponent) << 23).view(torch.float32).transpose(1, 2)
    if block:
        inverse = inverse.repeat_interleave(block, 1)[:, : x.shape[1]]
    data = (x * inverse[..., None]).to(dtype).contiguous()
    data.view(torch.uint8).masked_fill_(~finite, NAN)
    return data, (exponent << 23).view(torch.float32) * factor


def _exponent(amax: Tensor, most: int) -> Tensor:
    """Biased exponent, int32, of the least power of two that brings amax to 1.75 * 2^most at most; 127 for amax 0."""
    bits = amax.contiguous().view(torch.int32)
    above = (bits & 0x7FFFFF) > 0x600000  # its fraction is above 1.75
    exponent = ((bits >> 23) - most + above).clamp(min=SMALLEST)
    return torch.where(amax == 0, 127, exponent).int()
