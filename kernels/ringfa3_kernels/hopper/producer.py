"""What feeds the Hopper forward's consumers: shared memory, and the warp that loads it and deals out the tiles.

forward.py says what each barrier is for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ringfa3_kernels.hopper.gluon import aggregate, barrier_sync, ring_shape, take_ticket, this_cta, tma_load
from ringfa3_kernels.hopper.schedule import INTERVALS, bounds, decode

OUT_SHARED = gl.constexpr(1)
K_FREE = gl.constexpr(8)  # named barriers, one a stage: the consumers have read it
V_FREE = gl.constexpr(12)
MESSAGE = gl.constexpr(8)  # int32 that describe a tile: the fields of Tile, in order


@aggregate
class Tile:
    """One tile: row tile mi of batch row b and head h, over the key blocks [begin, end)."""

    t: gl.tensor  # its number; past the last tile the others are those of the last
    mi: gl.tensor
    b: gl.tensor
    h: gl.tensor  # as tiles count heads
    end: gl.tensor
    full_end: gl.tensor  # blocks in [full_begin, full_end) need no mask
    begin: gl.tensor
    full_begin: gl.tensor


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
def allocate(q_desc, k_desc, v_desc, o_desc, r_desc, C: gl.constexpr):
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
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], L)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], L)
    r = q
    r_full = q_full
    r_empty = q_empty
    if C.PREFETCH:  # nor barriers without use: Triton gives their bytes away, and an mbarrier's are no plain memory
        r = gl.allocate_shared_memory(gl.float32, ring_shape(NWG, r_desc.block_type.shape), r_desc.layout)
        r_full = gl.allocate_shared_memory(gl.int64, [NWG, 1], L)
        r_empty = gl.allocate_shared_memory(gl.int64, [NWG, 1], L)
    sm = Shared(  # type: ignore[call-arg]
        q=q,
        k=k,
        v=v,
        o=o,
        r=r,
        tile=gl.allocate_shared_memory(gl.int32, [2 * MESSAGE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        q_full=q_full,
        q_empty=q_empty,
        k_full=gl.allocate_shared_memory(gl.int64, [STAGES, 1], L),
        v_full=gl.allocate_shared_memory(gl.int64, [STAGES, 1], L),
        r_full=r_full,
        r_empty=r_empty,
        t_full=gl.allocate_shared_memory(gl.int64, [2, 1], L),
        t_empty=gl.allocate_shared_memory(gl.int64, [2, 1], L),
    )
    if C.PREFETCH:
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


@gluon.jit
def query_head(h, work, C: gl.constexpr):
    """(key/value head, first query head of its group that the tile holds)."""
    if C.PACK > 1:
        return h, 0
    else:
        return h // work.group, h % work.group


@gluon.jit
def producer(q_desc, k_desc, v_desc, r_desc, counter, work, sm, C: gl.constexpr):
    """Load tiles' queries, keys and values in the order in which the consumers need them, and deal out the tiles."""
    THREADS: gl.constexpr = C.THREADS
    it = 0  # key blocks loaded, over all tiles
    ti = 0  # tiles loaded
    t = this_cta()
    slot, b, h = decode(gl.minimum(t, work.ntiles - 1), work, C)
    mi, begin, full_begin, full_end, end = bounds(slot, b, work, C)
    _send(0, t, mi, b, h, end, full_end, begin, full_begin, sm, C)
    while t < work.ntiles:
        slot, b, h = decode(t, work, C)
        if C.MASK != INTERVALS:
            mi, begin, full_begin, full_end, end = bounds(slot, b, work, C)
        kvh, g = query_head(h, work, C)
        tn = t
        mi_n = mi
        begin_n = begin
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
                tn, mi_n, begin_n, end_n = _deal(counter, ti + 1, work, sm, C)
        ti += 1
        t = tn
        if C.MASK == INTERVALS:
            mi = mi_n
            begin = begin_n
            end = end_n
    _done(counter)


@gluon.jit
def _done(counter):
    """This CTA has no more tiles to take. The last one to say so leaves the counter ready for the next launch."""
    if take_ticket(counter + 1, "acq_rel") == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def _deal(counter, ti, work, sm, C: gl.constexpr):
    """Take a tile from the counter as this CTA's number ti and send its description; its number, row tile and blocks.

    Some 1000 clocks, and as many again where bounds come from memory: never before a tile's first loads (0.85 -> 1.04
    of cuDNN at 2K).
    """
    t = gl.num_programs(0) + take_ticket(counter, "relaxed")  # nothing in memory hangs on who takes which
    slot, b, h = decode(gl.minimum(t, work.ntiles - 1), work, C)
    mi, begin, full_begin, full_end, end = bounds(slot, b, work, C)
    _send(ti, t, mi, b, h, end, full_end, begin, full_begin, sm, C)
    return t, mi, begin, end


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
def _send(ti, t, mi, b, h, end, full_end, begin, full_begin, sm, C: gl.constexpr):
    """Tell the consumers what this CTA's tile number ti is: they would spend three divisions each on finding out."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    zero = gl.full([1], 0, gl.int32, L)
    first = (ti & 1) * MESSAGE
    mbarrier.wait(sm.t_empty.index(ti & 1), ((ti >> 1) & 1) ^ 1)
    sm.tile.index(first).store(zero + t)
    sm.tile.index(first + 1).store(zero + mi)
    sm.tile.index(first + 2).store(zero + b)
    sm.tile.index(first + 3).store(zero + h)
    sm.tile.index(first + 4).store(zero + end)
    if C.MASK:
        sm.tile.index(first + 5).store(zero + full_end)
    if C.MASK == INTERVALS:
        sm.tile.index(first + 6).store(zero + begin)
        sm.tile.index(first + 7).store(zero + full_begin)
    mbarrier.arrive(sm.t_full.index(ti & 1), count=1)


@gluon.jit
def _word(i, sm):
    """One int32 of a message, as a scalar."""
    return gl.max(sm.tile.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def receive(ti, sm, C: gl.constexpr):
    """The tile that `_send` told of."""
    first = (ti & 1) * MESSAGE
    mbarrier.wait(sm.t_full.index(ti & 1), (ti >> 1) & 1)
    t = _word(first, sm)
    end = _word(first + 4, sm)
    begin = t - t
    full_begin = begin
    full_end = end
    mi = _word(first + 1, sm)
    b = _word(first + 2, sm)
    h = _word(first + 3, sm)
    if C.MASK:
        full_end = _word(first + 5, sm)
    if C.MASK == INTERVALS:
        begin = _word(first + 6, sm)
        full_begin = _word(first + 7, sm)
    mbarrier.arrive(sm.t_empty.index(ti & 1), count=1)
    return Tile(t=t, mi=mi, b=b, h=h, end=end, full_end=full_end, begin=begin, full_begin=full_begin)  # type: ignore[call-arg]
