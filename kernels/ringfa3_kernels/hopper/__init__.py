"""Hopper (sm_90a) attention in Gluon, forward and backward: TMA, asynchronous wgmma, warp specialisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ringfa3_kernels.call import Call
from ringfa3_kernels.types import Partial, Visible

NAME = "hopper"


def unsupported(call: Call) -> str | None:
    """What this implementation lacks for a call, or None if it serves it."""
    if call.device != "cuda" or call.capability != (9, 0):
        return f"needs a GPU of compute capability 9.0, got {call.device} {call.capability[0]}.{call.capability[1]}"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {call.dtype}"
    if not call.aligned:
        return "TMA needs head_dim contiguous, and pointers and all other strides that are multiples of 16 bytes"
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
