"""Hugging Face transformers: models whose attention runs over a sequence that is sharded across ranks.

    plan = ringfa3.plan(Mask(), "zigzag", seqlen)
    with sequence_parallel(model, plan):
        out = model(input_ids=plan.shard(ids), shift_labels=plan.labels(ids))

The way of a layer's attention: transformers asks the registered mask function for each kind of layer's mask and gets a
Sight (no S x S tensor), hands it to every layer as its attention_mask, and the layer hands it to `attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils

from ringfa3.attention import ring_attention
from ringfa3.integrations.sharded_cache import ShardedCache, attend_sharded
from ringfa3.mask import Mask
from ringfa3.plan import Plan
from ringfa3.plan import plan as make_plan
from ringfa3_kernels import Visible

NAME = "ringfa3"  # the attn_implementation

# What models pass to attention functions that does not change what attention is; anything else is refused by name.
HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)


@dataclass(frozen=True, eq=False)
class Sight:
    """What the rows of one kind of layer see; it travels through the model in the place of an attention mask.

    Args:
        mask: the layers' own.
        plan: how the rows are sharded; in the prefill, with that mask.
        options: for `ring_attention`: transport, deterministic, impl.
        step: for tokens after the prefill, what they see of this rank's cached keys; else None.
    """

    mask: Mask
    plan: Plan
    options: dict[str, Any]
    step: Visible | None = None


@contextmanager
def sequence_parallel(
    model: PreTrainedModel, plan: Plan, *, transport: str = "auto", deterministic: bool = False, impl: str = "auto"
) -> Iterator[None]:
    """Within, model(...) takes this rank's shard of a sequence, and every layer attends to the whole of it.

    Call the model itself, on every rank, with `input_ids=plan.shard(ids)` (or inputs_embeds). Of the other arguments

    - position_ids default to this rank's positions; given, they must be those, or restart with every document.
    - attention_mask is the padding of the whole sequence, [B, seqlen], on every rank; not sharded.
    - past_key_values is a `ShardedCache`; use_cache=True makes one. Once it is filled, input_ids are further tokens,
      the same on every rank and not sharded (without gradients).
    - labels are refused, since transformers would shift them within the shard: pass shift_labels=plan.labels(ids).
    - logits are this rank's rows: the last position's are where `plan.positions` ends with seqlen - 1.

    The plan's mask says which documents are packed; causality, windows and chunks come from the model, layer by layer.
    A backward pass that recomputes (gradient checkpointing) belongs within as well.

    Args:
        model: any model that goes through transformers' AttentionInterface.
        plan: `ringfa3.plan(Mask(documents=...), layout, seqlen, group)`.
        transport, deterministic, impl: as `ring_attention` has them.

    Raises:
        ValueError: the plan holds what the model has to say, or the model cannot take another attention. Calls of the
            model raise it for every argument that could not be honoured, and name it.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: wanted a transformers.PreTrainedModel, got {type(model).__name__}")
    if plan.mask != Mask(plan.mask.causal, documents=plan.mask.documents) or plan.kv_seqlen != plan.seqlen:
        raise ValueError(f"plan: wanted a mask of documents alone, the rest is the model's to say, got {plan.mask}")
    call = _Call(model, plan, {"transport": transport, "deterministic": deterministic, "impl": impl})
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
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
    if dropout:
        raise ValueError(f"dropout: wanted 0, got {dropout}: set the config's attention_dropout to 0")
    causal = kwargs.pop("is_causal", None)
    if causal not in (None, attention_mask.mask.causal):
        raise ValueError(f"is_causal: wanted what the layer's mask has, {attention_mask.mask.causal}, got {causal}")
    for name, given in kwargs.items():
        if name not in HARMLESS and given is not None and given is not False:
            raise ValueError(f"{name}: wanted none (ringfa3's attention cannot honour it), got {type(given).__name__}")
    window = attention_mask.mask.window
    if sliding_window is not None and window != (sliding_window - 1, 0):
        raise ValueError(f"sliding_window: wanted what the layer's mask has, {window}, got {sliding_window}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
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


class _Call:
    """The forward passes of the model given to sequence_parallel: from the arguments of one to its layers' Sights."""

    def __init__(self, model: PreTrainedModel, plan: Plan, options: dict[str, Any]) -> None:
        self.plan = plan
        self.options = options
        self.names = list(inspect.signature(model.forward).parameters)
        self.documents: Any = None  # of the pass under way: the plan's, or made from its padding
        self.cache: ShardedCache | None = None
        self.rows = 0
        self.step = False  # whether the pass follows the prefill
        if "position_ids" not in self.names:
            raise ValueError(f"model: wanted one that takes position_ids, got {type(model).__name__}")

    def begin(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Check the model's arguments and fill in what a shard needs; torch's forward pre-hook."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        x = given.get("input_ids")
        name = "input_ids" if x is not None else "inputs_embeds"
        x = given.get(name)
        if x is None:
            raise ValueError("input_ids: wanted them or inputs_embeds, got neither")
        self.cache = self._cache(given)
        self.step = self.cache is not None and self.cache.seen > 0
        self.rows = x.shape[1]
        mine = self.plan.lengths[self.plan.rank]
        if not self.step and self.rows != mine:
            raise ValueError(
                f"{name}: wanted this rank's {mine} of {self.plan.seqlen} positions, plan.shard(...), got {self.rows}"
            )
        padding = given.get("attention_mask")
        self.documents = self._documents(padding, x.shape[0])
        positions_given = given.get("position_ids") is not None
        given["position_ids"] = self._positions(given.get("position_ids"), padding, x.device)
        given["attention_mask"] = None  # the Sights know
        if given.get("output_attentions") or getattr(model.config, "output_attentions", False):
            raise ValueError("output_attentions: wanted False (attention weights are never all in memory), got True")
        if given.get("labels") is not None and given.get("shift_labels") is None:
            raise ValueError(
                "labels: wanted shift_labels=plan.labels(ids), which no rank shifts again, got labels alone"
            )
        if given.get("shift_labels") is not None:
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


_NOW: ContextVar[_Call | None] = ContextVar("ringfa3 forward pass", default=None)  # for `see`, which gets no module


def see(
    *, mask_function: Callable[..., Any], q_length: int, device: Any, attention_mask: Any = None, **_sizes: Any
) -> Sight:
    """What transformers calls for every kind of layer's mask: a Sight of a few bytes a row instead of S x S.

    The other arguments are sizes and permissions to skip the mask, which the mask function and the plan imply.
    """
    call = _NOW.get()
    if call is None:
        raise ValueError(
            f"attn_implementation: wanted a call of the model within sequence_parallel for {NAME!r}, got none"
        )
    if attention_mask is not None:
        raise ValueError("attention_mask: wanted the one given to the model, got another made inside it")
    return call.sight(mask_function, q_length, torch.device(device))


def padding_documents(padding: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """Documents that hide padding from what is not: per batch row the lengths of its runs of zeros and ones.

    Args:
        padding: [B, S] of 0 and 1, an attention_mask; reading it synchronises a device.

    Returns:
        Lengths as `Mask(documents=...)` takes them; None where nothing is padded.

    Raises:
        ValueError: other values, or a row whose ones are not one run: its rows would not see one interval.
    """
    host = padding.cpu().numpy()
    if not np.isin(host, (0, 1)).all():
        raise ValueError("attention_mask: wanted 0 and 1, got other values")
    if host.all():
        return None
    rows = []
    for b, row in enumerate(host.astype(bool)):
        edges = np.flatnonzero(np.diff(row)) + 1
        if (np.diff(row.astype(np.int8), prepend=0) == 1).sum() > 1:
            raise ValueError(f"attention_mask: wanted the ones of a row in one run, got zeros between them in row {b}")
        rows.append(tuple(np.diff([0, *edges, row.size]).tolist()))
    return tuple(rows)


def rules(function: Callable[..., Any]) -> dict[str, Any]:
    """causal, window and chunk of a transformers mask function, which is a tree of closures.

    Raises:
        ValueError: the tree holds a function that is not known here; names it.
    """
    kind = function.__qualname__.split(".")[0]
    if function.__module__ != masking_utils.__name__:
        kind = f"{function.__module__}.{kind}"
    inside = inspect.getclosurevars(function).nonlocals
    if kind == "causal_mask_function":
        return {"causal": True}
    if kind == "bidirectional_mask_function":
        return {"causal": False}
    if kind == "sliding_window_overlay":  # key > position - sliding_window
        return {"window": (inside["sliding_window"] - 1, -1)}
    if kind == "sliding_window_bidirectional_overlay":
        return {"window": (inside["sliding_window"], inside["sliding_window"])}
    if kind == "chunked_overlay":  # counted from the padding's end, as from the start of any document
        return {"chunk": inside["chunk_size"]}
    if (
        kind == "packed_sequence_mask_function"
    ):  # guessed from position_ids, which the plan's documents have vouched for
        return {}
    if kind == "remap_positions_for_packed_sequence":
        return rules(inside["mask_function"])
    if kind != "and_masks":
        raise ValueError(f"mask_function: wanted causality, windows, chunks and documents of transformers, got {kind}")
    found: dict[str, Any] = {}
    for part in inside["mask_functions"]:
        for name, value in rules(part).items():
            if found.setdefault(name, value) != value:
                raise ValueError(f"mask_function: wanted one {name} a layer, got {found[name]} and {value}")
    return found


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, see)
