"""What torch.compile, torch.export and FakeTensor see of this package: its operators in torch.library.

An operator takes tensors, numbers and names alone. A process group is found by its name, a plan by its number, and what
a backward pass needs of its forward pass by a ticket, a tensor on the CPU that stands for it. All of it happens when
compiled code runs: arguments are checked, and ranks agree, in every call as without a compiler.

    ringfa3::attend             attention on one device, for `ringfa3.flash_attn`
    ringfa3::ring_attention     of one rank, for `ring_attention`

and their derivatives, named so with _backward. None is to be called by hand: eager code goes a shorter way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, islice
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from ringfa3.attention import Task, prepare
from ringfa3.entrance import NO_VMAP
from ringfa3.flash_attn.recent import Recent
from ringfa3.lane import Tensors
from ringfa3.plan import Plan
from ringfa3_kernels import Visible, attend, attend_backward, row_delta
from ringfa3_kernels.door import state_dtype

QKV = "Tensor q, Tensor k, Tensor v"
SAVED = f"Tensor? dout, Tensor? dlse, {QKV}, Tensor out, Tensor lse"
SEEN = "Tensor? lo, Tensor? hi, str kind, float? scale, float softcap, bool deterministic"
ASKED = (
    "Tensor? sink_logits, Tensor? documents, SymInt[]? lengths, SymInt[]? per_row, bool? causal, SymInt[]? window, "
    "float? scale, float softcap, SymInt? plan, str group, str? layout, str transport, bool deterministic, str impl, "
    "bool agree, bool grad"
)
GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv)"


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    kind: str,
    scale: float | None,
    softcap: float,
    deterministic: bool,
) -> Tensors:
    """out in q's dtype and lse; lo and hi None where kind says them: "full" or "causal"."""
    visible = _visible(q, k, lo, hi, kind)
    partial = attend(q, k, v, visible, scale=scale, softcap=softcap, out_dtype=q.dtype)
    return _owned(partial.out, partial.lse)


def _attend_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    kind: str,
    scale: float | None,
    softcap: float,
    deterministic: bool,
) -> Tensors:
    """dq, dk, dv of `_attend`."""
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    attend_backward(
        dout, q, k, v, lse, row_delta(dout, out, dlse), _visible(q, k, lo, hi, kind), dq=dq, dk=dk, dv=dv,
        accumulate=False, scale=scale, softcap=softcap, deterministic=deterministic,
    )  # fmt: skip
    return dq, dk, dv


def _visible(q: Tensor, k: Tensor, lo: Tensor | None, hi: Tensor | None, kind: str) -> Visible:
    """What rows see. Bounds in tensors are read anew each time: compiled code may write others to their memory."""
    if lo is not None and hi is not None:
        return Visible(lo, hi)
    sizes = q.shape[1], k.shape[1], q.device
    make = Visible.full if kind == "full" else Visible.causal
    return _RECENT.get((), (kind, *sizes), q.device, lambda: make(*sizes))


def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    documents: Tensor | None,
    lengths: Sequence[int] | None,
    per_row: Sequence[int] | None,
    causal: bool | None,
    window: Sequence[int] | None,
    scale: float | None,
    softcap: float,
    plan: int | None,
    group: str,
    layout: str | None,
    transport: str,
    deterministic: bool,
    impl: str,
    agree: bool,
    grad: bool,
) -> Tensors:
    """out in q's dtype and lse, without the sinks; a ticket for the backward pass.

    Args:
        sink_logits: to be checked.
        lengths: of documents; where they differ between batch rows, `per_row` of them are a row's.
        group: its name; "": the plan's, or all ranks.
        grad: a backward pass may follow.
        others: as `ring_attention`'s.
    """
    task = prepare(
        q, k, v, causal=causal, window=None if window is None else tuple(window),
        documents=_documents(lengths, per_row) if documents is None else documents, softcap=softcap,
        sink_logits=sink_logits, scale=scale, plan=None if plan is None else Plan.by_key(plan), layout=layout,
        transport=transport, deterministic=deterministic, mask=None, impl=impl, fp8=None, agree=agree, grad=grad,
        group=_group(group),
    )  # fmt: skip
    out, lse, *computed_with = task.lane.run(lambda: task.forward(q, k, v))
    return *_owned(out, lse), _Task.ticket(task, computed_with)


def _ring_attention_backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ticket: Tensor
) -> Tensors:
    """dq, dk, dv of the call that the ticket is of."""
    held = _Task.of(ticket)
    saved = held.computed_with or (q, k, v, lse)
    return _owned(*held.task.lane.run(lambda: held.task.backward(out, *saved, dout=dout, dlse=dlse)))


