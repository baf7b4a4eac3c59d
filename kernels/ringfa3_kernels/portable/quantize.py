"""Quantisation to fp8 in one pass: scale of a block, rotation, rounding, and v laid out as Hopper's wgmma wants it.

Grid (ceil(S / 128), H, B): a program reads 128 rows of one head of q, or of k and of v together, [B, S, H, D] with any
strides, and writes their data and scales as `Quantized` describes them. One scale for a whole head takes two launches:
the first writes the largest magnitude of each block (STEP "measure"), the second is told the head's (STEP "given").
Bit for bit what quantize_torch.py computes: scales are powers of two, and the rotation adds in the same order.
Follows FlashAttention-3, section 3.3 (arXiv 2407.08608).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringfa3_kernels.portable.configs import padded as width
from ringfa3_kernels.portable.launch import interpreted, on_device
from ringfa3_kernels.quantize_torch import NAN, RANGE, SMALLEST, Pair, head_amax, salt
from ringfa3_kernels.quantized import BLOCK, padded

FORMAT = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}
# head_dim padded to a power of two -> warps. Not timed yet: with these two blocks share a multiprocessor (D 64) or one
# has 16 warps; tests/kernels/test_quantized.py says how they compile.
WARPS = {16: 4, 32: 4, 64: 8, 128: 16, 256: 16}

ROWS = tl.constexpr(BLOCK)
LEAST = tl.constexpr(SMALLEST)
NOT_A_NUMBER = tl.constexpr(NAN)


@triton.jit
def butterfly(x, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Sums and differences, in place, of the elements of x [ROWS, 2 * HIGH * LOW] that are LOW apart."""
    a, b = tl.split(x.reshape(ROWS, HIGH, 2, LOW).permute(0, 1, 3, 2))
    return tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(ROWS, 2 * HIGH * LOW)


@triton.jit
def rotate(x, salt, D: tl.constexpr, BITS: tl.constexpr):
    """Random signs, then the Hadamard matrix without its factor D ** -0.5, along the rows of x [ROWS, D]."""
    h = tl.arange(0, D).to(tl.uint32) + salt
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    x *= (1.0 - 2.0 * (h >> 31).to(tl.float32))[None, :]
    for bit in tl.static_range(BITS):
        x = butterfly(x, D >> (bit + 1), 1 << bit)
    return x


@triton.jit
def magnitude(x):
    """The largest |x| among what is finite, 0 if nothing is."""
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0), 1), 0)


@triton.jit
def exponent_of(amax, MOST: tl.constexpr):
    """Biased exponent of the least power of two that brings amax to 1.75 * 2^MOST at most; that of 1 for amax 0."""
    bits = amax.to(tl.int32, bitcast=True)
    above = ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)  # its fraction is above 1.75
    return tl.where(bits == 0, 127, tl.maximum((bits >> 23) - MOST + above, LEAST))


