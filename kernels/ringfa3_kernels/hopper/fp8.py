"""Forward attention on fp8 for Hopper: forward.py's tiles and roles, with QGMMA and a scale for every 128 rows.

Reads by TMA e4m3 q [B, Sq, Hkv, group, D] (a view), k [B, Sk, Hkv, D] and v [B, Hkv, D, Sk rounded up to 128], its keys
in quantized.key_order; fp32 scales of q, k and v; the rest and the outputs are forward.py's. What v holds past Sk is
finite. A row that sees no key gets out 0, lse -inf; one that sees a NaN becomes NaN.

Grid, warps, barriers: as in forward.py. Order inside a step: issue QK of this block and PV of the one before; wait for
QK, mask, row maximum; wait for PV; exps, conversion of P to e4m3 and rescale of O.
Scales: scores are multiplied by (scale of q) * (scale of k), a number per row and block, in the instruction that
subtracts the maximum. O is kept in units of the present block's scale of v: the ratio of two blocks' scales is part of
the factor that rescales O for the new maximum. m_i is the maximum less SHIFT, so that P = exp2(s - m_i) fills e4m3's
range up to 2^8; the row sums l_i are of P before it is rounded.
Follows FlashAttention-3, sections 3.1 to 3.3 (arXiv 2407.08608).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ringfa3_kernels.hopper.forward import (
    LN2,
    LOG2E,
    TURN,
    Work,
    _fill,
    _hide,
    _lse_pointers,
    _row_bounds,
    _rows,
    _state_pointers,
    _write,
)
from ringfa3_kernels.hopper.fp8_producer import fp8_producer
from ringfa3_kernels.hopper.fp8_softmax import (
    factor,
    fp8_exp_block,
    fp8_new_max,
    fp8_operand,
    fp8_out_layout,
    fp8_score_layout,
    packed,
    reciprocal,
    rescaled,
)
from ringfa3_kernels.hopper.gluon import (
    again,
    aggregate,
    barrier_arrive,
    barrier_arrive_after,
    barrier_sync,
    out_layout,
    score_layout,
    tma_store_wait,
)
from ringfa3_kernels.hopper.producer import K_FREE, V_FREE, allocate, query_head, receive
from ringfa3_kernels.hopper.schedule import LIVE_TILES
from ringfa3_kernels.hopper.softmax import FLOOR, cap, row_total, scaled

SCALE_ROWS = gl.constexpr(128)  # that a block's scale covers


@aggregate
class Scales:
    """Where the scales of q, k and v lie: a row of numbers for each (batch row, head)."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    q_row: gl.tensor  # numbers from row to row, of q
    k_row: gl.tensor  # and of k and v
    step: gl.tensor  # from one 128 to the next: 1, or 0 where one scale serves a head


@gluon.jit
def _row_factor(W: gl.constexpr, tile, R: gl.constexpr, work, scales, C: gl.constexpr):
    """Of the warpgroup's rows of a tile: scale of q times what the launch multiplies scores by."""
    pos, head, exists = _rows(tile.mi * C.BM + W * C.WM, tile.h, R, work, C)
    heads = work.heads * work.group if C.PACK > 1 else work.heads
    at = (tile.b * heads + head) * scales.q_row + pos // SCALE_ROWS * scales.step
    by = work.cap_scale if C.SOFTCAP else work.scale
    return gl.load(scales.q + at, mask=exists, other=1.0) * by


@gluon.jit
def _key_scales(tile, block, work, scales, C: gl.constexpr):
    """The scales of k and of v of a key block."""
    kvh, _ = query_head(tile.h, work, C)
    kv_heads = work.heads if C.PACK > 1 else work.heads // work.group
    at = (tile.b * kv_heads + kvh) * scales.k_row + block // (SCALE_ROWS // C.BN) * scales.step
    return gl.load(scales.k + at), gl.load(scales.v + at)


@gluon.jit
def _scored(s, k_scale, row_factor, work, C: gl.constexpr):
    """Scores and what exp2 is to multiply them by, per row."""
    by = factor(row_factor, k_scale, C)
    if C.SOFTCAP:
        s = cap(s, by[:, None], C)
        by = gl.full_like(by, 0.0) + work.scale
    return s, by


@gluon.jit
def _masked(s, lo, hi, block, tile, C: gl.constexpr):
    """`_hide` for scores in our layout, which differs from that of 16-bit products in name only."""
    s = _hide(gl.convert_layout(s, score_layout(C), assert_trivial=True), lo, hi, block, tile, C)
    return gl.convert_layout(s, fp8_score_layout(C), assert_trivial=True)


