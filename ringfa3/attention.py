"""ring_attention: exact attention over a sequence whose shards lie on the ranks of a group; the door of this package.

The way of a call: check the arguments, agree with the other ranks, look up the plan, and let the transport bring hop
after hop, each of which continues the same online softmax (`ringfa3_kernels.attend`, into=). The backward pass goes the
same way; gradients of keys and values travel home with the transport.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringfa3 import arguments, places, profiling, shards
from ringfa3.agree import BACKWARD, Agreement
from ringfa3.arguments import Arguments
from ringfa3.entrance import entrance, wants_grad
from ringfa3.fp8 import Fp8, quantized_hops, rotated_back, rounded
from ringfa3.gang import Gang
from ringfa3.handle import Handle
from ringfa3.lane import Lane, Tensors
from ringfa3.layout import Layout
from ringfa3.mask import Mask
from ringfa3.mesh import sliced
from ringfa3.plan import Hop, Plan, on_axes
from ringfa3.plan import plan as plan_for
from ringfa3.shards import Group, members
from ringfa3.sinks import with_sinks
from ringfa3.transport import Transport
from ringfa3.transport.choose import choose
from ringfa3.ulysses import Alone, Heads, exchange, hop_gang, numbered, parts, ring_gang, ring_ranks
from ringfa3_kernels import Partial, Quantized, attend, attend_backward, row_delta
from ringfa3_kernels.door import is_aligned, state_dtype


@entrance
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | None = None,
    window: tuple[int, int] | None = None,
    documents: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    plan: Plan | None = None,
    group: Group = None,
    layout: str | Layout | None = None,
    transport: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    async_op: bool = False,
    mask: Mask | None = None,
    impl: str = "auto",
    fp8: Fp8 | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    agree: bool | Agreement = True,
) -> Any:
    """Attention of this rank's queries over the keys of all ranks; every rank of the group must call.

    Under torch.autocast q, k and v are cast to its dtype, as for torch's own attention. torch.compile (fullgraph) finds
    an operator here, whose arguments are checked and agreed on when it runs; of the arguments below it takes names,
    numbers, tensors, a group and a plan (another plan compiles nothing anew), and refuses the rest by name.

    q, k and v may be DTensors, sharded on dim 1 over every axis of one mesh: so are the results then (lse on dim 2).
    `group` is that mesh, and without layout and plan the layout is "contiguous", which is how DTensors lie.

    Args:
        q: [B, n, Hq, D] bf16, fp16 or fp32 (fp64 too, where an implementation serves it): this rank's rows of the
            sequence, as the layout deals them (`shard`). n may differ between ranks and may be 0.
        k, v: [B, n, Hkv, D], q's dtype and device; Hq a multiple of Hkv. Another n with a plan for cross attention.
        causal, window, documents: who sees what, by global position; see `Mask`; causal by default. Or `mask`, a Mask
            that says it all.
        softcap: where not 0, scores become softcap * tanh(score / softcap).
        sink_logits: [Hq], learnable: every row's softmax has one more score, whose value is 0. A replicated parameter:
            its gradient here is this rank's rows' share, to be summed over the ranks like any other parameter's.
        scale: factor on q.k; None: D ** -0.5.
        plan: what `plan` made for this mask, layout and length; it says these itself, so leave them alone.
        group: a ProcessGroup or a DeviceMesh; None: the plan's, or all ranks (one, without torch.distributed). A 2-D
            mesh, its axes named "ulysses" and "ring" (or nameless, in that order), deals positions over the ring axis
            and heads over the ulysses axis, along which ranks hold contiguous slices of one shard.
        layout: how the sequence was dealt: "zigzag" (default), "contiguous", "striped", "balanced" or a Layout.
        transport: "pull" (ranks of one host read each other's memory; "pull:3" lands slices in 3 buffers, not 2),
            "ring", "gather", "hierarchical" (pull inside a host, ring between hosts; "hierarchical:2" takes every 2
            ranks for a host), or "auto": gather where a rank's keys and values are below 64 KiB, else on GPUs pull or
            hierarchical where their places allow, else ring. Or "ulysses": the whole group deals heads, no hops; its
            layout is "contiguous".
        deterministic: gradients bitwise equal from run to run, at some cost.
        return_lse: also return the log-sum-exp of every row; differentiable. It includes the sink.
        async_op: return a `Handle` at once; its wait() gives the result. Calls of one group run in the order in which
            they were made, on every rank the same; so do their backward passes (ValueError where ranks differ).
        impl: implementation of the kernels; see `ringfa3_kernels.attend`.
        fp8: round q, k and v to 8 bits, with scales, for the forward pass: its matrix products are done so, and half
            the bytes of bf16 travel. The backward pass is that of a call without fp8; see `Fp8`.
        alibi_slopes: fp32 [Hq] or [B, Hq], the same on every rank (their values are not compared): scores get
            -slope * distance added, after the softcap, by global position. They get no gradient.
        dropout_p: share of the probabilities that are dropped; the others are scaled by 1 / (1 - p). What is dropped
            depends on the seed, the batch row, the head and both positions alone: not on the layout, the world, the
            transport or the implementation. lse stays that of the whole softmax.
        dropout_seed: an integer in [0, 2**64), the same on every rank. None: drawn from torch's default generator (the
            CPU's), which torch.manual_seed must have set alike on all ranks: they compare, so agree=False wants a seed.
            Its backward pass drops the same, and so does a checkpoint's recomputation: one that would not, with
            preserve_rng_state=False or a seed that has changed, is refused. Only a seed or dropout_p of the
            caller's that a reentrant checkpoint finds changed goes unnoticed.
        agree: compare the call between the ranks first, and watch over them. An Agreement, for another timeout than
            300 s. False: neither; then shards that the layout does not deal evenly need a plan, and ranks that differ,
            die or stall are a hang or a crash.

    Returns:
        out [B, n, Hq, D] in q's dtype, or (out, lse fp32 [B, Hq, n]), or a Handle of either. Rows that see nothing have
        out 0 and lse -inf (with a sink, its logit).

    Raises:
        ValueError: an argument is wrong, here or on another rank, or ranks differ: raised on every rank before anything
            is sent; it names the argument, what was wanted and what came.
        Unsupported: no implementation, or not the named one, serves this call (a ValueError on the other ranks).
        RankFailed: another rank died, or did not come in time, before the call or during its hops. On CUDA a call
            returns before its hops are done: the next call, `Handle.wait` or a backward pass raises it then, and what
            was computed since is worth nothing.
    """
    task = prepare(
        q, k, v, causal=causal, window=window, documents=documents, softcap=softcap, sink_logits=sink_logits,
        scale=scale, plan=plan, layout=layout, transport=transport, deterministic=deterministic, mask=mask, impl=impl,
        fp8=fp8, group=group, agree=agree, grad=wants_grad(q, k, v), alibi_slopes=alibi_slopes, dropout_p=dropout_p,
        dropout_seed=dropout_seed, return_lse=return_lse, async_op=async_op,
    )  # fmt: skip
    if not async_op:
        return _finish(task, q, k, v, None, sink_logits, return_lse)
    inputs = tuple(x.detach() for x in (q, k, v))  # shares the version counters
    started = task.lane.start(lambda: task.forward(*inputs), inputs)
    before = task.lane.latest() if task.lane.latest else None
    handle: Handle[Any] = Handle(
        started, (q, k, v), lambda result: _finish(task, q, k, v, result, sink_logits, return_lse), before
    )
    task.lane.latest = weakref.ref(handle)
    return handle


def prepare(
    q: Tensor, k: Tensor, v: Tensor, *, plan: Plan | None, group: Group, agree: bool | Agreement, **options: Any
) -> Task:
    """What there is to do in a call, once its arguments are found right and all ranks agree; see `ring_attention`.

    Args:
        options: the other arguments that `arguments.check` takes.

    Raises:
        ValueError, Unsupported, RankFailed: as `ring_attention`.
    """
    if not isinstance(agree, bool | Agreement):
        raise ValueError(f"agree: wanted True, False or an Agreement, got {agree!r}")
    group = plan.group if group is None and isinstance(plan, Plan) else group
    process_group, world, rank = members(group)
    gang = Gang.of(process_group)
    asked: Arguments | None = None
    error: Exception | None = None
    try:
        asked = arguments.check(
            q, k, v, plan=plan, world=world, rank=rank, axes=shards.axes(group), compared=agree is not False, **options
        )
    except Exception as wrong:  # whatever it is, the others must hear of it before it is raised here
        error = wrong
    lengths: tuple[int, ...] | None = None
    hosts: tuple[str, ...] = ()
    agreement: Agreement | None = None
    if world > 1 and agree is not False:
        agreement = gang.agreement() if agree is True else agree
        hosts = agreement.hosts
        lengths = agreement.agree(asked.signature(q, k) if asked else (), q.shape[1] if asked else 0, error)
    if asked is None:
        assert error is not None
        raise error
    plan = plan or _plan(asked, q, lengths or (q.shape[1],) * world, group)
    if plan.axes != asked.axes and asked.axes is not None:
        plan = on_axes(plan, asked.axes)
    if agreement is not None:
        watch = gang.watch(agreement)
        for part, ranks in parts(plan, group):
            watch.follow(part, ranks)
    heads = exchange(plan, q.shape[2], k.shape[2], q.device, group, hosts)
    transfer = _transport(asked, plan, k, heads, *ring_gang(plan, group, hosts))
    return Task(
        plan.ring, transfer, ring_ranks(plan), heads, gang.lane(q.device), asked, agreement, gang.number(),
        profiling.asked(),
    )  # fmt: skip


def release_buffers(group: Group = None) -> None:
    """Give back the memory that this group's calls have kept for the next one. Every rank of the group must call.

    Transports "pull" and "hierarchical" keep buffers, symmetric memory on GPUs, which torch's allocator does not know:
    as much as their longest call needed, a few shards of keys and values. They grow with calls and do not shrink, so
    after a call with 1M tokens this may give back gigabytes. Waits for what is under way; the next call makes its own
    buffers. Those in a CUDA graph stay.

    Args:
        group: a process group, a DeviceMesh, or None for the default group. The calls' own: buffers are kept by group.

    Raises:
        ValueError: not a group, or this rank is not in it; or another rank calls something else, on every rank.
        RuntimeError: within a CUDA graph capture; a ValueError on the other ranks.
        RankFailed: a rank does not come within the group's Agreement's timeout, or dies.
    """
    process_group, world, rank = members(group)
    if world == 1:
        return
    error = None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        error = RuntimeError("release_buffers: wanted no CUDA graph capture under way, got one")
    gang, axes = Gang.of(process_group), shards.axes(group)
    agreement = gang.agreement()
    agreement.agree((("call", "release_buffers"),), 0, error)
    gang.settle()  # on a mesh, calls run in the lane of all its ranks, their hops in the group along one axis
    with _together(agreement), numbered(range(world) if axes is None else axes.ring_peers(rank)):
        hop_gang(group).release_buffers()


@contextmanager
def _together(agreement: Agreement | None) -> Iterator[None]:
    """What all ranks do at once: an error in here leaves messages under way, so the other ranks are told."""
    try:
        yield
        if agreement is not None:
            agreement.check()  # what was waited for may have been given up meanwhile
    except BaseException as error:
        failure = None if agreement is None else agreement.abandon(error)
        if failure is None or failure is error or not isinstance(error, Exception):
            raise
        raise failure from error


@dataclass(frozen=True, eq=False)
class Task:
    """One call's work, forward and backward, on whatever thread or stream runs it."""

    plan: Plan  # of the ring axis, on a mesh
    transport: Transport
    ranks: Sequence[int]  # of the group, by their number on the ring
    heads: Heads | None  # traded before and after the hops
    lane: Lane
    asked: Arguments
    agreement: Agreement | None
    number: int  # of the call, among the group's: backward passes of different calls must not meet
    named: bool  # hops get NVTX ranges; kept, because autograd's thread does not know the caller's context

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        """out in q's dtype and lse, over all hops; where heads were traded, also the q, k, v and lse computed with."""
        with _together(self.agreement):
            if self.heads is None:
                return self._forward(q, k, v, fp8=self.asked.fp8)
            with self._range("forward heads out"):
                qkv = self.heads.spread(q, k, v)
            with numbered(self.ranks):
                out, lse = self._forward(*qkv, fp8=self.asked.fp8)
            with self._range("forward heads home"):
                return (*self.heads.home(out, lse), *((*qkv, lse) if self.asked.grad else ()))

    def backward(self, *saved: Tensor, dout: Tensor | None, dlse: Tensor | None) -> Tensors:
        """dq, dk, dv in q's dtype, for what autograd saved: this rank's out, q, k, v, lse as computed with, a seed."""
        out, q, k, v, lse, *seed = saved
        error = places.changed(self.asked.dropout, seed)
        if self.agreement is not None:
            self.agreement.agree(((BACKWARD, self.number),), 0, error)
        if error is not None:
            raise error
        with _together(self.agreement):
            if self.asked.fp8 is not None and self.asked.fp8.gradients == "exact":
                out, lse = self._recomputed(q, k, v)
            dout = torch.zeros_like(out) if dout is None else dout if is_aligned(dout) else dout.contiguous()
            delta = row_delta(dout, out, dlse)
            if self.heads is None:
                return tuple(x.to(out.dtype) for x in self._backward(q, k, v, lse, dout, delta))
            with self._range("backward heads out"):
                dout, delta = self.heads.spread_gradients(dout, delta)
            with numbered(self.ranks):
                gradients = self._backward(q, k, v, lse, dout, delta)
            with self._range("backward heads home"):
                return self.heads.home_gradients(*gradients, out.dtype)

    def _recomputed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out of this rank's rows and lse as computed with, from q, k and v as computed with, without fp8."""
        with numbered(self.ranks):
            out, lse = self._forward(q, k, v, fp8=None)
        return (out if self.heads is None else self.heads.home(out, lse)[0]), lse

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, *, fp8: Fp8 | None) -> tuple[Tensor, Tensor]:
        asked, state = self.asked, None
        left = len(self.plan.hops)
        queries: Tensor | Quantized
        rotation: Iterator[tuple[Hop, tuple[Any, ...]]]
        if fp8 is None:
            queries, rotation = q, self.transport.rotate((k, v), self.plan)
        else:
            queries, rotation = quantized_hops(self.transport, self.plan, q, k, v, fp8, asked.v_order)
        for hop, (k_hop, v_hop) in rotation:
            left -= 1
            with self._range("forward", hop):
                state = attend(
                    queries, k_hop, v_hop, hop.visible, scale=asked.scale, softcap=asked.softcap, into=state,
                    out_dtype=None if left else q.dtype, impl=asked.impl, **self._places(hop),
                )  # fmt: skip
        state = Partial.empty(q, q.dtype) if state is None else state
        return state.out, state.lse

    def _backward(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, dout: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients are fp32 from hop to hop, unless nothing has to be added to them."""
        asked = self.asked
        through = asked.fp8 if asked.fp8 is not None and asked.fp8.gradients == "rounded" else None
        if through is not None:
            q, k, v = rounded(q, k, v, through)
        narrow = self.plan.world == 1 and not (self.heads is not None and self.heads.mine.shared)
        dq = torch.empty(q.shape, dtype=q.dtype if narrow else state_dtype(q.dtype), device=q.device)
        first = True
        rotation = self.transport.rotate_backward((k, v), self.plan)
        for hop, (k_hop, v_hop), (dk, dv) in rotation:
            with self._range("backward", hop):
                attend_backward(
                    dout, q, k_hop, v_hop, lse, delta, hop.visible, dq=dq, dk=dk, dv=dv, accumulate=not first,
                    scale=asked.scale, softcap=asked.softcap, deterministic=asked.deterministic, impl=asked.impl,
                    **self._places(hop),
                )  # fmt: skip
            first = False
        if first:
            dq.zero_()
        dk, dv = rotation.home()
        if through is not None:
            dq, dk = rotated_back(dq, through), rotated_back(dk, through)
        return dq, dk, dv

    def _places(self, hop: Hop) -> dict[str, Any]:
        """What the kernels are told of global positions, where something depends on them."""
        heads = None if self.heads is None else self.heads.mine.q
        return places.options(self.plan, hop, self.asked.alibi, self.asked.dropout, heads)

    def _range(self, name: str, hop: Hop | None = None) -> AbstractContextManager[None]:
        """A range in a profile, of a hop or of what has this name, where one was asked for."""
        if not self.named:
            return nullcontext()
        if hop is not None:
            sources = [each.source for each in self.plan.hops]
            number, hops = sources.index(hop.source) + 1, len(sources)
            name = f"{name} hop {number} of {hops}, keys of rank {self.ranks[hop.source]}"
        return profiling.span(f"ringfa3 {name}")


class _RingAttention(torch.autograd.Function):
    """The task as one differentiable operation; `result` is its forward's, where that was started before."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, task: Task, result: Tensors | None) -> Tensors:
        out, lse, *computed_with = result or task.lane.run(lambda: task.forward(q, k, v))
        ctx.task = task
        ctx.save_for_backward(out, *(computed_with or (q, k, v, lse)), *places.kept(task.asked.dropout))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        task, saved = ctx.task, ctx.saved_tensors
        dq, dk, dv = task.lane.run(lambda: task.backward(*saved, dout=dout, dlse=dlse))
        return dq, dk, dv, None, None


def _finish(
    task: Task, q: Tensor, k: Tensor, v: Tensor, result: Tensors | None, sinks: Tensor | None, return_lse: bool
) -> Tensor | Tensors:
    """What the caller gets, from the result of the hops (None: run them now)."""
    if task.agreement is not None:
        task.agreement.check()  # what was queued before the gang failed is worth nothing
    out, lse = _RingAttention.apply(q, k, v, task, result)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _plan(asked: Arguments, q: Tensor, lengths: tuple[int, ...], group: Group) -> Plan:
    """The plan for shards of these lengths.

    Raises:
        ValueError: the layout deals the sequence otherwise, or the mask does not fit its length.
    """
    made = plan_for(asked.mask, asked.layout, sum(lengths), group, device=q.device, axes=asked.axes)
    if made.lengths != lengths:
        name = sliced(asked.layout, asked.axes).name
        raise ValueError(
            f"q: wanted the {name} layout's shards of {sum(lengths)} rows, {list(made.lengths)} by rank, "
            f"got {list(lengths)}"
        )
    return made


def _transport(
    asked: Arguments, plan: Plan, k: Tensor, heads: Heads | None, gang: Gang, hosts: tuple[str, ...]
) -> Transport:
    """The transport that was named, or the one for shards of this size: the same on every rank of the ring."""
    if plan.axes is not None and plan.ring.world == 1:
        return Alone(shared=heads is not None and heads.mine.shared)
    kv_heads = k.shape[2] if heads is None else heads.mine.kv.stop - heads.mine.kv.start
    size = 2 * max(plan.ring.kv_lengths) * k.shape[0] * kv_heads * k.shape[3] * k.element_size()
    return choose(asked.transport, plan.ring, size, k.device, gang, hosts)
