"""Hugging Face transformers: attn_implementation="ringfa3", and models that run over a sequence sharded across ranks.

Importing this module registers the name; a model then has our attention on one rank, for training and generation:

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="ringfa3")

    plan = ringfa3.plan(Mask(), "zigzag", seqlen)
    with sequence_parallel(model, plan):  # over the ranks of a group, whatever the model's attention was
        out = model(input_ids=plan.shard(ids), shift_labels=plan.labels(ids))

The way of a layer's attention: transformers asks the registered mask function for each kind of layer's mask and gets a
Sight (no S x S tensor), hands it to every layer as its attention_mask, and the layer hands it to `attention`. On one
rank it is a View, and `one_rank.attention`; `context_parallel` shards and weighs the loss as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ringfa3.attention import ring_attention
from ringfa3.fp8 import Fp8
from ringfa3.integrations import one_rank
from ringfa3.integrations.compiled import Now, check_compiled, special
from ringfa3.integrations.sharded_cache import ShardedCache, attend_sharded
from ringfa3.integrations.words import (
    HARMLESS,
    check,
    check_call,
    check_layers,
    check_rotary,
    check_rows,
    check_temperature,
    has_loss_function,
    implementations,
    padding_documents,
    rows_first,
    rules,
)
from ringfa3.mask import Mask
from ringfa3.plan import Plan
from ringfa3.plan import plan as make_plan
from ringfa3_kernels import Visible

__all__ = [
    "HARMLESS",
    "NAME",
    "SHARDED",
    "Call",
    "ShardedCache",
    "Sight",
    "attention",
    "padding_documents",
    "rules",
    "sequence_parallel",
]

NAME = "ringfa3"  # the attn_implementation on one rank
SHARDED = "ringfa3_sequence_parallel"  # what models have within sequence_parallel


class Sight:
    """What the rows of one kind of layer see; it travels through the model in the place of an attention mask.

    No dataclass: FSDP's mixed precision takes those apart, among the arguments of every layer, and casts their tensors.

    Args:
        mask: the layers' own.
        plan: how the rows are sharded; in the prefill, with that mask.
        options: for `ring_attention`: transport, deterministic, impl, fp8.
        step: for tokens after the prefill, what they see of this rank's cached keys; else None.
    """

    def __init__(self, mask: Mask, plan: Plan, options: dict[str, Any], step: Visible | None = None) -> None:
        self.mask, self.plan, self.options, self.step = mask, plan, options, step


@contextmanager
def sequence_parallel(
    model: PreTrainedModel,
    plan: Plan,
    *,
    transport: str = "auto",
    deterministic: bool = False,
    impl: str = "auto",
    fp8: Fp8 | None = None,
) -> Iterator[None]:
    """Within, model(...) takes this rank's shard of a sequence, and every layer attends to the whole of it.

    Call the model itself, on every rank, with `input_ids=plan.shard(ids)` (or inputs_embeds). Of the other arguments

    - position_ids default to this rank's positions; given, they must be those, or restart with every document.
    - attention_mask is the padding of the whole sequence, [B, seqlen], on every rank; not sharded.
    - past_key_values is a `ShardedCache`; use_cache=True makes one. Once it is filled, input_ids are further tokens,
      the same on every rank and not sharded (without gradients).
    - labels are refused, since transformers would shift them within the shard: pass shift_labels=plan.labels(ids).
    - logits and hidden states are this rank's rows: the last position's are where `plan.positions` ends with
      seqlen - 1. logits_to_keep is refused, as it counts from the shard's end.
    - token_type_ids are this rank's as well, for models that embed them; other arguments are refused.

    The plan's mask says which documents are packed; causality, windows and chunks come from the model, layer by layer.
    A backward pass that recomputes (gradient checkpointing) belongs within as well.

    Args:
        model: any model that goes through transformers' AttentionInterface.
        plan: `ringfa3.plan(Mask(documents=...), layout, seqlen, group)`.
        transport, deterministic, impl: as `ring_attention` has them.
        fp8: as `ring_attention` has it, of every layer; tokens after the prefill read unrounded keys.

    Raises:
        ValueError: the plan holds what the model has to say, or the model cannot take another attention. Calls of the
            model raise it for every argument that could not be honoured, and name it.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: wanted a transformers.PreTrainedModel, got {type(model).__name__}")
    if plan.mask != Mask(plan.mask.causal, documents=plan.mask.documents) or plan.kv_seqlen != plan.seqlen:
        raise ValueError(f"plan: wanted a mask of documents alone, the rest is the model's to say, got {plan.mask}")
    check_rows(model)
    call = Call(model, plan, {"transport": transport, "deterministic": deterministic, "impl": impl, "fp8": fp8})
    before = implementations(model.config)
    model.set_attn_implementation(SHARDED)
    if model.config._attn_implementation != SHARDED:
        raise ValueError(f"model: wanted one that uses transformers' AttentionInterface, got {type(model).__name__}")
    hooks = (
        model.register_forward_pre_hook(call.begin, with_kwargs=True),
        model.register_forward_hook(call.end, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: q, k, v [B, H, S, D] of this rank's rows -> out [B, S, H, D].

    Raises:
        ValueError: something was asked for that would have to be ignored (dropout, head masks, biases, attention
            weights, another mask); names it.
    """
    if not isinstance(attention_mask, Sight):
        raise ValueError(
            f"attention_mask: wanted the model to make its mask with transformers.masking_utils, within "
            f"sequence_parallel, got {type(attention_mask).__name__} in {type(module).__name__}"
        )
    check(
        attention_mask.mask, dropout=dropout, sliding_window=sliding_window, is_causal=kwargs.pop("is_causal", None),
        others=kwargs,
    )  # fmt: skip
    q, k, v = rows_first(query, key, value)
    if attention_mask.step is not None:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            raise ValueError("past_key_values: wanted torch.no_grad() for tokens after the prefill, got gradients")
        options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sink_logits": s_aux}
        return attend_sharded(q, k, v, attention_mask.step, attention_mask.plan, **options), None
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"key: wanted the query's {q.shape[1]} rows (no cross attention), got {k.shape[1]}")
    plan = attention_mask.plan
    out = ring_attention(
        q,
        k,
        v,
        plan=plan,
        group=plan.group,
        scale=scaling,
        softcap=softcap or 0.0,
        sink_logits=s_aux,
        **attention_mask.options,
    )
    return out, None


class Call:
    """Forward passes of a model under a plan: from the arguments of one to its layers' Sights."""

    def __init__(self, model: PreTrainedModel, plan: Plan, options: dict[str, Any]) -> None:
        self.plan = plan
        self.options = options
        self.names = list(inspect.signature(model.forward).parameters)
        self.documents: Any = None  # of the pass under way: the plan's, or made from its padding
        self.cache: ShardedCache | None = None
        self.rows = 0
        self.step = False  # whether the pass follows the prefill
        self.compiled = Sight(plan.mask, plan, options)  # of every layer, where the whole model is compiled
        self.special: tuple[str, ...] = ()  # arguments of the pass that it would have to know of
        self.config = model.config
        if "position_ids" not in self.names:
            raise ValueError(f"model: wanted one that takes position_ids, got {type(model).__name__}")
        check_layers(model)
        if 0 in plan.lengths:  # models fail on empty shards, and then the other ranks would wait for theirs
            raise ValueError(f"plan: wanted positions for all {plan.world} ranks, got {plan.lengths} of them")
        self.heeds = has_loss_function(model)  # shift_labels
        self.typed = bool(getattr(model.config, "type_vocab_size", 0))  # token_type_ids are embedded row by row

    def begin(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Check the model's arguments and fill in what a shard needs; torch's forward pre-hook."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        x = given.get("input_ids")
        name = "input_ids" if x is not None else "inputs_embeds"
        x = given.get(name)
        if x is None:
            raise ValueError("input_ids: wanted them or inputs_embeds, got neither")
        check_call(model.config, given, also=("token_type_ids",) if self.typed else ())
        self.cache = self._cache(given)
        self.step = self.cache is not None and self.cache.seen > 0
        self.rows = x.shape[1]
        mine = self.plan.lengths[self.plan.rank]
        if not self.step and self.rows != mine:
            raise ValueError(
                f"{name}: wanted this rank's {mine} of {self.plan.seqlen} positions, plan.shard(...), got {self.rows}"
            )
        types = given.get("token_type_ids")
        if types is not None and types.shape != x.shape[:2]:
            raise ValueError(f"token_type_ids: wanted {name}'s rows, {list(x.shape[:2])}, got {list(types.shape)}")
        check_rotary(model.config, self.plan.seqlen)
        check_temperature(model.config, self._counted())
        padding = given.get("attention_mask")
        self.special = special(given)
        if torch.compiler.is_compiling():
            check_compiled(model.config, self.plan, self.special)
        self.documents = self._documents(padding, x.shape[0])
        positions_given = given.get("position_ids") is not None
        given["position_ids"] = self._positions(given.get("position_ids"), padding, x.device)
        given["attention_mask"] = None  # the Sights know
        if given.get("labels") is not None and given.get("shift_labels") is None:
            raise ValueError(
                "labels: wanted shift_labels=plan.labels(ids), which no rank shifts again, got labels alone"
            )
        if given.get("shift_labels") is not None:
            if not self.heeds:
                raise ValueError(
                    f"shift_labels: wanted a model whose loss is model.loss_function's (another shifts them again, "
                    f"within the shard), got {type(model).__name__}"
                )
            given["labels"] = given["shift_labels"]
        if self.cache is not None:
            self.cache.begin(self.rows, self.documents, positions_given)
        _NOW.set(self)
        return (), given

    def end(self, model: PreTrainedModel, args: Any, output: Any) -> None:
        """The forward pass is over, or (no output) has failed; torch's forward hook."""
        if _NOW.get() is self and self.cache is not None and output is None:
            self.cache.broken = True
        _NOW.set(None)

    def sight(self, function: Callable[..., Any], rows: int, device: torch.device) -> Sight:
        """How one kind of layer sees, from the function that is transformers' word for its mask."""
        if rows != self.rows:
            raise ValueError(f"q_length: wanted the model's {self.rows} rows, got {rows}: another sequence's mask")
        mask = Mask(documents=self.documents, **rules(function))
        if mask.causal != self.plan.mask.causal:
            raise ValueError(
                f"plan: wanted a mask with causal={mask.causal}, as the model's layers, got {self.plan.mask}"
            )
        if self.step:
            assert self.cache is not None
            return Sight(mask, self.plan, self.options, self.cache.visible(mask, rows, device))
        plan = make_plan(mask, self.plan.layout, self.plan.seqlen, self.plan.group, device=device)
        return Sight(mask, plan, self.options)

    def _counted(self) -> int:
        """The highest number of a position that a layer may come to which asks the cache where its rows begin."""
        if self.cache is None:
            return self.plan.seqlen
        return self.rows + (self.cache.seen + self.rows if self.step else self.plan.seqlen)

    def _cache(self, given: dict[str, Any]) -> ShardedCache | None:
        cache = given.get("past_key_values")
        if cache is None and given.get("use_cache"):
            cache = given["past_key_values"] = ShardedCache(self.plan)
        if cache is None:
            given["use_cache"] = False  # the config's default would fill a cache that knows nothing of other ranks
            return None
        if not isinstance(cache, ShardedCache):
            raise ValueError(f"past_key_values: wanted a ShardedCache or use_cache=True, got {type(cache).__name__}")
        if cache.broken:
            raise ValueError("past_key_values: wanted a cache whose passes all ended, got one in which a pass failed")
        if cache.plan is not self.plan:
            raise ValueError("past_key_values: wanted a ShardedCache of this plan, got another plan's")
        return cache

    def _documents(self, padding: Any, batch: int) -> Any:
        """Documents as `Mask` has them: the plan's, or each row's padding and what is between it."""
        if self.step:
            assert self.cache is not None
            if padding is not None:
                raise ValueError("attention_mask: wanted None after the prefill, whose padding is remembered, got one")
            return self.cache.documents
        if padding is None:
            return self.plan.mask.documents
        if not isinstance(padding, Tensor) or padding.shape != (batch, self.plan.seqlen):
            what = list(padding.shape) if isinstance(padding, Tensor) else type(padding).__name__
            raise ValueError(
                f"attention_mask: wanted the whole sequence's, [{batch}, {self.plan.seqlen}] of 0 and 1, got {what}"
            )
        documents = padding_documents(padding)
        if documents is None:
            return self.plan.mask.documents
        if self.plan.mask.documents is not None:
            raise ValueError(
                "attention_mask: wanted ones where the plan has documents (make the padding one), got zeros"
            )
        if self.cache is not None and not bool(padding[:, -1].all()):
            raise ValueError("attention_mask: wanted padding on the left where a cache is filled, got it on the right")
        return documents

    def _positions(self, given: Tensor | None, padding: Tensor | None, device: torch.device) -> Tensor:
        """position_ids of the pass, [1 or B, rows]: global, or restarting with every document if they were given so."""
        if given is None and padding is None and not self.step:
            return self.plan.positions[None].to(device)
        p, seqlen, documents = self.plan.dealing.positions(self.plan.rank), self.plan.seqlen, self.documents
        if self.step:
            assert self.cache is not None
            seqlen = self.cache.seen + self.rows
            p, documents = np.arange(self.cache.seen, seqlen), self.cache.continued(documents, seqlen)
        begins = Mask(causal=False, documents=documents).bounds(p, seqlen)[0]
        whole, restarted = (torch.from_numpy(x).long().to(device) for x in (p[None], np.atleast_2d(p - begins)))
        if given is None:
            if self.step and self.cache is not None and self.cache.positions_given and documents is not None:
                raise ValueError("position_ids: wanted them after the prefill too, where they were given, got None")
            return whole
        if given.ndim != 2 or given.shape[1] != self.rows:
            raise ValueError(f"position_ids: wanted [1 or B, {self.rows}], got {list(given.shape)}")
        free = torch.zeros_like(given, dtype=torch.bool)  # where any id will do: at padding
        if padding is not None:
            free = ~self.plan.shard(padding.to(device).bool())
        if not any(bool(((given == wanted) | free).all()) for wanted in (whole, restarted)):
            raise ValueError(
                "position_ids: wanted this rank's positions (plan.positions), or those counted from the start of each "
                "of the plan's documents, got others: rotary embeddings would be wrong"
            )
        return given


_NOW: Now[Call] = Now("ringfa3 forward pass")  # for `see`, which gets no module


def see(
    *, mask_function: Callable[..., Any], q_length: int, device: Any, attention_mask: Any = None, **_sizes: Any
) -> Sight:
    """What transformers calls for every kind of layer's mask: a Sight of a few bytes a row instead of S x S.

    The other arguments are sizes and permissions to skip the mask, which the mask function and the plan imply.
    """
    call = _NOW.get()
    if call is None:
        raise ValueError(
            f"attn_implementation: wanted a call of the model within sequence_parallel for {SHARDED!r}, got none"
        )
    if attention_mask is not None:
        raise ValueError("attention_mask: wanted the one given to the model, got another made inside it")
    if torch.compiler.is_compiling():  # functions that are made while tracing cannot be looked into
        check_compiled(call.config, call.plan, call.special)
        return call.compiled
    return call.sight(mask_function, q_length, torch.device(device))


AttentionInterface.register(SHARDED, attention)
AttentionMaskInterface.register(SHARDED, see)
AttentionInterface.register(NAME, one_rank.attention)
AttentionMaskInterface.register(NAME, one_rank.see)
