"""Weights shared by several ranks: each keeps its slice, as the model's own tensor-parallel plan says.

transformers has a plan for each family: which layers are cut by the features that they put out (colwise), which by
those they take in (rowwise). Only the plan is taken from there. Its machinery wants a mesh without an axis for the
cache, a launcher's environment, and DTensors in the way of every layer; what the plan means is a slice and a hook.

A rank's heads of queries come with the heads of keys and values that they see: ranks beyond the number of key/value
heads hold copies of them. Activations between layers are whole on every rank, logits are gathered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ringfa3.inference.ranks import Ranks
from ringfa3_kernels import Unsupported

GATHERED = ("colwise_gather_output", "colwise_rep")  # the name of it in transformers 5.3 and later, and before
LOOKUP = "embedding_rowwise"
WHOLE = ("replicated_with_grad_allreduce", "replicate")  # of a norm over one head
STYLES = ("colwise", "rowwise", *GATHERED, LOOKUP, *WHOLE)
# layers that must be cut together: one that is not would meet slices where it wants the whole
TOGETHER = (
    {"self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
     "self_attn.o_proj": "rowwise"},
    {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"},
)  # fmt: skip


def split(model: PreTrainedModel, ranks: Ranks) -> None:
    """Keep this rank's slices of a model's weights, in its place, and let its layers work together.

    Args:
        model: a causal LM, whole, with the same weights on all ranks.
        ranks: who shares the weights. Of one rank: nothing is done.

    Raises:
        Unsupported: transformers has no plan for the model's attention, or its heads cannot be dealt to so many.
    """
    if ranks.world == 1:
        return
    styles = _styles(model)
    config = model.config.get_text_config()
    heads = _Heads.of(config, ranks)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and inputs.weight is outputs.weight
    for name, style in styles.items():
        module = model.get_submodule(name)
        if style in WHOLE:
            continue
        if isinstance(module, nn.Embedding):
            _cut_lookup(module, ranks)
        elif style in GATHERED:
            _cut_gathered(module, ranks)
        else:
            begin, end = heads.of_layer(name, module) or _even(_size(module, style), ranks)
            cut = _cut_rowwise if style == "rowwise" else _cut_colwise
            cut(module, begin, end, ranks)
    if tied and inputs.weight.shape == outputs.weight.shape:
        outputs.weight = inputs.weight
    _sharing[model] = ranks


def sharing(model: PreTrainedModel) -> Ranks | None:
    """Who shares the weights of a model that has been split; None: it is whole."""
    return _sharing.get(model)


_sharing: WeakKeyDictionary[PreTrainedModel, Ranks] = WeakKeyDictionary()


class _Heads:
    """Which heads are a rank's.

    Args:
        queries, keys: (first, end) of its heads.
        head_dim: D.
    """

    def __init__(self, queries: tuple[int, int], keys: tuple[int, int], head_dim: int) -> None:
        self.ranges = {"q_proj": queries, "o_proj": queries, "k_proj": keys, "v_proj": keys}
        self.head_dim = head_dim

    @classmethod
    def of(cls, config: PreTrainedConfig, ranks: Ranks) -> _Heads:
        """Raises Unsupported where they cannot be dealt evenly."""
        world, rank = ranks.world, ranks.rank
        queries = int(config.num_attention_heads)
        keys = int(getattr(config, "num_key_value_heads", None) or queries)
        if queries % world or (keys % world and world % keys):
            raise Unsupported(
                f"model {config.model_type!r}: its {queries} heads of queries and {keys} of keys cannot be dealt "
                f"evenly to {world} ranks that share its weights"
            )
        each, held = queries // world, max(1, keys // world)
        first = rank * keys // world
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
        return cls((rank * each, (rank + 1) * each), (first, first + held), dim)

    def of_layer(self, name: str, module: Any) -> tuple[int, int] | None:
        """(First, end) of the features of a layer around attention; None: it is another."""
        parent, _, last = name.rpartition(".")
        if not parent.endswith("self_attn") or last not in self.ranges:
            return None
        first, end = self.ranges[last]
        return first * self.head_dim, end * self.head_dim


def _styles(model: PreTrainedModel) -> dict[str, str]:
    """How each layer of the model is cut, by its name.

    Raises:
        Unsupported: the plan leaves out what must be cut, or has what is not known here.
    """
    kind = model.config.model_type
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    styles = {}
    for name, _ in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is not None:
            styles[name] = style
    unknown = {name: style for name, style in plan.items() if style not in STYLES}
    if unknown:
        raise Unsupported(f"model {kind!r}: its tensor-parallel plan has {unknown}, known are {', '.join(STYLES)}")
    attentions = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    for attention in attentions:
        block = attention.removesuffix("self_attn")
        for together in TOGETHER:
            there = {name: styles.get(block + name) for name in together}
            missing = [name for name, style in there.items() if style != together[name]]
            if missing and (len(missing) < len(together) or together is TOGETHER[0]):
                raise Unsupported(
                    f"model {kind!r}: transformers' tensor-parallel plan for it leaves out {', '.join(missing)}; "
                    "its weights are served whole only"
                )
    return styles


def _even(size: int, ranks: Ranks) -> tuple[int, int]:
    """This rank's (first, end) of so many; the last ranks may have fewer."""
    each = -(-size // ranks.world)
    return min(ranks.rank * each, size), min((ranks.rank + 1) * each, size)


def _size(module: Any, style: str) -> int:
    return int(module.in_features if style == "rowwise" else module.out_features)


def _cut_colwise(module: Any, begin: int, end: int, ranks: Ranks) -> None:
    """A linear layer that puts out the features [begin, end) alone."""
    module.weight = _slice(module.weight, 0, begin, end)
    if module.bias is not None:
        module.bias = _slice(module.bias, 0, begin, end)
    module.out_features = end - begin


def _cut_rowwise(module: Any, begin: int, end: int, ranks: Ranks) -> None:
    """A linear layer that takes in the features [begin, end) alone; its outputs are summed, the bias is added once."""
    module.weight = _slice(module.weight, 1, begin, end)
    module.in_features = end - begin
    module.whole_bias, module.bias = module.bias, None
    module.register_forward_hook(partial(_summed, ranks))


def _cut_gathered(module: Any, ranks: Ranks) -> None:
    """A linear layer whose outputs are put together from all ranks'."""
    size = module.out_features
    _cut_colwise(module, *_even(size, ranks), ranks)
    module.register_forward_hook(partial(_gathered, ranks, size))


def _cut_lookup(module: nn.Embedding, ranks: Ranks) -> None:
    """An embedding of some tokens; those of the others are zeros, and a sum puts them together."""
    begin, end = _even(module.num_embeddings, ranks)
    module.weight = _slice(module.weight, 0, begin, end)
    module.num_embeddings, module.padding_idx = end - begin, None
    hooks = _Lookup(begin, end, ranks)
    module.register_forward_pre_hook(hooks.before)
    module.register_forward_hook(hooks.after)


class _Lookup:
    """What an embedding of the tokens [begin, end) does with others."""

    def __init__(self, begin: int, end: int, ranks: Ranks) -> None:
        self.begin, self.end, self.ranks = begin, end, ranks

    def before(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Another rank's tokens are looked up as the first of ours."""
        (ids,) = args
        self._elsewhere = (ids < self.begin) | (ids >= self.end)
        return ((ids - self.begin).masked_fill(self._elsewhere, 0),)

    def after(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        """Exact: one rank adds to zeros."""
        out = out.masked_fill(self._elsewhere[..., None], 0).contiguous()
        self.ranks.all_reduce(out)
        return out


def _summed(ranks: Ranks, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """After a layer that took in a part of the features."""
    out = out.contiguous()
    ranks.all_reduce(out)
    bias = module.whole_bias
    return out + bias if isinstance(bias, Tensor) else out


def _gathered(ranks: Ranks, size: int, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """After a layer that put out a part of so many features; the last ranks' parts may be shorter."""
    each = -(-size // ranks.world)
    mine = F.pad(out, (0, each - out.shape[-1])).contiguous()
    parts = mine.new_empty(ranks.world, *mine.shape)
    ranks.all_gather(parts, mine)
    return parts.movedim(0, -2).flatten(-2)[..., :size]


def _slice(whole: Tensor, dim: int, begin: int, end: int) -> nn.Parameter:
    """A copy of a part, so that the whole can go."""
    part = whole.detach().narrow(dim, begin, end - begin).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=False)
