"""flash_attn_with_kvcache: new tokens are written into a cache, plain or in pages, and attend to all that is in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringfa3.entrance import checked_flag
from ringfa3.flash_attn.operation import check_shapes, sides
from ringfa3.flash_attn.paged import check_block_table, check_pages, decodes, read_pages
from ringfa3.flash_attn.places import at_end
from ringfa3.flash_attn.rotary import check_tables, rotate
from ringfa3.places import check_alibi
from ringfa3_kernels import Visible, attend, decode
from ringfa3_kernels.decode_door import MOST_ROWS, MOST_SPLITS
from ringfa3_kernels.door import check_scalars

PAGE = 256  # keys of a page, where a plain cache is read as if it had pages: as flash-attn's, so kernels are shared


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q over the first cache_seqlens keys of the cache and, where given, the new keys after them.

    New k and v are written into the cache, in place, from index cache_seqlens of each sequence on. Rows stand at the
    end of all keys (bottom-right alignment). No gradients. On a GPU nothing is read back, so a CUDA graph can hold it;
    then that lengths fit the cache and pages exist is the caller's promise.

    Args:
        q: [B, Sq, Hq, D].
        k_cache, v_cache: [cache_batch, capacity, Hkv, D], or with a block table pages [P, page, Hkv, D]; q's dtype,
            head_dim contiguous. What lies past a sequence's length may be anything. With at most 16 rows of q, plain
            caches whose capacity is a multiple of 16, and pages of a power of two from 16 on, are read where they lie;
            others are copied first (not those of one length for all, an int, which are read where they lie too).
        k, v: [B, n, Hkv, D], or None.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2], a row for each key that the cache has room for; beside k
            and v only. k is turned by cache_seqlens, cache_seqlens + 1, ..., and so is q with causal or a window;
            without either q is turned by cache_seqlens.
        cache_seqlens: keys in the cache, an int or int [B]. None: it is full.
        cache_batch_idx: int [B], which sequence of the cache is each of q's; None: the first is the first, and so on.
        cache_leftpad: int [B], the first key of each sequence that counts.
        block_table: int32 [B, blocks].
        softmax_scale, causal, window_size, softcap, alibi_slopes: as `flash_attn_func`. With slopes the cache is copied
            first, however it lies.
        rotary_interleaved: see `rotary.rotate`.
        num_splits: a matter of speed: into how many parts a sequence's keys are split where q has at most 16 rows; 0:
            chosen from the shapes.
        return_softmax_lse: also return softmax_lse.

    Returns:
        out [B, Sq, Hq, D] in q's dtype, or (out, softmax_lse fp32 [B, Hq, Sq]). Rows that see nothing have out 0 and
        softmax_lse -inf.

    Raises:
        ValueError, Unsupported: as `flash_attn_func`; before anything is written.
    """
    left, right = sides(window_size, causal)
    rotary_interleaved = checked_flag("rotary_interleaved", rotary_interleaved)
    return_softmax_lse = checked_flag("return_softmax_lse", return_softmax_lse)
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits: wanted an integer of at least 0, got {num_splits!r}")
    _check_caches(q, k_cache, v_cache, k, v)
    check_scalars(softmax_scale, softcap, q.shape[3])
    alibi = check_alibi(alibi_slopes, q)
    B, Sq = q.shape[:2]
    capacity = k_cache.shape[1]
    if block_table is not None:
        check_block_table(block_table, q, B)
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx: wanted None beside block_table, which says where sequences lie, got one")
        capacity *= block_table.shape[1]
    # a plain cache is one of pages that are as long as it is, one a sequence
    plain = block_table is None
    table = _batch_index(cache_batch_idx, q, k_cache.shape[0])[:, None] if block_table is None else block_table
    new = 0 if k is None else k.shape[1]
    lengths = _lengths(cache_seqlens, capacity, new, q)
    totals = lengths + new
    leftpad = _whole("cache_leftpad", cache_leftpad, q, totals)
    check_pages(table, totals, *k_cache.shape[:2])
    if rotary_cos is not None or rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos: wanted None where no k and v are given, as flash-attn has it, got one")
        check_tables(rotary_cos, rotary_sin, q, capacity)
    with torch.no_grad():
        if k is not None and v is not None:
            positions = lengths[:, None].long() + torch.arange(new, device=q.device)
            if rotary_cos is not None and rotary_sin is not None:
                steps = torch.arange(Sq if (left, right) != (-1, -1) else 1, device=q.device)
                q = rotate(q, rotary_cos, rotary_sin, lengths[:, None].long() + steps, interleaved=rotary_interleaved)
                k = rotate(k, rotary_cos, rotary_sin, positions, interleaved=rotary_interleaved)
            _append(k_cache, v_cache, k, v, positions, table)
        visible = _visible(totals, leftpad, Sq, left, right, capacity)
        options: dict[str, Any] = {"scale": softmax_scale, "softcap": softcap}
        pages = _pages(k_cache, v_cache, table, plain=plain) if Sq <= MOST_ROWS and alibi is None else None
        if pages is not None:
            splits = min(num_splits * B, MOST_SPLITS) or None
            partial = decode(q, *pages, visible, splits=splits, **options)
        else:
            if isinstance(cache_seqlens, int) and plain and cache_batch_idx is None and cache_leftpad is None:
                keys, values = (x[:, : cache_seqlens + new] for x in (k_cache, v_cache))  # nothing to copy or to clean
            else:
                keys, values = (read_pages(x, table, leftpad, totals) for x in (k_cache, v_cache))
            at = None if alibi is None else at_end(totals, Sq, keys.shape[1])
            partial = attend(q, keys, values, visible, out_dtype=q.dtype, positions=at, alibi=alibi, **options)
    out = partial.out.to(q.dtype)
    return (out, partial.lse) if return_softmax_lse else out


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    """Raise ValueError unless shapes, dtypes and devices go together and nothing asks for gradients."""
    check_shapes("[B, S, H, D]", q=q, k_cache=k_cache, v_cache=v_cache)
    if (k is None) != (v is None):
        name, other = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{name}: wanted a Tensor beside {other}, got None")
    if not k_cache.shape[1]:
        raise ValueError(f"k_cache: wanted room for at least one key, got shape {list(k_cache.shape)}")
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache: wanted k_cache's shape {list(k_cache.shape)}, got {list(v_cache.shape)}")
    new = {"k": k, "v": v} if k is not None and v is not None else {}
    for name, x in new.items():
        check_shapes("[B, S, H, D]", **{name: x})
        wanted = [q.shape[0], new["k"].shape[1], *k_cache.shape[2:]]
        if list(x.shape) != wanted:
            raise ValueError(f"{name}: wanted shape {wanted}, got {list(x.shape)}")
    for name, x in ({"k_cache": k_cache, "v_cache": v_cache} | new).items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: wanted q's {q.dtype} on {q.device}, got {x.dtype} on {x.device}")
    for name, x in ({"q": q, "k_cache": k_cache, "v_cache": v_cache} | new).items():
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: wanted no requires_grad outside torch.no_grad(), as a cache has no gradient")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(3) != 1:
            raise ValueError(f"{name}: wanted head_dim contiguous, got strides {x.stride()}")
    if q.shape[3] != k_cache.shape[3] or not k_cache.shape[2] or q.shape[2] % k_cache.shape[2]:
        raise ValueError(
            f"q: wanted k_cache's head_dim {k_cache.shape[3]} and a multiple of its {k_cache.shape[2]} heads, "
            f"got shape {list(q.shape)}"
        )
    if q.shape[3] % 8 or not 8 <= q.shape[3] <= 256:
        raise ValueError(f"q: wanted a head_dim that is a multiple of 8 from 8 to 256, got {q.shape[3]}")


