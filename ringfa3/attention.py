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

from ringfa3 import arguments, profiling
from ringfa3.agree import Agreement
from ringfa3.arguments import Arguments
from ringfa3.gang import Gang
from ringfa3.handle import Handle
from ringfa3.lane import Lane, Tensors
from ringfa3.layout import Layout
from ringfa3.mask import Mask
from ringfa3.plan import Hop, Plan
from ringfa3.plan import plan as plan_for
from ringfa3.shards import Group, members
from ringfa3.transport import Gather, Ring, Transport, Wire
from ringfa3_kernels import Partial, attend, attend_backward, row_delta
from ringfa3_kernels.door import state_dtype

GATHER_BYTES = 64 << 10  # of a rank's K and V: below, one exchange beats a round a rank (docs/decisions.md)


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
    agree: bool | Agreement = True,
) -> Any:
    """Attention of this rank's queries over the keys of all ranks; every rank of the group must call.

    Args:
        q: [B, n, Hq, D] bf16, fp16 or fp32: this rank's rows of the sequence, as the layout deals them (`shard`). n may
            differ between ranks and may be 0.
        k, v: [B, n, Hkv, D], q's dtype and device; Hq a multiple of Hkv. Another n with a plan for cross attention.
        causal, window, documents: who sees what, by global position; see `Mask`; causal by default. Or `mask`, a Mask
            that says it all.
        softcap: where not 0, scores become softcap * tanh(score / softcap).
        sink_logits: [Hq], learnable: every row's softmax has one more score, whose value is 0. A replicated parameter:
            its gradient here is this rank's rows' share, to be summed over the ranks like any other parameter's.
        scale: factor on q.k; None: D ** -0.5.
        plan: what `plan` made for this mask, layout and length; it says these itself, so leave them alone.
        group: a ProcessGroup or a 1-D DeviceMesh; None: the plan's, or all ranks (one, without torch.distributed).
        layout: how the sequence was dealt: "zigzag" (default), "contiguous", "striped", "balanced" or a Layout.
        transport: "ring", "gather", or "auto": gather where a rank's keys and values are below 64 KiB, else ring.
        deterministic: gradients bitwise equal from run to run, at some cost.
        return_lse: also return the log-sum-exp of every row; differentiable. It includes the sink.
        async_op: return a `Handle` at once; its wait() gives the result. Calls of one group run in the order in which
            they were made, on every rank the same; so do their backward passes (ValueError where ranks differ).
        impl: implementation of the kernels; see `ringfa3_kernels.attend`.
        agree: compare the call between the ranks first. An Agreement, for another timeout than 300 s. False: not at
            all; then shards that the layout does not deal evenly need a plan, and ranks that differ hang or crash.

    Returns:
        out [B, n, Hq, D] in q's dtype, or (out, lse fp32 [B, Hq, n]), or a Handle of either. Rows that see nothing have
        out 0 and lse -inf (with a sink, its logit).

    Raises:
        ValueError: an argument is wrong, here or on another rank, or ranks differ: raised on every rank before anything
            is sent; it names the argument, what was wanted and what came.
        Unsupported: no implementation, or not the named one, serves this call (a ValueError on the other ranks).
        RankFailed: another rank died, or did not come: before the call within the agreement's timeout, during its hops
            within the process group's.
    """
    if not isinstance(agree, bool | Agreement):
        raise ValueError(f"agree: wanted True, False or an Agreement, got {agree!r}")
    process_group, world, rank = members(plan.group if group is None and isinstance(plan, Plan) else group)
    gang = Gang.of(process_group)
    asked: Arguments | None = None
    error: Exception | None = None
    try:
        asked = arguments.check(
            q, k, v, causal=causal, window=window, documents=documents, softcap=softcap, sink_logits=sink_logits,
            scale=scale, plan=plan, layout=layout, transport=transport, deterministic=deterministic, mask=mask,
            impl=impl, world=world, rank=rank,
        )  # fmt: skip
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
    plan = plan or _plan(asked, q, lengths or (q.shape[1],) * world, process_group)
    transfer = _transport(asked, plan, k, gang.wire(q.device, hosts))
    task = _Task(plan, transfer, gang.lane(q.device), asked, agreement, gang.number(), profiling.asked())
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


