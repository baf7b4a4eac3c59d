"""What feeds the Hopper backward's consumers: its sizes and shared memory, the warp that loads, the warp that adds dQ.

backward.py says what each barrier is for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ringfa3_kernels.hopper.gluon import (
    aggregate,
    barrier_arrive,
    barrier_sync,
    ring_shape,
    this_cta,
    tma_load,
    tma_reduce_add,
    tma_store_wait,
    wide_product,
)
from ringfa3_kernels.hopper.schedule import CAUSAL, INTERVALS, PITCH

LOG2E = gl.constexpr(1.4426950408889634)
FEED = gl.constexpr(288)  # threads at "block is free": the consumers and the producer warp
Q_FREE = gl.constexpr(8)
DO_FREE = gl.constexpr(11)
DQ_FULL = gl.constexpr(5)  # and 6, consumer 1's
DQ_FREE = gl.constexpr(7)  # and 10
HAND = gl.constexpr(160)  # threads of a consumer and the writer warp


@aggregate
class Task:
    """What the launch computes: sizes, and where rows find their statistics and keys their bounds."""

    lse: gl.tensor
    delta: gl.tensor
    bounds: gl.tensor  # INTERVALS: int32 [B or 1, 2, tiles * BN]: first row that sees a key, and the first after those
    bounds_stride: gl.tensor  # from batch row to batch row (0: shared)
    tiles: gl.tensor  # INTERVALS: int32 [B or 1, tiles, PITCH]: tile, begin, unmasked begin, unmasked end, end
    tiles_stride: gl.tensor
    scale: gl.tensor  # of scores: what dS gets with PRESCALE, else dq and dk
    to_log2: gl.tensor  # of (capped) scores, to what exp2 takes
    cap_scale: gl.tensor  # SOFTCAP: scale / softcap
    num_n: gl.tensor  # key tiles of a head
    wave: gl.tensor  # heads whose key tiles take turns
    heads: gl.tensor  # Hkv
    group: gl.tensor  # Hq / Hkv
    Sq: gl.tensor
    Sk: gl.tensor


@aggregate
class Room:
    """Shared memory: tiles and barriers."""

    q: gl.shared_memory_descriptor
    do: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor
    stats: gl.shared_memory_descriptor  # [2 * Q_STAGES, BM]: of a block lse in units of log2, then -delta (scaled)
    message: gl.shared_memory_descriptor  # int32 [3 * Q_STAGES, 1]: a block's first row, its head, if it needs the mask
    kv_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    do_full: gl.shared_memory_descriptor


@gluon.jit
def allocate(q_desc, do_desc, k_desc, v_desc, dq_desc, C: gl.constexpr):
    """Shared memory and initialised barriers."""
    L: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C.BN, C.BM], q_desc.dtype)
    Q_STAGES: gl.constexpr = C.Q_STAGES
    DO_STAGES: gl.constexpr = C.DO_STAGES
    ds = gl.allocate_shared_memory(q_desc.dtype, [C.DS_STAGES, C.BN, C.BM], DS)
    p = ds
    if C.SPLIT_D:
        p = gl.allocate_shared_memory(q_desc.dtype, [C.P_STAGES, C.BN, C.BM], DS)
    room = Room(  # type: ignore[call-arg]
        q=gl.allocate_shared_memory(q_desc.dtype, ring_shape(Q_STAGES, q_desc.block_type.shape), q_desc.layout),
        do=gl.allocate_shared_memory(do_desc.dtype, ring_shape(DO_STAGES, do_desc.block_type.shape), do_desc.layout),
        k=gl.allocate_shared_memory(k_desc.dtype, ring_shape(1, k_desc.block_type.shape), k_desc.layout),
        v=gl.allocate_shared_memory(v_desc.dtype, ring_shape(1, v_desc.block_type.shape), v_desc.layout),
        p=p,
        ds=ds,
        dq=gl.allocate_shared_memory(gl.float32, ring_shape(2, dq_desc.block_type.shape), dq_desc.layout),
        stats=gl.allocate_shared_memory(gl.float32, [2 * C.Q_STAGES, C.BM], FLAT),
        message=gl.allocate_shared_memory(gl.int32, [3 * C.Q_STAGES, 1], FLAT),
        kv_full=gl.allocate_shared_memory(gl.int64, [2, 1], L),
        q_full=gl.allocate_shared_memory(gl.int64, [C.Q_STAGES, 1], L),
        do_full=gl.allocate_shared_memory(gl.int64, [C.DO_STAGES, 1], L),
    )
    for i in gl.static_range(2):
        mbarrier.init(room.kv_full.index(i), count=1)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(room.q_full.index(i), count=2)  # the queries, and their lse and delta
    for i in gl.static_range(DO_STAGES):
        mbarrier.init(room.do_full.index(i), count=1)
    fence_async_shared()  # the barriers' first values, before the copy engine arrives at them
    return room


@gluon.jit
def tile_of(task, C: gl.constexpr):
    """(batch row, key/value head, key tile, its row blocks [begin, end)); [full_begin, full_end) need no mask."""
    t = this_cta()
    per = task.num_n * task.wave
    r = t % per
    bh = (t // per) * task.wave + r % task.wave
    slot = r // task.wave
    b = bh // task.heads
    h = bh % task.heads
    blocks = (task.Sq + C.BM - 1) // C.BM
    if C.MASK == INTERVALS:
        at = task.tiles + b * task.tiles_stride + slot * PITCH
        n = gl.load(at)
        begin = gl.load(at + 1)
        full_begin = gl.load(at + 2)
        full_end = gl.load(at + 3)
        end = gl.load(at + 4)
    else:
        n = slot  # under CAUSAL the longest first
        begin = 0
        full_begin = 0
        end = blocks
        full_end = blocks
        stop = (n + 1) * C.BN
        if C.MASK == CAUSAL:
            shift = task.Sk - task.Sq
            begin = gl.minimum(gl.maximum(n * C.BN - shift, 0) // C.BM, blocks)
            full_begin = (gl.maximum(stop - 1 - shift, 0) + C.BM - 1) // C.BM
        if C.BRANCH:  # keys past Sk have score 0, and exp2(0 - lse) may overflow
            full_begin = gl.where(stop > task.Sk, blocks, full_begin)
    return b, h, n, begin, full_begin, full_end, end


@gluon.jit
def producer(q_desc, do_desc, k_desc, v_desc, task, room, C: gl.constexpr):
    """Load the tile's keys and values, then block after block of the rows that see them."""
    L: gl.constexpr = gl.BlockedLayout([C.BM // 32], [32], [1], [0])
    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    b, h, n, begin, full_begin, full_end, end = tile_of(task, C)
    mbarrier.expect(room.kv_full.index(0), k_desc.block_type.nbytes)
    tma_load(k_desc, [b, n * C.BN, h, 0], room.kv_full.index(0), room.k.index(0))
    head = h * task.group
    i = begin
    for it in range(0, (end - begin) * task.group):
        row = i * C.BM
        s = it % C.Q_STAGES
        d = it % C.DO_STAGES
        # asked for before the wait that the consumers' pace makes long
        rows = row + gl.arange(0, C.BM, L)
        line = wide_product(b * task.heads * task.group + head, task.Sq)
        lse = gl.load(task.lse + line + rows, mask=rows < task.Sq, other=-float("inf"))
        delta = gl.load(task.delta + line + rows, mask=rows < task.Sq, other=0.0)
        if it >= C.Q_STAGES:
            barrier_sync(Q_FREE + s, FEED)
        mbarrier.expect(room.q_full.index(s), q_desc.block_type.nbytes)
        tma_load(q_desc, [b, row, head, 0], room.q_full.index(s), room.q.index(s))
        # -inf: the row sees nothing or does not exist, and exp2(x - inf) is 0
        lse = gl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
        room.stats.index(2 * s).store(lse)
        room.stats.index(2 * s + 1).store(-delta * task.scale if C.PRESCALE else -delta)
        room.message.index(3 * s).store(zero + row)
        room.message.index(3 * s + 1).store(zero + head)
        if C.BRANCH:
            room.message.index(3 * s + 2).store(zero + ((i < full_begin) | (i >= full_end)).to(gl.int32))
        mbarrier.arrive(room.q_full.index(s), count=1)
        if it == 0:
            mbarrier.expect(room.kv_full.index(1), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, n * C.BN, h, 0], room.kv_full.index(1), room.v.index(0))
        if it >= C.DO_STAGES:
            barrier_sync(DO_FREE + d, FEED)
        mbarrier.expect(room.do_full.index(d), do_desc.block_type.nbytes)
        tma_load(do_desc, [b, row, head, 0], room.do_full.index(d), room.do.index(d))
        i += 1
        if i == end:
            i = begin
            head += 1


@gluon.jit
def writer(dq_desc, task, C: gl.constexpr, room):
    """Add to memory the dQ that the consumers put into shared memory, in the order of the producer's blocks."""
    if C.DQ:
        b, h, _, begin, _, _, end = tile_of(task, C)
        head = h * task.group
        i = begin
        steps = (end - begin) * task.group
        for it in range(0, steps):
            for W in gl.static_range(2):
                barrier_sync(DQ_FULL + W, HAND)
                row = i * C.BM + (W * C.QM if C.BM > 64 else 0)
                tma_reduce_add(dq_desc, [b, row, head, 0 if C.BM > 64 else W * C.QD], room.dq.index(W))
            for W in gl.static_range(2):
                tma_store_wait(1 - W)
                if it + 1 < steps:
                    barrier_arrive(DQ_FREE + 3 * W, HAND)
            i += 1
            if i == end:
                i = begin
                head += 1
        tma_store_wait(0)
