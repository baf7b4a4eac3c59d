"""Attention on one device as one differentiable operation, and flash-attn's options in this package's words."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringfa3.entrance import autocasted, checked_flag, plain, sharded, traced
from ringfa3.places import changed, kept
from ringfa3_kernels import Unsupported, Visible, attend, attend_backward, row_delta


def sides(window_size: Any, causal: bool) -> tuple[int, int]:
    """How far a row sees to its left and right, -1 where nothing ends its view.

    Args:
        window_size: (left, right), inclusive, as flash-attn has it: (-1, -1) is unlimited, and causal=True hides what
            is to the right whatever `right` says.

    Raises:
        ValueError: not two integers of at least -1, or causal is not a bool.
    """
    causal = checked_flag("causal", causal)
    try:
        left, right = (operator.index(side) for side in window_size)
    except (TypeError, ValueError):
        raise ValueError(f"window_size: wanted (left, right), two integers, got {window_size!r}") from None
    if left < -1 or right < -1:
        raise ValueError(f"window_size: wanted -1 (unlimited) or more on either side, got {window_size!r}")
    return left, 0 if causal else right


def check_shapes(shape: str, **tensors: Tensor) -> None:
    """Raise ValueError unless these are tensors of as many dimensions as the shape, "[B, S, H, D]", has.

    Sizes and dtypes are checked where they are used, in `ringfa3_kernels`.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: wanted a Tensor {shape}, got {type(x).__name__}")
        if x.ndim != shape.count(",") + 1:
            raise ValueError(f"{name}: wanted {shape}, got shape {list(x.shape)}")


def unpacked(shape: str, parts: int, **packed: Tensor) -> tuple[Tensor, ...]:
    """The parts of a packed tensor, views along the dimension before heads; their gradients are stacked once.

    Raises:
        ValueError: it is not of that shape.
    """
    check_shapes(shape, **packed)
    ((name, x),) = packed.items()
    if x.shape[-3] != parts:
        raise ValueError(f"{name}: wanted {shape}, got shape {list(x.shape)}")
    return x.unbind(-3)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    places: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, Hq, D] in q's dtype and lse fp32 [B, Hq, Sq], both differentiable.

    Args:
        q, k, v, visible, softcap: as `ringfa3_kernels.attend`; but any head_dim up to 256: it is padded. Under autocast
            q, k and v are cast to its dtype.
        softmax_scale: None: D ** -0.5.
        places: `attend`'s positions, alibi and dropout, where they are wanted: see `places.options`.

    Raises:
        ValueError, Unsupported: as `ringfa3_kernels.attend`.
    """
    deterministic = checked_flag("deterministic", deterministic)
    compiled = False
    if not plain(q, k, v):
        if sharded(q, k, v):
            raise ValueError("q: wanted tensors of one device, got DTensors, which ring_attention takes")
        q, k, v = autocasted(q, k, v)
        compiled = traced(q, k, v)
    D = q.shape[-1]
    missing = -D % 8
    if missing and softmax_scale is None:
        softmax_scale = D**-0.5
    if missing:  # zeros add nothing to a score, and their columns of out are cut off
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    if compiled:
        if places:
            raise Unsupported("places: wanted no dropout_p and no alibi_slopes of fake tensors, got some")
        bounds = (visible.lo, visible.hi) if visible.kind == "intervals" else (None, None)
        options = softmax_scale, softcap, deterministic
        out, lse = torch.ops.ringfa3.attend(q, k, v, *bounds, visible.kind, *options)
    else:
        out, lse = _Attention.apply(q, k, v, visible, softmax_scale, softcap, deterministic, places or {})
    return (out[..., :D] if missing else out), lse


class _Attention(torch.autograd.Function):
    """`attend` and its derivative `attend_backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Visible,
        scale: float | None,
        softcap: float,
        deterministic: bool,
        places: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        partial = attend(q, k, v, visible, scale=scale, softcap=softcap, out_dtype=q.dtype, **places)
        ctx.visible, ctx.deterministic = visible, deterministic
        ctx.options = {"scale": scale, "softcap": softcap, **places}
        ctx.save_for_backward(q, k, v, partial.out, partial.lse, *kept(places.get("dropout")))
        ctx.set_materialize_grads(False)
        return partial.out, partial.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *seed = ctx.saved_tensors
        if (error := changed(ctx.options.get("dropout"), seed)) is not None:
            raise error
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = row_delta(dout, out, dlse)
        attend_backward(
            dout, q, k, v, lse, delta, ctx.visible, dq=dq, dk=dk, dv=dv, accumulate=False,
            deterministic=ctx.deterministic, **ctx.options,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None, None
