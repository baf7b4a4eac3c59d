"""llama3_flash_attn_varlen_func: packed documents over a sequence that is cut where ranks meet, not by document.

Each rank says what its own rows see (cu_seqlens_k and local_k_slice) and knows nothing of the others' documents. So
keys travel as for one document, causal and windowed as the call is, and documents narrow what rows see of them.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_left
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ringfa3.entrance import checked_flag
from ringfa3.flash_attn.operation import sides
from ringfa3.flash_attn.recent import Recent
from ringfa3.flash_attn.varlen import check_cu_seqlens, check_tensors, whose_rows
from ringfa3.hops import Hop
from ringfa3.mask import Mask
from ringfa3.plan import Plan, plan
from ringfa3.ring_flash_attn.batch import separate
from ringfa3.ring_flash_attn.call import Common
from ringfa3.ring_flash_attn.varlen import host_lengths
from ringfa3.shards import Group, members
from ringfa3_kernels import Visible


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """What one rank's rows are of, and which keys they need, where the packed sequence is cut into equal pieces.

    Args:
        cu_seqlens: int32 [documents + 1] of the whole packed sequence, whose length is a multiple of world_size.
        causal: keys after this rank's last row are not needed.
        rank, world_size: of the process group.

    Returns:
        cu_seqlens_q: of this rank's rows, cut into documents.
        cu_seqlens_k: of the keys that those documents need, in the slice below.
        max_seqlen_q, max_seqlen_k: the longest of each.
        local_k_slice: of the whole sequence's keys, from the start of the first document that this rank holds a part
            of.

    Raises:
        ValueError: the length is not a multiple of world_size, or no such rank; causal is not a bool.
    """
    causal = checked_flag("causal", causal)
    edges = [0]
    for length in host_lengths(cu_seqlens):
        edges.append(edges[-1] + length)
    if edges[-1] % world_size:
        raise ValueError(f"cu_seqlens: wanted a multiple of {world_size} ranks at the end, got {edges[-1]}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: wanted one in [0, {world_size}), got {rank}")
    begin, end = (edges[-1] // world_size * i for i in (rank, rank + 1))
    first, last = bisect_left(edges, begin), bisect_left(edges, end)
    first -= edges[first] > begin
    rows = [min(max(edge, begin), end) - begin for edge in edges[first : last + 1]]
    stop = end if causal else edges[last]
    keys = [min(edge, stop) - edges[first] for edge in edges[first : last + 1]]
    longest_q, longest_k = (max((b - a for a, b in itertools.pairwise(x)), default=0) for x in (rows, keys))
    q, k = (torch.tensor(x, dtype=cu_seqlens.dtype, device=cu_seqlens.device) for x in (rows, keys))
    return q, k, longest_q, longest_k, slice(edges[first], stop)


def llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """Attention of packed documents over a sequence of which rank r holds the r-th of `world` equal pieces.

    Args:
        q: [n, Hq, D], this rank's rows; bf16, fp16 or fp32.
        k, v: [n, Hkv, D], Hq a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice: from
            `llama3_flash_attn_prepare_cu_seqlens`, with this `causal`.
        heads_k_stride: a divisor of Hkv. Keys and values travel whole here, a few shards at a time, so that nothing
            depends on it.
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
    documents = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice
    return _narrowed(common, documents, heads_k_stride, q, k, v)


def llama3_flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`llama3_flash_attn_varlen_func` with keys and values in one tensor, kv [n, 2, Hkv, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    documents = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice
    return _narrowed(common, documents, heads_k_stride, q, kv)


def llama3_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`llama3_flash_attn_varlen_func` with queries, keys and values in one tensor, qkv [n, 3, H, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    documents = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice
    return _narrowed(common, documents, heads_k_stride, qkv)


def _narrowed(
    common: Common, documents: tuple[Tensor, Tensor, int, int, slice], heads_k_stride: int, *tensors: Tensor
) -> Any:
    """The call for these documents of this rank, from q, k, v or q, kv or qkv."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice = documents

    def prepare() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        q, k, v = separate(tensors, "[total, H, D]")
        _, world, rank = members(common.group)
        if not isinstance(heads_k_stride, int) or heads_k_stride < 1 or k.shape[1] % heads_k_stride:
            raise ValueError(f"heads_k_stride: wanted a divisor of k's {k.shape[1]} heads, got {heads_k_stride!r}")
        check_tensors(q, cu_seqlens_q, cu_seqlens_k)
        rows = q.shape[0]
        start, stop = _ends(local_k_slice, rank * rows, world * rows)
        mask = Mask(common.causal, sides(common.window_size, common.causal))

        def make() -> Plan:
            for of, cu, last, longest in (
                ("q", cu_seqlens_q, rows, max_seqlen_q),
                ("k", cu_seqlens_k, stop - start, max_seqlen_k),
            ):
                check_cu_seqlens(of, cu, last, longest)
                if cu.device.type == "cpu" and int(cu[-1]) != last:
                    raise ValueError(f"cu_seqlens_{of}: wanted {last} at the end, got {int(cu[-1])}")
            whole = plan(mask, "contiguous", rows * world, common.group, device=q.device)
            return _narrow(whole, start, cu_seqlens_q, cu_seqlens_k)

        options = (mask, rows, max_seqlen_q, max_seqlen_k, start, stop, rank, world, common.group)
        narrowed = _RECENT.get((cu_seqlens_q, cu_seqlens_k), options, q.device, make)
        return q, k, v, {"plan": narrowed}

    return common.run_packed(prepare)


def _narrow(whole: Plan, start: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Plan:
    """The plan with every row's view narrowed to its document; nothing is read from the device.

    Args:
        whole: a plan for one document, contiguous.
        start: position of the key from which cu_seqlens_k counts.
    """
    rows = whole.lengths[whole.rank]
    if cu_seqlens_q.numel() < 2:  # no documents, and so no rows
        return whole
    document = whose_rows(cu_seqlens_q, rows).clamp_(max=cu_seqlens_q.numel() - 2)
    hops = []
    for hop in whole.hops:
        base = start - whole.dealing.runs[hop.source][0][0] - hop.keys.start
        size = hop.keys.stop - hop.keys.start
        first, last = ((cu[document] + base).clamp(0, size) for cu in (cu_seqlens_k[:-1], cu_seqlens_k[1:]))
        visible = Visible(torch.maximum(hop.visible.lo, first), torch.minimum(hop.visible.hi, last))
        hops.append(Hop(hop.source, hop.keys, visible))
    return replace(whole, hops=tuple(hops))


def _ends(local_k_slice: slice, before: int, total: int) -> tuple[int, int]:
    """Start and stop of the slice, in a sequence of `total` positions of which this rank's begin at `before`."""
    try:
        start, stop = operator.index(local_k_slice.start), operator.index(local_k_slice.stop)
    except (AttributeError, TypeError):
        raise ValueError(f"local_k_slice: wanted a slice of two integers, got {local_k_slice!r}") from None
    if local_k_slice.step not in (None, 1) or not 0 <= start <= before or not start <= stop <= total:
        raise ValueError(
            f"local_k_slice: wanted one that starts at this rank's first position {before} or before and stops at "
            f"{total} or before, got {local_k_slice}"
        )
    return start, stop


_RECENT: Recent[Plan] = Recent()
