"""Plain PyTorch attention by its definition: in fp64 the truth, in the inputs' dtype the yardstick of its error.

It shares no code with the package: masks are spelled out as S x S tensors, gradients come from autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """out [B, Sq, Hq, D], lse [B, Hq, Sq], and the gradients of sum(out * dout) + sum(lse * dlse)."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor,
    mask: Tensor,
    *,
    dtype: torch.dtype,
    scale: float | None,
    softcap: float,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> Answer:
    """Attention and its gradients by autograd, as one would write it, in `dtype` with the softmax in fp32 or wider.

    Args:
        mask: bool [B, Sq, Sk], True where visible.
        bias: [B, Hq, Sq, Sk], added to the scores after the softcap.
        weights: [B, Hq, Sq, Sk], dropout's factors on the probabilities.
    """
    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2))
    s = s.to(torch.promote_types(dtype, torch.float32)) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(s.dtype)
    seen = mask.any(-1)[:, None, :]  # rows that see nothing are left out of the softmax: it would be NaN there
    s = s.masked_fill(~mask[:, None], -torch.inf).masked_fill(~seen[..., None], 0.0)
    p = s.softmax(-1) * seen[..., None] if s.shape[-1] else s
    if weights is not None:
        p = p * weights.to(p.dtype)
    out = torch.einsum("bhij,bjhd->bihd", p.to(dtype), v.repeat_interleave(group, 2))
    lse = s.logsumexp(-1) if s.shape[-1] else torch.zeros(s.shape[:-1], dtype=s.dtype, device=s.device)
    loss = (out * dout.to(dtype)).to(s.dtype).sum() + (lse * dlse.to(s.dtype) * seen).sum()
    if loss.requires_grad:
        loss.backward()
    grads = (torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v))
    return Answer(out.detach(), lse.detach().masked_fill(~seen, -torch.inf), *grads)


class Unlucky(AssertionError):
    """An error between the rule's bound and twice that: a defect, or one small draw's luck. Fresh draws tell."""


def assert_close(name: str, got: Tensor, truth: Tensor, yardstick: Tensor, dtype: torch.dtype) -> None:
    """The error rule: root mean square error at most twice the yardstick's, and no element far out.

    The largest error of a small tensor is a matter of luck: in 49,393 comparisons of `reference` and `aten` in fp32,
    fp16 and bf16 the ratio of the root mean squares never passed 1.73, while that of the largest errors passed 2 in 164
    and was 6.5 at worst; hence 2 and 10. With softcap a row of two keys can decide both: in 26,000 comparisons of
    gradients the root mean squares' ratio passed 2 in a few, 2.9 at worst. Errors of a few roundings of the fp32
    state count as none, both being noise. Inputs in fp64 have no truer oracle: for them it is a few thousand roundings
    of fp64.

    Raises:
        Unlucky: above the bound, by less than another factor of 2.
        AssertionError: above that, of another shape, or not finite.
    """
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, wanted {list(truth.shape)}"
    infinite = truth == -torch.inf
    assert torch.equal(got == -torch.inf, infinite), f"{name}: -inf in other places than the oracle's"
    truth = truth.double().masked_fill(infinite, 0.0)
    got, yardstick = (x.double().masked_fill(infinite, 0.0) for x in (got, yardstick))
    assert got.isfinite().all(), f"{name}: not finite in {int((~got.isfinite()).sum())} elements"
    if not truth.numel():
        return
    roundings = 8e3 * torch.finfo(dtype).eps if dtype == torch.float64 else 32 * torch.finfo(torch.float32).eps
    noise = roundings * max(1.0, float(truth.abs().max()))
    for size, factor in ((_root_mean_square, 2), (_largest, 10)):
        error, plain_error = size(got - truth), size(yardstick - truth)
        if error > factor * plain_error + noise:
            defect = Unlucky if error <= 2 * factor * plain_error + noise else AssertionError
            raise defect(f"{name}: {size.__name__} error {error:.3e}, plain {plain_error:.3e}")


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
