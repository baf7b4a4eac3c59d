"""What transformers asks of an attention function, in this package's words: masks, documents, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import masking_utils

from ringfa3.mask import Mask

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

# What a model may be called with where its sequence is sharded: it is served, or means the same for a part of the rows
SERVED = frozenset(
    {
        "attention_mask",
        "input_ids",
        "inputs_embeds",
        "labels",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)
LAST_ROWS = ("logits_to_keep", "num_logits_to_keep")
# Heads, by the end of a model's name, that make one thing of all rows
POOLING = ("SequenceClassification", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction", "PreTraining")

# transformers' layer_types whose rows see others by attention functions alone, and those that see no others
ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
POSITIONWISE = frozenset({"sparse", "dense", "moe"})


def check(
    mask: Mask, *, dropout: float, sliding_window: int | None, is_causal: bool | None, others: dict[str, Any]
) -> None:
    """Raise ValueError, naming it, for what a layer asks beyond its mask, or that contradicts it.

    Args:
        mask: the layer's.
        dropout, sliding_window, is_causal: as layers pass them to attention functions.
        others: all other keyword arguments.
    """
    if dropout:
        raise ValueError(f"dropout: wanted 0, got {dropout}: set the config's attention_dropout to 0")
    if is_causal not in (None, mask.causal):
        raise ValueError(f"is_causal: wanted what the layer's mask has, {mask.causal}, got {is_causal}")
    for name, given in others.items():
        if name not in HARMLESS and given is not None and given is not False:
            raise ValueError(f"{name}: wanted none (ringfa3's attention cannot honour it), got {type(given).__name__}")
    if sliding_window is None:
        return
    left = sliding_window - 1  # transformers counts the row itself; models that look both ways are not of one mind
    if mask.window not in (((left, 0),) if mask.causal else ((left, left), (left + 1, left + 1))):
        raise ValueError(f"sliding_window: wanted what the layer's mask has, {mask.window}, got {sliding_window}")


def check_call(config: Any, given: dict[str, Any], *, also: Collection[str] = ()) -> None:
    """Raise ValueError, naming it, for an argument of a model that means something else where rows are sharded.

    Args:
        config: the model's; it may ask for outputs as well.
        given: the arguments by name. None and False are as good as none.
        also: further names that are served.
    """
    for name in LAST_ROWS:
        keep = given.get(name)
        if isinstance(keep, Tensor) or keep:
            raise ValueError(f"{name}: wanted 0 (the last rows of a shard are not the sequence's), got {keep}")
    if given.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError("output_attentions: wanted False (attention weights are never all in memory), got True")
    targets = given.get("labels") is not None or given.get("shift_labels") is not None
    routed = given.get("output_router_logits")
    if targets and (getattr(config.get_text_config(), "output_router_logits", False) if routed is None else routed):
        raise ValueError("output_router_logits: wanted False beside labels (a router's loss is no sum), got True")
    for name, other in given.items():
        if name in SERVED or name in LAST_ROWS or name in also or other is None or other is False:
            continue
        got = list(other.shape) if isinstance(other, Tensor) else type(other).__name__
        raise ValueError(f"{name}: wanted none (nobody says how it is sharded), got {got}")


def check_rows(model: Any) -> None:
    """Raise ValueError where a model makes something of a row's number, or of all rows, that differs on a shard."""
    name = type(model).__name__
    if name.endswith(tuple(f"For{head}" for head in POOLING)) or getattr(model, "pooler", None) is not None:
        raise ValueError(f"model: wanted one without a head or pooler that makes one thing of all rows, got {name}")
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            raise ValueError(
                f"model: wanted positions that count from 0, got {name}, which counts past its padding_idx"
            )


def has_loss_function(model: Any) -> bool:
    """Whether a model's forward, or one called by super(), asks model.loss_function, which heeds shift_labels."""
    for kind in type(model).__mro__:
        if "forward" not in vars(kind):
            continue
        names = getattr(getattr(inspect.unwrap(vars(kind)["forward"]), "__code__", None), "co_names", ())
        if "loss_function" in names:
            return True
        if not {"super", "forward"} <= set(names):
            return False
    return False


def check_layers(model: Any) -> None:
    """Raise ValueError where layers mix positions otherwise than by attention: each would run over its shard alone."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION - POSITIONWISE
    if getattr(model, "_is_stateful", False):
        kinds = kinds or {"recurrent state"}
    if kinds:
        raise ValueError(
            f"model: wanted attention in all layers that mix positions (others would see this rank's shard alone), got "
            f"{type(model).__name__} with {', '.join(sorted(kinds))}"
        )


def check_temperature(config: Any, counted: int) -> None:
    """Raise ValueError where layers scale queries by a row's number within the shard, as Llama 4 without rotary does.

    Args:
        config: a model's.
        counted: positions, as far as layers count them.
    """
    text = config.get_text_config()
    if not getattr(text, "attn_temperature_tuning", False) or 0 not in (getattr(text, "no_rope_layers", None) or (0,)):
        return
    if counted >= text.floor_scale:  # up to there the scale is 1
        raise ValueError(
            f"attn_temperature_tuning: wanted False, or fewer than floor_scale = {text.floor_scale} positions (a cache "
            f"counts its rows twice), as the model counts within a shard, got {counted}"
        )


def implementations(config: Any, above: str | None = None) -> Any:
    """The attn_implementation of a config, and of those within it, as `set_attn_implementation` takes it to restore.

    Args:
        config: a model's.
        above: that of configs which have none yet (no model was made of them).
    """
    own = config._attn_implementation or above
    found = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: implementations(sub, own) for name, sub in found.items() if sub is not None}
    return {"": own, **inner} if inner else own


def check_rotary(config: Any, seqlen: int) -> None:
    """Raise ValueError where rotary embeddings depend on the longest position: ranks would each take their own.

    Args:
        config: a model's.
        seqlen: of the whole sequence.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    for rope in (parameters, *(inner for inner in parameters.values() if isinstance(inner, dict))):
        most: Any = rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", seqlen)
        if rope.get("rope_type") in ("dynamic", "longrope") and seqlen > most:
            raise ValueError(
                f"model: wanted rotary embeddings that do not depend on the sequence's length, or at most {most} "
                f"positions, got {rope['rope_type']!r} and {seqlen}"
            )


def rows_first(*tensors: Tensor) -> list[Tensor]:
    """q, k and v as this package has them, [B, S, H, D], from [B, H, S, D]; in autocast's dtype, where that is on."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        tensors = tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    return [x.transpose(1, 2) for x in tensors]


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
    if kind == "packed_sequence_mask_function":  # documents, guessed from position_ids: `packing` has them
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


def packing(function: Callable[..., Any]) -> tuple[Tensor, Tensor | None] | None:
    """What a mask function, served by `rules`, holds of packed documents: number and position_ids of each row, [B, S].

    The latter None with older versions of transformers (5.17), whose masks do not hold them. All None where
    transformers has found no documents in the position_ids.
    """
    kind = function.__qualname__.split(".")[0]
    if kind != "and_masks":
        return None
    parts = inspect.getclosurevars(function).nonlocals["mask_functions"]
    found = {part.__qualname__.split(".")[0]: inspect.getclosurevars(part).nonlocals for part in parts}
    if "packed_sequence_mask_function" not in found:
        return next((inner for inner in map(packing, parts) if inner is not None), None)
    numbers: Tensor = found["packed_sequence_mask_function"]["packed_sequence_mask"]
    return numbers, found.get("remap_positions_for_packed_sequence", {}).get("position_ids")
