"""Forward attention on fp8 in plain Triton: fp8 is loaded, and widened to fp16, exactly, for the matrix unit.

Grid, masks, `into` and outputs as in forward.py. Reads q, k, v e4m3 or e5m2 [B, S, H, D] and their scales fp32
[B, H, blocks] (`Quantized`); tiles never cross a block of 128, so that a tile has one scale. Those of q and k join the
factor of the scores, that of v multiplies what the tile adds to the output. NaN in q or k reaches out and lse.
"""

import triton
import triton.language as tl

from ringfa3_kernels.portable.forward import online_softmax
from ringfa3_kernels.portable.tiles import FLOOR, LN2, LOG2E, dense_tile, head_base, load_tile, program_tile

TINY = tl.constexpr(1.0e-30)  # least factor of the scores: 0 times a masked score, -inf, would be NaN
BLOCK = tl.constexpr(128)


@triton.jit
def widened(x, INTERPRETED: tl.constexpr):
    """fp8 in fp16, exactly."""
    if not INTERPRETED:
        return x.to(tl.float16)
    elif x.dtype == tl.float8e5:  # whose cast loses subnormals there; e5m2 is fp16's upper half
        return (x.to(tl.uint8, bitcast=True).to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    else:  # whose cast makes 480 of NaN there
        magnitude = x.to(tl.uint8, bitcast=True) & 0x7F
        return tl.where(magnitude == 0x7F, float("nan"), x.to(tl.float16)).to(tl.float16)


@triton.jit
def scale_of(scale, step, batch, head, H, blocks, row):
    """The scale of the tile that begins at `row`; step is 1, or 0 where a head has one scale."""
    return tl.load(scale + (batch.to(tl.int64) * H + head) * blocks + row // BLOCK * step)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_s", "q_h", "k_b", "k_s", "k_h", "v_b", "v_s", "v_h",
        "q_step", "k_step", "v_step", "q_blocks", "k_blocks", "v_blocks",
        "B", "Sq", "Sk", "Hq", "group", "row_tiles", "heads_in_cache", "visible_b",
    ]
)  # fmt: skip
def quantized_forward_kernel(
    q, k, v, q_scale, k_scale, v_scale, lo, hi, bounds, out, lse, out_in, lse_in,
    to_log2,  # scale * log2(e); with a softcap, scale / softcap
    cap,  # softcap * log2(e)
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,  # strides in units of UNIT elements
    q_step, k_step, v_step, q_blocks, k_blocks, v_blocks,  # of the scales: 0 and 1 where a head has one
    B, Sq, Sk, Hq,
    group,  # query heads per key/value head
    row_tiles,  # ceil(Sq / BLOCK_M)
    heads_in_cache,  # query heads whose keys and values fit the L2 cache together
    visible_b,  # 1 where lo, hi and bounds differ between batch rows, else 0
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, INTO: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile, bh = program_tile(row_tiles, B * Hq, heads_in_cache)
    tile = row_tiles - 1 - tile
    batch, head = bh // Hq, bh % Hq
    kv_head, Hkv = head // group, Hq // group
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    in_rows = rows < Sq

    q = head_base(q, batch, head, q_b, q_h, TMA, UNIT)
    k = head_base(k, batch, kv_head, k_b, k_h, TMA, UNIT)
    v = head_base(v, batch, kv_head, v_b, v_h, TMA, UNIT)
    visible_row = (visible_b * batch).to(tl.int64) * Sq
    lo_i = tl.load(lo + visible_row + rows, mask=in_rows, other=0)
    hi_i = tl.load(hi + visible_row + rows, mask=in_rows, other=0)
    bound = bounds + ((visible_b * batch).to(tl.int64) * row_tiles + tile) * 4
    begin, full_begin = tl.load(bound), tl.load(bound + 1)
    full_end, end = tl.load(bound + 2), tl.load(bound + 3)

    lse_row = bh.to(tl.int64) * Sq + rows
    if INTO:
        seen = tl.load(lse_in + lse_row, mask=in_rows, other=float("-inf"))
        m_i = tl.where(seen == float("-inf"), FLOOR, seen * LOG2E)  # running max of the scores, log2 domain
        l_i = tl.where(seen == float("-inf"), 0.0, 1.0)  # running sum of exp2(s - m_i)
        before, inside = dense_tile(out_in, batch, row, head, Sq, Hq, BLOCK_M, HEAD_DIM, BLOCK_D)
        acc = tl.load(before, mask=inside, other=0.0)  # running sum of exp2(s - m_i) * v
    else:
        m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    q_i = widened(load_tile(q, batch, row, head, q_s, Sq, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, UNIT), INTERPRETED)
    to_log2 *= scale_of(q_scale, q_step, batch, head, Hq, q_blocks, row)
    for j in tl.range(begin, end):
        start = j * BLOCK_N
        k_j = widened(load_tile(k, batch, start, kv_head, k_s, Sk, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, UNIT), INTERPRETED)
        s = tl.dot(q_i, k_j.T, input_precision=PRECISION)
        factor = tl.maximum(to_log2 * scale_of(k_scale, k_step, batch, kv_head, Hkv, k_blocks, start), TINY)
        masked = (j < full_begin) | (j >= full_end)
        p, m_i, l_i, alpha = online_softmax(s, m_i, l_i, lo_i, hi_i, start, masked, factor, cap, BLOCK_N, SOFTCAP)
        v_j = widened(load_tile(v, batch, start, kv_head, v_s, Sk, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, UNIT), INTERPRETED)
        added = tl.dot(p.to(tl.float16), v_j, input_precision=PRECISION)
        acc = acc * alpha[:, None] + added * scale_of(v_scale, v_step, batch, kv_head, Hkv, v_blocks, start)

    seen_any = l_i != 0  # NaN has seen something
    l_i = tl.where(seen_any, l_i, 1.0)
    tl.store(lse + lse_row, tl.where(seen_any, (m_i + tl.log2(l_i)) * LN2, float("-inf")), mask=in_rows)
    after, inside = dense_tile(out, batch, row, head, Sq, Hq, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(after, (acc / l_i[:, None]).to(out.dtype.element_ty), mask=inside)
