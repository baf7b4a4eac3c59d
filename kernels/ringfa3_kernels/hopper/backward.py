"""Backward attention for Hopper: a tile of keys stays in a CTA, one producer warp feeds it the rows that see it.

Reads q, dout [B, Sq, Hq, D], k, v [B, Sk, Hkv, D] by TMA in any strides, which fills head_dim to 64, 128 or 256 and the
tails with zeros; lse and delta fp32 [B, Hq, Sq]; under INTERVALS the tables of `backward_schedule`. Adds to dq fp32
[B, Sq, Hq, D]; stores or adds dk, dv [B, Sk, Hkv, D]. A row whose lse is -inf has P = 0 and gets no gradient.

Grid: one CTA per BN keys of a key/value head; it walks the rows that see them, for all query heads of the group in
    turn, so that dk and dv are summed over the group in registers.
Warps: consumers 0 and 1 (4 warps each; 0 is the default partition), 1 producer warp; 1 that adds dQ to memory (WRITER).
    Every product has keys as rows: S^T = K Q^T, dP^T = V dO^T, then dV += P^T dO and dK += dS^T Q with P^T and dS^T
    straight from registers. dQ = dS K needs the dS of all keys: it goes through shared memory, each consumer computes
    half of dQ (columns, or rows where BM is 128), and one TMA reduction adds it to memory.
    dQ^T = K^T dS is what they compute (TURN).
    With SPLIT_D (head_dim 256) the registers hold dK and dV of half of head_dim for all keys instead, and P^T too goes
    through shared memory. Consumer 0 computes S^T and P of all rows, a step ahead, and consumer 1 dP^T and dS (ROLES):
    K and V are then read once a step, not twice. With a softcap each computes S^T, dP^T, P and dS of half of the rows.
Barriers (mbarrier unless said otherwise):
    kv_full [2]                    the tile's keys, its values
    q_full, do_full [stages]       a block of queries (with its lse, delta and message), of dout
    named 8 + stage, 11 + stage    that block is free
    named 14                       consumers: P is written (SPLIT_D); dS is written
    named 13                       ROLES: consumer 1 has read P
    named 5 + W, 7 + 3 W           WRITER: consumer W's dQ is written; its buffer is free
    named 15                       consumers: keys and values are no longer read
    Named barriers 8 and 9 are the queries', so Q_STAGES is at most 2.
Order inside a step: S, dP; exps under dP; dV; dS under dV; dQ, dK; dQ leaves under dK.
Follows FlashAttention-3 (arXiv 2407.08608) and FlashAttention-2, algorithm 2 (arXiv 2307.08691).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringfa3_kernels.hopper.backward_producer import (
    DO_FREE,
    DQ_FREE,
    DQ_FULL,
    FEED,
    HAND,
    Q_FREE,
    Task,
    allocate,
    producer,
    tile_of,
    writer,
)
from ringfa3_kernels.hopper.gluon import (
    again,
    barrier_arrive,
    barrier_sync,
    reinterpret,
    ring_shape,
    tanh_exact,
    tanh_fast,
    tma_reduce_add,
    tma_store,
    tma_store_wait,
    wide_product,
)
from ringfa3_kernels.hopper.schedule import CAUSAL, INTERVALS
from ringfa3_kernels.hopper.softmax import CAP_EXACT, CAP_FAST

FAR = gl.constexpr(1 << 30)
PAIR = gl.constexpr(256)  # threads of both consumers
EXCHANGE = gl.constexpr(14)
DONE = gl.constexpr(15)
P_FREE = gl.constexpr(13)


@gluon.constexpr_function
def scores_layout(C):
    """fp32 [keys, SM]: the accumulator of K Q^T, one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.SM, 16])


@gluon.constexpr_function
def keys_layout(C):
    """fp32 [WN, WD]: the accumulators of dK and dV."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.WD, 16])


@gluon.constexpr_function
def queries_layout(C):
    """fp32 [QD, QM]: the accumulator of dQ^T, or [QM, QD] and dQ without TURN."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.QM if C.TURN else C.QD, 16])


