"""Decode in plain Triton: a few query rows a sequence against a paged cache, split over the keys, then combined.

Memory is the limit, so a key is read once: all query rows and heads that share a key/value head are one tile of rows
(row = i * group + g; above BLOCK_M of them there are more tiles). The keys of a sequence are cut into pieces of whole
tiles of BLOCK_N, each piece becomes a Partial in a slot of its own, and the slots of a sequence are merged. `shares`
is how many pieces the batch is to have; what a sequence gets of them goes by its length, which only the device knows:
every program works it out for itself (`deal`), so that no launch depends on lengths and a CUDA graph serves them all.

decode_kernel: grid (slots * Hkv * row_tiles), heads fastest, so that programs in flight read the heads of the same
keys, which are neighbours in memory; programs of slots that stay empty end at once. Reads q [B, Sq, Hq, D], k and v
[P, page, Hkv, D] through table int32 [B, blocks], lo and hi int32 [Sq] or [B, Sq]. Writes Partials
[slots, Sq, Hq, D] and lse [Sq, Hq, slots] in log2 or, where each sequence is one piece (WHOLE), out [B, Sq, Hq, D] and
lse [B, Hq, Sq] themselves.
combine_kernel: grid (B * ceil(Sq * Hq / BLOCK_R), ceil(D / BLOCK_C)), merges a sequence's slots into out and lse.

Keys outside a sequence's hull (from the first that any row sees to the last) are not loaded: neither what pages hold
there nor the table's numbers there can reach a result. A row that sees no key gets out 0, lse -inf.
Follows flash-decoding (the split-KV of FlashAttention).
"""

import triton
import triton.language as tl

from ringfa3_kernels.portable.forward import online_softmax
from ringfa3_kernels.portable.tiles import FLOOR, LN2

MOST_ROWS = tl.constexpr(16)  # new tokens of a sequence, at most: what the door lets through


@triton.jit
def hull(lo, hi, sequence, Sq, visible_b):
    """(first key that any row of a sequence sees, past the last); for one number or a column [n, 1] of them."""
    i = tl.arange(0, MOST_ROWS)[None, :]
    at = (visible_b * sequence).to(tl.int64) * Sq + i
    lo_i = tl.load(lo + at, mask=i < Sq, other=0)
    hi_i = tl.load(hi + at, mask=i < Sq, other=0)
    stop = tl.max(tl.where(hi_i > lo_i, hi_i, 0), 1)
    return tl.minimum(tl.min(tl.where(hi_i > lo_i, lo_i, 2147483647), 1), stop), stop