@triton.jit
def power(exponent):
    """2 ** (exponent - 127), exactly."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def fp8_bits(x, exponent, FORMAT: tl.constexpr, MOST: tl.constexpr, INTERPRETED: tl.constexpr):
    """x / 2 ** (exponent - 127) in fp8, as uint8; 0 for what is not finite."""
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0) * power(254 - exponent)
    if INTERPRETED:  # whose cast does not round to nearest: adding and taking away 1.5 * 2^23 units does
        digits: tl.constexpr = 3 if MOST == 8 else 2
        least: tl.constexpr = 121 if MOST == 8 else 113  # biased exponent of the smallest normal number
        own = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
        shift = ((tl.maximum(own, least) - digits + 23) << 23) | 0x400000
        shift = shift.to(tl.float32, bitcast=True)
        sign = x.to(tl.int32, bitcast=True) & ~0x7FFFFFFF  # what rounds to 0 keeps it
        x = (((x + shift) - shift).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return x.to(FORMAT).to(tl.uint8, bitcast=True)


@triton.jit
def load_rows(x, s_b, s_s, s_h, s_d, within, S, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's rows of x in fp32 [ROWS, BLOCK_D], in the order `within` [ROWS]; 0 outside."""
    start = tl.program_id(0) * ROWS
    d = tl.arange(0, BLOCK_D)
    head = tl.program_id(2).to(tl.int64) * s_b + tl.program_id(1).to(tl.int64) * s_h
    tile = x + head + start.to(tl.int64) * s_s
    inside = (within < S - start)[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(tile + (within[:, None] * s_s + d[None, :] * s_d), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(data, bits, within, S, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write bits [ROWS, BLOCK_D] to this program's rows of a contiguous [B, S, H, HEAD_DIM]."""
    start, H = tl.program_id(0) * ROWS, tl.num_programs(1)
    d = tl.arange(0, BLOCK_D)
    tile = data + ((tl.program_id(2).to(tl.int64) * S + start) * H + tl.program_id(1)) * HEAD_DIM
    inside = (within < S - start)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(tile + (within[:, None] * (H * HEAD_DIM) + d[None, :]), bits, mask=inside)


@triton.jit
def store_keys(data, bits, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write bits [ROWS, BLOCK_D], transposed, to this program's keys of contiguous [B, H, HEAD_DIM, ROWS * blocks]."""
    d = tl.arange(0, BLOCK_D)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    lines = data + (head * HEAD_DIM + d) * (tl.num_programs(0) * ROWS) + tl.program_id(0) * ROWS
    place = lines[:, None] + tl.arange(0, ROWS)[None, :]
    tl.store(place, tl.trans(bits), mask=(d < HEAD_DIM)[:, None] & (tl.arange(0, ROWS) >= 0)[None, :])


@triton.jit
def scaled(x, scale, amax, factor, STEP: tl.constexpr, MOST: tl.constexpr):
    """Exponent of what x [ROWS, BLOCK_D] is to be divided by; writes the scale, or what the next launch needs."""
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    block = head * tl.num_programs(0) + tl.program_id(0)
    if STEP == "given":
        exponent = exponent_of(tl.load(amax + head), MOST)
        tl.store(scale + head, power(exponent) * factor)  # by every block of the head, the same
    else:
        largest = magnitude(x)
        exponent = exponent_of(largest, MOST)
        if STEP == "measure":
            tl.store(amax + block, largest)
        else:
            tl.store(scale + block, power(exponent) * factor)
    return exponent


@triton.jit(do_not_specialize=["S", "salt"])
def quantize_kernel(
    x, y,  # q and nothing, or k and v
    x_data, y_data,  # uint8: [B, S, H, D], or, of v in "keys" order, [B, H, D, 128 * blocks]
    x_scale, y_scale, x_amax, y_amax,
    x_b, x_s, x_h, x_d, y_b, y_s, y_h, y_d,  # strides
    S, salt,
    factor,  # D ** -0.5 where rotated, else 1
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr,  # BLOCK_D is 2 ** BITS
    PAIR: tl.constexpr, ROTATE: tl.constexpr, KEYS: tl.constexpr,
    STEP: tl.constexpr,  # "block", "measure", "given"
    FORMAT: tl.constexpr, MOST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, ROWS)
    # in "keys" order place 4 t + 2 c + b holds key 8 c + 2 t + b: rows are read in that order, and k is written back
    within = (i & ~15) | ((i & 2) << 2) | ((i & 12) >> 1) | (i & 1) if KEYS else i
    if PAIR:
        tile = load_rows(y, y_b, y_s, y_h, y_d, within, S, HEAD_DIM, BLOCK_D)
        exponent = scaled(tile, y_scale, y_amax, 1.0, STEP, MOST)
        whole = tl.min((tl.abs(tile) < float("inf")).to(tl.int32), 1) == 1  # rows of v without NaN and infinities
        if STEP != "measure":
            bits = fp8_bits(tile, exponent, FORMAT, MOST, INTERPRETED)
            if KEYS:
                store_keys(y_data, bits, HEAD_DIM, BLOCK_D)
            else:
                store_rows(y_data, bits, within, S, HEAD_DIM, BLOCK_D)

    tile = load_rows(x, x_b, x_s, x_h, x_d, within, S, HEAD_DIM, BLOCK_D)
    if ROTATE:
        tile = rotate(tile, salt, BLOCK_D, BITS)
    exponent = scaled(tile, x_scale, x_amax, factor, STEP, MOST)
    if STEP != "measure":
        finite = tl.abs(tile) < float("inf")
        if PAIR:
            finite = finite & whole[:, None]
        bits = fp8_bits(tile, exponent, FORMAT, MOST, INTERPRETED)
        store_rows(x_data, tl.where(finite, bits, NOT_A_NUMBER).to(tl.uint8), within, S, HEAD_DIM, BLOCK_D)


def quantize_queries(q: Tensor, *, block: int, seed: int | None, dtype: torch.dtype) -> Pair:
    """Data [B, S, H, D] and scale; see `ringfa3_kernels.quantized.quantize_queries`."""
    return _launch(q, None, block=block, seed=seed, v_order="rows", dtype=dtype)[0]


def quantize_keys(
    k: Tensor, v: Tensor, *, block: int, seed: int | None, v_order: str, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Data and scale of k and of v; see `ringfa3_kernels.quantized.quantize_keys`."""
    return _launch(k, v, block=block, seed=seed, v_order=v_order, dtype=dtype)


def _launch(
    x: Tensor, y: Tensor | None, *, block: int, seed: int | None, v_order: str, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Data and scale of x, and of y (of x again where there is none)."""
    x = _reachable(x)
    other = x if y is None else _reachable(y)
    B, S, H, D = x.shape
    blocks = triton.cdiv(S, BLOCK)
    keys = v_order == "keys"
    shapes = (x.shape, (B, H, D, padded(S)) if keys else x.shape)
    data = [torch.empty(shape, dtype=dtype, device=x.device) for shape in shapes[: 1 if y is None else 2]]
    wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    scales = [torch.empty(B, H, blocks if block else 1, **wide) for _ in data]
    amax = scales if block else [torch.empty(B, H, blocks, **wide) for _ in data]
    for step in ("block",) if block else ("measure", "given"):
        if not data[0].numel():
            for scale in scales:
                scale.fill_(1.0)
            break
        if step == "given":
            amax = [head_amax(a) for a in amax]
        with on_device(x):
            quantize_kernel[(blocks, H, B)](
                x, other,
                data[0].view(torch.uint8), data[-1].view(torch.uint8), scales[0], scales[-1], amax[0], amax[-1],
                *x.stride(), *other.stride(),
                S, 0 if seed is None else salt(seed), 1.0 if seed is None else D**-0.5,
                STEP=step, **constants(D, dtype, pair=y is not None, rotate=seed is not None, keys=keys),
                INTERPRETED=interpreted(), **options(D),
            )  # fmt: skip
    return (data[0], scales[0]), (data[-1], scales[-1])


def _reachable(x: Tensor) -> Tensor:
    """x where offsets inside a tile fit int32, else a contiguous copy."""
    return x if x.stride(1) * BLOCK + x.stride(3) * x.shape[3] < 1 << 31 else x.contiguous()


def options(D: int) -> dict[str, Any]:
    """Compile options."""
    return {"num_warps": WARPS[width(D)], "enable_fp_fusion": True}


def constants(D: int, dtype: torch.dtype, *, pair: bool, rotate: bool, keys: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernel."""
    return {
        "HEAD_DIM": D,
        "BLOCK_D": width(D),
        "BITS": width(D).bit_length() - 1,
        "PAIR": pair,
        "ROTATE": rotate,
        "KEYS": keys,
        "FORMAT": FORMAT[dtype],
        "MOST": RANGE[dtype],
    }