class _Task(np.ndarray[Any, np.dtype[np.int64]]):
    """The memory of a ticket, and what that stands for: a task lives as long as a tensor has this memory.

    A ticket reads as next to nothing, its number times the smallest fp64: results of equal calls compare equal so.
    """

    task: Task
    computed_with: Sequence[Tensor]  # where heads were traded

    @classmethod
    def ticket(cls, task: Task, computed_with: Sequence[Tensor]) -> Tensor:
        """A ticket for this task: fp64 [1] on the CPU."""
        number = next(_NUMBERS)
        held = np.array([number]).view(cls)
        held.task, held.computed_with = task, computed_with
        if task.asked.grad:
            _HELD[number] = held
        return torch.from_numpy(held).view(torch.float64)

    @staticmethod
    def of(ticket: Tensor) -> _Task:
        """What `ticket` was given.

        Raises:
            RuntimeError: it is a copy, and the ticket is gone.
        """
        held = _HELD.get(int(ticket.view(torch.int64)))
        if held is None:
            raise RuntimeError("ring_attention: wanted its forward pass's ticket in a backward pass, got a copy of it")
        return held


_NUMBERS = count()
_HELD: WeakValueDictionary[int, _Task] = WeakValueDictionary()
_RECENT: Recent[Visible] = Recent()


def _group(name: str) -> dist.ProcessGroup | None:
    """The group of this name, as torch's own compiled collectives find theirs."""
    find: Any = c10d._resolve_process_group  # type: ignore[attr-defined]
    found: dist.ProcessGroup | None = find(name) if name else None
    return found


def _documents(lengths: Sequence[int] | None, per_row: Sequence[int] | None) -> Any:
    """Lengths of documents as `Mask` has them."""
    if lengths is None or per_row is None:
        return None if lengths is None else tuple(lengths)
    rest = iter(lengths)
    return tuple(tuple(islice(rest, number)) for number in per_row)


def _owned(*results: Tensor) -> Tensors:
    """Results that are contiguous and have their memory to themselves, as compiled code takes it."""
    alone = (x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in results)
    return tuple(
        x if kept else x.clone(memory_format=torch.contiguous_format) for x, kept in zip(results, alone, strict=True)
    )


def _out_and_lse(q: Tensor) -> Tensors:
    B, n, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, n, dtype=state_dtype(q.dtype))


def _gradients(dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensors:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    """Keep what the derivative of either operator takes."""
    q, k, v, *options = inputs
    out, lse, *ticket = output
    kept = ticket or options[:2]  # lo and hi
    ctx.options = () if ticket else options[2:]
    ctx.inputs = len(inputs)
    ctx.save_for_backward(q, k, v, out, lse, *kept)
    ctx.set_materialize_grads(False)


def _derivative(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = getattr(torch.ops.ringfa3, name)(dout, dlse, *ctx.saved_tensors, *ctx.options)
        return *gradients, *(None,) * (ctx.inputs - 3)

    return backward


def _refuse_vmap(*_: Any) -> NoReturn:
    raise NotImplementedError(NO_VMAP)


_LIBRARY = torch.library.Library("ringfa3", "DEF")


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag) -> None:
    """An operator with its kernel for every device."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ringfa3::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"ringfa3::{name}", _refuse_vmap, lib=_LIBRARY)


def _differentiate(name: str) -> None:
    torch.library.register_autograd(
        f"ringfa3::{name}", _derivative(f"{name}_backward"), setup_context=_save, lib=_LIBRARY
    )


_register("attend", f"({QKV}, {SEEN}) -> (Tensor out, Tensor lse)", _attend, lambda q, *_: _out_and_lse(q))
_register("attend_backward", f"({SAVED}, {SEEN}) -> {GRADIENTS}", _attend_backward, _gradients)
_differentiate("attend")
# ranks agree on the host, in every call: a CUDA graph cannot hold that
_register(
    "ring_attention",
    f"({QKV}, {ASKED}) -> (Tensor out, Tensor lse, Tensor ticket)",
    _ring_attention,
    lambda q, *_: (*_out_and_lse(q), torch.empty(1, dtype=torch.float64, device="cpu")),
    torch.Tag.cudagraph_unsafe,
)
_register(
    "ring_attention_backward",
    f"({SAVED}, Tensor ticket) -> {GRADIENTS}",
    _ring_attention_backward,
    _gradients,
    torch.Tag.cudagraph_unsafe,
)
_differentiate("ring_attention")
