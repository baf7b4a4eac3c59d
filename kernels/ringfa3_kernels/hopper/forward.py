"""Forward attention for Hopper: one producer warp feeds two or three consumer warpgroups.

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
    t_full, t_empty [2]            the next tile: its number and, under INTERVALS, its bounds
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
    out_layout,
    rescale_if_needed,
    ring_shape,
    score_layout,
    this_cta,
    tma_load,
    tma_store,
    tma_store_wait,
    wide_product,
)
from ringfa3_kernels.hopper.schedule import INTERVALS, bounds, decode
from ringfa3_kernels.hopper.softmax import cap, exp_block, hide, new_max, row_total, scaled, to_operand

OUT_REGISTERS = gl.constexpr(0)
OUT_SHARED = gl.constexpr(1)
OUT_ALIAS = gl.constexpr(2)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
K_FREE = gl.constexpr(8)
V_FREE = gl.constexpr(12)
TURN = gl.constexpr(5)
MESSAGE = gl.constexpr(6)  # int32 of a "next tile" message: number, row tile, begin, unmasked begin, unmasked end, end


@aggregate
class Work:
    """What the launch computes: sizes, and where rows find their bounds, state and lse."""

    state: gl.tensor  # fp32 [B, Sq, Hq, D]: read with INTO, written with OUT_REGISTERS
    state_b: gl.tensor  # its strides in units of 4 elements, so that the compiler knows 16-byte alignment
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


@aggregate
class Shared:
    """Shared memory: tiles, barriers, and the two messages that name the next tile."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    o: gl.shared_memory_descriptor
    r: gl.shared_memory_descriptor
    tile: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    r_full: gl.shared_memory_descriptor
    r_empty: gl.shared_memory_descriptor
    t_full: gl.shared_memory_descriptor
    t_empty: gl.shared_memory_descriptor


@gluon.jit
def _query_head(h, work, C: gl.constexpr):
    """(key/value head, first query head of its group that the tile holds)."""
    if C.PACK > 1:
        return h, 0
    else:
        return h // work.group, h % work.group


