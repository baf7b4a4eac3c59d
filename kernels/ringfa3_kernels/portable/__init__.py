"""Attention in plain Triton, decode too: CUDA of capability 8.0 or newer, and Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from ringfa3_kernels.call import Call
from ringfa3_kernels.portable.decode_launch import run_decode
from ringfa3_kernels.portable.launch import interpreted, run_backward, run_forward
from ringfa3_kernels.portable.quantized_launch import run_quantized
from ringfa3_kernels.positional import Positional
from ringfa3_kernels.quantized import CAPABILITY, Quantized
from ringfa3_kernels.types import Partial, Visible

NAME = "portable"


def unsupported(call: Call) -> str | None:
    """What these kernels lack for the call, or None if they serve it."""
    if call.dtype == torch.float64:
        return "computes in fp32, got float64 inputs"
    if call.direction == "decode" and (call.page < 16 or call.page & (call.page - 1)):
        return f"needs pages of a power of two of at least 16 keys, got {call.page}"
    if call.blocks and call.v_order != "rows":
        return f"of fp8 it reads v in order 'rows', got {call.v_order!r}"
    if interpreted():
        return "tl.dot is wrong for bfloat16 in Triton's interpreter" if call.dtype == torch.bfloat16 else None
    if call.device != "cuda" or call.capability < (8, 0):
        return "needs a CUDA device of capability 8.0 (or TRITON_INTERPRET=1)"
    if call.blocks and call.capability < CAPABILITY:
        return f"fp8 needs capability {CAPABILITY[0]}.{CAPABILITY[1]}"
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
    positional: Positional | None = None,
) -> Partial:
    """softmax(q k^T) v and its lse, continuing `into` in place; see `ringfa3_kernels.attend`."""
    return run_forward(
        q, k, v, visible, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype, positional=positional
    )


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
    """`attend` on fp8 tensors, v in order "rows"; see `ringfa3_kernels.attend`."""
    return run_quantized(q, k, v, visible, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype)


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
    positional: Positional | None = None,
) -> None:
    """Gradients of `attend`, added in place or stored; see `ringfa3_kernels.attend_backward`. Always deterministic."""
    run_backward(
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
        positional=positional,
    )


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    splits: int | None,
) -> Partial:
    """A few rows a sequence over a paged cache; see `ringfa3_kernels.decode`. Always deterministic."""
    return run_decode(q, k_pages, v_pages, block_table, visible, scale=scale, softcap=softcap, splits=splits)


__all__ = ["NAME", "attend", "attend_backward", "attend_quantized", "decode", "unsupported"]
