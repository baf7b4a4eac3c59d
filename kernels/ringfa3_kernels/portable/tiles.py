"""What the portable kernels share: which tile a program works on, how tiles are read and written, the softcap."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E): the GPU has exp2 in hardware
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(
    -1.0e30
)  # finite stand-in for a running max of -inf: exp2(-inf - FLOOR) is 0 where -inf would be NaN


@triton.jit
def program_tile(tiles, heads, heads_in_cache):
    """(tile, batch * head) of this program.

    Heads come in sections whose keys and values fit the L2 cache together; within a section the head runs fastest, so
    that the programs in flight share keys, and all heads' tile 0 comes before any tile 1.
    """
    pid = tl.program_id(0)
    section = pid // (tiles * heads_in_cache)
    first = section * heads_in_cache
    width = tl.minimum(heads - first, heads_in_cache)
    within = pid - first * tiles
    return within // width, first + within % width


@triton.jit
def head_base(x, batch, head, stride_b, stride_h, TMA: tl.constexpr, UNIT: tl.constexpr):
    """x itself if it is a descriptor, else the pointer to x[batch, 0, head, 0]; strides count units of UNIT."""
    if TMA:
        return x
    else:
        return x + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * UNIT


@triton.jit
def load_tile(
    x,  # what head_base returned
    batch,
    row,
    head,
    stride_s,
    S,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    UNIT: tl.constexpr,
):
    """x[batch, row : row + ROWS, head, :] as [ROWS, BLOCK_D], 0 outside the tensor.

    With TMA, x is a descriptor of the whole [B, S, H, D] tensor: the hardware fills in the zeros. Otherwise the row
    offset is int64 (a shard can pass 2^31 elements) and the offsets inside the tile are int32, the same for every tile.
    Tiles that stay (q in the forward) are read by pointer: Triton 3.6 would keep a reshaped TMA tile in registers.
    """
    if TMA:
        return x.load([batch, row, head, 0]).reshape(ROWS, BLOCK_D)
    else:
        i = tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK_D)
        tile = x + tl.cast(row, tl.int64) * stride_s * UNIT
        inside = (i < S - row)[:, None]
        if BLOCK_D != HEAD_DIM:
            inside = inside & (d < HEAD_DIM)[None, :]
        return tl.load(tile + (i[:, None] * stride_s * UNIT + d[None, :]), mask=inside, other=0.0)


@triton.jit
def dense_tile(x, batch, row, head, S, H, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] to rows of one head of a contiguous [B, S, H, HEAD_DIM] x, and which lie inside it."""
    i = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    base = x + ((batch.to(tl.int64) * S + row) * H + head) * HEAD_DIM
    inside = (i < S - row)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (d < HEAD_DIM)[None, :]
    return base + (i[:, None] * (H * HEAD_DIM) + d[None, :]), inside


@triton.jit
def store_gradient(pointers, inside, grad, ACCUMULATE: tl.constexpr):
    """Write grad, or add it to what is there.

    One program adds to an element, once a launch: the atomic is there because it needs no registers for the old values
    (a load and an add spilled up to 300 bytes at head_dim 256), and the result is deterministic all the same.
    """
    if ACCUMULATE:
        tl.atomic_add(pointers, grad, mask=inside, sem="relaxed")
    else:
        tl.store(pointers, grad.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """tanh to about 2 ulp. 1 - 2 / (1 + exp(2x)) alone loses small x to cancellation: those take the Taylor series."""
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    ratio = (1.0 - e) / (1.0 + e)
    return tl.where(x2 < 0.0625, series, tl.where(x < 0, -ratio, ratio))
