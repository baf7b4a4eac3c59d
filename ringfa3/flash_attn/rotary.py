"""Rotary position embedding with flash-attn's tables: pairs of dimensions turn by an angle that grows."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tables(cos: Tensor | None, sin: Tensor | None, like: Tensor, positions: int) -> None:
    """Raise ValueError unless cos and sin go together and serve positions 0..positions-1 of x [B, S, H, D]."""
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor):
        name = "rotary_cos" if not isinstance(cos, Tensor) else "rotary_sin"
        raise ValueError(
            f"{name}: wanted a Tensor, as the other of the two is given, got {(cos, sin)[cos is not None]!r}"
        )
    if cos.ndim != 2 or not cos.is_floating_point() or cos.device != like.device:
        raise ValueError(
            f"rotary_cos: wanted floating point [positions, rotary_dim / 2] on {like.device}, "
            f"got {cos.dtype} {list(cos.shape)} on {cos.device}"
        )
    if sin.shape != cos.shape or sin.dtype != cos.dtype or sin.device != cos.device:
        raise ValueError(
            f"rotary_sin: wanted rotary_cos' {cos.dtype} {list(cos.shape)} on {cos.device}, "
            f"got {sin.dtype} {list(sin.shape)} on {sin.device}"
        )
    if 2 * cos.shape[1] > like.shape[-1]:
        raise ValueError(f"rotary_cos: wanted at most half of head_dim {like.shape[-1]} columns, got {cos.shape[1]}")
    if cos.shape[0] < positions:
        raise ValueError(f"rotary_cos: wanted a row for each of the cache's {positions} positions, got {cos.shape[0]}")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """x with its first rotary_dim dimensions turned, computed in fp32 and rounded once.

    Args:
        x: [B, S, H, D].
        cos, sin: [n, rotary_dim / 2].
        positions: int64 [B, S] or [B, 1], rows of cos and sin.
        interleaved: dimensions 0 and 1, 2 and 3, ... are pairs; False: 0 and rotary_dim / 2, ... are (GPT-NeoX).

    Returns:
        [B, S, H, D] in x's dtype.
    """
    half = cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = (table.to(wide)[positions][:, :, None] for table in (cos, sin))  # [B, S or 1, 1, half]
    turning = x[..., : 2 * half].to(wide)
    a, b = turning.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turning.chunk(2, -1)
    turned = torch.stack((a * c - b * s, a * s + b * c), -1 if interleaved else -2).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)
