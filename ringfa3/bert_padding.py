"""Padded batches to packed rows and back, with the names and returns that users of flash-attn's bert_padding know."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """The rows of x that indices name; differentiable.

    Args:
        x: [rows, ...].
        indices: int64 [n], each in [0, rows).

    Returns:
        [n, ...].

    Raises:
        ValueError: x has no dimension, or indices are not a vector of integers.
    """
    if x.ndim < 1:
        raise ValueError("x: wanted at least 1 dimension, got a scalar")
    _check_indices(indices)
    return x.index_select(0, indices)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The padded batch whose rows `unpad_input` packed; zeros where there was padding; differentiable.

    Args:
        hidden_states: [n, ...].
        indices: int64 [n], from `unpad_input`.
        batch, seqlen: of the padded batch.

    Returns:
        [batch, seqlen, ...].

    Raises:
        ValueError: indices do not go with hidden_states.
    """
    _check_indices(indices)
    if hidden_states.ndim < 1 or hidden_states.shape[0] != indices.numel():
        raise ValueError(
            f"indices: wanted one per row of hidden_states {list(hidden_states.shape)}, got {len(indices)}"
        )
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices.long(), hidden_states).view(batch, seqlen, *hidden_states.shape[1:])


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of a padded batch that are not padding, one after the other; differentiable in hidden_states.

    Synchronises the device: how many rows there are is known there.

    Args:
        hidden_states: [B, S, ...].
        attention_mask: bool or int [B, S], 1 where a token counts, 0 where padding is.
        unused_mask: the same for rows that are kept but not counted in `seqused` (room allocated for later tokens);
            nowhere 1 together with attention_mask.

    Returns:
        hidden_states [n, ...] of the n rows either mask names; their indices int64 [n] in the flattened batch;
        cu_seqlens int32 [B + 1], where each sequence starts among them; the longest sequence's length as an int; and
        seqused int32 [B], the number of rows in each sequence that attention_mask names.

    Raises:
        ValueError: a mask is not [B, S].
    """
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ValueError(f"{name}: wanted [B, S] = {list(hidden_states.shape[:2])}, got {list(mask.shape)}")
    counted = attention_mask != 0
    kept = counted if unused_mask is None else counted | (unused_mask != 0)
    lengths = kept.sum(-1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens, longest, counted.sum(-1, dtype=torch.int32)


def _check_indices(indices: Tensor) -> None:
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices: wanted int64 [n], got {indices.dtype} {list(indices.shape)}")