@dataclass(frozen=True, eq=False)
class _Task:
    """One call's work, forward and backward, on whatever thread or stream runs it."""

    plan: Plan
    transport: Transport
    lane: Lane
    asked: Arguments
    agreement: Agreement | None
    number: int  # of the call, among the group's: backward passes of different calls must not meet
    named: bool  # hops get NVTX ranges; kept, because autograd's thread does not know the caller's context

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        """out in q's dtype and lse, over all hops."""
        with self._whole():
            return self._forward(q, k, v)

    def backward(self, *saved: Tensor, dout: Tensor | None, dlse: Tensor | None) -> Tensors:
        """dq, dk, dv in q's dtype, for what autograd saved: q, k, v, out, lse."""
        if self.agreement is not None:
            self.agreement.agree((("call whose backward pass this is", self.number),), 0)
        q, k, v, out, lse = saved
        with self._whole():
            return self._backward(q, k, v, out, lse, dout, dlse)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """An error in here leaves messages under way: tell the other ranks."""
        try:
            yield
        except BaseException:
            if self.agreement is not None:
                self.agreement.abandon()
            raise

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        asked, state = self.asked, None
        left = len(self.plan.hops)
        for hop, (k_hop, v_hop) in self.transport.rotate((k, v), self.plan):
            left -= 1
            with self._range("forward", hop):
                state = attend(
                    q, k_hop, v_hop, hop.visible, scale=asked.scale, softcap=asked.softcap, into=state,
                    out_dtype=None if left else q.dtype, impl=asked.impl,
                )  # fmt: skip
        state = Partial.empty(q, q.dtype) if state is None else state
        return state.out, state.lse

    def _backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None
    ) -> Tensors:
        """The gradients are fp32 from hop to hop, unless nothing has to be added to them."""
        asked = self.asked
        dout = torch.zeros_like(out) if dout is None else dout
        delta = row_delta(dout, out, dlse)
        dq = torch.empty(q.shape, dtype=q.dtype if self.plan.world == 1 else state_dtype(q.dtype), device=q.device)
        first = True
        rotation = self.transport.rotate_backward((k, v), self.plan)
        for hop, (k_hop, v_hop), (dk, dv) in rotation:
            with self._range("backward", hop):
                attend_backward(
                    dout, q, k_hop, v_hop, lse, delta, hop.visible, dq=dq, dk=dk, dv=dv, accumulate=not first,
                    scale=asked.scale, softcap=asked.softcap, deterministic=asked.deterministic, impl=asked.impl,
                )  # fmt: skip
            first = False
        if first:
            dq.zero_()
        return tuple(x.to(q.dtype) for x in (dq, *rotation.home()))

    def _range(self, direction: str, hop: Hop) -> AbstractContextManager[None]:
        """A hop's range in a profile, where one was asked for."""
        if not self.named:
            return nullcontext()
        number, hops = self.plan.hops.index(hop) + 1, len(self.plan.hops)
        return profiling.span(f"ringfa3 {direction} hop {number} of {hops}, keys of rank {hop.source}")


class _RingAttention(torch.autograd.Function):
    """The task as one differentiable operation; `result` is its forward's, where that was started before."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, task: _Task, result: Tensors | None) -> Tensors:
        out, lse = result or task.lane.run(lambda: task.forward(q, k, v))
        ctx.task = task
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        task, saved = ctx.task, ctx.saved_tensors
        dq, dk, dv = task.lane.run(lambda: task.backward(*saved, dout=dout, dlse=dlse))
        return dq, dk, dv, None, None


def _finish(
    task: _Task, q: Tensor, k: Tensor, v: Tensor, result: Tensors | None, sinks: Tensor | None, return_lse: bool
) -> Tensor | Tensors:
    """What the caller gets, from the result of the hops (None: run them now)."""
    out, lse = _RingAttention.apply(q, k, v, task, result)
    if sinks is not None:
        with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = (out * torch.exp(lse - with_sink).transpose(1, 2)[..., None]).to(q.dtype)
        lse = with_sink
    return (out, lse) if return_lse else out


def _plan(asked: Arguments, q: Tensor, lengths: tuple[int, ...], group: Group) -> Plan:
    """The plan for shards of these lengths.

    Raises:
        ValueError: the layout deals the sequence otherwise, or the mask does not fit its length.
    """
    made = plan_for(asked.mask, asked.layout, sum(lengths), group, device=q.device)
    if made.lengths != lengths:
        raise ValueError(
            f"q: wanted the {asked.layout.name} layout's shards of {sum(lengths)} rows, {list(made.lengths)} by rank, "
            f"got {list(lengths)}"
        )
    return made


def _transport(asked: Arguments, plan: Plan, k: Tensor, wire: Wire) -> Transport:
    """The transport that was named, or the one for shards of this size: the same on every rank."""
    name = asked.transport
    if name == "auto":
        size = 2 * max(plan.kv_lengths) * k.shape[0] * k.shape[2] * k.shape[3] * k.element_size()
        name = "gather" if size < GATHER_BYTES else "ring"
    return Gather(wire) if name == "gather" else Ring(wire)
