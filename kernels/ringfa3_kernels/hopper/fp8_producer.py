"""The warp that feeds the fp8 forward: producer.py's, but for values, which lie keys fastest.

fp8.py says what each barrier is for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringfa3_kernels.hopper.gluon import barrier_sync, this_cta, tma_load
from ringfa3_kernels.hopper.producer import K_FREE, V_FREE, _deal, _done, _load_rows, _send, query_head
from ringfa3_kernels.hopper.schedule import INTERVALS, bounds, decode


@gluon.jit
def fp8_producer(q_desc, k_desc, v_desc, r_desc, counter, work, sm, C: gl.constexpr):
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
            key = (end - 1 - j) * C.BN
            s = it % C.STAGES
            if it >= C.STAGES:
                barrier_sync(K_FREE + s, THREADS)
            mbarrier.expect(sm.k_full.index(s), k_desc.block_type.nbytes)
            tma_load(k_desc, [b, key, kvh, 0], sm.k_full.index(s), sm.k.index(s))
            if j == 0:
                _load_rows(q_desc, r_desc, ti, mi, b, kvh, g, sm, C)  # after the first K: its slot is free sooner
            if it >= C.STAGES:
                barrier_sync(V_FREE + s, THREADS)
            mbarrier.expect(sm.v_full.index(s), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, kvh, 0, key], sm.v_full.index(s), sm.v.index(s))
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
