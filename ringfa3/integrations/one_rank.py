"""attn_implementation="ringfa3" on one rank: what transformers asks of a mask and of an attention, by our kernels.

A mask is two bounds a row (a View) instead of S x S booleans; attention is one differentiable operation over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ringfa3.flash_attn import operation
from ringfa3.integrations.words import check, packing, rows_first, rules
from ringfa3.mask import Mask
from ringfa3_kernels import Visible

Ints = NDArray[np.int64]
STATIC = "past_key_values: wanted a cache that grows, as DynamicCache, got a static one"


class View:
    """What the rows of one kind of layer see; it travels through the model in the place of an attention mask.

    No dataclass: FSDP's mixed precision takes those apart, among the arguments of every layer, and casts their tensors.

    Args:
        mask: causality, window and chunk of the layers.
        visible: which of the keys that layers get each row sees: new ones and a cache's, without padding.
        keys: how many keys those are.
        whole: rows that begin a sequence which counts as one document until `attention` has seen its position_ids:
            not every model's mask does, and none with a cache.
        runs: begin and end of what is not padding, [B, 2]; None where nothing is padded.
    """

    def __init__(self, mask: Mask, visible: Visible, keys: int, whole: bool, runs: Ints | None = None) -> None:
        self.mask, self.visible, self.keys, self.whole, self.runs = mask, visible, keys, whole, runs

    def contiguous(self) -> View:
        """Raises ValueError: generate() asks this of masks for passes that it compiles, over a static cache."""
        raise ValueError(STATIC)

    @property
    def ndim(self) -> int:
        """Raises ValueError, as `contiguous`: older transformers (5.17) give the model such a mask, which asks this."""
        raise ValueError(STATIC)


def see(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    device: Any,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **_others: Any,
) -> View:
    """What transformers calls for every kind of layer's mask. Synchronises the device where something is padded.

    Args:
        q_length, q_offset: rows, and the position of the first.
        kv_length, kv_offset: keys, and the position of the first (a cache of a window has forgotten what is before).
        attention_mask: bool [B, positions so far], False where padded, or None.
        _others: permissions to skip a simple mask, and sizes that mask_function implies.

    Raises:
        ValueError: a row would not see one interval of keys, or the cache is a static one; says why.
    """
    begin, end = int(q_offset), int(q_offset) + q_length
    mask = Mask(**rules(mask_function))
    seqlen = kv_offset + kv_length
    if mask.causal and seqlen != end:
        raise ValueError(
            f"past_key_values: wanted keys up to the last of the rows, {end}, as DynamicCache has them, got {seqlen} "
            "(a static cache?)"
        )
    packed = packing(mask_function)
    runs = None if attention_mask is None else _unpadded(attention_mask, seqlen)
    plain = packed is None and runs is None
    whole = packed is None and begin == 0 and q_length > 1
    if plain and mask.full:
        return View(mask, Visible.full(q_length, kv_length, device), kv_length, whole)
    if plain and mask == Mask():
        return View(mask, Visible.causal(q_length, kv_length, device), kv_length, whole)
    documents: Any = None
    if packed is not None:
        documents = _packed_documents(*packed, chunk=mask.chunk)
    elif runs is not None and mask.chunk is not None:  # chunks are counted from where the padding ends
        documents = tuple((first, seqlen - first) for first, _ in runs.tolist())
    lo, hi = _bounds(mask, documents, np.arange(begin, end), seqlen)
    if runs is not None:
        lo, hi = np.maximum(lo, runs[:, :1]), np.minimum(hi, runs[:, 1:])
    lo, hi = (np.clip(x - kv_offset, 0, kv_length) for x in (lo, hi))
    return View(mask, _visible(lo, hi, device), kv_length, whole, runs)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: View | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: q [B, H, Sq, D], k and v [B, H, Sk, D] -> out [B, Sq, H, D].

    Raises:
        ValueError: something was asked for that would have to be ignored (dropout, head masks, biases, attention
            weights, masks that are tensors); names it.
        Unsupported: as `ringfa3_kernels.attend`.
    """
    causal = kwargs.pop("is_causal", None)
    if attention_mask is None:  # encoders of images and sounds make no mask
        attention_mask = _unmasked(module, causal, sliding_window, query.shape[2], key.shape[2], query.device)
    if not isinstance(attention_mask, View):
        raise ValueError(
            f"attention_mask: wanted [B, S] of 0 and 1, or None, so that the model makes its mask with "
            f"transformers.masking_utils, got {type(attention_mask).__name__} in {type(module).__name__}"
        )
    check(attention_mask.mask, dropout=dropout, sliding_window=sliding_window, is_causal=causal, others=kwargs)
    if key.shape[2] != attention_mask.keys:
        raise ValueError(f"key: wanted the mask's {attention_mask.keys} rows, got {key.shape[2]}")
    if attention_mask.whole and kwargs.get("position_ids") is not None:
        _notice_documents(attention_mask, kwargs["position_ids"], kwargs.get("use_cache"))
    q, k, v = rows_first(query, key, value)
    D, Dv = q.shape[3], v.shape[3]
    if Dv != D:  # zeros add nothing to a score, and their columns of out are cut off
        scaling = D**-0.5 if scaling is None else scaling
        q, k, v = (F.pad(x, (0, max(D, Dv) - x.shape[3])) for x in (q, k, v))
    out, lse = operation.attention(
        q, k, v, attention_mask.visible, softmax_scale=scaling, softcap=softcap or 0.0, deterministic=False
    )
    if s_aux is not None:  # a key with this score and value 0
        share = torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None]).transpose(1, 2).unsqueeze(-1)
        out = (out * share).to(q.dtype)
    return out[..., :Dv], None


