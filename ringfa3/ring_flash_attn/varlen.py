"""ring_ and zigzag_ring_flash_attn_varlen_func with their packed forms: documents that are each dealt to all ranks."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ringfa3.flash_attn.operation import sides
from ringfa3.flash_attn.recent import Recent
from ringfa3.layout import Contiguous, Layout, Run, Zigzag
from ringfa3.mask import Mask
from ringfa3.ring_flash_attn.batch import only_causal, separate
from ringfa3.ring_flash_attn.call import Common
from ringfa3.shards import Group, members


def ring_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """Attention of packed documents, each of which is cut into `world` equal pieces: rank r holds the r-th of each.

    Args:
        q: [n, Hq, D], this rank's pieces, one after the other; bf16, fp16 or fp32.
        k, v: [n, Hkv, D], Hq a multiple of Hkv.
        cu_seqlens: int32 [documents + 1], where this rank's pieces start, and the end of the last one: those of the
            whole documents, divided by the world. The same on every rank. On a GPU it is read back, once for as long
            as the tensor lives unchanged.
        max_seqlen: at least the longest piece. Results do not depend on it.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, group: as `ring_flash_attn_func`,
            but by position in the document.
        return_attn_probs: also return softmax_lse, and None for the probabilities.

    Returns:
        out [n, Hq, D] in q's dtype, or (out, softmax_lse fp32 [Hq, n], None).

    Raises:
        ValueError, Unsupported, RankFailed: as `ringfa3.ring_attention`.
    """
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, Contiguous(), cu_seqlens, max_seqlen, q, k, v)


def ring_flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`ring_flash_attn_varlen_func` with keys and values in one tensor, kv [n, 2, Hkv, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, Contiguous(), cu_seqlens, max_seqlen, q, kv)


def ring_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`ring_flash_attn_varlen_func` with queries, keys and values in one tensor, qkv [n, 3, H, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, Contiguous(), cu_seqlens, max_seqlen, qkv)


def zigzag_ring_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """Causal attention of packed documents, each of 2 * world equal pieces: rank r holds its r-th and its r-th last.

    The rest is as `ring_flash_attn_varlen_func`: cu_seqlens counts both pieces of each document, so its lengths are
    even. causal=False raises, as it does in ring-flash-attn.
    """
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, Zigzag(), cu_seqlens, max_seqlen, q, k, v)


def zigzag_ring_flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`zigzag_ring_flash_attn_varlen_func` with keys and values in one tensor, kv [n, 2, Hkv, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, Zigzag(), cu_seqlens, max_seqlen, q, kv)


def zigzag_ring_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`zigzag_ring_flash_attn_varlen_func` with queries, keys and values in one tensor, qkv [n, 3, H, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, Zigzag(), cu_seqlens, max_seqlen, qkv)


@dataclass(frozen=True)
class ByDocument(Layout):
    """Documents one after the other, each dealt by itself.

    Args:
        documents: lengths, which sum to the sequence's; zeros are allowed.
        dealt: how each is.
    """

    documents: tuple[int, ...]
    dealt: Layout
    name: ClassVar[str] = "by document"

    def runs(self, seqlen: int, world: int, rank: int) -> list[Run]:
        if sum(self.documents) != seqlen:
            raise ValueError(f"layout: wanted documents that sum to {seqlen} positions, got {sum(self.documents)}")
        starts = itertools.accumulate(self.documents, initial=0)
        return [
            (start + first, start + stop, step)
            for start, length in zip(starts, self.documents, strict=False)
            for first, stop, step in self.dealt.runs(length, world, rank)
        ]


def host_lengths(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Lengths of the sequences that start where cu_seqlens says; read from a GPU once while the tensor is unchanged.

    Raises:
        ValueError: not int32 or int64 [B + 1] that begins with 0 and does not descend.
    """
    dtypes = (torch.int32, torch.int64)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.dtype not in dtypes:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else repr(cu_seqlens)
        raise ValueError(f"cu_seqlens: wanted torch.int32 [documents + 1], got {got}")

    def read() -> tuple[int, ...]:
        edges = cu_seqlens.tolist()
        if not edges or edges[0] != 0 or sorted(edges) != edges:
            raise ValueError(f"cu_seqlens: wanted 0 first and none below the one before, got {edges}")
        return tuple(b - a for a, b in itertools.pairwise(edges))

    return _RECENT.get((cu_seqlens,), None, cu_seqlens.device, read)


def _dealt(common: Common, dealt: Layout, cu_seqlens: Tensor, max_seqlen: int, *tensors: Tensor) -> Any:
    """The call for documents dealt so, from q, k, v or q, kv or qkv."""

    def prepare() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        q, k, v = separate(tensors, "[total, H, D]")
        if not isinstance(dealt, Contiguous):
            only_causal(common.causal)
        window = sides(common.window_size, common.causal)
        pieces = host_lengths(cu_seqlens)
        _check(pieces, max_seqlen, q.shape[0], even=isinstance(dealt, Zigzag))
        world = members(common.group)[1]
        documents = tuple(length * world for length in pieces)
        mask = Mask(common.causal, window, documents or None)
        return q, k, v, {"mask": mask, "layout": ByDocument(documents, dealt)}

    return common.run_packed(prepare)


def _check(pieces: tuple[int, ...], max_seqlen: int, rows: int, *, even: bool) -> None:
    """Raise ValueError unless a rank's pieces of documents make up its rows."""
    if sum(pieces) != rows:
        raise ValueError(f"cu_seqlens: wanted q's {rows} rows at the end, got {sum(pieces)}")
    if even and any(length % 2 for length in pieces):
        raise ValueError(f"cu_seqlens: wanted even lengths, two pieces of each document, got lengths {pieces}")
    try:
        longest = operator.index(max_seqlen)
    except TypeError:
        raise ValueError(f"max_seqlen: wanted an integer, got {max_seqlen!r}") from None
    if longest < max(pieces, default=0):
        raise ValueError(f"max_seqlen: wanted at least the longest piece's {max(pieces)}, got {longest}")


_RECENT: Recent[tuple[int, ...]] = Recent()
