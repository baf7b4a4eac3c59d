"""Hopper (sm_90a) attention in Gluon: TMA, asynchronous wgmma, warp specialisation. No backward yet."""

from __future__ import annotations

import torch
from torch import Tensor

from ringfa3_kernels.call import Call
from ringfa3_kernels.types import Partial, Unsupported, Visible

NAME = "hopper"


def unsupported(call: Call) -> str | None:
    """What this implementation lacks for a call, or None if it serves it."""
    if call.direction == "backward":
        return "backward: not written yet"
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


def attend_backward(*args: object, **kwargs: object) -> None:
    """Not there yet: dispatch never comes here, because `unsupported` says so."""
    raise Unsupported("hopper: backward: not written yet")