def _bounds(mask: Mask, documents: Any, rows: Ints, seqlen: int) -> tuple[Any, Any]:
    """Positions that each row sees, [Sq] or [B, Sq]; rows of cross attention are no positions, and see all."""
    if mask.full and documents is None:
        return np.zeros_like(rows), np.full_like(rows, seqlen)
    return Mask(mask.causal, mask.window, documents, None, mask.chunk).bounds(rows, seqlen)


def _visible(lo: Any, hi: Any, device: Any) -> Visible:
    """The bounds on the device, once where all batch rows have the same."""
    if lo.ndim == 2 and (lo == lo[0]).all() and (hi == hi[0]).all():
        lo, hi = lo[0], hi[0]
    begin, end = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (lo, hi))
    return Visible(begin, end)


def _unpadded(padding: Tensor, seqlen: int) -> Ints | None:
    """Begin and end of each batch row's run of ones: [B, 2]; None where nothing is padded.

    Raises:
        ValueError: a row's ones are not one run.
    """
    host = padding[:, :seqlen].bool().cpu().numpy()
    if host.all() and host.shape[1] == seqlen:
        return None
    host = np.pad(host, ((0, 0), (0, seqlen - host.shape[1])))  # as transformers: what it does not reach is padding
    edges = np.diff(host.astype(np.int8), axis=1, prepend=0)
    if ((edges == 1).sum(1) > 1).any():
        b = int(np.argmax((edges == 1).sum(1) > 1))
        raise ValueError(f"attention_mask: wanted the ones of a row in one run, got zeros between them in row {b}")
    begin, count = np.argmax(host, axis=1), host.sum(1)
    return np.stack([begin, begin + count], 1)


def _packed_documents(numbers: Tensor, positions: Tensor | None, *, chunk: int | None) -> tuple[tuple[int, ...], ...]:
    """Documents as `Mask` has them, from each row's number and position in its document (None: not known), [B, S]."""
    begins = np.diff(numbers.cpu().numpy(), axis=1, prepend=-1) != 0
    if chunk is not None:
        if positions is None:
            raise ValueError(
                "position_ids: wanted no packed documents where layers see chunks, with this version of transformers, "
                "got some"
            )
        if positions.cpu().numpy()[begins].any():
            raise ValueError("position_ids: wanted documents that begin at 0 where layers see chunks, got others")
    return tuple(tuple(np.diff([*np.flatnonzero(row), row.size]).tolist()) for row in begins)


def _notice_documents(view: View, position_ids: Tensor, use_cache: bool | None) -> None:
    """Let the view's rows see their own documents only, where position_ids [1 or B, S] restart. Synchronises.

    Raises:
        ValueError: they do, and a cache is filled: nobody could tell which document the tokens after it continue; or
            they do beside padding, where no other attention would keep the documents apart.
    """
    view.whole = False  # the layers after this one get the same position_ids
    restarts = position_ids.diff(dim=-1) != 1
    if position_ids.ndim == 2 and view.runs is not None:  # in the padding, and at its edges, ids are nobody's business
        begin, end = torch.from_numpy(view.runs).to(restarts.device).unsqueeze(-1).unbind(1)
        row = torch.arange(1, position_ids.shape[1], device=restarts.device)
        if bool((restarts & (row > begin) & (row < end)).any()):
            raise ValueError(
                "attention_mask: wanted ones where position_ids restart (make the padding a document), got zeros"
            )
        return
    if position_ids.ndim != 2 or not bool(restarts.any()):
        return
    if use_cache is not False:
        raise ValueError(
            "use_cache: wanted False where position_ids restart, as tokens after a cache of packed documents could "
            f"continue any of them, got {use_cache}"
        )
    documents = _packed_documents(F.pad(restarts, (1, 0)).cumsum(1), position_ids, chunk=view.mask.chunk)
    lo, hi = _bounds(view.mask, documents, np.arange(view.keys), view.keys)
    view.visible = _visible(lo, hi, view.visible.device)


def _unmasked(
    module: torch.nn.Module, causal: bool | None, window: int | None, Sq: int, Sk: int, device: torch.device
) -> View:
    """The View where a model made no mask: what is_causal says, of the call or else of the layer.

    Raises:
        ValueError: neither says it, or rows and keys are not of one sequence.
    """
    causal = getattr(module, "is_causal", None) if causal is None else causal
    if causal is None or window is not None:
        raise ValueError(
            f"attention_mask: wanted one, made by transformers.masking_utils, where a layer does not say is_causal or "
            f"has a sliding_window, got None in {type(module).__name__}"
        )
    if causal and Sq != Sk and Sq != 1:
        raise ValueError(f"key: wanted the query's {Sq} rows where there is no attention_mask, got {Sk}")
    see_all = not causal or Sq == 1
    visible = Visible.full(Sq, Sk, device) if see_all else Visible.causal(Sq, Sk, device)
    return View(Mask(causal=bool(causal)), visible, Sk, whole=False)
