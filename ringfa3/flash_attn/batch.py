"""flash_attn_func and its packed forms: batches of sequences of one length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringfa3.entrance import checked_flag
from ringfa3.flash_attn import places
from ringfa3.flash_attn.operation import attention, check_shapes, sides, unpacked
from ringfa3.flash_attn.recent import Recent
from ringfa3_kernels import Visible


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention; row i stands at position i + Sk - Sq among the keys (bottom-right alignment). Differentiable.

    Args:
        q: [B, Sq, Hq, D] bf16, fp16 or fp32.
        k, v: [B, Sk, Hkv, D], Hq a multiple of Hkv.
        dropout_p: share of the probabilities that are dropped, in [0, 1); the others are scaled by 1 / (1 - p). What is
            dropped follows from torch.manual_seed alone, and is the same on every device.
        softmax_scale: factor on q.k; None: D ** -0.5.
        causal: no row sees keys beyond its position.
        window_size: (left, right): a row sees keys from position - left to position + right; -1 is unlimited.
        softcap: where not 0, scores become softcap * tanh(score / softcap).
        alibi_slopes: fp32 [Hq] or [B, Hq]: -slope * distance is added to the scores, after the softcap. No gradient.
        deterministic: gradients bitwise equal from run to run, at some cost.
        return_attn_probs: also return softmax_lse, and None for the probabilities, which are never all in memory.

    Returns:
        out [B, Sq, Hq, D] in q's dtype, or (out, softmax_lse fp32 [B, Hq, Sq], None). Rows that see nothing have out 0
        and softmax_lse -inf. softmax_lse is that of the whole softmax, biased but not dropped.

    Raises:
        ValueError: an argument is wrong; names it, what was wanted and what came.
        Unsupported: no implementation serves this call.
    """
    left, right = sides(window_size, causal)
    return_attn_probs = checked_flag("return_attn_probs", return_attn_probs)
    check_shapes("[B, S, H, D]", q=q, k=k, v=v)
    bounds = q.shape[1], k.shape[1], left, right, q.device
    visible = _RECENT.get((), bounds, q.device, lambda: bottom_right(*bounds))
    at = places.options(dropout_p, alibi_slopes, q, lambda: places.aligned(q.shape[1], k.shape[1], q.device))
    out, lse = attention(
        q, k, v, visible, softmax_scale=softmax_scale, softcap=softcap, deterministic=deterministic, places=at
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with keys and values in one tensor, kv [B, Sk, 2, Hkv, D]."""
    k, v = unpacked("[B, S, 2, H, D]", 2, kv=kv)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with queries, keys and values in one tensor, qkv [B, S, 3, H, D]."""
    q, k, v = unpacked("[B, S, 3, H, D]", 3, qkv=qkv)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def bottom_right(Sq: int, Sk: int, left: int, right: int, device: torch.device) -> Visible:
    """What rows see that stand at the end of the keys.

    Args:
        left, right: how far a row sees to either side, -1 unlimited; see `sides`.
    """
    if (left, right) == (-1, -1):
        return Visible.full(Sq, Sk, device)
    if (left, right) == (-1, 0):
        return Visible.causal(Sq, Sk, device)
    p = torch.arange(Sk - Sq, Sk, dtype=torch.int32, device=device)
    lo = (p - min(left, Sk)).clamp_(0, Sk) if left >= 0 else torch.zeros_like(p)
    hi = (p + (min(right, Sq) + 1)).clamp_(0, Sk) if right >= 0 else torch.full_like(p, Sk)
    return Visible(lo, hi)


_RECENT: Recent[Visible] = Recent()
