"""flash-attn's dropout_p and alibi_slopes in the kernels' words: where rows and keys stand, and a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ringfa3.places import check_alibi, check_dropout
from ringfa3_kernels import Unsupported

Positions = tuple[Tensor, Tensor]  # of rows and of keys, int32, not below 0


def options(
    dropout_p: float, alibi_slopes: Tensor | None, q: Tensor, positions: Callable[[], Positions]
) -> dict[str, Any]:
    """What `ringfa3_kernels.attend` is to be told beside the rest; nothing where neither is asked for.

    The seed is drawn from torch's default generator, the CPU's on every device: torch.manual_seed repeats it.

    Args:
        q: [B, Sq, Hq, D].

    Raises:
        ValueError: dropout_p or alibi_slopes is wrong.
        Unsupported: torch.compile traces.
    """
    if torch.compiler.is_compiling() and (dropout_p or alibi_slopes is not None):
        name, value = ("dropout_p", "0") if alibi_slopes is None else ("alibi_slopes", "None")
        raise Unsupported(f"{name}: wanted {value} under torch.compile, which does not serve it yet, got another")
    alibi = check_alibi(alibi_slopes, q)
    dropout = check_dropout(dropout_p, None, compared=True)
    if alibi is None and dropout is None:
        return {}
    return {"positions": positions(), "alibi": alibi, "dropout": dropout}


def aligned(Sq: int, Sk: int, device: torch.device) -> Positions:
    """Rows at the end of the keys: row i stands at i + Sk - Sq of them; both are moved where that is below 0."""
    rows = torch.arange(Sq, dtype=torch.int32, device=device) + max(Sk - Sq, 0)
    return rows, torch.arange(Sk, dtype=torch.int32, device=device) + max(Sq - Sk, 0)


def packed(sequence: Tensor, row_ends: Tensor, key_ends: Tensor, keys: int) -> Positions:
    """Packed sequences' keys where they lie, and each row at the end of its sequence's keys.

    Args:
        sequence: int32 [rows], whose each row is.
        row_ends, key_ends: int32 [sequences], past the last row and the last key of each.
        keys: that there are in all.
    """
    rows = sequence.numel()  # no row stands further before the first key
    q_pos = torch.arange(rows, dtype=torch.int32, device=sequence.device)
    if row_ends.numel():
        q_pos += (key_ends - row_ends)[sequence] + rows
    return q_pos, torch.arange(rows, rows + keys, dtype=torch.int32, device=sequence.device)


def at_end(totals: Tensor, Sq: int, keys: int) -> Positions:
    """Rows at the end of each sequence's keys: [B, Sq] and [keys], both moved so that none is below 0.

    Args:
        totals: int32 [B], keys of each sequence, which are its first.
        keys: that a sequence has room for.
    """
    q_pos = totals[:, None] + torch.arange(Sq, dtype=torch.int32, device=totals.device)
    return q_pos, torch.arange(Sq, Sq + keys, dtype=torch.int32, device=totals.device)