@triton.jit
def deal(lo, hi, B, Sq, visible_b, shares, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pieces [BLOCK_B] that each sequence is cut into, at most shares + B - 1 in all; its hull.

    As many as its tiles are multiples of a share, rounded, but one at least; none where no row sees a key.
    """
    b = tl.arange(0, BLOCK_B)
    begin, end = hull(lo, hi, tl.minimum(b, B - 1)[:, None], Sq, visible_b)
    tiles = tl.where(b < B, (end + BLOCK_N - 1) // BLOCK_N - begin // BLOCK_N, 0)
    share = tl.maximum((tl.sum(tiles, 0) + shares - 1) // shares, 1)  # tiles
    return tl.where(tiles > 0, tl.maximum((tiles + share // 2) // share, 1), 0), begin, end


@triton.jit
def load_pages(table, key, begin, end, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """Pages of the keys key..key + BLOCK_N - 1, [BLOCK_N], or the one that holds them all; any where there are none."""
    if PAGE < BLOCK_N:
        j = key + tl.arange(0, BLOCK_N)
        return tl.load(table + j // PAGE, mask=(j >= begin) & (j < end), other=0)
    else:
        return tl.load(table + key // PAGE, mask=key < end, other=0)


@triton.jit
def load_keys(x, offsets, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_N, BLOCK_D] at offsets [BLOCK_N], 0 for keys that are not inside."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(x + (offsets[:, None] + d[None, :]), mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_s", "q_h", "k_p", "k_s", "k_h", "v_p", "v_s", "v_h", "table_b",
        "B", "Sq", "Hq", "Hkv", "group", "row_tiles", "shares", "slots", "visible_b",
    ]
)  # fmt: skip
def decode_kernel(
    q, k, v, table, lo, hi, out, lse,
    to_log2,  # scale * log2(e); with a softcap, scale / softcap
    cap,  # softcap * log2(e)
    q_b, q_s, q_h, k_p, k_s, k_h, v_p, v_s, v_h,  # strides in units of UNIT elements
    table_b,
    B, Sq, Hq, Hkv,
    group,  # query heads per key/value head
    row_tiles,  # ceil(Sq * group / BLOCK_M)
    shares,  # pieces that the batch is to have
    slots,  # shares + B - 1
    visible_b,  # 1 where lo and hi differ between sequences, else 0
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, WHOLE: tl.constexpr,
    FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    slot = pid // (Hkv * row_tiles)
    if WHOLE:
        sequence, piece, pieces = slot, 0, 1
        begins, ends = hull(lo, hi, sequence + tl.zeros([1, 1], tl.int32), Sq, visible_b)
        begin, end = tl.sum(begins, 0), tl.sum(ends, 0)
    else:
        dealt, begins, ends = deal(lo, hi, B, Sq, visible_b, shares, BLOCK_B, BLOCK_N)
        b = tl.arange(0, BLOCK_B)
        sequence = tl.sum(((tl.cumsum(dealt, 0) <= slot) & (b < B)).to(tl.int32), 0)
        if sequence == B:
            return
        piece = slot - tl.sum(tl.where(b < sequence, dealt, 0), 0)
        pieces = tl.sum(tl.where(b == sequence, dealt, 0), 0)
        begin, end = tl.sum(tl.where(b == sequence, begins, 0), 0), tl.sum(tl.where(b == sequence, ends, 0), 0)
    first_tile = begin // BLOCK_N
    tiles = (end + BLOCK_N - 1) // BLOCK_N - first_tile
    from_tile, to_tile = first_tile + tiles * piece // pieces, first_tile + tiles * (piece + 1) // pieces

    kv_head = pid % (Hkv * row_tiles) // row_tiles
    row = pid % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < Sq * group
    i = row // group
    head = kv_head * group + row % group
    d = tl.arange(0, BLOCK_D)
    in_tile = in_rows[:, None] & (d < HEAD_DIM)[None, :]
    n = tl.arange(0, BLOCK_N).to(tl.int64 if FAR else tl.int32)
    k += kv_head.to(tl.int64) * k_h * UNIT
    v += kv_head.to(tl.int64) * v_h * UNIT

    at = (visible_b * sequence).to(tl.int64) * Sq + i
    lo_i = tl.load(lo + at, mask=in_rows, other=0)
    hi_i = tl.load(hi + at, mask=in_rows, other=0)
    q_at = (sequence.to(tl.int64) * q_b + i.to(tl.int64) * q_s + head.to(tl.int64) * q_h) * UNIT
    q_i = tl.load(q + (q_at[:, None] + d[None, :]), mask=in_tile, other=0.0)
    pages = table + sequence.to(tl.int64) * table_b
    m_i = tl.full([BLOCK_M], FLOOR, tl.float32)  # running max of the scores, log2 domain
    l_i = tl.zeros([BLOCK_M], tl.float32)  # running sum of exp2(s - m_i)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # running sum of exp2(s - m_i) * v
    # The table is read one step ahead: read in the step itself, its loads would take a share of the stages.
    page = load_pages(pages, from_tile * BLOCK_N, begin, end, BLOCK_N, PAGE)
    for tile in tl.range(from_tile, to_tile):
        key = tile * BLOCK_N
        j = key + n
        inside = (j >= begin) & (j < end)
        k_j_at, v_j_at = k, v
        if PAGE < BLOCK_N:  # several pages a tile
            k_at = (page.to(tl.int64) * k_p + (j % PAGE).to(tl.int64) * k_s) * UNIT
            v_at = (page.to(tl.int64) * v_p + (j % PAGE).to(tl.int64) * v_s) * UNIT
        else:
            within = tl.cast(key % PAGE, tl.int64)
            k_j_at += (page.to(tl.int64) * k_p + within * k_s) * UNIT
            v_j_at += (page.to(tl.int64) * v_p + within * v_s) * UNIT
            k_at, v_at = n * k_s * UNIT, n * v_s * UNIT
        page = load_pages(pages, key + BLOCK_N, begin, end, BLOCK_N, PAGE)
        k_j = load_keys(k_j_at, k_at, inside, HEAD_DIM, BLOCK_D)
        s = tl.dot(q_i, k_j.T, input_precision=PRECISION)
        p, m_i, l_i, alpha = online_softmax(s, m_i, l_i, lo_i, hi_i, key, True, to_log2, cap, BLOCK_N, SOFTCAP)
        acc = acc * alpha[:, None]
        v_j = load_keys(v_j_at, v_at, inside, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(v_j.dtype), v_j, acc, input_precision=PRECISION)

    seen = l_i != 0  # NaN has seen something
    l_i = tl.where(seen, l_i, 1.0)
    lse_i = tl.where(seen, m_i + tl.log2(l_i), float("-inf"))
    if WHOLE:
        tl.store(lse + (slot.to(tl.int64) * Hq + head) * Sq + i, lse_i * LN2, mask=in_rows)
    else:
        tl.store(lse + (i * Hq + head).to(tl.int64) * slots + slot, lse_i, mask=in_rows)
    out_at = ((slot.to(tl.int64) * Sq + i) * Hq + head) * HEAD_DIM
    tl.store(out + (out_at[:, None] + d[None, :]), acc / l_i[:, None], mask=in_tile)


@triton.jit(do_not_specialize=["B", "Sq", "Hq", "shares", "slots", "visible_b"])
def combine_kernel(
    parts, parts_lse, lo, hi, out, lse, B, Sq, Hq, shares, slots, visible_b,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = (Sq * Hq + BLOCK_R - 1) // BLOCK_R
    sequence = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)  # row = i * Hq + head
    in_rows = row < Sq * Hq
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_tile = in_rows[:, None] & (c < HEAD_DIM)[None, :]

    dealt, _, _ = deal(lo, hi, B, Sq, visible_b, shares, BLOCK_B, BLOCK_N)
    b = tl.arange(0, BLOCK_B)
    first = tl.sum(tl.where(b < sequence, dealt, 0), 0)
    last = first + tl.sum(tl.where(b == sequence, dealt, 0), 0)

    m_i = tl.full([BLOCK_R], FLOOR, tl.float32)  # running max of the slots' lse, log2 domain
    l_i = tl.zeros([BLOCK_R], tl.float32)  # running sum of exp2(lse - m_i)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)  # running sum of exp2(lse - m_i) * out
    for start in range(first, last, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        there = in_rows[:, None] & (slot < last)[None, :]
        at = row.to(tl.int64)[:, None] * slots + slot[None, :]
        lse_s = tl.load(parts_lse + at, mask=there, other=float("-inf"))
        at = (slot.to(tl.int64)[None, :] * (Sq * Hq) + row[:, None]) * HEAD_DIM
        mask = in_tile[:, None, :] & (slot < last)[None, :, None]
        out_s = tl.load(parts + (at[:, :, None] + c[None, None, :]), mask=mask, other=0.0)
        m_new = tl.maximum(m_i, tl.max(lse_s, 1))
        alpha = tl.exp2(m_i - m_new)
        w = tl.exp2(lse_s - m_new[:, None])
        acc = acc * alpha[:, None] + tl.sum(w[:, :, None] * out_s, 1)
        l_i = l_i * alpha + tl.sum(w, 1)
        m_i = m_new

    seen = l_i != 0  # NaN has seen something
    l_i = tl.where(seen, l_i, 1.0)
    wide = tl.cast(sequence, tl.int64)
    out_at = (wide * (Sq * Hq) + row)[:, None] * HEAD_DIM + c[None, :]
    tl.store(out + out_at, acc / l_i[:, None], mask=in_tile)
    at = (wide * Hq + row % Hq) * Sq + row // Hq
    once = in_rows & (tl.program_id(1) == 0)
    tl.store(lse + at, tl.where(seen, (m_i + tl.log2(l_i)) * LN2, float("-inf")), mask=once)
