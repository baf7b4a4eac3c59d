"""The oracle: attention as its definition says, quadratic in memory, in whatever precision it is given.

Given fp64 it is what every implementation is tested against; given bf16 or fp16 it is "plain PyTorch attention", whose
error sets the scale of what the others may have (at most twice).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringfa3_kernels import paged
from ringfa3_kernels.call import Call
from ringfa3_kernels.positional import Positional
from ringfa3_kernels.quantized import Quantized, dequantize
from ringfa3_kernels.types import Partial, Visible, merge

NAME = "reference"


def unsupported(call: Call) -> str | None:
    """The reference serves every call."""
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
    """softmax(q k^T) v and its lse; see `ringfa3_kernels.attend`."""
    s = _scores(q, k, visible, scale, softcap, positional)[0]
    lse = torch.logsumexp(s, -1)
    m = torch.where(lse == -torch.inf, 0.0, lse)
    p = torch.exp(s - m[..., None])
    weights = None if positional is None else positional.weights(p.dtype)
    stays = p if weights is None else p * weights
    out = torch.einsum("bhij,bjhd->bihd", stays.to(v.dtype), _repeat(v, q.shape[2]))
    partial = Partial(out.to(lse.dtype), lse)
    if into is None:
        return Partial(partial.out.to(out_dtype), lse)
    merged = merge(into, partial)
    into.lse.copy_(merged.lse)
    if out_dtype != into.out.dtype:
        return Partial(merged.out.to(out_dtype), into.lse)
    into.out.copy_(merged.out)
    return into


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
    """softmax(q k^T) v of what the fp8 tensors stand for, in fp32; see `ringfa3_kernels.attend`."""
    wide = dequantize(q), dequantize(k), dequantize(v)
    return attend(*wide, visible, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype)


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
    """`attend` of one sequence after the other, over the keys that its pages hold; see `ringfa3_kernels.decode`."""
    result = Partial.empty(q)
    for b, (start, stop) in enumerate(paged.hulls(visible, q.shape[0])):
        if stop == start:
            continue
        k, v = (paged.read(x, block_table[b], start, stop)[None] for x in (k_pages, v_pages))
        sight = Visible(*paged.within(visible, b, start, stop))
        one = attend(q[b : b + 1], k, v, sight, scale=scale, softcap=softcap, into=None, out_dtype=result.out.dtype)
        result.out[b], result.lse[b] = one.out[0], one.lse[0]
    return result


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
    """Gradients of `attend` for rows whose final lse and delta are given; see `ringfa3_kernels.attend_backward`."""
    Hkv = k.shape[2]
    s, cap_slope = _scores(q, k, visible, scale, softcap, positional)
    m = torch.where(lse == -torch.inf, 0.0, lse)
    p = torch.exp(s - m[..., None])
    # unrounded, because delta is: autograd's softmax subtracts a delta that it sums from dp itself, so roundings cancel
    dp = torch.einsum("bihd,bjhd->bhij", dout.to(p.dtype), _repeat(v.to(p.dtype), q.shape[2]))
    weights = None if positional is None else positional.weights(p.dtype)
    stays, dp = (p, dp) if weights is None else (p * weights, dp * weights)
    ds = (p * (dp - delta[..., None]) * cap_slope * scale).to(q.dtype)
    grads = (
        (dq, torch.einsum("bhij,bjhd->bihd", ds, _repeat(k, q.shape[2]))),
        (dk, torch.einsum("bhij,bihd->bjhd", ds, q).unflatten(2, (Hkv, -1)).to(p.dtype).sum(3)),
        (dv, torch.einsum("bhij,bihd->bjhd", stays.to(q.dtype), dout).unflatten(2, (Hkv, -1)).to(p.dtype).sum(3)),
    )
    for into, grad in grads:
        if accumulate:
            into.add_(grad)
        else:
            into.copy_(grad)


def _scores(
    q: Tensor, k: Tensor, visible: Visible, scale: float, softcap: float, positional: Positional | None
) -> tuple[Tensor, Tensor | float]:
    """Masked scores [B, Hq, Sq, Sk] in fp32 (fp64 for fp64), and the slope of the softcap at each."""
    s = torch.einsum("bihd,bjhd->bhij", q, _repeat(k, q.shape[2]))
    s = s.to(torch.promote_types(s.dtype, torch.float32)) * scale
    slope: Tensor | float = 1.0
    if softcap:
        t = torch.tanh(s / softcap)
        s, slope = t * softcap, 1 - t * t
    bias = None if positional is None else positional.bias(s.dtype)
    s = s if bias is None else s + bias
    mask = visible.mask(k.shape[1])
    mask = mask if mask.ndim == 2 else mask[:, None]
    return s.masked_fill(~mask, -torch.inf), slope


def _repeat(x: Tensor, Hq: int) -> Tensor:
    """[B, S, Hkv, D] -> [B, S, Hq, D], each key/value head repeated for its group of query heads."""
    return x.repeat_interleave(Hq // x.shape[2], 2)