@gluon.jit
def _hide(W: gl.constexpr, p, s, key0, b, room, task, C: gl.constexpr):
    """p [keys, SM] with 0 where a row of the block of stage s does not see its key (rows of p count from key0).

    The rows that see a key are an interval, as the keys that a row sees are. Compared as the forward's `hide` does.
    """
    S: gl.constexpr = scores_layout(C)
    KEYS: gl.constexpr = p.shape[0]
    p8 = p.reshape([KEYS, C.SM // 8, 8])
    L: gl.constexpr = p8.type.layout
    R: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, L))
    # `again`: what is computed here from loop invariants would be hoisted out of the loop and spill
    key = again(key0) + gl.arange(0, KEYS, R)
    octet = (gl.arange(0, C.SM // 8, gl.SliceLayout(0, gl.SliceLayout(2, L))) * 8)[None, :][:, :, None]
    within = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :]
    row0 = _word(3 * s, room) + (W * C.SM if C.SM < C.BM else 0)
    if C.MASK == INTERVALS:
        at = task.bounds + wide_product(b, task.bounds_stride) + key
        above = (gl.load(at) - row0)[:, None] - within
        below = (gl.load(at + again(task.num_n) * C.BN) - row0)[:, None] - within
        keep = (octet >= above[:, None, :]) & (octet < below[:, None, :])
    else:
        Sk = again(task.Sk)
        begin = key - (Sk - again(task.Sq)) if C.MASK == CAUSAL else gl.full_like(key, 0)
        begin = gl.where(key < Sk, begin, FAR)
        keep = octet >= ((begin - row0)[:, None] - within)[:, None, :]
    return gl.convert_layout(gl.where(keep, p8, 0.0).reshape([KEYS, C.SM]), S, assert_trivial=True)


@gluon.jit
def _word(i, room):
    """One int32 of a message, as a scalar."""
    return gl.max(room.message.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _probabilities(W: gl.constexpr, st, lse, s, key0, b, room, task, C: gl.constexpr):
    """(P^T, P^T times the softcap's derivative), fp32, from the raw scores S^T of the block of stage s and its lse."""
    if C.SOFTCAP == CAP_FAST:
        t = tanh_fast(st * task.cap_scale)
    elif C.SOFTCAP == CAP_EXACT:
        t = tanh_exact(st * task.cap_scale)
    else:
        t = st
    p = gl.exp2(t * task.to_log2 - lse[None, :])
    if C.BRANCH:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if _word(3 * s + 2, room):
            p = _hide(W, p, s, key0, b, room, task, C)
    slope = p
    if C.SOFTCAP:
        slope = p * (1.0 - t * t)
    return p, slope


@gluon.jit
def _query_operands(W: gl.constexpr, ds, k, C: gl.constexpr):
    """Of the consumer's share of dQ = dS K: dS^T [BN, QM] and K [BN, QD] in shared memory."""
    if C.BM > 64:
        return ds.slice(W * C.QM, C.QM, dim=1), k
    else:
        return ds, k.slice(W * C.QD, C.QD, dim=1)


@gluon.jit
def _add_queries(W: gl.constexpr, dq_desc, dq, it, row, head, b, room, task, C: gl.constexpr):
    """Add a consumer's share of dQ of a block to memory, or with WRITER hand it to the writer warp."""
    if not C.PRESCALE:
        dq = dq * task.scale
    if C.WRITER:
        if it > 0:
            barrier_sync(DQ_FREE + 3 * W, HAND)
        _stage_queries(dq, room.dq.index(W), C)
        barrier_arrive(DQ_FULL + W, HAND)
    else:
        row += W * C.QM if C.BM > 64 else 0
        column: gl.constexpr = 0 if C.BM > 64 else W * C.QD
        if C.PARTS == 1:
            _add_part(W, dq_desc, dq, row, head, column, b, room, C)
        else:  # of dQ^T: TURN
            first, second = dq.reshape([C.QD, 2, C.QR]).permute((0, 2, 1)).split()
            _add_part(W, dq_desc, first, row, head, column, b, room, C)
            _add_part(W, dq_desc, second, row + C.QR, head, column, b, room, C)


@gluon.jit
def _add_part(W: gl.constexpr, dq_desc, dq, row, head, column, b, room, C: gl.constexpr):
    """Add a part of dQ [QR, QD] (transposed with TURN) to memory."""
    tma_store_wait(0)  # the last reduction has read the buffer
    buffer = room.dq.index(W)
    _stage_queries(dq, buffer, C)
    tma_reduce_add(dq_desc, [b, row, head, column], buffer)


@gluon.jit
def _stage_queries(dq, buffer, C: gl.constexpr):
    """A part of dQ [QR, QD] (transposed with TURN) into shared memory, to be sent from there."""
    rows = buffer.reshape([C.QR, C.QD])
    if C.TURN:
        rows.permute((1, 0)).store(dq)
    else:
        rows.store(dq)
    fence_async_shared()  # orders these stores before the copy engine's reads


@gluon.jit
def _store_scores(W: gl.constexpr, ds, it, room, C: gl.constexpr):
    """dS^T [WN, BM] of this consumer's keys into shared memory."""
    room.ds.index(it % 2).slice(W * C.WN, C.WN, dim=0).store(ds)
    fence_async_shared()  # orders these stores before the matrix unit's reads


@gluon.jit
def _blocks(W: gl.constexpr, it, room, C: gl.constexpr):
    """In shared memory: the step's queries and dout, and this consumer's keys and values."""
    # `again`: matrix descriptors of fixed buffers would be computed before the loop, and spill
    here = again(0)
    q = room.q.index(it % C.Q_STAGES).reshape([C.BM, C.D])
    do = room.do.index(it % C.DO_STAGES).reshape([C.BM, C.D])
    k = room.k.index(here).reshape([C.BN, C.D]).slice(W * C.WN, C.WN, dim=0)
    v = room.v.index(here).reshape([C.BN, C.D]).slice(W * C.WN, C.WN, dim=0)
    return q, do, k, v


@gluon.jit
def _start_queries(W: gl.constexpr, ds, here, room, C: gl.constexpr):
    """Issue this consumer's share of dQ of the block whose dS^T both have stored in ds [BN, BM]."""
    ds, k = _query_operands(W, ds, room.k.index(here).reshape([C.BN, C.D]), C)
    L: gl.constexpr = queries_layout(C)
    if C.TURN:
        nothing = gl.zeros([C.QD, C.QM], gl.float32, L)
        return warpgroup_mma(k.permute((1, 0)), ds, nothing, use_acc=False, is_async=True)
    else:
        nothing = gl.zeros([C.QM, C.QD], gl.float32, L)
        return warpgroup_mma(ds.permute((1, 0)), k, nothing, use_acc=False, is_async=True)


@gluon.jit
def _statistic(W: gl.constexpr, i, room, C: gl.constexpr):
    """lse or -delta of this consumer's rows of a block, as the producer has stored it in line i."""
    stats = room.stats.index(i)
    if C.SM < C.BM:
        stats = stats.slice(W * C.SM, C.SM)
    return stats.load(gl.SliceLayout(0, scores_layout(C)))


@gluon.jit
def _scores_gradient(slope, dpt, minus_delta, room, task, C: gl.constexpr):
    """dS^T in the inputs' dtype."""
    if C.PRESCALE:
        dpt = dpt * task.scale  # one instruction with the addition
    return (slope * (dpt + minus_delta[None, :])).to(room.q.dtype)


@gluon.jit
def _step(W: gl.constexpr, dk, dv, it, key0, b, dq_desc, room, task, C: gl.constexpr):
    """One block of rows: its share of dk, dv and dq."""
    S: gl.constexpr = scores_layout(C)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, keys_layout(C), 2)
    s = it % C.Q_STAGES
    d = it % C.DO_STAGES
    q, do, k_w, v_w = _blocks(W, it, room, C)
    zeros = gl.zeros([C.WN, C.BM], gl.float32, S)
    mbarrier.wait(room.q_full.index(s), (it // C.Q_STAGES) & 1)
    if C.EARLY:
        lse = _statistic(W, 2 * s, room, C)
    row = _word(3 * s, room)
    head = _word(3 * s + 1, room)
    st = warpgroup_mma(k_w, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(room.do_full.index(d), (it // C.DO_STAGES) & 1)
    dpt = warpgroup_mma(v_w, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    st = warpgroup_mma_wait(1, deps=[st])
    if not C.EARLY:
        lse = _statistic(W, 2 * s, room, C)
    p, slope = _probabilities(W, st, lse, s, key0, b, room, task, C)
    p_op = gl.convert_layout(p.to(room.q.dtype), OPERAND, assert_trivial=True)
    if C.EARLY:
        minus_delta = _statistic(W, 2 * s + 1, room, C)
    dv = warpgroup_mma(p_op, do, dv, is_async=True)
    dpt = warpgroup_mma_wait(1, deps=[dpt])
    if not C.EARLY:
        minus_delta = _statistic(W, 2 * s + 1, room, C)
    ds = _scores_gradient(slope, dpt, minus_delta, room, task, C)
    ds_op = gl.convert_layout(ds, OPERAND, assert_trivial=True)
    if C.DQ:
        _store_scores(W, ds, it, room, C)
        barrier_sync(EXCHANGE, PAIR)
        dq = _start_queries(W, room.ds.index(it % 2), again(0), room, C)
        dk = warpgroup_mma(ds_op, q, dk, is_async=True)
        dv, dq, p_op = warpgroup_mma_wait(1, deps=[dv, dq, p_op])
        barrier_arrive(DO_FREE + d, FEED)
        _add_queries(W, dq_desc, dq, it, row, head, b, room, task, C)
    else:
        dk = warpgroup_mma(ds_op, q, dk, is_async=True)
        dv, p_op = warpgroup_mma_wait(1, deps=[dv, p_op])
        barrier_arrive(DO_FREE + d, FEED)
    dk, ds_op = warpgroup_mma_wait(0, deps=[dk, ds_op])
    barrier_arrive(Q_FREE + s, FEED)
    return dk, dv


@gluon.jit
def _step_split(W: gl.constexpr, dk, dv, it, key0, b, dq_desc, room, task, C: gl.constexpr):
    """One block of rows, with SPLIT_D: P and dS of half of the rows, then half of the columns of dv, dk and dq."""
    S: gl.constexpr = scores_layout(C)
    dtype: gl.constexpr = room.q.dtype
    # `again`: matrix descriptors of fixed buffers would be computed before the loop, and spill
    here = again(0)
    s = it % C.Q_STAGES if C.Q_STAGES > 1 else here
    d = it % C.DO_STAGES if C.DO_STAGES > 1 else here
    q = room.q.index(s).reshape([C.BM, C.D])
    do = room.do.index(d).reshape([C.BM, C.D])
    k = room.k.index(here).reshape([C.BN, C.D])
    v = room.v.index(here).reshape([C.BN, C.D])
    zeros = gl.zeros([C.BN, C.SM], gl.float32, S)
    mbarrier.wait(room.q_full.index(s), (it // C.Q_STAGES) & 1)
    st = warpgroup_mma(k, q.slice(W * C.SM, C.SM, dim=0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(room.do_full.index(d), (it // C.DO_STAGES) & 1)
    dpt = warpgroup_mma(v, do.slice(W * C.SM, C.SM, dim=0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    st = warpgroup_mma_wait(1, deps=[st])
    p, slope = _probabilities(W, st, _statistic(W, 2 * s, room, C), s, key0, b, room, task, C)
    p_all = room.p.index(it % 2)
    p_all.slice(W * C.SM, C.SM, dim=1).store(p.to(dtype))
    fence_async_shared()  # orders these stores before the matrix unit's reads
    barrier_sync(EXCHANGE, PAIR)
    dv = warpgroup_mma(p_all, do.slice(W * C.WD, C.WD, dim=1), dv, is_async=True)
    dpt = warpgroup_mma_wait(1, deps=[dpt])
    ds = _scores_gradient(slope, dpt, _statistic(W, 2 * s + 1, room, C), room, task, C)
    ds_all = room.ds.index(here)  # one will do: both have met since the products of the last step that read it
    ds_all.slice(W * C.SM, C.SM, dim=1).store(ds)
    fence_async_shared()
    barrier_sync(EXCHANGE, PAIR)
    if C.DQ:
        dq = _start_queries(W, ds_all, here, room, C)
        dk = warpgroup_mma(ds_all, q.slice(W * C.WD, C.WD, dim=1), dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
        barrier_arrive(DO_FREE + d, FEED)
        _add_queries(W, dq_desc, dq, it, _word(3 * s, room), _word(3 * s + 1, room), b, room, task, C)
    else:
        dk = warpgroup_mma(ds_all, q.slice(W * C.WD, C.WD, dim=1), dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
        barrier_arrive(DO_FREE + d, FEED)
    dk = warpgroup_mma_wait(0, deps=[dk])
    barrier_arrive(Q_FREE + s, FEED)
    return dk, dv


@gluon.jit
def _start_ahead(it, steps, room, C: gl.constexpr):
    """Issue S^T [BN, BM] of step `it`, of all its rows; past the last step of whatever is there."""
    here = again(0)
    if it < steps:
        mbarrier.wait(room.q_full.index(it % C.Q_STAGES), (it // C.Q_STAGES) & 1)
    q = room.q.index(it % C.Q_STAGES).reshape([C.BM, C.D])
    zeros = gl.zeros([C.BN, C.BM], gl.float32, scores_layout(C))
    k = room.k.index(here).reshape([C.BN, C.D])
    return warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _step_roles(W: gl.constexpr, dk, dv, st, it, steps, key0, b, dq_desc, room, task, C: gl.constexpr):
    """One block of rows, with ROLES: consumer 0 computes P, consumer 1 dS, each half of dv, dk and dq.

    Consumer 0 is given the block's scores and computes those of the next, whose exps run under consumer 1's dP.
    """
    S: gl.constexpr = scores_layout(C)
    dtype: gl.constexpr = room.q.dtype
    # `again`: matrix descriptors of fixed buffers would be computed before the loop, and spill
    here = again(0)
    s = it % C.Q_STAGES
    d = it % C.DO_STAGES if C.DO_STAGES > 1 else here
    q = room.q.index(s).reshape([C.BM, C.D]).slice(W * C.WD, C.WD, dim=1)
    do = room.do.index(d).reshape([C.BM, C.D])
    p_all = room.p.index(here)
    ds_all = room.ds.index(here)
    if W == 0:
        p, _ = _probabilities(W, st, _statistic(W, 2 * s, room, C), s, key0, b, room, task, C)
        if it > 0:
            barrier_sync(P_FREE, PAIR)
        p_all.store(p.to(dtype))
        fence_async_shared()  # orders these stores before the matrix unit's reads
        mbarrier.wait(room.do_full.index(d), (it // C.DO_STAGES) & 1)
        barrier_sync(EXCHANGE, PAIR)
        dv = warpgroup_mma(p_all, do.slice(W * C.WD, C.WD, dim=1), dv, is_async=True)
    else:
        mbarrier.wait(room.q_full.index(s), (it // C.Q_STAGES) & 1)
        mbarrier.wait(room.do_full.index(d), (it // C.DO_STAGES) & 1)
        v = room.v.index(here).reshape([C.BN, C.D])
        zeros = gl.zeros([C.BN, C.BM], gl.float32, S)
        dpt = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dpt = warpgroup_mma_wait(0, deps=[dpt])
        barrier_sync(EXCHANGE, PAIR)
        p = p_all.load(S).to(gl.float32)
        dv = warpgroup_mma(p_all, do.slice(W * C.WD, C.WD, dim=1), dv, is_async=True)
        ds_all.store(_scores_gradient(p, dpt, _statistic(W, 2 * s + 1, room, C), room, task, C))
        fence_async_shared()
    barrier_sync(EXCHANGE, PAIR)
    if C.DQ:
        dq = _start_queries(W, ds_all, here, room, C)
        dk = warpgroup_mma(ds_all, q, dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
    else:
        dk = warpgroup_mma(ds_all, q, dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
    barrier_arrive(DO_FREE + d, FEED)
    if W == 1 and it + 1 < steps:
        barrier_arrive(P_FREE, PAIR)
    if C.DQ:
        _add_queries(W, dq_desc, dq, it, _word(3 * s, room), _word(3 * s + 1, room), b, room, task, C)
    if W == 0:
        st = _start_ahead(it + 1, steps, room, C)
        dk = warpgroup_mma_wait(1, deps=[dk])
        barrier_arrive(Q_FREE + s, FEED)
        st = warpgroup_mma_wait(0, deps=[st])
    else:
        dk = warpgroup_mma_wait(0, deps=[dk])
        barrier_arrive(Q_FREE + s, FEED)
    return dk, dv, st


@gluon.jit
def _leave(W: gl.constexpr, desc, grad, buffer, b, key, h, C: gl.constexpr):
    """Store a consumer's share of dk or dv, or add it to memory, through shared memory of its own."""
    buffer.reshape([C.WN, C.WD]).store(grad.to(desc.dtype))
    fence_async_shared()
    column = W * C.WD if C.SPLIT_D else 0
    if C.ACCUMULATE:
        tma_reduce_add(desc, [b, key, h, column], buffer)
    else:
        tma_store(desc, [b, key, h, column], buffer)


@gluon.jit
def _consumer(W: gl.constexpr, dq_desc, dk_desc, dv_desc, task, room, C: gl.constexpr):
    """Gradients of the tile: dk and dv of this consumer's share of it, and a share of dq."""
    L: gl.constexpr = keys_layout(C)
    b, h, n, begin, _, _, end = tile_of(task, C)
    dk = gl.zeros([C.WN, C.WD], gl.float32, L)  # running sum of dS^T Q
    dv = gl.zeros([C.WN, C.WD], gl.float32, L)  # running sum of P^T dO
    key0 = n * C.BN + (0 if C.SPLIT_D else W * C.WN)
    steps = (end - begin) * task.group
    mbarrier.wait(room.kv_full.index(0), 0)
    if steps > 0:
        mbarrier.wait(room.kv_full.index(1), 0)
    st = 0.0  # with ROLES consumer 0 carries the next block's scores
    if C.ROLES and W == 0:
        st = warpgroup_mma_wait(0, deps=[_start_ahead(0, steps, room, C)])
    for it in range(0, steps):
        if C.ROLES:
            dk, dv, st = _step_roles(W, dk, dv, st, it, steps, key0, b, dq_desc, room, task, C)
        elif C.SPLIT_D:
            dk, dv = _step_split(W, dk, dv, it, key0, b, dq_desc, room, task, C)
        else:
            dk, dv = _step(W, dk, dv, it, key0, b, dq_desc, room, task, C)
    tma_store_wait(0)
    barrier_sync(DONE, PAIR)  # both are done with K and V, whose memory dK and dV leave through
    if not C.PRESCALE:
        dk = dk * task.scale
    if C.WIDE:
        own = reinterpret(room.v if W else room.k, gl.float32, dk_desc.block_type.shape, dk_desc.layout)
        _leave(W, dk_desc, dk, own, b, key0, h, C)
        tma_store_wait(0)
        _leave(W, dv_desc, dv, own, b, key0, h, C)
    else:
        PAIR_OF: gl.constexpr = ring_shape(2, dk_desc.block_type.shape)
        k_w = reinterpret(room.k, dk_desc.dtype, PAIR_OF, dk_desc.layout).index(W)
        v_w = reinterpret(room.v, dk_desc.dtype, PAIR_OF, dk_desc.layout).index(W)
        _leave(W, dk_desc, dk, k_w, b, key0, h, C)
        _leave(W, dv_desc, dv, v_w, b, key0, h, C)
    tma_store_wait(0)


# Sizes are not specialised: every new length would compile again.
_SIZES = ["bounds_stride", "tiles_stride", "num_n", "wave", "heads", "group", "Sq", "Sk"]


@gluon.jit(do_not_specialize=_SIZES)
def attend_backward(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    lse,
    delta,
    bounds,
    bounds_stride,
    tiles,
    tiles_stride,
    scale,
    to_log2,
    cap_scale,
    num_n,
    wave,
    heads,
    group,
    Sq,
    Sk,
    C: gl.constexpr,
):
    """The kernel; arguments as `Task` explains them, and descriptors; C a BackwardConfig."""
    task = Task(  # type: ignore[call-arg]
        lse=lse,
        delta=delta,
        bounds=bounds,
        bounds_stride=bounds_stride,
        tiles=tiles,
        tiles_stride=tiles_stride,
        scale=scale,
        to_log2=to_log2,
        cap_scale=cap_scale,
        num_n=num_n,
        wave=wave,
        heads=heads,
        group=group,
        Sq=Sq,
        Sk=Sk,
    )
    room = allocate(q_desc, do_desc, k_desc, v_desc, dq_desc, C)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    if C.WRITER:
        gl.warp_specialize(
            [
                (_consumer, (zero, dq_desc, dk_desc, dv_desc, task, room, C)),
                (_consumer, (one, dq_desc, dk_desc, dv_desc, task, room, C)),
                (producer, (q_desc, do_desc, k_desc, v_desc, task, room, C)),
                (writer, (dq_desc, task, C, room)),
            ],
            [4, 1, 1],
            [C.CONSUMER_REGS, C.PRODUCER_REGS, C.PRODUCER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (zero, dq_desc, dk_desc, dv_desc, task, room, C)),
                (_consumer, (one, dq_desc, dk_desc, dv_desc, task, room, C)),
                (producer, (q_desc, do_desc, k_desc, v_desc, task, room, C)),
            ],
            [4, 1],
            [C.CONSUMER_REGS, C.PRODUCER_REGS],
        )
