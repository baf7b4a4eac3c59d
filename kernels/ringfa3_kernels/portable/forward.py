"""Forward attention in plain Triton: one program computes a tile of query rows of one head.

Grid: 1-D, ceil(Sq / BLOCK_M) * B * Hq programs, the last rows first (under causal masks they see the most keys).
Reads q [B, Sq, Hq, D], k and v [B, Sk, Hkv, D], lo and hi int32 [Sq] or [B, Sq], and the tile bounds of
Visible.key_tiles; writes out [B, Sq, Hq, D] and lse [B, Hq, Sq], starting from nothing or from another Partial.
Scores live in the log2 domain (scale * log2(e) is folded into exp2). A row that sees no key gets out 0, lse -inf.
What defaults to None is for ALiBi (slopes) and dropout (seed_low to first_row), and positions for both: without them
the compiled kernel is as if it knew neither.
Follows FlashAttention-2 (arXiv 2307.08691).
"""

import triton
import triton.language as tl

from ringfa3_kernels.portable.positional import biased, load_positions, load_slope, weights
from ringfa3_kernels.portable.tiles import FLOOR, LN2, LOG2E, dense_tile, head_base, load_tile, program_tile, tanh


@triton.jit
def online_softmax(s, m_i, l_i, lo_i, hi_i, start, masked, to_log2, cap, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr):
    """One step of the online softmax over raw scores s [BLOCK_M, BLOCK_N] of the keys start..: p, m_i, l_i, alpha."""
    if SOFTCAP:
        s = tanh(s * to_log2) * cap
    if masked:
        j = start + tl.arange(0, BLOCK_N)
        s = tl.where((j[None, :] >= lo_i[:, None]) & (j[None, :] < hi_i[:, None]), s, float("-inf"))
    if SOFTCAP:
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1) * to_log2)
        p = tl.exp2(s * to_log2 - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    return p, m_new, l_i * alpha + tl.sum(p, 1), alpha


@triton.jit(
    do_not_specialize=[
        "q_b", "q_s", "q_h", "k_b", "k_s", "k_h", "v_b", "v_s", "v_h",
        "B", "Sq", "Sk", "Hq", "group", "row_tiles", "heads_in_cache", "visible_b",
        "q_pos_b", "k_pos_b", "slopes_b", "seed_low", "seed_high", "threshold", "first_head", "first_row",
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v, lo, hi, bounds, out, lse, out_in, lse_in,
    to_log2,  # scale * log2(e); with a softcap, scale / softcap
    cap,  # softcap * log2(e)
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,  # strides in units of UNIT elements; unused with TMA
    B, Sq, Sk, Hq,
    group,  # query heads per key/value head
    row_tiles,  # ceil(Sq / BLOCK_M)
    heads_in_cache,  # query heads whose keys and values fit the L2 cache together
    visible_b,  # 1 where lo, hi and bounds differ between batch rows, else 0
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, INTO: tl.constexpr,
    PRECISION: tl.constexpr,
    q_pos=None, k_pos=None, q_pos_b=None, k_pos_b=None, slopes=None, slopes_b=None,
    seed_low=None, seed_high=None, threshold=None, rescale=None, first_head=None, first_row=None,
):  # fmt: skip
    tile, bh = program_tile(row_tiles, B * Hq, heads_in_cache)
    tile = row_tiles - 1 - tile
    batch, head = bh // Hq, bh % Hq
    kv_head = head // group
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    in_rows = rows < Sq

    q = head_base(q, batch, head, q_b, q_h, False, UNIT)
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
        m_i = tl.maximum(seen * LOG2E, FLOOR)  # running max of the scores, log2 domain
        l_i = tl.where(seen > float("-inf"), 1.0, 0.0)  # running sum of exp2(s - m_i)
        before, inside = dense_tile(out_in, batch, row, head, Sq, Hq, BLOCK_M, HEAD_DIM, BLOCK_D)
        acc = tl.load(before, mask=inside, other=0.0)  # running sum of exp2(s - m_i) * v
    else:
        m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if q_pos is not None:
        q_pos_i = load_positions(q_pos, q_pos_b, batch, row, Sq, BLOCK_M)[:, None]
    if slopes is not None:
        slope = load_slope(slopes, slopes_b, batch, head)
    q_i = load_tile(q, batch, row, head, q_s, Sq, BLOCK_M, HEAD_DIM, BLOCK_D, False, UNIT)
    for j in tl.range(begin, end):
        start = j * BLOCK_N
        k_j = load_tile(k, batch, start, kv_head, k_s, Sk, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, UNIT)
        s = tl.dot(q_i, k_j.T, input_precision=PRECISION)
        masked = (j < full_begin) | (j >= full_end)
        if q_pos is not None:
            k_pos_j = load_positions(k_pos, k_pos_b, batch, start, Sk, BLOCK_N)[None, :]
        if slopes is not None:
            s = tanh(s * to_log2) * cap if SOFTCAP else s * to_log2
            s = biased(s, q_pos_i, k_pos_j, slope)
            p, m_i, l_i, alpha = online_softmax(s, m_i, l_i, lo_i, hi_i, start, masked, 1.0, cap, BLOCK_N, False)
        else:
            p, m_i, l_i, alpha = online_softmax(s, m_i, l_i, lo_i, hi_i, start, masked, to_log2, cap, BLOCK_N, SOFTCAP)
        if rescale is not None:  # l_i, and so lse, is of all probabilities
            p *= weights(
                q_pos_i, k_pos_j, head + first_head, batch + first_row, seed_low, seed_high, threshold, rescale
            )
        acc = acc * alpha[:, None]
        v_j = load_tile(v, batch, start, kv_head, v_s, Sk, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, UNIT)
        acc = tl.dot(p.to(v_j.dtype), v_j, acc, input_precision=PRECISION)

    seen_any = l_i != 0  # NaN has seen something
    l_i = tl.where(seen_any, l_i, 1.0)
    tl.store(lse + lse_row, tl.where(seen_any, (m_i + tl.log2(l_i)) * LN2, float("-inf")), mask=in_rows)
    after, inside = dense_tile(out, batch, row, head, Sq, Hq, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(after, (acc / l_i[:, None]).to(out.dtype.element_ty), mask=inside)