def _lengths(cache_seqlens: int | Tensor | None, capacity: int, new: int, q: Tensor) -> Tensor:
    """Keys in the cache, int32 [B]; there must be room for `new` more."""
    room = capacity - new
    if cache_seqlens is None:
        if new:
            raise ValueError("cache_seqlens: wanted it beside k and v, to know where they go, got None")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int):
        if isinstance(cache_seqlens, bool) or not 0 <= cache_seqlens <= room:
            raise ValueError(f"cache_seqlens: wanted 0 to {capacity} - {new} new keys, got {cache_seqlens}")
        return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    lengths = _whole("cache_seqlens", cache_seqlens, q)
    if lengths.device.type == "cpu" and lengths.numel() and int(lengths.max()) > room:
        raise ValueError(f"cache_seqlens: wanted at most {capacity} - {new} new keys, got {int(lengths.max())}")
    return lengths


def _whole(name: str, x: Tensor | None, q: Tensor, most: Tensor | None = None) -> Tensor:
    """x as int32 [B], zeros for None; where it is on the CPU it must lie in [0, most]."""
    if x is None:
        return torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
    if not isinstance(x, Tensor) or x.shape != q.shape[:1] or x.dtype not in (torch.int32, torch.int64):
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
        raise ValueError(f"{name}: wanted torch.int32 [{q.shape[0]}], got {got}")
    if x.device != q.device:
        raise ValueError(f"{name}: wanted q's device {q.device}, got {x.device}")
    if x.device.type == "cpu" and bool(((x < 0) | (x > (x if most is None else most))).any()):
        limit = "" if most is None else f" and at most {most.tolist()}"
        raise ValueError(f"{name}: wanted at least 0{limit}, got {x.tolist()}")
    return x.int()


