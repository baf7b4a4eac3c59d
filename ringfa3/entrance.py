"""What comes before a call at the public doors: DTensors are opened, autocast casts, compilers get an operator.

A plain tensor of eager mode passes with a few comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.device_mesh import DeviceMesh

from ringfa3.plan import Plan
from ringfa3.shards import Group
from ringfa3.sinks import with_sinks
from ringfa3_kernels import Unsupported

Function = TypeVar("Function", bound=Callable[..., Any])

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts
NO_VMAP = "ring_attention: wanted tensors with a batch dimension of their own, got torch.vmap's, which is not served"


def entrance(function: Function) -> Function:
    """`ring_attention` as the world may call it: with DTensors, under autocast and from compiled code too."""

    @wraps(function)
    def enter(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        if plain(q, k, v) or not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
            return function(q, k, v, **options)
        if sharded(q, k, v):
            from ringfa3 import dtensors  # what it needs takes seconds to import, and is there by now

            return dtensors.call(enter, q, k, v, **options)
        q, k, v = autocasted(q, k, v)
        return _operator(q, k, v, **options) if traced(q, k, v) else function(q, k, v, **options)

    return cast(Function, enter)


def checked_flag(name: str, x: Any) -> bool:
    """An option that is on or off. As flash-attn's binding takes them: numpy's bools, 0 and 1 too, and no words.

    Raises:
        ValueError: it is none of these; names it.
    """
    if isinstance(x, bool | np.bool_) or (isinstance(x, int) and x in (0, 1)):
        return bool(x)
    raise ValueError(f"{name}: wanted True or False, got {x!r}")


def plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are tensors of eager mode, with nothing about them that would have to be seen to first."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and not torch.is_autocast_enabled(q.device.type)
        and not torch._C._are_functorch_transforms_active()
    )


def sharded(*tensors: Tensor) -> bool:
    """Whether one of them is a DTensor."""
    if all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(x, DTensor) for x in tensors)


def autocasted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in autocast's dtype, where that is on, as torch's own attention casts them; differentiable."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.dtype in FLOATS and x.device.type == kind else x for x in tensors)


def traced(*tensors: Tensor) -> bool:
    """Whether a compiler is looking, which sees nothing of a call but operators.

    Raises:
        NotImplementedError: torch.vmap is.
    """
    if torch.compiler.is_compiling():
        return True
    if any(torch._C._functorch.is_batchedtensor(x) for x in tensors):
        raise NotImplementedError(NO_VMAP)
    return any(is_fake(x) for x in tensors)


def wants_grad(*tensors: Any) -> bool:
    """Whether autograd would record an operation on these; what is no tensor is found out later."""
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)


def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | None = None,
    window: tuple[int, int] | None = None,
    documents: Any = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    plan: Plan | None = None,
    group: Group = None,
    layout: Any = None,
    transport: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    async_op: bool = False,
    mask: Any = None,
    impl: str = "auto",
    agree: Any = True,
    **others: Any,
) -> Any:
    """`ring_attention` as an operator: its options in tensors, numbers and names.

    Raises:
        ValueError, Unsupported: an option is of a kind that compiled code cannot hold.
    """
    for name, given, kinds, wanted in (
        ("plan", plan, (Plan, type(None)), "a Plan"),
        ("layout", layout, (str, type(None)), "a name, or a plan that was made with it,"),
        ("mask", mask, (type(None),), "None, and a plan that was made with it,"),
        ("agree", agree, (bool,), "True or False"),
    ):
        if not isinstance(given, kinds):
            raise ValueError(f"{name}: wanted {wanted} under torch.compile, got {type(given).__name__}")
    deterministic, return_lse = checked_flag("deterministic", deterministic), checked_flag("return_lse", return_lse)
    if checked_flag("async_op", async_op):
        raise Unsupported("async_op: wanted False under torch.compile, which overlaps nothing with a call, got True")
    for name, given in others.items():
        if isinstance(given, Tensor) or given:
            raise Unsupported(f"{name}: wanted none under torch.compile, which does not serve it yet, got one")
    if torch.compiler._is_exporting_flag:  # is_exporting(), which torch 2.11 takes for true wherever it compiles
        _check_exported(plan, group)
    lengths, per_row = None, None
    if documents is not None and not isinstance(documents, Tensor):
        lengths, per_row = _flat(documents)
    out, lse, _ = torch.ops.ringfa3.ring_attention(
        q, k, v, None if sink_logits is None else sink_logits.detach(),
        documents if isinstance(documents, Tensor) else None, lengths, per_row, causal, window, scale, softcap,
        None if plan is None else plan.key, _name(group, plan), layout, transport, deterministic, impl, agree,
        wants_grad(q, k, v),
    )  # fmt: skip
    if sink_logits is not None:
        out, lse = with_sinks(out, lse, sink_logits)
    return (out, lse) if return_lse else out


def _flat(documents: Any) -> tuple[list[int], list[int] | None]:
    """Lengths of documents as one list, and how many of them are each batch row's where rows differ."""
    if not isinstance(documents, list | tuple):
        wanted = "lists of lengths or a Tensor under torch.compile"
        raise ValueError(f"documents: wanted {wanted}, got {type(documents).__name__}")
    if not documents or not isinstance(documents[0], list | tuple):
        return list(documents), None
    return [length for row in documents for length in row], [len(row) for row in documents]


def _name(group: Group, plan: Plan | None) -> str:
    """The name by which the group is found when the code runs; "" for the plan's, or all ranks.

    Raises:
        ValueError: it has none.
    """
    if group is None or (plan is not None and group is plan.group):
        return ""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError("group: wanted a plan beside a mesh of more axes under torch.compile, got none")
        group = group.get_group()
    return str(group.group_name)


def _check_exported(plan: Plan | None, group: Group) -> None:
    """Raise Unsupported for what means nothing in another process than this."""
    if plan is not None or group is not None:
        name = "group" if plan is None else "plan"
        raise Unsupported(f"{name}: wanted None under torch.export, as it means nothing in another process, got one")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise Unsupported(f"ring_attention: wanted one rank under torch.export, got a world of {dist.get_world_size()}")
