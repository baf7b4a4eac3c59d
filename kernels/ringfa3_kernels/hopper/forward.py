"""Forward attention for Hopper: the consumer warpgroups, two or three, that producer.py's warp feeds; and the kernel.

Reads q [B, Sq, Hkv, group, D] (a view), k and v [B, Sk, Hkv, D] by TMA in any strides, which fills head_dim to 64, 128
or 256 and the tails with zeros; lo and hi [Sq] or [B, Sq] and the tile table where MASK is INTERVALS; with INTO, fp32
out and lse. Writes out [B, Sq, Hq, D] (16 bits by TMA, fp32 from registers) and lse fp32 [B, Hq, Sq]. A row that sees
no key gets out 0, lse -inf.

Grid: persistent, at most one CTA per SM. A tile is BM query rows of one head (PACK: of a group's heads, rows
    outermost); the producer deals itself tiles from a counter in memory and passes their numbers on.
Warps: consumers 0 .. NWG-1 (4 warps each, BM / NWG rows; consumer 0 is the default partition), 1 producer warp.
Barriers (mbarrier unless said otherwise):
    q_full, q_empty [QB * NWG]     the queries of one warpgroup's rows
    k_full, v_full [STAGES]        a block of keys, of values; empty: named barriers 8 + stage and 12 + stage
    r_full, r_empty [NWG]          PREFETCH: fp32 out to continue from
    t_full, t_empty [2]            a tile: its number, place and key blocks
    named 5 .. 5 + NWG-1           PINGPONG: whose turn it is to issue matrix products
Order inside a step: issue QK of this block and PV of the one before; wait for QK, mask, row maximum; then wait for PV
and take the exps. With nothing between the maximum and the exps ptxas puts the PV wait after about 15 of the 64 exps
and mixes rescale and conversion into the rest: FlashAttention-3's own schedule (tests/kernels/test_hopper_aot.py
holds every build to it).
Follows FlashAttention-3, sections 3.1 and 3.2 (arXiv 2407.08608).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringfa3_kernels.hopper.gluon import (
    again,
    aggregate,
    barrier_arrive,
    barrier_arrive_after,
    barrier_sync,
    line_layout,
    out_layout,
    rescale_if_needed,
    score_layout,
    this_cta,
    tma_store,
    tma_store_wait,
    wide_product,
)
from ringfa3_kernels.hopper.producer import K_FREE, V_FREE, Tile, allocate, producer, query_head, receive
from ringfa3_kernels.hopper.schedule import INTERVALS, LIVE_TILES, PITCH
from ringfa3_kernels.hopper.softmax import (
    FLOOR,
    cap,
    carried,
    exp_block,
    hide_after,
    hide_before,
    new_max,
    operand,
    row_total,
    scaled,
)

OUT_REGISTERS = gl.constexpr(0)
OUT_ALIAS = gl.constexpr(2)
OUT_DIRECT = gl.constexpr(3)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
TURN = gl.constexpr(5)  # the first warpgroup's named barrier


@aggregate
class Work:
    """What the launch computes: sizes, and where rows find their bounds, state and lse."""

    state: gl.tensor  # [B, Sq, Hq, D]: fp32, read with INTO and written with OUT_REGISTERS; 16 bits with OUT_DIRECT
    state_b: gl.tensor  # its strides in units of 16 bytes, so that the compiler knows their alignment
    state_s: gl.tensor
    state_h: gl.tensor
    lse: gl.tensor
    lo: gl.tensor
    hi: gl.tensor
    rows_stride: gl.tensor  # of lo and hi, from batch row to batch row (0: shared)
    tiles: gl.tensor
    tiles_stride: gl.tensor
    scale: gl.tensor  # of scores, in units of log2: what exp2 takes
    cap_scale: gl.tensor  # SOFTCAP: scale / softcap
    ntiles: gl.tensor
    num_m: gl.tensor  # row tiles of a head
    wave: gl.tensor  # heads whose row tiles take turns
    heads: gl.tensor  # of a batch row, as tiles count them: Hq, or Hkv where packed
    group: gl.tensor  # Hq / Hkv
    Sq: gl.tensor
    Sk: gl.tensor
    D: gl.tensor


@gluon.jit
def _row_bounds(W: gl.constexpr, tile, R: gl.constexpr, work, C: gl.constexpr):
    """Keys lo <= j < hi that the warpgroup's rows of a tile see."""
    pos, _, _ = _rows(tile.mi * C.BM + W * C.WM, tile.h, R, work, C)
    if C.MASK == INTERVALS:
        at = tile.b * work.rows_stride + pos
        lo = gl.load(work.lo + at, mask=pos < work.Sq, other=0)
        hi = gl.load(work.hi + at, mask=pos < work.Sq, other=0)
    else:
        Sk = again(work.Sk)
        hi = gl.minimum(pos + (Sk - again(work.Sq) + 1), Sk) if C.MASK else gl.full_like(pos, 0) + Sk
        lo = hi
    return lo, hi


