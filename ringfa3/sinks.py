"""Learnable sink logits, applied to softmaxes that are finished: no kernel knows of them."""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of softmaxes that have one more score each, whose value is 0; differentiable.

    Args:
        out: [B, S, H, D].
        lse: [B, H, S].
        sinks: [H], that score of every head.

    Returns:
        out in its dtype, and lse.
    """
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return (out * torch.exp(lse - with_sink).transpose(1, 2)[..., None]).to(out.dtype), with_sink
