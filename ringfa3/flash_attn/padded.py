"""Packed sequences as a batch of padded ones: for ALiBi whose slopes differ between sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ringfa3.flash_attn.places import Positions
from ringfa3_kernels import Visible


def pad(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """[total, H, D] -> [B, longest, H, D], differentiable; past a sequence's end are others' rows."""
    at = cu_seqlens[:-1, None] + torch.arange(longest, dtype=torch.int32, device=x.device)
    rows: Tensor = x.index_select(0, at.flatten().clamp_(max=x.shape[0] - 1)).unflatten(0, at.shape)
    return rows


def unpad(out: Tensor, lse: Tensor, cu_seqlens: Tensor, sequence: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """out [B, longest, H, D] and lse [B, H, longest] -> [rows, H, D] and [H, rows]; rows past the last see nothing.

    Args:
        sequence: int32 [rows], whose each packed row is.
    """
    row = torch.arange(rows, dtype=torch.int32, device=out.device)
    past = row >= cu_seqlens[-1]
    at = torch.where(past, 0, sequence * out.shape[1] + row - cu_seqlens[:-1][sequence])
    lse = lse.transpose(0, 1).flatten(1).index_select(1, at).masked_fill(past, -torch.inf)
    return out.flatten(0, 1).index_select(0, at).masked_fill(past[:, None, None], 0), lse


def seen(
    bounds: tuple[Tensor, Tensor], cu_seqlens_q: Tensor, lengths: Tensor, longest: tuple[int, int]
) -> tuple[Visible, Positions]:
    """What padded rows see of their padded keys, and where both stand; rows past their sequence's end see nothing.

    Args:
        bounds: lo, hi int32 [rows] of the packed rows, counted from their sequence's first key.
        lengths: int32 [B], keys of each sequence.
        longest: rows and keys of a padded sequence.
    """
    rows, keys = longest
    i = torch.arange(rows, dtype=torch.int32, device=lengths.device)
    starts, held = cu_seqlens_q[:-1, None], cu_seqlens_q.diff()[:, None]
    at = (starts + i).clamp_(max=bounds[0].numel() - 1)
    lo, hi = (torch.where(i < held, x[at], lengths[:, None]) for x in bounds)
    q_pos = i + lengths[:, None] - held + rows  # bottom-right; moved, so that none is below 0
    return Visible(lo, hi), (q_pos, torch.arange(rows, rows + keys, dtype=torch.int32, device=lengths.device))