@gluon.jit
def _rows(row0, h, L: gl.constexpr, work, C: gl.constexpr):
    """Of the tile rows from row0 on: query position, query head, and whether the row exists."""
    r = row0 + gl.arange(0, C.WM, L)
    pos = r // C.PACK
    if C.PACK > 1:
        g = r % C.PACK
        return pos, h * work.group + g, (pos < work.Sq) & (g < work.group)
    else:
        return pos, gl.full_like(pos, 0) + h, pos < work.Sq


@gluon.jit
def _lse_pointers(pos, head, b, work, C: gl.constexpr):
    """Where rows keep their lse."""
    heads = work.heads * work.group if C.PACK > 1 else work.heads
    return work.lse + wide_product(b * heads + head, work.Sq) + pos


@gluon.jit
def _state_pointers(row0, b, h, L: gl.constexpr, work, C: gl.constexpr):
    """Where the tile's rows lie in memory, in layout L, and which elements exist."""
    UNIT: gl.constexpr = 128 // work.state.dtype.element_ty.primitive_bitwidth  # elements of the strides' unit
    pos, head, exists = _rows(row0, h, gl.SliceLayout(1, L), work, C)
    col = gl.arange(0, C.D, gl.SliceLayout(0, L))
    units = wide_product(b, work.state_b) + wide_product(pos, work.state_s) + wide_product(head, work.state_h)
    mask = exists[:, None]
    if not C.EVEN:
        mask = mask & (col < work.D)[None, :]
    return work.state + (units * UNIT)[:, None] + col[None, :], mask


@gluon.jit
def _hide(s, lo, hi, block, tile, C: gl.constexpr):
    """Scores of a key block with -inf where the mask hides them, on the sides where it does."""
    col0 = again(block * C.BN)  # `again`: comparisons kept from tile to tile would spill
    if C.MASK == INTERVALS:
        if block >= tile.full_end:
            s = hide_after(s, hi, col0, C)
        if block < tile.full_begin:
            s = hide_before(s, lo, col0, C)
    elif C.MASK or C.TAIL:
        s = hide_after(s, hi, col0, C)
    return s


