"""The door: arguments are checked here, once, and handed to the implementation that serves the call."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ringfa3_kernels import dispatch, positional
from ringfa3_kernels.call import Call
from ringfa3_kernels.positional import Dropout, Positional
from ringfa3_kernels.quantized import Quantized
from ringfa3_kernels.types import Partial, Unsupported, Visible

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def attend(
    q: Tensor | Quantized,
    k: Tensor | Quantized,
    v: Tensor | Quantized,
    visible: Visible | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    into: Partial | None = None,
    out_dtype: torch.dtype | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    alibi: Tensor | None = None,
    dropout: Dropout | None = None,
    impl: str = "auto",
) -> Partial:
    """Attention of q over the visible keys, as a Partial that further shards of keys can continue.

    It records nothing for autograd: `attend_backward` is its derivative, and an autograd function joins the two.

    Args:
        q: [B, Sq, Hq, D] bf16, fp16, fp32 (fp64: reference and aten only); or fp8, all three from `quantize`.
        k, v: [B, Sk, Hkv, D], q's dtype and device; Hq a multiple of Hkv (GQA, MQA).
        visible: which keys each row sees; None: all of them.
        scale: factor on q.k before the softmax; None: D ** -0.5.
        softcap: where not 0, scores become softcap * tanh(score / softcap).
        into: a Partial over other keys (fp32 out). The softmax continues from it: its lse, and its out where out_dtype
            is fp32, are overwritten in place and are what is returned.
        out_dtype: dtype of the returned out: fp32 (default), or q's dtype where no hop follows. fp64 for fp64 inputs;
            any 16-bit dtype for fp8 inputs.
        positions: (q_pos, k_pos), int32 or int64 [Sq] or [B, Sq], and [Sk] or [B, Sk]: where rows and keys stand in the
            whole sequence, in [0, 2**31) (on a GPU the caller's promise). Wanted where alibi or dropout is given.
        alibi: fp32 [Hq] or [B, Hq], slopes: -slope * abs(q_pos - k_pos) is added to each score, after the softcap. They
            get no gradient.
        dropout: which probabilities are dropped, by position (see `Dropout`). lse stays that of the whole softmax.
        impl: "auto", or the name of one implementation, which then never falls back.

    Returns:
        Partial: out [B, Sq, Hq, D] in out_dtype, lse fp32 [B, Hq, Sq]; rows that saw no key have out 0 and lse -inf.

    Raises:
        ValueError: an argument is wrong; names it, what was wanted and what came.
        Unsupported: the named implementation (or, for "auto", every one) lacks something this call needs.
    """
    if isinstance(q, Quantized) or isinstance(k, Quantized) or isinstance(v, Quantized):
        from ringfa3_kernels import quantized_door  # here, because it uses this module's checks

        for name, given in (("alibi", alibi), ("dropout", dropout), ("positions", positions)):
            if given is not None:
                raise Unsupported(f"{name}: wanted None for fp8 q, k and v, which no kernel serves with it")
        return quantized_door.attend(
            q, k, v, visible, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype, impl=impl
        )
    check_qkv(q, k, v)
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.requires_grad:
                raise ValueError(
                    f"{name}: wanted no requires_grad outside torch.no_grad(), as attend records no gradient"
                )
    B, Sq, Hq, D = q.shape
    Sk = k.shape[1]
    visible = check_visible(visible, q, Sk)
    scale, softcap = check_scalars(scale, softcap, D)
    wide = state_dtype(q.dtype)
    out_dtype = wide if out_dtype is None else out_dtype
    if out_dtype not in (wide, q.dtype):
        raise ValueError(f"out_dtype: wanted {wide} or q's {q.dtype}, got {out_dtype}")
    check_into(into, (B, Sq, Hq, D), wide, q.device)
    places = positional.check(positions, alibi, dropout, q, k)
    call = _call("forward", q, k, v, visible, softcap, out_dtype, into=into is not None, places=places)
    chosen = dispatch.choose(call, impl)
    if Sk == 0 or q.numel() == 0:
        return Partial.empty(q, out_dtype) if into is None else Partial(into.out.to(out_dtype), into.lse)
    with own_precision(q):
        result: Partial = chosen.attend(
            q, k, v, visible, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype, **_given(places)
        )
    return result


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    visible: Visible | None = None,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    positions: tuple[Tensor, Tensor] | None = None,
    alibi: Tensor | None = None,
    dropout: Dropout | None = None,
    impl: str = "auto",
) -> None:
    """Add this shard's share of the gradients to dq, dk and dv, in place.

    Args:
        dout: [B, Sq, Hq, D], q's dtype.
        q, k, v, visible, scale, softcap, positions, alibi, dropout: as `attend` had them.
        lse: fp32 [B, Hq, Sq] of the finished softmax, over the keys of all shards.
        delta: fp32 [B, Hq, Sq] from `row_delta`.
        dq: [B, Sq, Hq, D]; dk, dv: [B, Sk, Hkv, D]; contiguous, fp32 (or, with accumulate=False, q's dtype).
        accumulate: add to what dq, dk and dv hold; False stores.
        deterministic: bitwise equal results from run to run, at some cost.

    Raises:
        ValueError, Unsupported: as `attend`. Unsupported for fp8 too: gradients take the tensors it was made from.
    """
    if any(isinstance(x, Quantized) for x in (dout, q, k, v)):
        raise Unsupported(
            "attend_backward reads no fp8: give it the 16-bit (or fp32) q, k and v that were quantised; "
            "it recomputes the scores from them"
        )
    check_qkv(q, k, v)
    B, Sq, Hq, D = q.shape
    visible = check_visible(visible, q, k.shape[1])
    scale, softcap = check_scalars(scale, softcap, D)
    wide = state_dtype(q.dtype)
    _like("dout", dout, q.shape, q.dtype, q.device)
    _like("lse", lse, (B, Hq, Sq), wide, q.device)
    _like("delta", delta, (B, Hq, Sq), wide, q.device)
    store = q.dtype if not accumulate and getattr(dq, "dtype", None) == q.dtype else wide
    for name, grad, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        _like(name, grad, like.shape, store, q.device)
        if not grad.is_contiguous():
            raise ValueError(f"{name}: wanted a contiguous tensor to write into, got strides {grad.stride()}")
    places = positional.check(positions, alibi, dropout, q, k)
    call = _call(
        "backward",
        q,
        k,
        v,
        visible,
        softcap,
        dq.dtype,
        accumulate=accumulate,
        deterministic=deterministic,
        others=(dout, dq, dk, dv),
        places=places,
    )
    chosen = dispatch.choose(call, impl)
    if k.shape[1] == 0 or q.numel() == 0:
        if not accumulate:
            for grad in (dq, dk, dv):
                grad.zero_()
        return
    with own_precision(q):
        chosen.attend_backward(
            dout,
            q,
            k,
            v,
            lse,
            delta,
            visible,
            dq=dq,
            dk=dk,
            dv=dv,
            accumulate=accumulate,
            scale=scale,
            softcap=softcap,
            deterministic=deterministic,
            **_given(places),
        )


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> Tensor:
    """rowsum(dout * out) - dlse, what the softmax's derivative subtracts in every row: computed once a backward.

    Args:
        dout, out: [B, S, H, D].
        dlse: gradient of lse, fp32 [B, H, S], or None.

    Returns:
        fp32 [B, H, S] (fp64 for fp64 inputs), contiguous.
    """
    wide = state_dtype(out.dtype)
    if out.is_cuda and wide == torch.float32 and dout.stride(3) == out.stride(3) == 1 and dispatch.has_triton():
        from ringfa3_kernels.portable import delta as kernel  # here, so that the door needs no Triton

        return kernel.row_delta(dout, out, dlse)
    with own_precision(out):
        delta: Tensor = torch.linalg.vecdot(dout.to(wide), out.to(wide)).transpose(1, 2).contiguous()
    return delta if dlse is None else delta - dlse


def own_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast must not reach the maths inside: precision is decided by the inputs' dtype and the fp32 state."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What out, lse, dq, dk and dv are kept in between hops: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q [B, Sq, Hq, D] and k, v [B, Sk, Hkv, D] go together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: wanted a Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name}: wanted 4 dimensions [B, S, H, D], got shape {list(x.shape)}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: wanted dtype bfloat16, float16, float32 or float64, got {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"v: wanted k's shape {list(k.shape)}, got {list(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: wanted q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: wanted q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: wanted q's batch size {q.shape[0]}, got {x.shape[0]}")
        if x.shape[3] != q.shape[3]:
            raise ValueError(f"{name}: wanted q's head_dim {q.shape[3]}, got {x.shape[3]}")
    for name, x in (("q", q), ("k", k)):
        if k.shape[2] == 0 == x.shape[2]:
            raise ValueError(f"{name}: wanted at least one head, got 0")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q: wanted a number of heads that is a multiple of k's {k.shape[2]}, got {q.shape[2]}")
    if not 8 <= q.shape[3] <= 256 or q.shape[3] % 8:
        raise ValueError(f"q: wanted a head_dim that is a multiple of 8 from 8 to 256, got {q.shape[3]}")


def check_visible(visible: Visible | None, q: Tensor, Sk: int) -> Visible:
    B, Sq = q.shape[:2]
    if visible is None:
        return Visible.full(Sq, Sk, q.device)
    if not isinstance(visible, Visible):
        raise ValueError(f"visible: wanted a Visible or None, got {type(visible).__name__}")
    if visible.rows != Sq or (visible.lo.ndim == 2 and visible.lo.shape[0] != B):
        raise ValueError(f"visible: wanted bounds [{Sq}] or [{B}, {Sq}], got {list(visible.lo.shape)}")
    if visible.device != q.device:
        raise ValueError(f"visible: wanted q's device {q.device}, got {visible.device}")
    if visible.device.type == "cpu":  # elsewhere it would synchronise
        visible.check(Sk)
    return visible


def check_scalars(scale: float | None, softcap: float, D: int) -> tuple[float, float]:
    for name, x in (("scale", scale), ("softcap", softcap)):
        if not isinstance(x, int | float) and not (x is None and name == "scale"):
            raise ValueError(f"{name}: wanted a number, got {x!r}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: wanted 0 (off) or a positive number, got {softcap}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: wanted a finite number or None, got {scale}")
    return (D**-0.5 if scale is None else float(scale)), float(softcap)


def check_into(into: Partial | None, shape: tuple[int, int, int, int], wide: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless `into` is None or a Partial for an output [B, Sq, Hq, D]."""
    if into is None:
        return
    if not isinstance(into, Partial):
        raise ValueError(f"into: wanted a Partial, got {type(into).__name__}")
    B, Sq, Hq, _ = shape
    _like("into.out", into.out, shape, wide, device)
    _like("into.lse", into.lse, (B, Hq, Sq), wide, device)


def _like(name: str, x: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: wanted a Tensor, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name}: wanted {dtype} {list(shape)} on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )


def _call(
    direction: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    softcap: float,
    out_dtype: torch.dtype,
    *,
    into: bool = False,
    accumulate: bool = False,
    deterministic: bool = False,
    others: tuple[Tensor, ...] = (),
    places: Positional | None = None,
) -> Call:
    B, Sq, Hq, D = q.shape
    return Call(
        direction=direction,
        device=q.device.type,
        capability=dispatch.capability(q.device),
        dtype=q.dtype,
        B=B,
        Sq=Sq,
        Sk=k.shape[1],
        Hq=Hq,
        Hkv=k.shape[2],
        D=D,
        batched_visible=visible.lo.ndim == 2,
        softcap=softcap != 0,
        into=into,
        out_dtype=out_dtype,
        accumulate=accumulate,
        deterministic=deterministic,
        aligned=all(is_aligned(x) for x in (q, k, v, *others)),
        alibi=places is not None and places.alibi is not None,
        dropout=places is not None and places.dropout is not None,
    )


def _given(places: Positional | None) -> dict[str, Positional]:
    """The option for what depends on positions; implementations that have none of it do not know the name."""
    return {} if places is None else {"positional": places}


def is_aligned(x: Tensor) -> bool:
    if x.numel() == 0:  # its strides say nothing, and nobody reads it
        return True
    size = x.element_size()
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in x.stride()[:3])
