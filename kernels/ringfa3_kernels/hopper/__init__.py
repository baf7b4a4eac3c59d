"""Hopper (sm_90a) attention in Gluon, forward (fp8 too) and backward: TMA, asynchronous wgmma, warp specialisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ringfa3_kernels.call import Call
from ringfa3_kernels.quantized import Quantized
from ringfa3_kernels.types import Partial, Visible

NAME = "hopper"


def unsupported(call: Call) -> str | None:
    """What this implementation lacks for a call, or None if it serves it."""
    if call.device != "cuda" or call.capability != (9, 0):
        return f"needs a GPU of compute capability 9.0, got {call.device} {call.capability[0]}.{call.capability[1]}"
    if call.blocks:
        lacking = _unsupported_fp8(call)
        if lacking:
            return lacking
    elif call.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {call.dtype}"
    for asked, name in ((call.alibi, "ALiBi"), (call.dropout, "dropout")):
        if asked:
            return f"has no {name}"
    if not call.aligned:
        return "TMA needs head_dim contiguous, and pointers and all other strides that are multiples of 16 bytes"
    return None


def _unsupported_fp8(call: Call) -> str | None:
    if call.dtype != torch.float8_e4m3fn:
        return f"of fp8 it reads float8_e4m3fn, got {call.dtype}"
    if call.D > 128:  # the matrix unit alone would lose a quarter of a sum over 16K keys: docs/decisions.md
        return f"of fp8 it reads head_dim up to 128, whose sums it can keep in fp32, got {call.D}"
    if call.v_order != "keys":
        return f"of fp8 it reads v in order 'keys' (quantize's v_order), got {call.v_order!r}"
    if len(set(call.blocks)) > 1:
        return f"needs scales of one kind for q, k and v, got blocks {', '.join(map(str, call.blocks))}"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    into: Partial | None,
    out_dtype: torch.dtype,
) -> Partial:
    """softmax(q k^T) v and its lse; see `ringfa3_kernels.attend`."""
    from ringfa3_kernels.hopper import launch  # here, so that asking `unsupported` needs no Triton

    return launch.attend(q, k, v, visible, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype)


def attend_quantized(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    into: Partial | None,
    out_dtype: torch.dtype,
) -> Partial:
    """`attend` of fp8 tensors, v in order "keys"."""
    from ringfa3_kernels.hopper import fp8_launch

    return fp8_launch.attend(q, k, v, visible, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    visible: Visible,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool,
    scale: float,
    softcap: float,
    deterministic: bool,
) -> None:
    """Gradients of `attend`, added in place or stored; see `ringfa3_kernels.attend_backward`."""
    from ringfa3_kernels.hopper import backward_launch

    backward_launch.attend_backward(
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
    )
