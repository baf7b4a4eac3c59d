"""Backward attention in plain Triton: one kernel computes dk and dv, another dq. Both are deterministic.

Each recomputes the probabilities from lse: 2 of 7 matrix products are done twice, the price of determinism.
key_gradient_kernel: 1-D grid, ceil(Sk / BLOCK_N) * B * Hkv programs; a program holds a tile of keys and walks the rows
that see it, for all query heads of its group in turn.
query_gradient_kernel: 1-D grid, ceil(Sq / BLOCK_M) * B * Hq programs, a tile of rows each, as in the forward.
Both read q, dout [B, Sq, Hq, D], k, v [B, Sk, Hkv, D], lse, delta [B, Hq, Sq], lo, hi and the tile bounds of
Visible.query_tiles or key_tiles; they store dq, dk, dv or add to them.
Order of the products: S, dP, then dV, which runs while dS is computed, then dK or dQ, which runs on into the next step
(Triton waits for a wgmma at once unless its result is only accumulated).
What defaults to None is for ALiBi and dropout, as in the forward.
Follows FlashAttention-2, algorithm 2 (arXiv 2307.08691).
"""

import triton
import triton.language as tl

from ringfa3_kernels.portable.positional import biased, load_positions, load_slope, weights
from ringfa3_kernels.portable.tiles import (
    LOG2E,
    dense_tile,
    head_base,
    load_tile,
    program_tile,
    store_gradient,
    tanh,
)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_s", "q_h", "do_b", "do_s", "do_h", "k_b", "k_s", "k_h", "v_b", "v_s", "v_h",
        "B", "Sq", "Sk", "Hkv", "group", "key_tiles", "heads_in_cache", "visible_b",
        "q_pos_b", "k_pos_b", "slopes_b", "seed_low", "seed_high", "threshold", "first_head", "first_row",
    ]
)  # fmt: skip
def key_gradient_kernel(
    q, dout, k, v, lo, hi, bounds, lse, delta, dk, dv,
    to_log2,  # scale * log2(e); with a softcap, scale / softcap
    cap,  # softcap * log2(e)
    scale,
    q_b, q_s, q_h, do_b, do_s, do_h, k_b, k_s, k_h, v_b, v_s, v_h,  # strides in units of UNIT elements; unused with TMA
    B, Sq, Sk, Hkv,
    group,  # query heads per key/value head
    key_tiles,  # ceil(Sk / BLOCK_N)
    heads_in_cache,  # key/value heads whose group's q and dout fit the L2 cache together
    visible_b,  # 1 where lo, hi and bounds differ between batch rows, else 0
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    q_pos=None, k_pos=None, q_pos_b=None, k_pos_b=None, slopes=None, slopes_b=None,
    seed_low=None, seed_high=None, threshold=None, rescale=None, first_head=None, first_row=None,
):  # fmt: skip
    tile, bh = program_tile(key_tiles, B * Hkv, heads_in_cache)
    batch, kv_head = bh // Hkv, bh % Hkv
    Hq = Hkv * group
    start = tile * BLOCK_N
    j = start + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_M)

    k = head_base(k, batch, kv_head, k_b, k_h, False, UNIT)
    v = head_base(v, batch, kv_head, v_b, v_h, False, UNIT)
    visible_row = (visible_b * batch).to(tl.int64) * Sq
    bound = bounds + ((visible_b * batch).to(tl.int64) * key_tiles + tile) * 4
    begin, full_begin = tl.load(bound), tl.load(bound + 1)
    full_end, end = tl.load(bound + 2), tl.load(bound + 3)
    blocks = end - begin  # row blocks that see these keys; the loop runs over them for each head of the group

    k_j = load_tile(k, batch, start, kv_head, k_s, Sk, BLOCK_N, HEAD_DIM, BLOCK_D, False, UNIT)
    v_j = load_tile(v, batch, start, kv_head, v_s, Sk, BLOCK_N, HEAD_DIM, BLOCK_D, False, UNIT)
    if q_pos is not None:
        k_pos_j = load_positions(k_pos, k_pos_b, batch, start, Sk, BLOCK_N)[:, None]
    dk_j = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # running sum of dS^T q, without the scale
    dv_j = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # running sum of P^T dout
    for step in tl.range(0, blocks * group):
        head = kv_head * group + step // blocks
        block = begin + step % blocks
        row = block * BLOCK_M
        q_h_i = head_base(q, batch, head, q_b, q_h, TMA, UNIT)
        q_i = load_tile(q_h_i, batch, row, head, q_s, Sq, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, UNIT)
        in_rows = i < Sq - row
        stat = (batch * Hq + head).to(tl.int64) * Sq + row
        lse_i = tl.load(lse + stat + i, mask=in_rows, other=0.0) * LOG2E
        s = tl.dot(k_j, q_i.T, input_precision=PRECISION)  # S^T: keys are rows here
        do_h_i = head_base(dout, batch, head, do_b, do_h, TMA, UNIT)
        do_i = load_tile(do_h_i, batch, row, head, do_s, Sq, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, UNIT)
        dp = tl.dot(v_j, do_i.T, input_precision=PRECISION)
        if SOFTCAP:
            t = tanh(s * to_log2)
            s = t * cap
        else:
            s = s * to_log2
        if q_pos is not None:
            q_pos_i = load_positions(q_pos, q_pos_b, batch, row, Sq, BLOCK_M)[None, :]
        if slopes is not None:
            s = biased(s, q_pos_i, k_pos_j, load_slope(slopes, slopes_b, batch, head))
        p = tl.exp2(s - lse_i[None, :])
        if (block < full_begin) | (block >= full_end):
            lo_i = tl.load(lo + visible_row + row + i, mask=in_rows, other=0)
            hi_i = tl.load(hi + visible_row + row + i, mask=in_rows, other=0)
            p = tl.where((j[:, None] >= lo_i[None, :]) & (j[:, None] < hi_i[None, :]), p, 0.0)
        stays = p
        if rescale is not None:
            weight = weights(
                q_pos_i, k_pos_j, head + first_head, batch + first_row, seed_low, seed_high, threshold, rescale
            )
            stays = p * weight
            dp = dp * weight
        dv_j = tl.dot(stays.to(do_i.dtype), do_i, dv_j, input_precision=PRECISION)
        delta_i = tl.load(delta + stat + i, mask=in_rows, other=0.0)
        ds = p * (dp - delta_i[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - t * t)
        dk_j = tl.dot(ds.to(q_i.dtype), q_i, dk_j, input_precision=PRECISION)

    to_dk, inside = dense_tile(dk, batch, start, kv_head, Sk, Hkv, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_gradient(to_dk, inside, dk_j * scale, ACCUMULATE)
    to_dv, inside = dense_tile(dv, batch, start, kv_head, Sk, Hkv, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_gradient(to_dv, inside, dv_j, ACCUMULATE)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_s", "q_h", "do_b", "do_s", "do_h", "k_b", "k_s", "k_h", "v_b", "v_s", "v_h",
        "B", "Sq", "Sk", "Hq", "group", "row_tiles", "heads_in_cache", "visible_b",
        "q_pos_b", "k_pos_b", "slopes_b", "seed_low", "seed_high", "threshold", "first_head", "first_row",
    ]
)  # fmt: skip
def query_gradient_kernel(
    q, dout, k, v, lo, hi, bounds, lse, delta, dq,
    to_log2,  # scale * log2(e); with a softcap, scale / softcap
    cap,  # softcap * log2(e)
    scale,
    q_b, q_s, q_h, do_b, do_s, do_h, k_b, k_s, k_h, v_b, v_s, v_h,  # strides in units of UNIT elements; unused with TMA
    B, Sq, Sk, Hq,
    group,  # query heads per key/value head
    row_tiles,  # ceil(Sq / BLOCK_M)
    heads_in_cache,  # query heads whose keys and values fit the L2 cache together
    visible_b,  # 1 where lo, hi and bounds differ between batch rows, else 0
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
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
    dout = head_base(dout, batch, head, do_b, do_h, False, UNIT)
    k = head_base(k, batch, kv_head, k_b, k_h, TMA, UNIT)
    v = head_base(v, batch, kv_head, v_b, v_h, TMA, UNIT)
    visible_row = (visible_b * batch).to(tl.int64) * Sq
    lo_i = tl.load(lo + visible_row + rows, mask=in_rows, other=0)
    hi_i = tl.load(hi + visible_row + rows, mask=in_rows, other=0)
    bound = bounds + ((visible_b * batch).to(tl.int64) * row_tiles + tile) * 4
    begin, full_begin = tl.load(bound), tl.load(bound + 1)
    full_end, end = tl.load(bound + 2), tl.load(bound + 3)

    q_i = load_tile(q, batch, row, head, q_s, Sq, BLOCK_M, HEAD_DIM, BLOCK_D, False, UNIT)
    do_i = load_tile(dout, batch, row, head, do_s, Sq, BLOCK_M, HEAD_DIM, BLOCK_D, False, UNIT)
    stat = bh.to(tl.int64) * Sq + rows
    lse_i = tl.load(lse + stat, mask=in_rows, other=0.0) * LOG2E
    delta_i = tl.load(delta + stat, mask=in_rows, other=0.0)
    if q_pos is not None:
        q_pos_i = load_positions(q_pos, q_pos_b, batch, row, Sq, BLOCK_M)[:, None]
    if slopes is not None:
        slope = load_slope(slopes, slopes_b, batch, head)
    dq_i = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # running sum of dS k, without the scale
    for block in tl.range(begin, end):
        start = block * BLOCK_N
        k_j = load_tile(k, batch, start, kv_head, k_s, Sk, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, UNIT)
        s = tl.dot(q_i, k_j.T, input_precision=PRECISION)
        if SOFTCAP:
            t = tanh(s * to_log2)
            s = t * cap
        else:
            s = s * to_log2
        if q_pos is not None:
            k_pos_j = load_positions(k_pos, k_pos_b, batch, start, Sk, BLOCK_N)[None, :]
        if slopes is not None:
            s = biased(s, q_pos_i, k_pos_j, slope)
        p = tl.exp2(s - lse_i[:, None])
        if (block < full_begin) | (block >= full_end):
            j = start + tl.arange(0, BLOCK_N)
            p = tl.where((j[None, :] >= lo_i[:, None]) & (j[None, :] < hi_i[:, None]), p, 0.0)
        v_j = load_tile(v, batch, start, kv_head, v_s, Sk, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, UNIT)
        dp = tl.dot(do_i, v_j.T, input_precision=PRECISION)
        if rescale is not None:
            dp *= weights(
                q_pos_i, k_pos_j, head + first_head, batch + first_row, seed_low, seed_high, threshold, rescale
            )
        ds = p * (dp - delta_i[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - t * t)
        dq_i = tl.dot(ds.to(k_j.dtype), k_j, dq_i, input_precision=PRECISION)

    to_dq, inside = dense_tile(dq, batch, row, head, Sq, Hq, BLOCK_M, HEAD_DIM, BLOCK_D)
    store_gradient(to_dq, inside, dq_i * scale, ACCUMULATE)
