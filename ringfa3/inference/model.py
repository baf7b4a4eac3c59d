"""Hugging Face causal LMs whose attention goes over the sharded cache: loading, refusing, and one forward pass.

Nothing of a model is changed: it runs under the attn_implementation "ringfa3-paged". transformers asks the registered
mask function for each kind of layer's mask and gets a Sight, which the layer hands to `attention`; new keys and values
go by what the layer takes for its cache (`_Keeper`). Positions are always given, so that RoPE is right for rows that
are no neighbours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from ringfa3.inference.attend import Step
from ringfa3.inference.gguf_config import read_config
from ringfa3.inference.ranks import Axes
from ringfa3.inference.tensor import split
from ringfa3.integrations.transformers import HARMLESS, rules
from ringfa3.mask import Mask
from ringfa3.shards import Group
from ringfa3_kernels import Unsupported

NAME = "ringfa3-paged"  # the attn_implementation

# config.model_type of what is known to keep all its state in keys and values and to place tokens by position_ids alone
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss")
LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
SEEN_LENGTH = frozenset({"dynamic", "longrope"})  # RoPE whose frequencies depend on the longest position of the pass
TEXT_WEIGHTS = {
    "gemma3": {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
}  # by model_type of models that also see: what their files call the text model's weights -> what it calls them itself
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True, eq=False)
class Sight:
    """What the rows of one kind of layer see; travels through the model in the place of an attention mask.

    Args:
        mask: the layers' own.
        step: what the forward pass is for.
    """

    mask: Mask
    step: Step


def load(
    path: str | Path, *, device: torch.device | str, dtype: torch.dtype, group: Group = None
) -> tuple[PreTrainedModel, Any]:
    """A causal LM and its tokenizer, from files alone.

    Args:
        path: a folder with config.json, weights and tokenizer; or a GGUF file, or a folder with one (which takes most
            of half a minute to read: its vocabulary is parsed in Python).
        device: where the weights go.
        dtype: of weights and activations.
        group: a DeviceMesh with the axes cp and tp: along tp each rank keeps its slice of the weights. All of them are
            read into the host's memory first. Any other group: the weights are whole.

    Returns:
        The model, and its tokenizer (None where the folder has none).

    Raises:
        ValueError: there is no model; says what was wanted.
        Unsupported: it is none of the models that `served` names, or its weights cannot be shared by so many; or see
            `read`.
    """
    model = read(path, dtype=dtype)
    split(model, Axes.of(group).tensor)
    return model.to(device).eval(), load_tokenizer(path)


def read(path: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM there, whole, on the host: as `load` reads it. Of a model that also sees, its text model.

    Raises:
        ValueError: there is no model, or some of its weights are missing.
        Unsupported: it is not served; or its GGUF file says what transformers would not do, and we do not either.
    """
    folder, gguf = _found(Path(path))
    files = {} if gguf is None else {"gguf_file": gguf}
    if gguf is not None:
        config = read_config(folder / gguf)
    else:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    text = text_config(config)
    served(text)  # before gigabytes are read
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, config=text, dtype=dtype, local_files_only=True, output_loading_info=True,
        key_mapping=TEXT_WEIGHTS.get(config.model_type), **files,
    )  # fmt: skip
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"path: wanted all weights of {str(path)!r}, got none for {len(missing)}, as {missing[0]}")
    if gguf is not None and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the file's: the weights are not quantised any more
    checked: PreTrainedModel = model
    return checked


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of the model there; None where the folder has none. Raises ValueError: there is no model."""
    folder, gguf = _found(Path(path))
    if gguf is None and not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    files = {} if gguf is None else {"gguf_file": gguf}
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, **files)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of what `read` makes of a folder: of a model that also sees, its text model's; others' own.

    Raises:
        Unsupported: the weights of one that also sees are quantised.
    """
    kind = getattr(config, "model_type", None)
    if kind not in TEXT_WEIGHTS:
        return config
    if getattr(config, "quantization_config", None) is not None:  # it names the modules of the whole
        raise Unsupported(f"model {kind!r}: its weights are quantised; without that, its text model is served")
    text: PreTrainedConfig = config.get_text_config()
    return text


