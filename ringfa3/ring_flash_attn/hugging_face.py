"""Hugging Face models whose flash attention runs over ring-flash-attn's layout: packed documents, cut where ranks meet.

substitute_hf_flash_attn replaces transformers' flash attention for the whole process, as ring-flash-attn's does;
update_ring_flash_attn_params says, before every step, what documents the packed sequence is of.
`ringfa3.integrations.transformers` does more, for one model at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from ringfa3.attention import ring_attention
from ringfa3.entrance import checked_flag
from ringfa3.mask import Mask
from ringfa3.ring_flash_attn.call import heard
from ringfa3.ring_flash_attn.varlen import host_lengths
from ringfa3.shards import Group, members

Attend = Callable[..., Any]


@dataclass
class _Now:
    """What the process's models run over. No context variable: checkpointing recomputes on other threads."""

    group: Group = None
    documents: tuple[int, ...] | None = None
    on: bool = True
    substituted: bool = False


_NOW = _Now()


def substitute_hf_flash_attn(process_group: Group, heads_k_stride: int) -> None:
    """From now on, in this process, transformers' flash attention attends to the whole sequence of the group.

    It serves every attn_implementation whose name begins with "flash_attention", and models that call
    `_flash_attention_forward` themselves. Each rank gives the model its piece, ids.chunk(world, dim=1)[rank], of one
    packed sequence (batch size 1), with position_ids dealt alike. Calling it again changes the group.

    Args:
        process_group: a ProcessGroup or a DeviceMesh.
        heads_k_stride: nothing depends on it; see `llama3_flash_attn_varlen_func`.

    Raises:
        ValueError: heads_k_stride is not a positive integer, or this process is not in the group.
    """
    from transformers import modeling_flash_attention_utils as flash
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not isinstance(heads_k_stride, int) or heads_k_stride < 1:
        raise ValueError(f"heads_k_stride: wanted a positive integer, got {heads_k_stride!r}")
    members(process_group)
    _NOW.group = process_group
    if _NOW.substituted:
        return
    _NOW.substituted = True
    for name in [name for name in ALL_ATTENTION_FUNCTIONS if "flash_attention" in name]:
        ALL_ATTENTION_FUNCTIONS[name] = _layer(ALL_ATTENTION_FUNCTIONS[name])
    flash._flash_attention_forward = _function(flash._flash_attention_forward)


def update_ring_flash_attn_params(cu_seqlens: Tensor, process_group: Group) -> None:
    """Say what documents the next passes are of, on every rank alike.

    Args:
        cu_seqlens: int32 [documents + 1] of the whole packed sequence, whose length is a multiple of the world.
        process_group: the one that was substituted.

    Raises:
        ValueError: cu_seqlens are wrong.
    """
    documents = host_lengths(cu_seqlens)
    world = members(process_group)[1]
    if sum(documents) % world:
        raise ValueError(f"cu_seqlens: wanted a multiple of {world} ranks at the end, got {sum(documents)}")
    _NOW.documents = documents


def use_ring_attn(flag: bool) -> None:
    """False: transformers' own functions serve, until True is said again (for a pass that is not sharded)."""
    _NOW.on = checked_flag("flag", flag)


def _layer(own: Attend) -> Attend:
    """What layers call through transformers' AttentionInterface, q, k, v [B, H, S, D], in the place of `own`."""

    @wraps(own)
    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        if not _NOW.on:
            return own(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("is_causal") is None:
            kwargs["is_causal"] = module.is_causal
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return _attend(
            q, k, v, attention_mask=attention_mask, softmax_scale=kwargs.pop("scaling", None), **kwargs
        ), None

    return attention


def _function(own: Attend) -> Attend:
    """transformers' `_flash_attention_forward`, q, k, v [B, S, H, D]."""
    signature = inspect.signature(own)

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not _NOW.on:
            return own(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        q, k, v = (given.pop(f"{name}_states") for name in ("query", "key", "value"))
        return _attend(q, k, v, **given.pop("kwargs", {}), **given)

    return forward


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attention_mask: Any,
    is_causal: bool,
    query_length: int | None = None,
    dropout: float = 0.0,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    use_top_left_mask: bool = False,
    softcap: float | None = None,
    deterministic: bool | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Attention of this rank's rows [1, n, H, D] over the whole packed sequence, as transformers asks for it.

    A sliding window of w is what transformers means by it: a row and the w - 1 before it.

    Raises:
        ValueError, Unsupported: something was asked for that would have to be ignored; names it.
    """
    from ringfa3.integrations.transformers import HARMLESS

    known = HARMLESS | {"target_dtype", "attn_implementation", "layer_idx"}  # fp32 needs no cast here
    with heard(_NOW.group):
        if _NOW.documents is None:
            raise ValueError("cu_seqlens: wanted update_ring_flash_attn_params before the first pass, got none")
        if attention_mask is not None:
            raise ValueError("attention_mask: wanted None (make padding a document of cu_seqlens), got a mask")
        if q.shape[0] != 1:
            raise ValueError(f"q: wanted batch size 1, one packed sequence, got {q.shape[0]}")
        if k.shape[1] != q.shape[1] or query_length not in (None, q.shape[1]):
            raise ValueError(f"k: wanted q's {q.shape[1]} rows (no cache, no cross attention), got {k.shape[1]}")
        if use_top_left_mask:
            raise ValueError("use_top_left_mask: wanted False, got True")
        deterministic = deterministic is not None and checked_flag("deterministic", deterministic)
        for name, given in others.items():
            if name not in known and given is not None and given is not False:
                raise ValueError(f"{name}: wanted none (it would be ignored), got {type(given).__name__}")
        mask = _mask(checked_flag("is_causal", is_causal), sliding_window, _NOW.documents)
    return ring_attention(  # type: ignore[no-any-return]
        q, k, v, mask=mask, layout="contiguous", group=_NOW.group, scale=softmax_scale, softcap=softcap or 0.0,
        sink_logits=s_aux, deterministic=deterministic, dropout_p=dropout,
    )  # fmt: skip


@lru_cache(maxsize=16)  # a few kinds of layers; a mask of thousands of documents takes a millisecond to check
def _mask(causal: bool, sliding_window: int | None, documents: tuple[int, ...]) -> Mask:
    reach = -1 if sliding_window is None else sliding_window - 1
    return Mask(causal, (reach, 0 if causal else reach), documents or None)
