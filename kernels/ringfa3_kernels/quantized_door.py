"""The part of the door for fp8: checks Quantized q, k and v and hands them to the implementation that serves them."""

from __future__ import annotations

import torch

from ringfa3_kernels import dispatch
from ringfa3_kernels.call import Call
from ringfa3_kernels.door import check_into, check_scalars, check_visible, is_aligned, own_precision
from ringfa3_kernels.quantized import Quantized, unsupported_device
from ringfa3_kernels.types import Partial, Unsupported, Visible

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


def attend(
    q: object,
    k: object,
    v: object,
    visible: Visible | None,
    *,
    scale: float | None,
    softcap: float,
    into: Partial | None,
    out_dtype: torch.dtype | None,
    impl: str,
) -> Partial:
    """`ringfa3_kernels.attend` where at least one of q, k and v is Quantized."""
    q, k, v = check(q, k, v)
    B, Sq, Hq, D = q.shape
    Sk = k.length
    visible = check_visible(visible, q.data, Sk)
    scale, softcap = check_scalars(scale, softcap, D)
    out_dtype = torch.float32 if out_dtype is None else out_dtype
    if out_dtype not in OUTPUTS:
        raise ValueError(f"out_dtype: wanted float32, bfloat16 or float16 for fp8 inputs, got {out_dtype}")
    check_into(into, q.shape, torch.float32, q.device)
    reason = unsupported_device(q.device)
    if reason is not None:
        raise Unsupported(reason)
    call = Call(
        direction="forward",
        device=q.device.type,
        capability=dispatch.capability(q.device),
        dtype=q.data.dtype,
        B=B,
        Sq=Sq,
        Sk=Sk,
        Hq=Hq,
        Hkv=k.shape[2],
        D=D,
        batched_visible=visible.lo.ndim == 2,
        softcap=softcap != 0,
        into=into is not None,
        out_dtype=out_dtype,
        accumulate=False,
        deterministic=False,
        aligned=all(is_aligned(x.data) for x in (q, k, v)),
        blocks=(q.block, k.block, v.block),
        v_order=v.order,
    )
    chosen = dispatch.choose(call, impl)
    if Sk == 0 or q.data.numel() == 0:
        if into is not None:
            return Partial(into.out.to(out_dtype), into.lse)
        out = torch.zeros(q.shape, dtype=out_dtype, device=q.device)
        return Partial(out, torch.full((B, Hq, Sq), -torch.inf, dtype=torch.float32, device=q.device))
    with own_precision(q.data):
        result: Partial = chosen.attend_quantized(
            q, k, v, visible, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype
        )
    return result


def check(q: object, k: object, v: object) -> tuple[Quantized, Quantized, Quantized]:
    """q, k and v, or ValueError unless they are Quantized alike: q [B, Sq, Hq, D] and k, v [B, Sk, Hkv, D]."""
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, Quantized):
            raise ValueError(f"{name}: wanted Quantized, as the others are, got {type(x).__name__}")
    assert isinstance(q, Quantized)
    assert isinstance(k, Quantized)
    assert isinstance(v, Quantized)
    if k.shape != v.shape:
        raise ValueError(f"v: wanted k's shape {list(k.shape)}, got {list(v.shape)}")
    for name, x in (("q", q), ("k", k)):
        if x.order != "rows":
            raise ValueError(f"{name}: wanted order 'rows', got {x.order!r}")
        if x.shape[2] == 0:
            raise ValueError(f"{name}: wanted at least one head, got 0")
    for name, x in (("k", k), ("v", v)):
        for what, wanted, got in (
            ("dtype", q.data.dtype, x.data.dtype),
            ("device", q.device, x.device),
            ("batch size", q.shape[0], x.shape[0]),
            ("head_dim", q.shape[3], x.shape[3]),
        ):
            if got != wanted:
                raise ValueError(f"{name}: wanted q's {what} {wanted}, got {got}")
    if q.seed != k.seed:
        raise ValueError(f"k: wanted to be rotated as q is, with seed {q.seed}, got {k.seed}")
    if v.rotated:
        raise ValueError("v: wanted no rotation: the output would be rotated too")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q: wanted a number of heads that is a multiple of k's {k.shape[2]}, got {q.shape[2]}")
    if not 8 <= q.shape[3] <= 256 or q.shape[3] % 8:
        raise ValueError(f"q: wanted a head_dim that is a multiple of 8 from 8 to 256, got {q.shape[3]}")
    return q, k, v