@gluon.jit
def _step(W: gl.constexpr, acc, p, m_i, l_i, it, block, tile, lo, hi, q, sm, work, C: gl.constexpr):
    """One key block: its scores and softmax, under whose cover O += P V of the block before runs."""
    THREADS: gl.constexpr = C.THREADS
    S: gl.constexpr = score_layout(C)
    OUT: gl.constexpr = out_layout(C)
    s_i = it % C.STAGES
    v_i = (it - 1) % C.STAGES
    v_phase = ((it - 1) // C.STAGES) & 1
    p = operand(p, sm.q.dtype, C)
    mbarrier.wait(sm.k_full.index(s_i), (it // C.STAGES) & 1)
    if not C.V_LATE:
        mbarrier.wait(sm.v_full.index(v_i), v_phase)
    if C.PINGPONG:
        barrier_sync(TURN + W, C.NWG * 128)
    s = warpgroup_mma(
        q,
        sm.k.index(s_i).reshape([C.BN, C.D]).permute((1, 0)),
        gl.zeros([C.WM, C.BN], gl.float32, S),
        use_acc=False,
        is_async=True,
    )
    if C.V_LATE:
        mbarrier.wait(sm.v_full.index(v_i), v_phase)
    acc = warpgroup_mma(p, sm.v.index(v_i).reshape([C.BN, C.D]), acc, is_async=True)
    if C.PINGPONG:
        barrier_arrive(TURN + (W + 1) % C.NWG, C.NWG * 128)
    s = warpgroup_mma_wait(1, deps=[s])
    s = cap(s, work.cap_scale, C)
    if C.BRANCH:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if (block < tile.full_begin) | (block >= tile.full_end):
            s = _hide(s, lo, hi, block, tile, C)
    # K is free. After the mask's branch: ptxas hoists the PV wait to the top of its block, but not above this barrier
    if not C.K_LATE:
        barrier_arrive(K_FREE + s_i, THREADS)
    m_new = new_max(s, m_i, work.scale, C)
    if C.K_LATE:
        barrier_arrive_after(K_FREE + s_i, m_new, THREADS)
    if C.LAZY_RESCALE:
        m_new = gl.where(m_new - m_i <= 8.0, m_i, m_new)  # P stays <= 2^8
    alpha = gl.exp2(m_i - m_new)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    barrier_arrive(V_FREE + v_i, THREADS)
    p32, l_block = exp_block(s, m_new, work.scale, C)
    l_i = scaled(l_i, alpha) + l_block
    p = carried(p32, sm.q.dtype, C)
    if C.LAZY_RESCALE:
        acc = rescale_if_needed(acc, alpha, C)
    else:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    return acc, p, m_new, l_i


@gluon.jit
def _first(W: gl.constexpr, it, ti, tile, m_i, lo, hi, sm, work, C: gl.constexpr):
    """The tile's first (last in memory) key block, on top of the state given with INTO."""
    THREADS: gl.constexpr = C.THREADS
    S: gl.constexpr = score_layout(C)
    OUT: gl.constexpr = out_layout(C)
    acc = gl.zeros([C.WM, C.D], gl.float32, OUT)  # running sum of P V, in units of exp2(m_i)
    if C.INTO and not C.PREFETCH:
        at, mask = _state_pointers(tile.mi * C.BM + W * C.WM, tile.b, tile.h, OUT, work, C)
        acc = gl.load(at, mask=mask, other=0.0)  # in flight until the first softmax is done
    s_i = it % C.STAGES
    qi = (ti % C.QB) * C.NWG + W
    mbarrier.wait(sm.q_full.index(qi), (ti // C.QB) & 1)
    mbarrier.wait(sm.k_full.index(s_i), (it // C.STAGES) & 1)
    s = warpgroup_mma(
        sm.q.index(qi).reshape([C.WM, C.D]),
        sm.k.index(s_i).reshape([C.BN, C.D]).permute((1, 0)),
        gl.zeros([C.WM, C.BN], gl.float32, S),
        use_acc=False,
        is_async=True,
    )
    s = warpgroup_mma_wait(0, deps=[s])
    barrier_arrive(K_FREE + s_i, THREADS)
    s = _hide(cap(s, work.cap_scale, C), lo, hi, tile.end - 1, tile, C)
    m_new = new_max(s, m_i, work.scale, C)
    if C.INTO:  # a NaN lse would make m_new NaN in some lanes: barrier_arrive_after wants one answer of a whole warp
        m_new = gl.maximum(m_new, FLOOR)
    p32, l_i = exp_block(s, m_new, work.scale, C)  # l_i: running sum of exp2(s - m_i), spread over 8 columns
    if C.INTO:
        alpha = gl.exp2(m_i - m_new)
        if C.PREFETCH:
            mbarrier.wait(sm.r_full.index(W), ti & 1)
            acc = sm.r.index(W).reshape([C.WM, C.D]).load(OUT)
            mbarrier.arrive(sm.r_empty.index(W), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        l_i = l_i + scaled(gl.full_like(l_i, 0.125), alpha)  # the state counts as one key of weight exp2(lse - m_i)
    return acc, carried(p32, sm.q.dtype, C), m_new, l_i


@gluon.jit
def _factor(W: gl.constexpr, m_i, l_i, tile, work, C: gl.constexpr):
    """Store the rows' lse; what their acc is to be multiplied by."""
    R: gl.constexpr = gl.SliceLayout(1, score_layout(C))
    l_row = row_total(l_i, R)
    lse = (m_i + gl.log2(l_row)) * LN2
    inv = 1.0 / l_row
    if C.GUARD:  # by equality: NaN stays NaN
        lse = gl.where(l_row == 0, -float("inf"), lse)
        inv = gl.where(l_row == 0, 0.0, inv)
    pos, head, exists = _rows(again(tile.mi * C.BM + W * C.WM), tile.h, R, work, C)
    gl.store(_lse_pointers(pos, head, tile.b, work, C), lse, mask=exists)
    return gl.convert_layout(inv, gl.SliceLayout(1, out_layout(C)))[:, None]


@gluon.jit
def _write(W: gl.constexpr, o_desc, o, tile, qi, sm, work, C: gl.constexpr):
    """Store the finished rows; o is fp32 in the accumulator's layout."""
    row0 = again(tile.mi * C.BM + W * C.WM)
    if C.OUT == OUT_REGISTERS:
        at, mask = _state_pointers(row0, tile.b, tile.h, out_layout(C), work, C)
        gl.store(at, o, mask=mask, eviction_policy="evict_first")
    elif C.OUT == OUT_DIRECT:
        LINES: gl.constexpr = line_layout(C)
        at, mask = _state_pointers(row0, tile.b, tile.h, LINES, work, C)
        gl.store(at, gl.convert_layout(o.to(o_desc.dtype), LINES), mask=mask)
    else:
        if C.OUT != OUT_ALIAS:
            tma_store_wait(0)  # the last tile's store has read the buffer
        i = qi if C.OUT == OUT_ALIAS else W
        kvh, g = query_head(tile.h, work, C)
        sm.o.index(i).reshape([C.WM, C.D]).store(o.to(o_desc.dtype))
        fence_async_shared()  # orders these stores before the copy engine's reads
        tma_store(o_desc, [tile.b, row0 // C.PACK, kvh, g, 0], sm.o.index(i))
        if C.OUT == OUT_ALIAS:
            tma_store_wait(0)
            mbarrier.arrive(sm.q_empty.index(qi), count=1)


@gluon.jit
def _consumer(W: gl.constexpr, o_desc, work, sm, C: gl.constexpr):
    """Attention of WM rows of every tile this CTA gets."""
    THREADS: gl.constexpr = C.THREADS
    R: gl.constexpr = gl.SliceLayout(1, score_layout(C))
    it = 0  # key blocks seen, over all tiles
    ti = 0  # tiles seen
    if C.PINGPONG and W == C.NWG - 1:
        barrier_arrive(TURN, C.NWG * 128)
    tile = receive(0, sm, C)
    lo, hi = _row_bounds(W, tile, R, work, C)
    while tile.t < work.ntiles:
        m_i = gl.full([C.WM], -float("inf"), gl.float32, R)  # running maximum of the scores, in units of log2
        if C.INTO:
            pos, head, exists = _rows(tile.mi * C.BM + W * C.WM, tile.h, R, work, C)
            m_i = gl.load(_lse_pointers(pos, head, tile.b, work, C), mask=exists, other=0.0) * LOG2E
        acc, p, m_i, l_i = _first(W, it, ti, tile, m_i, lo, hi, sm, work, C)
        qi = (ti % C.QB) * C.NWG + W
        q = sm.q.index(qi).reshape([C.WM, C.D])
        for j in range(1, tile.end - tile.begin):
            it += 1
            acc, p, m_i, l_i = _step(W, acc, p, m_i, l_i, it, tile.end - 1 - j, tile, lo, hi, q, sm, work, C)
        if C.OUT != OUT_ALIAS:
            mbarrier.arrive(sm.q_empty.index(qi), count=1)
        v_i = it % C.STAGES
        mbarrier.wait(sm.v_full.index(v_i), (it // C.STAGES) & 1)
        p = operand(p, sm.q.dtype, C)
        acc = warpgroup_mma(p, sm.v.index(v_i).reshape([C.BN, C.D]), acc, is_async=True)
        # the next tile's message, its rows' bounds and this one's row sums, while the last PV runs
        this = tile
        it += 1
        ti += 1
        tile = receive(ti, sm, C)
        lo, hi = _row_bounds(W, tile, R, work, C)
        inv = _factor(W, m_i, l_i, this, work, C)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        barrier_arrive(V_FREE + v_i, THREADS)
        _write(W, o_desc, acc * inv, this, qi, sm, work, C)
    if C.FILL:
        _fill(W, o_desc, work, sm, C)
    tma_store_wait(0)
    if C.PINGPONG and W == 0:
        barrier_sync(TURN, C.NWG * 128)  # takes the extra arrival made at the start


@gluon.jit
def _fill(W: gl.constexpr, o_desc, work, sm, C: gl.constexpr):
    """Write the row tiles that see no key, of which no one told: out 0, lse -inf. The CTAs take turns."""
    R: gl.constexpr = gl.SliceLayout(1, score_layout(C))
    ROWS: gl.constexpr = C.BM // C.PACK
    live = gl.load(work.tiles + LIVE_TILES)
    pairs = work.ntiles // live
    dark = ((work.Sq + ROWS - 1) // ROWS - live) * pairs
    for e in range(this_cta(), dark, gl.num_programs(0)):
        b = e % pairs // work.heads
        h = e % pairs % work.heads
        mi = gl.load(work.tiles + b * work.tiles_stride + (live + e // pairs) * PITCH)
        tile = Tile(t=e, mi=mi, b=b, h=h, end=e, full_end=e, begin=e, full_begin=e)  # type: ignore[call-arg]
        pos, head, exists = _rows(mi * C.BM + W * C.WM, h, R, work, C)
        nothing = gl.full([C.WM], -float("inf"), gl.float32, R)
        gl.store(_lse_pointers(pos, head, b, work, C), nothing, mask=exists)
        _write(W, o_desc, gl.zeros([C.WM, C.D], gl.float32, out_layout(C)), tile, W, sm, work, C)


# Sizes are not specialised: every new length would compile again (7 s).
_SIZES = [
    "state_b",
    "state_s",
    "state_h",
    "rows_stride",
    "tiles_stride",
    "pairs",
    "ntiles",
    "num_m",
    "wave",
    "heads",
    "group",
]


@gluon.jit(do_not_specialize=[*_SIZES, "Sq", "Sk", "D"])
def attend_forward(
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
    C: gl.constexpr,
):
    """The kernel; arguments as `Work` explains them, descriptors of q, k, v, out (o) and fp32 out (r),
    pairs = batch * heads, C a Config."""
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
    sm = allocate(q_desc, k_desc, v_desc, o_desc, r_desc, C)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    two: gl.constexpr = 2
    if C.NWG == 2:
        gl.warp_specialize(
            [
                (_consumer, (zero, o_desc, work, sm, C)),
                (_consumer, (one, o_desc, work, sm, C)),
                (producer, (q_desc, k_desc, v_desc, r_desc, counter, work, sm, C)),
            ],
            [4, 1],
            [C.CONSUMER_REGS, C.PRODUCER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (zero, o_desc, work, sm, C)),
                (_consumer, (one, o_desc, work, sm, C)),
                (_consumer, (two, o_desc, work, sm, C)),
                (producer, (q_desc, k_desc, v_desc, r_desc, counter, work, sm, C)),
            ],
            [4, 4, 1],
            [C.CONSUMER_REGS, C.CONSUMER_REGS, C.PRODUCER_REGS],
        )