def _batch_index(cache_batch_idx: Tensor | None, q: Tensor, sequences: int) -> Tensor:
    """Which sequence of the cache each of q's is: int32 [B]."""
    if cache_batch_idx is None:
        if sequences != q.shape[0]:
            raise ValueError(
                f"k_cache: wanted q's batch size {q.shape[0]} (another takes cache_batch_idx), got {sequences}"
            )
        return torch.arange(sequences, dtype=torch.int32, device=q.device)
    last = torch.full(q.shape[:1], sequences - 1, device=q.device)
    return _whole("cache_batch_idx", cache_batch_idx, q, last)


def _append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> None:
    """Write k and v [B, n, Hkv, D] at positions int64 [B, n] of the sequences whose pages table [B, blocks] names."""
    page = k_cache.shape[1]
    number = table.long().gather(1, positions // page)
    number = torch.where(number < 0, k_cache.shape[0], number)  # out of range, an error: -1 would be the last page
    at = (number, positions % page)
    k_cache.index_put_(at, k)
    v_cache.index_put_(at, v)


def _visible(totals: Tensor, leftpad: Tensor, Sq: int, left: int, right: int, capacity: int) -> Visible:
    """Bounds [B, Sq] of rows at the end of each sequence's keys, which are leftpad <= j < totals."""
    stop, start = totals[:, None], leftpad[:, None]
    p = stop - Sq + torch.arange(Sq, dtype=torch.int32, device=totals.device)
    lo, hi = start.expand_as(p), stop.expand_as(p)
    if left >= 0:
        lo = torch.minimum(torch.maximum(p - min(left, capacity), start), stop)
    if right >= 0:
        hi = torch.minimum(torch.maximum(p + (min(right, Sq) + 1), start), stop)
    return Visible(lo.contiguous(), hi.contiguous())


def _pages(k_cache: Tensor, v_cache: Tensor, table: Tensor, *, plain: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """The caches and their table as `decode` reads them on any device, without a copy; None: it could not.

    Args:
        plain: pages are whole sequences: they are cut into shorter ones, which table then counts.
    """
    capacity = k_cache.shape[1]
    page = min(capacity & -capacity, PAGE)  # the largest power of two that divides it
    if plain and page < capacity:
        if any(x.shape[0] > 1 and x.stride(0) != capacity * x.stride(1) for x in (k_cache, v_cache)):
            return None  # sequences do not lie one after the other: pages would not be one view
        parts = capacity // page
        table = table * parts + torch.arange(parts, dtype=torch.int32, device=table.device)
        k_cache, v_cache = (x.unflatten(1, (parts, page)).flatten(0, 1) for x in (k_cache, v_cache))
    return (k_cache, v_cache, table) if decodes(k_cache) and decodes(v_cache) else None