def served(config: PreTrainedConfig) -> None:
    """Raise Unsupported for a model that this package can't serve; says what it has that is in the way."""
    kind = getattr(config, "model_type", None)
    for name in ("vision_config", "audio_config"):
        if getattr(config, name, None) is not None:
            raise Unsupported(
                f"model {kind!r}: it has a {name}, only text is served ('load' takes the text model of folders of "
                f"{', '.join(TEXT_WEIGHTS)})"
            )
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"model {kind!r}: it is an encoder-decoder, only causal LMs are served")
    if kind not in FAMILIES:
        raise Unsupported(f"model {kind!r}: served are {', '.join(FAMILIES)}")
    others = set(getattr(config, "layer_types", None) or ()) - LAYERS
    if others:
        raise Unsupported(f"model {kind!r}: it has layers of {', '.join(sorted(others))}, which are no attention")
    for rope in _ropes(config):
        alike = rope.get("rope_type") == "longrope" and rope.get("short_factor") == rope.get("long_factor")
        if rope.get("rope_type") in SEEN_LENGTH and not alike:
            raise Unsupported(
                f"model {kind!r}: its RoPE is {rope['rope_type']!r}, whose frequencies depend on the longest position "
                "of a forward pass: cached keys would be turned by others than a pass over the whole prompt turns them"
            )


def longest(config: PreTrainedConfig) -> int:
    """Positions that the model was made for: its max_position_embeddings, stretched where YaRN's factor says more."""
    stretched = [
        int(rope["factor"] * rope["original_max_position_embeddings"])
        for rope in _ropes(config)
        if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings")
    ]
    return max([int(config.max_position_embeddings), *stretched])


def reach(masks: Iterable[Mask]) -> int | None:
    """How many positions before its own a token sees at most, in layers of these masks; None: all, in some of them."""
    limits = []
    for mask in masks:
        window = -1 if mask.window is None else mask.window[0]
        seen = [n for n in (window, -1 if mask.chunk is None else mask.chunk - 1) if n >= 0]
        limits.append(min(seen, default=-1))
    return max(limits) if limits and min(limits) >= 0 else None


class Paged:
    """A model that runs over the cache. Its attn_implementation is changed for good.

    Args:
        model: of `load`, or any other that `served` allows.

    Attributes:
        layers, kv_heads, head_dim: of the keys and values to be cached.
        masks: of its kinds of layers.
        queries: (heads, softcap) of its kinds of layers.
        vocab, longest: token ids, and positions, that it takes.

    Raises:
        ValueError: not a transformers model.
        Unsupported: it can't be served; says why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
            raise ValueError(f"model: wanted a transformers causal LM, got {type(model).__name__}")
        served(model.config)
        if model.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise Unsupported(f"model: wanted weights in bf16, fp16, fp32 or fp64, got {model.dtype}")
        model.eval()
        model.set_attn_implementation(NAME)
        for module in model.modules():
            if getattr(module, "rope_type", None) == "longrope":  # served only where its frequencies never change, but
                module.rope_type = "default"  # transformers asks the device each pass, which no CUDA graph can hold
        self._model = model
        probe = _Probe()
        self(probe, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
        layers = list(range(model.config.num_hidden_layers))
        if sorted(probe.shapes) != layers or sorted(probe.masks) != layers:
            raise Unsupported(
                f"model: wanted attention in each of {len(layers)} layers, got it in {sorted(probe.masks)}"
            )
        if len(set(probe.shapes.values())) != 1:
            raise Unsupported(
                f"model: wanted keys of one shape in all layers, got {sorted(set(probe.shapes.values()))}"
            )
        self.layers = len(layers)
        self.kv_heads, self.head_dim = probe.shapes[0]
        self.masks = tuple(dict.fromkeys(probe.masks.values()))
        self.queries = tuple(dict.fromkeys(probe.queries))
        self.vocab, self.longest = int(model.config.vocab_size), longest(model.config)

    @property
    def device(self) -> torch.device:
        """Where ids go."""
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    def __call__(self, step: Step, ids: Tensor, positions: Tensor, keep: Tensor | None = None) -> Tensor:
        """One forward pass.

        Args:
            step: where keys and values go, and what queries see.
            ids: ints [B, n].
            positions: ints [B, n], global.
            keep: int64 [m], the rows whose logits are wanted; None: all.

        Returns:
            fp32 [B, m, vocab].
        """
        ids, positions = (x.to(self.device).long() for x in (ids, positions))
        token = _NOW.set(step)
        try:
            with torch.no_grad():
                out = self._model(
                    input_ids=ids, position_ids=positions, attention_mask=None, past_key_values=_Keeper(step),
                    use_cache=False, logits_to_keep=0 if keep is None else keep, return_dict=True,
                )  # fmt: skip
        finally:
            _NOW.reset(token)
        logits: Tensor = out.logits.float()
        return logits


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
    """What transformers calls in every layer: q, k, v [B, H, n, D] of new tokens -> out [B, n, H, D].

    Raises:
        ValueError: something was asked for that would have to be ignored; names it.
    """
    if not isinstance(attention_mask, Sight):
        raise ValueError(
            f"attention_mask: wanted the mask that transformers.masking_utils makes for {NAME!r}, "
            f"got {type(attention_mask).__name__} in {type(module).__name__}"
        )
    mask = attention_mask.mask
    if dropout:
        raise ValueError(f"dropout: wanted 0, got {dropout}")
    if kwargs.pop("is_causal", None) not in (None, mask.causal):
        raise ValueError(f"is_causal: wanted what the layer's mask has, {mask.causal}, got {not mask.causal}")
    if sliding_window is not None and mask.window != (sliding_window - 1, 0):
        raise ValueError(f"sliding_window: wanted what the layer's mask has, {mask.window}, got {sliding_window}")
    for name, given in kwargs.items():
        if name not in HARMLESS and given is not None and given is not False:
            raise ValueError(f"{name}: wanted none (attention over pages cannot honour it), got {type(given).__name__}")
    out = attention_mask.step.attend(
        module.layer_idx,  # type: ignore[arg-type]  # an int, in every model that takes a cache
        query.transpose(1, 2), mask, scale=scaling, softcap=softcap or 0.0, sinks=s_aux,
    )  # fmt: skip
    return out, None


def see(*, mask_function: Callable[..., Any], attention_mask: Any = None, **_sizes: Any) -> Sight:
    """What transformers calls for every kind of layer's mask. The other arguments are sizes, which the step knows."""
    step = _NOW.get()
    if step is None:
        raise ValueError(f"attn_implementation: wanted {NAME!r} to be called by a Runner, got a call of the model")
    if attention_mask is not None:
        raise ValueError("attention_mask: wanted none, as sequences are not padded, got one")
    mask = Mask(**rules(mask_function))
    if not mask.causal:
        raise Unsupported("model: its layers see what follows; only causal LMs are served")
    return Sight(mask, step)


