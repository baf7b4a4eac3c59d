"""The door of decode, a few new tokens a sequence against a paged cache: arguments are checked here, once."""

from __future__ import annotations

import torch
from torch import Tensor

from ringfa3_kernels import dispatch, paged
from ringfa3_kernels.call import Call
from ringfa3_kernels.door import DTYPES, check_scalars, check_visible, is_aligned, own_precision, state_dtype
from ringfa3_kernels.types import Partial, Visible

MOST_ROWS = 16  # new tokens of a sequence in one call
MOST_SPLITS = 1024


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    visible: Visible,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    splits: int | None = None,
    impl: str = "auto",
) -> Partial:
    """Attention of the newest tokens of each sequence over its keys in a paged cache, as a Partial to be merged.

    Keys of a sequence are counted in the order of its row of the block table: key j lies in page
    block_table[b, j // page] at j % page. From the first to the last key that any row of a sequence sees they are
    read; nothing else is, so that there the table may hold -1 and pages may hold anything.

    On a GPU it neither synchronises nor launches anything that depends on the tensors' values: a CUDA graph can hold
    it, and serves all lengths that fit the block table.

    Args:
        q: [B, Sq, Hq, D] bf16, fp16, fp32 (fp64: reference and aten only); Sq from 1 to 16.
        k_pages, v_pages: [P, page, Hkv, D], q's dtype and device; any strides, head_dim contiguous. Hq a multiple of
            Hkv.
        block_table: int32 [B, blocks], numbers of pages. Where they are on a GPU, that they lie in [0, P) for the keys
            that are read is the caller's promise.
        visible: bounds [B, Sq] (or [Sq], the same for all sequences) in local keys, at most blocks * page.
        scale: factor on q.k before the softmax; None: D ** -0.5.
        softcap: where not 0, scores become softcap * tanh(score / softcap).
        splits: pieces that the keys of the whole batch are cut into, for each key/value head, each sequence by its
            length and none without a piece; None: chosen from the shapes and the device. A matter of speed and
            rounding only; aten and reference have no use for it.
        impl: "auto", or the name of one implementation, which then never falls back.

    Returns:
        Partial: out fp32 [B, Sq, Hq, D], lse fp32 [B, Hq, Sq] (fp64 for fp64 inputs); rows that see no key have out 0
        and lse -inf.

    Raises:
        ValueError: an argument is wrong; names it, what was wanted and what came.
        Unsupported: the named implementation (or, for "auto", every one) lacks something this call needs.
    """
    check_pages(q, k_pages, v_pages)
    B, Sq, Hq, D = q.shape
    pages, page, Hkv, _ = k_pages.shape
    _check_table(block_table, q)
    Sk = block_table.shape[1] * page
    if visible is None:
        raise ValueError("visible: wanted a Visible, got NoneType")
    visible = check_visible(visible, q, Sk)
    scale, softcap = check_scalars(scale, softcap, D)
    if splits is not None and (type(splits) is not int or not 1 <= splits <= MOST_SPLITS):
        raise ValueError(f"splits: wanted None or a whole number from 1 to {MOST_SPLITS}, got {splits!r}")
    call = Call(
        direction="decode",
        device=q.device.type,
        capability=dispatch.capability(q.device),
        dtype=q.dtype,
        B=B,
        Sq=Sq,
        Sk=Sk,
        Hq=Hq,
        Hkv=Hkv,
        D=D,
        batched_visible=visible.lo.ndim == 2,
        softcap=softcap != 0,
        into=False,
        out_dtype=state_dtype(q.dtype),
        accumulate=False,
        deterministic=True,
        aligned=is_aligned(k_pages) and is_aligned(v_pages),
        page=page,
    )
    chosen = dispatch.choose(call, impl)
    if Sk == 0 or q.numel() == 0:
        return Partial.empty(q)
    if block_table.device.type == "cpu":  # elsewhere it would synchronise
        paged.check_numbers(block_table, visible, pages, page)
    with own_precision(q):
        result: Partial = chosen.decode(
            q, k_pages, v_pages, block_table, visible, scale=scale, softcap=softcap, splits=splits
        )
    return result


def check_pages(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """Raise ValueError unless q [B, Sq, Hq, D] and k_pages, v_pages [P, page, Hkv, D] go together."""
    named = (("q", q), ("k_pages", k_pages), ("v_pages", v_pages))
    for (name, x), shape in zip(named, ("[B, S, H, D]", *["[P, page, H, D]"] * 2), strict=True):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: wanted a Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name}: wanted 4 dimensions {shape}, got shape {list(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: wanted no requires_grad outside torch.no_grad(), as decode records no gradient")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: wanted dtype bfloat16, float16, float32 or float64, got {q.dtype}")
    if k_pages.shape != v_pages.shape:
        raise ValueError(f"v_pages: wanted k_pages' shape {list(k_pages.shape)}, got {list(v_pages.shape)}")
    for name, x in named[1:]:
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: wanted q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: wanted q's device {q.device}, got {x.device}")
        if x.shape[3] != q.shape[3]:
            raise ValueError(f"{name}: wanted q's head_dim {q.shape[3]}, got {x.shape[3]}")
        if x.stride(3) != 1:  # a copy, as attend makes one, would be one of the whole cache
            raise ValueError(f"{name}: wanted head_dim contiguous, got strides {x.stride()}")
    _, page, Hkv, D = k_pages.shape
    if page == 0 or Hkv == 0:
        raise ValueError(f"k_pages: wanted at least one key a page and one head, got shape {list(k_pages.shape)}")
    if q.shape[2] % Hkv:
        raise ValueError(f"q: wanted a number of heads that is a multiple of k_pages' {Hkv}, got {q.shape[2]}")
    if not 8 <= D <= 256 or D % 8:
        raise ValueError(f"q: wanted a head_dim that is a multiple of 8 from 8 to 256, got {D}")
    if q.shape[1] > MOST_ROWS:
        raise ValueError(f"q: wanted at most {MOST_ROWS} rows a sequence, got {q.shape[1]}: `attend` is for more")


def _check_table(block_table: Tensor, q: Tensor) -> None:
    if not isinstance(block_table, Tensor):
        raise ValueError(f"block_table: wanted a Tensor, got {type(block_table).__name__}")
    if block_table.ndim != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table: wanted shape [{q.shape[0]}, blocks], got {list(block_table.shape)}")
    if block_table.dtype != torch.int32 or block_table.device != q.device:
        raise ValueError(
            f"block_table: wanted torch.int32 on {q.device}, got {block_table.dtype} on {block_table.device}"
        )
