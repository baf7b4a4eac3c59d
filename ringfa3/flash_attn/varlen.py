"""flash_attn_varlen_func and its packed forms: sequences of any lengths, one after the other in one tensor.

All sequences are one call of the kernels: a row sees an interval of the packed keys, and sequences only move its ends.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor

from ringfa3.entrance import checked_flag
from ringfa3.flash_attn import padded, places
from ringfa3.flash_attn.operation import attention, check_shapes, sides, unpacked
from ringfa3.flash_attn.paged import check_block_table, check_pages, decodes, read_pages
from ringfa3.flash_attn.recent import Recent
from ringfa3_kernels import Visible, decode


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of packed sequences, each over its own keys; see `flash_attn_func`. Differentiable.

    On a GPU (and under torch.compile) lengths are not read back: they are checked only as far as shapes tell, and a
    CUDA graph that holds the call serves other lengths in the same tensors.

    Args:
        q: [total_q, Hq, D]. Rows past the last sequence see nothing.
        k, v: [total_k, Hkv, D]; with a block table pages [P, page, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each sequence starts, and the end of the last one. Sequences
            may be empty on either side. With a block table cu_seqlens_k says how many keys each sequence has.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length. Results do not depend on them.
        block_table: int32 [B, blocks], the pages of each sequence in order; what of them lies past its end may hold
            anything. Where max_seqlen_q is more than 1 they are gathered first: memory for B * blocks * page keys.
        alibi_slopes: fp32 [Hq] or [B, Hq]; sequences with slopes of their own are padded to the longest first. Distance
            is counted in the sequence, whose last row stands at its last key.

    Returns:
        out [total_q, Hq, D], or (out, softmax_lse fp32 [Hq, total_q], None).

    Raises:
        ValueError, Unsupported: as `flash_attn_func`.
    """
    reach = sides(window_size, causal)
    return_attn_probs = checked_flag("return_attn_probs", return_attn_probs)
    check_shapes("[total, H, D]", q=q)
    check_tensors(q, cu_seqlens_q, cu_seqlens_k)
    longest = _length("max_seqlen_q", max_seqlen_q), _length("max_seqlen_k", max_seqlen_k)
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap, "deterministic": deterministic}
    check_shapes("[total, H, D]" if block_table is None else "[P, page, H, D]", k=k, v=v)
    several = cu_seqlens_q.numel() > 2 and q.numel() and k.numel() and min(longest)
    if several and isinstance(alibi_slopes, Tensor) and alibi_slopes.ndim == 2:
        out, lse = _by_sequence(
            q, k, v, cu_seqlens_q, cu_seqlens_k, longest, reach, block_table, dropout_p, alibi_slopes, options
        )
    elif block_table is None:
        visible = _visible(q, k.shape[0], cu_seqlens_q, cu_seqlens_k, longest, reach)
        options["places"] = places.options(
            dropout_p, alibi_slopes, q[None], lambda: _positions(q, k.shape[0], cu_seqlens_q, cu_seqlens_k[1:])
        )
        out, lse = (x[0] for x in attention(q[None], k[None], v[None], visible, **options))
    else:
        keys = block_table.numel() * k.shape[1] if isinstance(block_table, Tensor) else 0
        ends = _page_ends(cu_seqlens_k, keys)
        options["places"] = places.options(
            dropout_p, alibi_slopes, q[None], lambda: _positions(q, keys, cu_seqlens_q, ends)
        )
        out, lse = _over_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, reach, block_table, options)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with keys and values in one tensor, kv [total_k, 2, Hkv, D]."""
    k, v = unpacked("[total, 2, H, D]", 2, kv=kv)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor, qkv [total, 3, H, D]."""
    q, k, v = unpacked("[total, 3, H, D]", 3, qkv=qkv)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def bounds_of_rows(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows: int, left: int, right: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Whose each packed row is, and which of its sequence's keys it sees, rows standing at the end of the keys.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1].
        rows: of q, at least cu_seqlens_q's last; those past it see nothing.
        left, right: see `sides`.

    Returns:
        sequence, lo, hi: int32 [rows] on cu_seqlens' device, which is not synchronised; lo <= j < hi are seen, j
        counted from the sequence's first key.
    """
    B = cu_seqlens_q.numel() - 1
    row = torch.arange(rows, dtype=torch.int32, device=cu_seqlens_q.device)
    if B == 0:
        return torch.zeros_like(row), torch.zeros_like(row), torch.zeros_like(row)
    found = whose_rows(cu_seqlens_q, rows)
    sequence = found.clamp(max=B - 1)
    length = cu_seqlens_k.diff()[sequence]
    p = row - cu_seqlens_q[1:][sequence] + length  # counted from the sequence's first key, below its length
    # int32 must not overflow: a side of 2**30 or more is unlimited, and no row stands further left than -rows
    lo = torch.minimum((p - left).clamp_(min=0), length) if 0 <= left < 2**30 else torch.zeros_like(p)
    hi = torch.minimum((p + (min(right, rows) + 1)).clamp_(min=0), length) if right >= 0 else length
    return sequence, torch.where(found == B, length, lo), hi  # past the last sequence hi is its length already


def whose_rows(cu_seqlens_q: Tensor, rows: int) -> Tensor:
    """Which sequence each packed row is of, int32 [rows]; past the last sequence one more than there are."""
    row = torch.arange(rows, dtype=torch.int32, device=cu_seqlens_q.device)
    # Not over cu_seqlens_q[1:]: inductor of torch 2.11 cannot search a slice on a GPU
    return (torch.searchsorted(cu_seqlens_q, row, right=True, out_int32=True) - 1).clamp_(min=0)


def check_cu_seqlens(of: str, cu_seqlens: Tensor, total: int, longest: int, capacity: int | None = None) -> None:
    """Raise ValueError unless lengths that are on the CPU make sense; those on a GPU, or compiled, are not read.

    Args:
        of: "q" or "k", for the names.
        total: rows that there are.
        longest: what the caller says the longest sequence has at most.
        capacity: of a sequence's pages; None: sequences lie one after the other in the rows.
    """
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    edges = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    name = f"cu_seqlens_{of}"
    if edges[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"{name}: wanted 0 first and none below the one before, got {edges}")
    if capacity is None and edges[-1] > total:
        raise ValueError(f"{name}: wanted at most the {total} rows of {of} at the end, got {edges[-1]}")
    if capacity is not None and max(lengths, default=0) > capacity:
        raise ValueError(
            f"{name}: wanted lengths of at most the {capacity} keys of a row of block_table, got {max(lengths)}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_seqlen_{of}: wanted at least the longest sequence's {max(lengths)}, got {longest}")


def _visible(
    q: Tensor, keys: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest: tuple[int, int], reach: tuple[int, int]
) -> Visible:
    """What each packed row sees of the packed keys; lengths are checked."""
    rows = q.shape[0]

    def make() -> Visible:
        check_cu_seqlens("q", cu_seqlens_q, rows, longest[0])
        check_cu_seqlens("k", cu_seqlens_k, keys, longest[1])
        sequence, lo, hi = bounds_of_rows(cu_seqlens_q, cu_seqlens_k, rows, *reach)
        start = cu_seqlens_k[sequence]
        return Visible(start + lo, start + hi)

    return _RECENT.get((cu_seqlens_q, cu_seqlens_k), (rows, keys, longest, reach), q.device, make)


def _positions(q: Tensor, keys: int, cu_seqlens_q: Tensor, key_ends: Tensor) -> places.Positions:
    """Where packed rows and keys stand; see `places.packed`."""
    sequence = whose_rows(cu_seqlens_q, q.shape[0]).clamp_(max=max(key_ends.numel() - 1, 0))
    return places.packed(sequence, cu_seqlens_q[1:], key_ends, keys)


def _page_ends(cu_seqlens_k: Tensor, keys: int) -> Tensor:
    """Past the last key of each sequence, where each has as much room as the others of so many keys: int32 [B]."""
    lengths = cu_seqlens_k.diff()
    room = keys // max(lengths.numel(), 1)
    return lengths + room * torch.arange(lengths.numel(), dtype=torch.int32, device=lengths.device)


def _over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest: tuple[int, int],
    reach: tuple[int, int],
    block_table: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """out [rows, Hq, D] and lse [Hq, rows] of packed rows over pages: one row a sequence is decoding."""
    rows, B = q.shape[0], cu_seqlens_q.numel() - 1
    lengths = _paged_lengths(q, k, cu_seqlens_q, cu_seqlens_k, longest, block_table)
    capacity = block_table.shape[1] * k.shape[1]
    sequence, lo, hi = bounds_of_rows(cu_seqlens_q, cu_seqlens_k, rows, *reach)
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    bare = not graded and not options["places"]
    if longest[0] == 1 and B and bare and decodes(k) and decodes(v) and q.shape[2] % 8 == 0:
        partial = decode(
            q[:, None], k, v, block_table.index_select(0, sequence), Visible(lo[:, None], hi[:, None]),
            scale=options["softmax_scale"], softcap=options["softcap"],
        )  # fmt: skip
        return partial.out[:, 0].to(q.dtype), partial.lse[..., 0].T
    visible = Visible(sequence * capacity + lo, sequence * capacity + hi)
    k, v = (read_pages(x, block_table, 0, lengths).flatten(0, 1)[None] for x in (k, v))
    out, lse = attention(q[None], k, v, visible, **options)
    return out[0], lse[0]


def _by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest: tuple[int, int],
    reach: tuple[int, int],
    block_table: Tensor | None,
    dropout_p: float,
    alibi_slopes: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """out [rows, Hq, D] and lse [Hq, rows] of packed rows whose sequences have slopes [B, Hq] of their own."""
    rows = q.shape[0]
    if block_table is None:
        check_cu_seqlens("q", cu_seqlens_q, rows, longest[0])
        check_cu_seqlens("k", cu_seqlens_k, k.shape[0], longest[1])
        lengths = cu_seqlens_k.diff()
        k, v = (padded.pad(x, cu_seqlens_k, longest[1]) for x in (k, v))
    else:
        lengths = _paged_lengths(q, k, cu_seqlens_q, cu_seqlens_k, longest, block_table)
        k, v = (read_pages(x, block_table, 0, lengths) for x in (k, v))
    sequence, lo, hi = bounds_of_rows(cu_seqlens_q, cu_seqlens_k, rows, *reach)
    visible, positions = padded.seen((lo, hi), cu_seqlens_q, lengths, (longest[0], k.shape[1]))
    q = padded.pad(q, cu_seqlens_q, longest[0])
    at = places.options(dropout_p, alibi_slopes, q, lambda: positions)
    out, lse = attention(q, k, v, visible, places=at, **options)
    return padded.unpad(out, lse, cu_seqlens_q, sequence, rows)


def _paged_lengths(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest: tuple[int, int], block_table: Tensor
) -> Tensor:
    """Keys of each sequence, int32 [B]; lengths and pages are checked."""
    B, page = cu_seqlens_q.numel() - 1, k.shape[1]
    check_block_table(block_table, q, B)
    capacity = block_table.shape[1] * page
    check_cu_seqlens("q", cu_seqlens_q, q.shape[0], longest[0])
    check_cu_seqlens("k", cu_seqlens_k, B * capacity, longest[1], capacity)
    lengths = cu_seqlens_k.diff()
    check_pages(block_table, lengths, *k.shape[:2])
    return lengths


def check_tensors(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """What is wrong with cu_seqlens without looking at their values."""
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(x, Tensor) or x.ndim != 1 or x.dtype != torch.int32 or not x.numel():
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: wanted torch.int32 [B + 1], got {got}")
        if x.device != q.device:
            raise ValueError(f"{name}: wanted q's device {q.device}, got {x.device}")
    if cu_seqlens_q.numel() != cu_seqlens_k.numel():
        raise ValueError(
            f"cu_seqlens_k: wanted cu_seqlens_q's {cu_seqlens_q.numel()} numbers, got {cu_seqlens_k.numel()}"
        )


def _length(name: str, x: Any) -> int:
    try:
        length = operator.index(x)
    except TypeError:
        raise ValueError(f"{name}: wanted an integer, got {x!r}") from None
    if length < 0:
        raise ValueError(f"{name}: wanted at least 0, got {length}")
    return length


_RECENT: Recent[Visible] = Recent()