_NOW: ContextVar[Step | None] = ContextVar(
    "ringfa3 paged forward pass", default=None
)  # for `see`, which gets no module


class _Keeper:
    """What a model takes for its cache: new keys and values go to the step, and come back as they are."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def update(self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep k and v [B, Hkv, n, D]."""
        self._step.write(layer, key.transpose(1, 2), value.transpose(1, 2))
        return key, value

    def get_query_offset(self, layer: int = 0) -> int:
        """As masks have no sizes here, any does."""
        return 0

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        """As `get_query_offset`."""
        return query_length, 0


@dataclass
class _Probe:
    """A step that only looks at what comes: by layer the keys' heads and head_dim, and the mask; and queries' heads."""

    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    masks: dict[int, Mask] = field(default_factory=dict)
    queries: list[tuple[int, float]] = field(default_factory=list)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        if k.shape != v.shape:
            raise Unsupported(f"model: wanted values of the keys' shape {list(k.shape)}, got {list(v.shape)}")
        self.shapes[layer] = k.shape[2], k.shape[3]

    def attend(
        self, layer: int, q: Tensor, mask: Mask, *, scale: float | None, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        self.masks[layer] = mask
        self.queries.append((q.shape[2], softcap))
        return torch.zeros_like(q)


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The RoPE parameters of a model; some have them by kind of layer."""
    found = [getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    nested = [rope for each in found for rope in each.values() if isinstance(rope, dict)]
    return [*found, *nested]


def _found(path: Path) -> tuple[Path, str | None]:
    """The folder of a model, and the name of its GGUF file if it is one."""
    if path.is_dir() and (path / "config.json").is_file():
        return path, None
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".gguf" or not files[0].is_file():
        raise ValueError(f"path: wanted a GGUF file, or a folder with config.json or one GGUF file, got {str(path)!r}")
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:  # transformers reads GGUF only with both
        raise ValueError(f"path: wanted {', '.join(missing)} (pip install) to read {files[0].name}, got none")
    return files[0].parent, files[0].name


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, see)
