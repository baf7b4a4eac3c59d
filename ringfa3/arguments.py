"""What a call of `ring_attention` asks for, checked once, before anything is sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ringfa3.agree import Signature
from ringfa3.entrance import checked_flag
from ringfa3.fp8 import Fp8, check_fp8, served_order
from ringfa3.layout import Layout, resolve
from ringfa3.mask import Mask
from ringfa3.mesh import Axes, line
from ringfa3.places import check_alibi, check_dropout
from ringfa3.plan import Plan
from ringfa3.transport import choose
from ringfa3.ulysses import deal_heads
from ringfa3_kernels import Dropout, Partial, Unsupported, attend, attend_backward
from ringfa3_kernels.door import check_qkv, is_aligned, state_dtype
from ringfa3_kernels.quantized import Order


@dataclass(frozen=True)
class Arguments:
    """The checked arguments of one call on one rank, in one spelling: what was left to a default is filled in."""

    mask: Mask
    layout: Layout
    plan: Plan | None
    axes: Axes | None
    scale: float
    softcap: float
    transport: str
    deterministic: bool
    impl: str
    grad: bool
    sinks: bool
    fp8: Fp8 | None = None
    v_order: Order = "rows"  # of quantised values, as the implementation wants them
    alibi: Tensor | None = None
    dropout: Dropout | None = None

    def signature(self, q: Tensor, k: Tensor) -> Signature:
        """What must be equal on all ranks. The rest may differ: impl, return_lse, async_op."""
        return (
            ("batch", q.shape[0]),
            ("heads", q.shape[2]),
            ("kv_heads", k.shape[2]),
            ("head_dim", q.shape[3]),
            ("dtype", q.dtype),
            ("device", q.device.type),
            ("mask", self.mask),
            ("layout", self.layout),
            ("mesh", self.axes),
            ("plan", _of_plan(self.plan)),
            ("scale", self.scale),
            ("softcap", self.softcap),
            ("transport", self.transport),
            ("deterministic", self.deterministic),
            ("sink_logits given", self.sinks),
            ("gradients wanted", self.grad),
            ("fp8", repr(self.fp8)),  # Fp8(rotate=True) == Fp8(rotate=1), but they are not the same
            ("order of fp8 values", self.v_order),
            ("alibi_slopes", None if self.alibi is None else tuple(self.alibi.shape)),
            ("dropout_p", 0.0 if self.dropout is None else self.dropout.p),
            ("dropout_seed", None if self.dropout is None else self.dropout.seed),
        )


def _of_plan(plan: Plan | None) -> str:
    """Its lengths, the one thing that the other arguments do not say."""
    if plan is None:
        return "none"
    keys = "" if plan.kv_seqlen == plan.seqlen else f" and {plan.kv_seqlen} keys"
    return f"one of {plan.seqlen} positions{keys}"


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | None,
    window: tuple[int, int] | None,
    documents: Any,
    softcap: float,
    sink_logits: Tensor | None,
    scale: float | None,
    plan: Plan | None,
    layout: str | Layout | None,
    transport: str,
    deterministic: bool,
    mask: Mask | None,
    impl: str,
    grad: bool,
    fp8: Fp8 | None,
    world: int,
    rank: int,
    axes: Axes | None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    async_op: bool = False,
    compared: bool = True,
) -> Arguments:
    """The call's arguments, if they go together on this rank; see `ring_attention`.

    Args:
        grad: gradients are wanted.
        axes: of the group, where it is a mesh.
        compared: the ranks compare their calls.

    Raises:
        ValueError: an argument is wrong; names it, what was wanted and what came.
        Unsupported: the named implementation, or every one, lacks something this call needs.
    """
    check_qkv(q, k, v)
    if q.shape[2] == 0:
        raise ValueError("q: wanted at least one head, got 0")
    choose.check(transport)
    deterministic = checked_flag("deterministic", deterministic)
    for name, given in (("return_lse", return_lse), ("async_op", async_op)):
        checked_flag(name, given)
    alone = transport == "ulysses" and axes is None  # Ulysses over the whole group
    if plan is not None:
        _check_plan(plan, q, k, world, rank, axes, line(world) if alone else axes)
    elif k.shape[1] != q.shape[1]:
        raise ValueError(f"k: wanted q's {q.shape[1]} rows (cross attention takes a plan), got {k.shape[1]}")
    mask = _mask_of(causal, window, documents, mask, plan)
    if mask.batch not in (None, q.shape[0]):
        raise ValueError(f"documents: wanted lengths for q's {q.shape[0]} batch rows, got them for {mask.batch}")
    if plan is not None and layout is not None and resolve(layout, mask) != plan.layout:
        raise ValueError(f"layout: wanted the plan's {plan.layout}, or none beside plan, got {layout!r}")
    dealt = resolve(layout or ("contiguous" if alone else "zigzag"), mask) if plan is None else plan.layout
    if transport == "ulysses":
        axes = _ulysses(world, axes, plan, dealt)
    scale = q.shape[3] ** -0.5 if scale is None else _number("scale", scale)
    softcap = _number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap: wanted 0 (off) or a positive number, got {softcap}")
    if sink_logits is not None:
        _check_sinks(sink_logits, q)
    alibi = check_alibi(alibi_slopes, q)
    dropout = check_dropout(dropout_p, dropout_seed, compared=compared or world == 1)
    if fp8 is not None and not (alibi is None and dropout is None):
        raise Unsupported("fp8: wanted None beside alibi_slopes or dropout_p, which no kernel serves with it, got one")
    Hq, Hkv = q.shape[2], k.shape[2]
    if axes is not None:
        mine = deal_heads(Hq, Hkv, axes.ulysses)[axes.places[rank][0]]
        Hq, Hkv = mine.q.stop - mine.q.start, mine.kv.stop - mine.kv.start
    for backward in (False, True) if grad else (False,):
        shape = Hq, Hkv, q.shape[3]
        places = alibi is not None, dropout is not None
        _serves(*shape, q.dtype, q.device, softcap, impl, deterministic, backward, *places)
    if impl == "hopper":
        _check_aligned(q, k, v)
    v_order: Order = "rows"
    if fp8 is not None:
        check_fp8(q, fp8)
        made = (Hq, Hkv, q.shape[3], q.dtype, q.device)
        v_order = served_order(*made, softcap != 0, impl, fp8.block, fp8.rotate)
    return Arguments(
        mask,
        dealt,
        plan,
        axes,
        scale,
        softcap,
        transport,
        deterministic,
        impl,
        grad,
        sink_logits is not None,
        fp8,
        v_order,
        alibi,
        dropout,
    )


def _check_aligned(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise now what the named implementation would raise in the first hop, when the others wait."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_aligned(x):
            raise Unsupported(
                f"{name}: wanted rows at multiples of 16 bytes for impl='hopper', got strides {x.stride()}"
            )


def _mask_of(causal: bool | None, window: Any, documents: Any, mask: Mask | None, plan: Plan | None) -> Mask:
    """The mask, from the one place that says it."""
    given = "mask" if mask is not None else "plan" if plan is not None else ""
    if given:
        if mask is not None and not isinstance(mask, Mask):
            raise ValueError(f"mask: wanted a Mask, got {type(mask).__name__}")
        for name, value in (("causal", causal), ("window", window), ("documents", documents)):
            if value is not None:
                raise ValueError(f"{name}: wanted none beside {given}, which says it already, got {value!r}")
        if plan is not None and mask is not None and mask != plan.mask:
            raise ValueError(f"mask: wanted the plan's {plan.mask}, or none beside plan, got {mask}")
        return mask or plan.mask  # type: ignore[union-attr]  # one of them is given
    causal = True if causal is None else causal
    plain = isinstance(window, tuple) and {type(side) for side in window} == {
        int
    }  # 3.0 would be found where 3 was kept
    if (window is None or plain) and isinstance(documents, tuple | None):
        try:
            return _kept_mask(causal, window, documents)
        except TypeError:  # tuples of lists, which cannot be looked up
            pass
    return Mask(causal=causal, window=window, documents=documents)


@lru_cache(maxsize=64, typed=True)
def _kept_mask(causal: bool, window: Any, documents: Any) -> Mask:
    return Mask(causal=causal, window=window, documents=documents)


def _ulysses(world: int, axes: Axes | None, plan: Plan | None, layout: Layout) -> Axes:
    """Where transport="ulysses" puts the ranks: all of them on one axis."""
    if axes is None and layout != resolve("contiguous"):
        name = "layout" if plan is None else "plan"
        raise ValueError(f"{name}: wanted the layout 'contiguous' for transport='ulysses', got {layout}")
    if axes is not None and axes.ring > 1:
        raise ValueError(
            f"transport: wanted that of the ring axis, as the mesh has one of {axes.ring} ranks, got 'ulysses'"
        )
    return axes or line(world)


def _check_plan(plan: Plan, q: Tensor, k: Tensor, world: int, rank: int, *axes: Axes | None) -> None:
    """axes: those that the plan may be made for."""
    if not isinstance(plan, Plan):
        raise ValueError(f"plan: wanted a Plan, got {type(plan).__name__}")
    if (plan.world, plan.rank) != (world, rank):
        raise ValueError(f"plan: wanted one for rank {rank} of {world}, got one for rank {plan.rank} of {plan.world}")
    if plan.axes not in axes:
        wanted, got = (x or "a plain ring" for x in (axes[0], plan.axes))
        raise ValueError(f"plan: wanted one for {wanted}, as the group is, got one for {got}")
    for name, x, rows in (("q", q, plan.lengths[rank]), ("k", k, plan.kv_lengths[rank])):
        if x.shape[1] != rows:
            raise ValueError(f"{name}: wanted the plan's {rows} rows on rank {rank}, got {x.shape[1]}")
    if plan.device != q.device:
        raise ValueError(f"plan: wanted one on q's device {q.device}, got one on {plan.device}")


def _check_sinks(sinks: Tensor, q: Tensor) -> None:
    if not isinstance(sinks, Tensor) or sinks.shape != q.shape[2:3] or not sinks.is_floating_point():
        got = f"{sinks.dtype} {list(sinks.shape)}" if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"sink_logits: wanted a number per query head, floating point [{q.shape[2]}], got {got}")
    if sinks.device != q.device:
        raise ValueError(f"sink_logits: wanted q's device {q.device}, got {sinks.device}")


def _number(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        raise ValueError(f"{name}: wanted a finite number, got {x!r}")
    return float(x)


@lru_cache(maxsize=256)
def _serves(
    Hq: int,
    Hkv: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    softcap: float,
    impl: str,
    deterministic: bool,
    backward: bool,
    alibi: bool,
    dropout: bool,
) -> None:
    """Raise now what the kernels' door would raise for such a call: in mid-ring, others would be left waiting."""
    q = torch.empty(1, 0, Hq, D, dtype=dtype, device=device)
    k = torch.empty(1, 0, Hkv, D, dtype=dtype, device=device)
    places: dict[str, Any] = {"impl": impl}
    if alibi or dropout:
        nowhere = torch.empty(0, dtype=torch.int32, device=device)
        slopes = torch.empty(Hq, device=device) if alibi else None
        places |= {"positions": (nowhere, nowhere), "alibi": slopes, "dropout": Dropout(0.5, 0) if dropout else None}
    state = attend(q, k, k, softcap=softcap, **places)
    if not backward:
        attend(q, k, k, softcap=softcap, into=Partial.empty(q, state.out.dtype), out_dtype=dtype, **places)
        return
    dq, dk, dv = (torch.empty(x.shape, dtype=state_dtype(dtype), device=device) for x in (q, k, k))
    for accumulate in (False, True):
        attend_backward(
            q, q, k, k, state.lse, state.lse, dq=dq, dk=dk, dv=dv, accumulate=accumulate, softcap=softcap,
            deterministic=deterministic, **places,
        )  # fmt: skip