@gluon.jit
def _values(sm, i, C: gl.constexpr):
    """A block of values as wgmma takes it: [BN, D], keys fastest in memory."""
    return sm.v.index(i).reshape([C.D, C.BN]).permute((1, 0))


@gluon.jit
def _product(p, sm, i, acc, C: gl.constexpr):
    """Issue P V: added to acc or, TWO_LEVEL, on its own."""
    OUT: gl.constexpr = fp8_out_layout(C)
    a = fp8_operand(p, C)
    if C.TWO_LEVEL:
        return warpgroup_mma(a, _values(sm, i, C), gl.zeros([C.WM, C.D], gl.float32, OUT), use_acc=False, is_async=True)
    else:
        return warpgroup_mma(a, _values(sm, i, C), acc, is_async=True)


@gluon.jit
def _sum(acc, grow, pv, C: gl.constexpr):
    """What acc is once `_product` is done; grow is per row."""
    if C.TWO_LEVEL:
        return acc * gl.convert_layout(grow, gl.SliceLayout(1, fp8_out_layout(C)))[:, None] + pv
    else:
        return pv


@gluon.jit
def _step(
    W: gl.constexpr,
    acc,
    p,
    m_i,
    l_i,
    unit,
    grow,
    it,
    block,
    tile,
    lo,
    hi,
    row_factor,
    q,
    sm,
    work,
    scales,
    C: gl.constexpr,
):
    """One key block: its scores and softmax, under whose cover O += P V of the block before runs."""
    THREADS: gl.constexpr = C.THREADS
    s_i = it % C.STAGES
    v_i = (it - 1) % C.STAGES
    v_phase = ((it - 1) // C.STAGES) & 1
    k_scale, v_scale = _key_scales(tile, block, work, scales, C)  # in flight until QK is done
    mbarrier.wait(sm.k_full.index(s_i), (it // C.STAGES) & 1)
    if not C.V_LATE:
        mbarrier.wait(sm.v_full.index(v_i), v_phase)
    if C.PINGPONG:
        barrier_sync(TURN + W, C.NWG * 128)
    s = warpgroup_mma(
        q,
        sm.k.index(s_i).reshape([C.BN, C.D]).permute((1, 0)),
        gl.zeros([C.WM, C.BN], gl.float32, fp8_score_layout(C)),
        use_acc=False,
        is_async=True,
    )
    if C.V_LATE:
        mbarrier.wait(sm.v_full.index(v_i), v_phase)
    pv = _product(p, sm, v_i, acc, C)
    if C.PINGPONG:
        barrier_arrive(TURN + (W + 1) % C.NWG, C.NWG * 128)
    s = warpgroup_mma_wait(1, deps=[s])
    s, by = _scored(s, k_scale, row_factor, work, C)
    if C.BRANCH:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if (block < tile.full_begin) | (block >= tile.full_end):
            s = _masked(s, lo, hi, block, tile, C)
    # K is free. After the mask's branch: ptxas hoists the PV wait to the top of its block, but not above this barrier
    if not C.K_LATE:
        barrier_arrive(K_FREE + s_i, THREADS)
    m_new = fp8_new_max(s, m_i, by, C)
    if C.K_LATE:
        barrier_arrive_after(K_FREE + s_i, m_new, THREADS)
    if C.LAZY:
        m_new = gl.where(m_new - m_i <= C.LAZY, m_i, m_new)
    alpha = gl.exp2(m_i - m_new)
    pv, p = warpgroup_mma_wait(0, deps=[pv, p])
    barrier_arrive(V_FREE + v_i, THREADS)
    p32, l_block = fp8_exp_block(s, m_new, by, C)
    l_i = scaled(l_i, alpha) + l_block
    p = packed(p32, C)
    acc = _sum(acc, grow, pv, C)
    grow = alpha * (unit * reciprocal(v_scale))
    if not C.TWO_LEVEL:
        acc = rescaled(acc, grow, C)
    return acc, p, m_new, l_i, v_scale, grow


@gluon.jit
def _first(W: gl.constexpr, it, ti, tile, m_i, lo, hi, row_factor, sm, work, scales, C: gl.constexpr):
    """The tile's first (last in memory) key block; with INTO the row sums begin with the given state's weight."""
    THREADS: gl.constexpr = C.THREADS
    OUT: gl.constexpr = fp8_out_layout(C)
    acc = gl.zeros([C.WM, C.D], gl.float32, OUT)  # running sum of P V, in units of exp2(m_i) and of unit
    k_scale, unit = _key_scales(tile, tile.end - 1, work, scales, C)
    s_i = it % C.STAGES
    qi = (ti % C.QB) * C.NWG + W
    mbarrier.wait(sm.q_full.index(qi), (ti // C.QB) & 1)
    mbarrier.wait(sm.k_full.index(s_i), (it // C.STAGES) & 1)
    s = warpgroup_mma(
        sm.q.index(qi).reshape([C.WM, C.D]),
        sm.k.index(s_i).reshape([C.BN, C.D]).permute((1, 0)),
        gl.zeros([C.WM, C.BN], gl.float32, fp8_score_layout(C)),
        use_acc=False,
        is_async=True,
    )
    s = warpgroup_mma_wait(0, deps=[s])
    barrier_arrive(K_FREE + s_i, THREADS)
    s, by = _scored(s, k_scale, row_factor, work, C)
    s = _masked(s, lo, hi, tile.end - 1, tile, C)
    m_new = fp8_new_max(s, m_i, by, C)
    if C.INTO:  # a NaN lse would make m_new NaN in some lanes: barrier_arrive_after wants one answer of a whole warp
        m_new = gl.maximum(m_new, FLOOR)
    p32, l_i = fp8_exp_block(s, m_new, by, C)  # l_i: running sum of exp2(s - m_i), spread over 8 columns
    if C.INTO:  # the state counts as one key whose score is lse
        l_i = l_i + scaled(gl.full_like(l_i, 0.125 * C.WEIGHT), gl.exp2(m_i - m_new))
    grow = gl.full_like(m_i, 1.0)  # TWO_LEVEL: what acc is to be multiplied by when the next P V is added
    return acc, packed(p32, C), m_new, l_i, unit, grow


@gluon.jit
def _factors(W: gl.constexpr, given, m_i, l_i, unit, tile, work, C: gl.constexpr):
    """Store the rows' lse; what their acc is to be multiplied by, and the state whose m_i was `given` at the start."""
    R: gl.constexpr = gl.SliceLayout(1, fp8_score_layout(C))
    l_row = row_total(l_i, R)
    lse = (m_i + gl.log2(l_row)) * LN2
    inv = 1.0 / l_row
    if C.GUARD:  # by equality: NaN stays NaN
        lse = gl.where(l_row == 0, -float("inf"), lse)
        inv = gl.where(l_row == 0, 0.0, inv)
    kept = gl.exp2(given - m_i) * (inv * C.WEIGHT)
    pos, head, exists = _rows(again(tile.mi * C.BM + W * C.WM), tile.h, R, work, C)
    gl.store(_lse_pointers(pos, head, tile.b, work, C), lse, mask=exists)
    O: gl.constexpr = gl.SliceLayout(1, fp8_out_layout(C))
    return gl.convert_layout(inv * unit, O)[:, None], gl.convert_layout(kept, O)[:, None]


@gluon.jit
def _state(W: gl.constexpr, tile, work, C: gl.constexpr):
    """The given out of the warpgroup's rows of a tile."""
    at, mask = _state_pointers(again(tile.mi * C.BM + W * C.WM), tile.b, tile.h, fp8_out_layout(C), work, C)
    return gl.load(at, mask=mask, other=0.0)


@gluon.jit
def _consumer(W: gl.constexpr, o_desc, work, scales, sm, C: gl.constexpr):
    """Attention of WM rows of every tile this CTA gets."""
    THREADS: gl.constexpr = C.THREADS
    R: gl.constexpr = gl.SliceLayout(1, fp8_score_layout(C))
    it = 0  # key blocks seen, over all tiles
    ti = 0  # tiles seen
    if C.PINGPONG and W == C.NWG - 1:
        barrier_arrive(TURN, C.NWG * 128)
    tile = receive(0, sm, C)
    lo, hi = _row_bounds(W, tile, R, work, C)
    row_factor = _row_factor(W, tile, R, work, scales, C)
    while tile.t < work.ntiles:
        m_i = gl.full([C.WM], -float("inf"), gl.float32, R)  # running maximum of the scores less SHIFT, in log2
        if C.INTO:
            pos, head, exists = _rows(tile.mi * C.BM + W * C.WM, tile.h, R, work, C)
            m_i = gl.load(_lse_pointers(pos, head, tile.b, work, C), mask=exists, other=0.0) * LOG2E - C.SHIFT
        given = m_i
        acc, p, m_i, l_i, unit, grow = _first(W, it, ti, tile, m_i, lo, hi, row_factor, sm, work, scales, C)
        qi = (ti % C.QB) * C.NWG + W
        q = sm.q.index(qi).reshape([C.WM, C.D])
        for j in range(1, tile.end - tile.begin):
            it += 1
            acc, p, m_i, l_i, unit, grow = _step(
                W,
                acc,
                p,
                m_i,
                l_i,
                unit,
                grow,
                it,
                tile.end - 1 - j,
                tile,
                lo,
                hi,
                row_factor,
                q,
                sm,
                work,
                scales,
                C,
            )
        mbarrier.arrive(sm.q_empty.index(qi), count=1)
        v_i = it % C.STAGES
        mbarrier.wait(sm.v_full.index(v_i), (it // C.STAGES) & 1)
        pv = _product(p, sm, v_i, acc, C)
        # while the last PV runs: the state, which would keep wgmma's registers busy as the loop's first acc (ptxas of
        # Triton 3.9 serialises that), the next tile's message, its rows' bounds and this one's row sums
        this = tile
        if C.INTO:
            before = _state(W, this, work, C)
        it += 1
        ti += 1
        tile = receive(ti, sm, C)
        lo, hi = _row_bounds(W, tile, R, work, C)
        row_factor = _row_factor(W, tile, R, work, scales, C)
        inv, kept = _factors(W, given, m_i, l_i, unit, this, work, C)
        pv, p = warpgroup_mma_wait(0, deps=[pv, p])
        barrier_arrive(V_FREE + v_i, THREADS)
        o = _sum(acc, grow, pv, C) * inv
        if C.INTO:
            o = o + before * kept
        _write(W, o_desc, gl.convert_layout(o, out_layout(C), assert_trivial=True), this, qi, sm, work, C)
    if C.FILL:
        _fill(W, o_desc, work, sm, C)
    tma_store_wait(0)
    if C.PINGPONG and W == 0:
        barrier_sync(TURN, C.NWG * 128)  # takes the extra arrival made at the start


# Sizes are not specialised: every new length would compile again (7 s). Nor is how scales are aligned: a slice of a
# shard begins at any of them.
_SIZES = ["state_b", "state_s", "state_h", "rows_stride", "tiles_stride", "pairs", "ntiles", "num_m", "wave", "heads"]
_SIZES += ["group", "Sq", "Sk", "D", "q_row", "k_row", "step", "q_scale", "k_scale", "v_scale"]


@gluon.jit(do_not_specialize=_SIZES)
def attend_fp8(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    r_desc,
    state,
    state_b,
    state_s,
    state_h,
    lse,
    lo,
    hi,
    rows_stride,
    tiles,
    tiles_stride,
    counter,
    scale,
    cap_scale,
    pairs,
    ntiles,
    num_m,
    wave,
    heads,
    group,
    Sq,
    Sk,
    D,
    q_scale,
    k_scale,
    v_scale,
    q_row,
    k_row,
    step,
    C: gl.constexpr,
):
    """The kernel; arguments as `forward.attend_forward` has them, then those of Scales; C an Fp8Config."""
    if C.LIVE:
        num_m = gl.load(tiles + LIVE_TILES)
        ntiles = num_m * pairs
    work = Work(  # type: ignore[call-arg]
        state=state,
        state_b=state_b,
        state_s=state_s,
        state_h=state_h,
        lse=lse,
        lo=lo,
        hi=hi,
        rows_stride=rows_stride,
        tiles=tiles,
        tiles_stride=tiles_stride,
        scale=scale,
        cap_scale=cap_scale,
        ntiles=ntiles,
        num_m=num_m,
        wave=wave,
        heads=heads,
        group=group,
        Sq=Sq,
        Sk=Sk,
        D=D,
    )
    scales = Scales(q=q_scale, k=k_scale, v=v_scale, q_row=q_row, k_row=k_row, step=step)  # type: ignore[call-arg]
    sm = allocate(q_desc, k_desc, v_desc, o_desc, r_desc, C)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    two: gl.constexpr = 2
    if C.NWG == 2:
        gl.warp_specialize(
            [
                (_consumer, (zero, o_desc, work, scales, sm, C)),
                (_consumer, (one, o_desc, work, scales, sm, C)),
                (fp8_producer, (q_desc, k_desc, v_desc, r_desc, counter, work, sm, C)),
            ],
            [4, 1],
            [C.CONSUMER_REGS, C.PRODUCER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (zero, o_desc, work, scales, sm, C)),
                (_consumer, (one, o_desc, work, scales, sm, C)),
                (_consumer, (two, o_desc, work, scales, sm, C)),
                (fp8_producer, (q_desc, k_desc, v_desc, r_desc, counter, work, sm, C)),
            ],
            [4, 4, 1],
            [C.CONSUMER_REGS, C.CONSUMER_REGS, C.PRODUCER_REGS],
        )