@gluon.jit
def _producer(q_desc, k_desc, v_desc, r_desc, counter, work, sm, C: gl.constexpr):
    """Load tiles' queries, keys and values in the order in which the consumers need them, and deal out the tiles."""
    THREADS: gl.constexpr = C.THREADS
    it = 0  # key blocks loaded, over all tiles
    ti = 0  # tiles loaded
    t = this_cta()
    slot, b, h = decode(t, work, C)
    mi, begin, full_begin, full_end, end = bounds(slot, b, work, C)
    while t < work.ntiles:
        slot, b, h = decode(t, work, C)
        if C.MASK != INTERVALS:
            mi, begin, full_begin, full_end, end = bounds(slot, b, work, C)
        kvh, g = _query_head(h, work, C)
        tn = t
        mi_n = mi
        begin_n = begin
        full_begin_n = full_begin
        full_end_n = full_end
        end_n = end
        n = end - begin
        for j in range(0, n):
            row = (end - 1 - j) * C.BN
            s = it % C.STAGES
            if it >= C.STAGES:
                barrier_sync(K_FREE + s, THREADS)
            mbarrier.expect(sm.k_full.index(s), k_desc.block_type.nbytes)
            tma_load(k_desc, [b, row, kvh, 0], sm.k_full.index(s), sm.k.index(s))
            if j == 0:
                _load_rows(q_desc, r_desc, ti, mi, b, kvh, g, sm, C)  # after the first K: its slot is free sooner
            if it >= C.STAGES:
                barrier_sync(V_FREE + s, THREADS)
            mbarrier.expect(sm.v_full.index(s), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, row, kvh, 0], sm.v_full.index(s), sm.v.index(s))
            it += 1
            if j == 0:
                # after this tile's first loads: the atomic's latency must not delay them (0.85 -> 1.04 of cuDNN at 2K)
                tn = gl.num_programs(0) + gl.atomic_add(counter, 1)
                if C.MASK == INTERVALS:
                    slot_n, b_n, _ = decode(gl.minimum(tn, work.ntiles - 1), work, C)
                    mi_n, begin_n, full_begin_n, full_end_n, end_n = bounds(slot_n, b_n, work, C)
                _send(ti, tn, mi_n, begin_n, full_begin_n, full_end_n, end_n, sm, C)
        ti += 1
        t = tn
        if C.MASK == INTERVALS:
            mi = mi_n
            begin = begin_n
            full_begin = full_begin_n
            full_end = full_end_n
            end = end_n
    # the last CTA to come here leaves the counter ready for the next launch
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def _load_rows(q_desc, r_desc, ti, mi, b, kvh, g, sm, C: gl.constexpr):
    """Queries (and the fp32 out to continue) of every warpgroup's rows of tile ti."""
    NWG: gl.constexpr = C.NWG
    for w in gl.static_range(NWG):
        qi = (ti % C.QB) * C.NWG + w
        row = (mi * C.BM + w * C.WM) // C.PACK
        mbarrier.wait(sm.q_empty.index(qi), ((ti // C.QB) & 1) ^ 1)
        mbarrier.expect(sm.q_full.index(qi), q_desc.block_type.nbytes)
        tma_load(q_desc, [b, row, kvh, g, 0], sm.q_full.index(qi), sm.q.index(qi))
    if C.PREFETCH:
        for w in gl.static_range(NWG):
            row = (mi * C.BM + w * C.WM) // C.PACK
            mbarrier.wait(sm.r_empty.index(w), (ti & 1) ^ 1)
            mbarrier.expect(sm.r_full.index(w), r_desc.block_type.nbytes)
            tma_load(r_desc, [b, row, kvh, g, 0], sm.r_full.index(w), sm.r.index(w))


@gluon.jit
def _send(ti, t, mi, begin, full_begin, full_end, end, sm, C: gl.constexpr):
    """Tell the consumers which tile follows tile ti."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    zero = gl.full([1], 0, gl.int32, L)
    first = (ti & 1) * MESSAGE
    mbarrier.wait(sm.t_empty.index(ti & 1), ((ti >> 1) & 1) ^ 1)
    sm.tile.index(first).store(zero + t)
    if C.MASK == INTERVALS:
        sm.tile.index(first + 1).store(zero + mi)
        sm.tile.index(first + 2).store(zero + begin)
        sm.tile.index(first + 3).store(zero + full_begin)
        sm.tile.index(first + 4).store(zero + full_end)
        sm.tile.index(first + 5).store(zero + end)
    mbarrier.arrive(sm.t_full.index(ti & 1), count=1)


@gluon.jit
def _word(i, sm):
    """One int32 of a message, as a scalar."""
    return gl.max(sm.tile.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _receive(ti, mi, begin, full_begin, full_end, end, sm, C: gl.constexpr):
    """What `_send` said; bounds as given unless they come in the message."""
    first = (ti & 1) * MESSAGE
    mbarrier.wait(sm.t_full.index(ti & 1), (ti >> 1) & 1)
    t = _word(first, sm)
    if C.MASK == INTERVALS:
        mi = _word(first + 1, sm)
        begin = _word(first + 2, sm)
        full_begin = _word(first + 3, sm)
        full_end = _word(first + 4, sm)
        end = _word(first + 5, sm)
    mbarrier.arrive(sm.t_empty.index(ti & 1), count=1)
    return t, mi, begin, full_begin, full_end, end


@gluon.jit
def _row_bounds(pos, b, work, C: gl.constexpr):
    """Keys lo <= j < hi that the query positions `pos` see."""
    if C.MASK == INTERVALS:
        at = b * work.rows_stride + pos
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
def _state_pointers(row0, b, h, work, C: gl.constexpr):
    """Where the tile's fp32 rows lie, and which elements exist."""
    OUT: gl.constexpr = out_layout(C)
    pos, head, exists = _rows(row0, h, gl.SliceLayout(1, OUT), work, C)
    col = gl.arange(0, C.D, gl.SliceLayout(0, OUT))
    quads = wide_product(b, work.state_b) + wide_product(pos, work.state_s) + wide_product(head, work.state_h)
    mask = exists[:, None]
    if not C.EVEN:
        mask = mask & (col < work.D)[None, :]
    return work.state + (quads * 4)[:, None] + col[None, :], mask


@gluon.jit
def _step(W: gl.constexpr, acc, p, m_i, l_i, it, col0, masked, lo, hi, q, sm, work, C: gl.constexpr):
    """One key block: its scores and softmax, under whose cover O += P V of the block before runs."""
    THREADS: gl.constexpr = C.THREADS
    S: gl.constexpr = score_layout(C)
    OUT: gl.constexpr = out_layout(C)
    s_i = it % C.STAGES
    v_i = (it - 1) % C.STAGES
    v_phase = ((it - 1) // C.STAGES) & 1
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
        if masked:
            s = hide(s, lo, hi, col0, C)
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
    p = to_operand(p32, sm.q.dtype, C)
    if C.LAZY_RESCALE:
        acc = rescale_if_needed(acc, alpha, C)
    else:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    return acc, p, m_new, l_i


@gluon.jit
def _first(W: gl.constexpr, it, ti, row0, b, h, end, m_i, lo, hi, q, sm, work, C: gl.constexpr):
    """The tile's first (last in memory) key block, on top of the state given with INTO."""
    THREADS: gl.constexpr = C.THREADS
    S: gl.constexpr = score_layout(C)
    OUT: gl.constexpr = out_layout(C)
    acc = gl.zeros([C.WM, C.D], gl.float32, OUT)  # running sum of P V, in units of exp2(m_i)
    if C.INTO and not C.PREFETCH:
        at, mask = _state_pointers(row0, b, h, work, C)
        acc = gl.load(at, mask=mask, other=0.0)  # in flight until the first softmax is done
    s_i = it % C.STAGES
    mbarrier.wait(sm.k_full.index(s_i), (it // C.STAGES) & 1)
    s = warpgroup_mma(
        q,
        sm.k.index(s_i).reshape([C.BN, C.D]).permute((1, 0)),
        gl.zeros([C.WM, C.BN], gl.float32, S),
        use_acc=False,
        is_async=True,
    )
    s = warpgroup_mma_wait(0, deps=[s])
    barrier_arrive(K_FREE + s_i, THREADS)
    s = cap(s, work.cap_scale, C)
    if C.MASK or C.TAIL:
        s = hide(s, lo, hi, again((end - 1) * C.BN), C)  # `again`: comparisons kept from tile to tile would spill
    m_new = new_max(s, m_i, work.scale, C)
    p32, l_i = exp_block(s, m_new, work.scale, C)  # l_i: running sum of exp2(s - m_i), spread over 8 columns
    if C.INTO:
        alpha = gl.exp2(m_i - m_new)
        if C.PREFETCH:
            mbarrier.wait(sm.r_full.index(W), ti & 1)
            acc = sm.r.index(W).reshape([C.WM, C.D]).load(OUT)
            mbarrier.arrive(sm.r_empty.index(W), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        l_i = l_i + scaled(gl.full_like(l_i, 0.125), alpha)  # the state counts as one key of weight exp2(lse - m_i)
    return acc, to_operand(p32, sm.q.dtype, C), m_new, l_i


@gluon.jit
def _write(W: gl.constexpr, o_desc, o, row0, b, h, qi, sm, work, C: gl.constexpr):
    """Store the finished rows; o is fp32 in the accumulator's layout."""
    if C.OUT == OUT_REGISTERS:
        at, mask = _state_pointers(row0, b, h, work, C)
        gl.store(at, o, mask=mask, eviction_policy="evict_first")
    else:
        if C.OUT != OUT_ALIAS:
            tma_store_wait(0)  # the last tile's store has read the buffer
        i = qi if C.OUT == OUT_ALIAS else W
        kvh, g = _query_head(h, work, C)
        sm.o.index(i).reshape([C.WM, C.D]).store(o.to(o_desc.dtype))
        fence_async_shared()  # orders these stores before the copy engine's reads
        tma_store(o_desc, [b, row0 // C.PACK, kvh, g, 0], sm.o.index(i))
        if C.OUT == OUT_ALIAS:
            tma_store_wait(0)
            mbarrier.arrive(sm.q_empty.index(qi), count=1)


@gluon.jit
def _consumer(W: gl.constexpr, o_desc, work, sm, C: gl.constexpr):
    """Attention of WM rows of every tile this CTA gets."""
    THREADS: gl.constexpr = C.THREADS
    R: gl.constexpr = gl.SliceLayout(1, score_layout(C))
    OUT: gl.constexpr = out_layout(C)
    it = 0  # key blocks seen, over all tiles
    ti = 0  # tiles seen
    if C.PINGPONG and W == C.NWG - 1:
        barrier_arrive(TURN, C.NWG * 128)
    t = this_cta()
    slot, b, h = decode(t, work, C)
    mi, begin, full_begin, full_end, end = bounds(slot, b, work, C)
    while t < work.ntiles:
        slot, b, h = decode(t, work, C)
        if C.MASK != INTERVALS:
            mi, begin, full_begin, full_end, end = bounds(slot, b, work, C)
        row0 = mi * C.BM + W * C.WM
        pos, head, exists = _rows(row0, h, R, work, C)
        lo, hi = _row_bounds(pos, b, work, C)
        m_i = gl.full([C.WM], -float("inf"), gl.float32, R)  # running maximum of the scores, in units of log2
        if C.INTO:
            m_i = gl.load(_lse_pointers(pos, head, b, work, C), mask=exists, other=0.0) * LOG2E
        qi = (ti % C.QB) * C.NWG + W
        q = sm.q.index(qi).reshape([C.WM, C.D])
        mbarrier.wait(sm.q_full.index(qi), (ti // C.QB) & 1)
        acc, p, m_i, l_i = _first(W, it, ti, row0, b, h, end, m_i, lo, hi, q, sm, work, C)
        for j in range(1, end - begin):
            it += 1
            block = end - 1 - j
            masked = (block < full_begin) | (block >= full_end)
            acc, p, m_i, l_i = _step(W, acc, p, m_i, l_i, it, block * C.BN, masked, lo, hi, q, sm, work, C)
        if C.OUT != OUT_ALIAS:
            mbarrier.arrive(sm.q_empty.index(qi), count=1)
        v_i = it % C.STAGES
        mbarrier.wait(sm.v_full.index(v_i), (it // C.STAGES) & 1)
        acc = warpgroup_mma(p, sm.v.index(v_i).reshape([C.BN, C.D]), acc, is_async=True)
        # the next tile's message and the row sums, while the last PV runs
        t, mi, begin, full_begin, full_end, end = _receive(ti, mi, begin, full_begin, full_end, end, sm, C)
        l_row = row_total(l_i, R)
        lse = (m_i + gl.log2(l_row)) * LN2
        inv = 1.0 / l_row
        if C.GUARD:
            lse = gl.where(l_row > 0, lse, -float("inf"))
            inv = gl.where(l_row > 0, inv, 0.0)
        row0 = again(row0)
        pos, head, exists = _rows(row0, h, R, work, C)
        gl.store(_lse_pointers(pos, head, b, work, C), lse, mask=exists)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        barrier_arrive(V_FREE + v_i, THREADS)
        it += 1
        o = acc * gl.convert_layout(inv, gl.SliceLayout(1, OUT))[:, None]
        _write(W, o_desc, o, row0, b, h, qi, sm, work, C)
        ti += 1
    tma_store_wait(0)
    if C.PINGPONG and W == 0:
        barrier_sync(TURN, C.NWG * 128)  # takes the extra arrival made at the start


@gluon.jit
def _allocate(q_desc, k_desc, v_desc, o_desc, r_desc, C: gl.constexpr):
    """Shared memory and initialised barriers."""
    L: gl.constexpr = mbarrier.MBarrierLayout()
    NWG: gl.constexpr = C.NWG
    QUERIES: gl.constexpr = C.QB * C.NWG
    STAGES: gl.constexpr = C.STAGES
    q = gl.allocate_shared_memory(q_desc.dtype, ring_shape(QUERIES, q_desc.block_type.shape), q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, ring_shape(STAGES, k_desc.block_type.shape), k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, ring_shape(STAGES, v_desc.block_type.shape), v_desc.layout)
    o = q
    if C.OUT == OUT_SHARED:
        o = gl.allocate_shared_memory(o_desc.dtype, ring_shape(NWG, o_desc.block_type.shape), o_desc.layout)
    r = q
    if C.PREFETCH:
        r = gl.allocate_shared_memory(gl.float32, ring_shape(NWG, r_desc.block_type.shape), r_desc.layout)
    sm = Shared(  # type: ignore[call-arg]
        q=q,
        k=k,
        v=v,
        o=o,
        r=r,
        tile=gl.allocate_shared_memory(gl.int32, [2 * MESSAGE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        q_full=gl.allocate_shared_memory(gl.int64, [QUERIES, 1], L),
        q_empty=gl.allocate_shared_memory(gl.int64, [QUERIES, 1], L),
        k_full=gl.allocate_shared_memory(gl.int64, [STAGES, 1], L),
        v_full=gl.allocate_shared_memory(gl.int64, [STAGES, 1], L),
        r_full=gl.allocate_shared_memory(gl.int64, [NWG, 1], L),
        r_empty=gl.allocate_shared_memory(gl.int64, [NWG, 1], L),
        t_full=gl.allocate_shared_memory(gl.int64, [2, 1], L),
        t_empty=gl.allocate_shared_memory(gl.int64, [2, 1], L),
    )
    for i in gl.static_range(NWG):
        mbarrier.init(sm.r_full.index(i), count=1)
        mbarrier.init(sm.r_empty.index(i), count=1)
    for i in gl.static_range(QUERIES):
        mbarrier.init(sm.q_full.index(i), count=1)
        mbarrier.init(sm.q_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(sm.t_full.index(i), count=1)
        mbarrier.init(sm.t_empty.index(i), count=NWG)
    for i in gl.static_range(STAGES):
        mbarrier.init(sm.k_full.index(i), count=1)
        mbarrier.init(sm.v_full.index(i), count=1)
    fence_async_shared()  # the barriers' first values, before the copy engine arrives at them
    return sm


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
    live,
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
        num_m = gl.load(live)
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
    sm = _allocate(q_desc, k_desc, v_desc, o_desc, r_desc, C)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    two: gl.constexpr = 2
    if C.NWG == 2:
        gl.warp_specialize(
            [
                (_consumer, (zero, o_desc, work, sm, C)),
                (_consumer, (one, o_desc, work, sm, C)),
                (_producer, (q_desc, k_desc, v_desc, r_desc, counter, work, sm, C)),
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
                (_producer, (q_desc, k_desc, v_desc, r_desc, counter, work, sm, C)),
            ],
            [4, 4, 1],
            [C.CONSUMER_REGS, C.CONSUMER_REGS, C.PRODUCER_REGS],
        )
