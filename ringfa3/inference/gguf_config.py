"""The configuration of a model in a GGUF file, with what transformers leaves out of the header: how RoPE is scaled.

transformers builds the model without it, and nothing would tell: distant tokens would be placed wrongly. What the keys
mean is llama.cpp's: https://github.com/ggml-org/llama.cpp (src/llama-context.cpp, ggml_rope_ext).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ringfa3_kernels import Unsupported

DIVISORS = "rope_freqs.weight"  # a tensor [head_dim / 2]: of each inverse frequency (Llama 3.1 and 3.2)
PLAIN = ("dimension_count", "freq_base", "scaling.finetuned")  # of *.rope: read by transformers, or without effect
BETAS = {"scaling.yarn_beta_fast": "beta_fast", "scaling.yarn_beta_slow": "beta_slow"}
LAYERS_27B = {"gemma2": 46, "gemma3": 62}  # by which llama.cpp knows the model whose queries are scaled otherwise


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of its model beside the weights.

    Args:
        name: of the file.
        family: llama.cpp's name of the architecture.
        keys: the architecture's own, without its name.
        divisors: of RoPE's inverse frequencies; empty: none.
        tensors: names of other tensors about RoPE.
    """

    name: str
    family: str
    keys: dict[str, Any]
    divisors: list[float]
    tensors: list[str]

    @classmethod
    def read(cls, file: Path) -> Header:
        """The header of the file. Raises ValueError: it is no GGUF file."""
        from gguf import GGUFReader, dequantize

        reader = GGUFReader(file)
        family = str(reader.fields["general.architecture"].contents())
        keys = {
            key.removeprefix(f"{family}."): field.contents()
            for key, field in reader.fields.items()
            if key.startswith(f"{family}.")
        }
        about = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_")}
        found = about.pop(DIVISORS, None)
        divisors = [] if found is None else dequantize(found.data, found.tensor_type).tolist()
        return cls(file.name, family, keys, divisors, sorted(about))

    def refuse(self, what: str) -> Unsupported:
        """The error for something of it that is not served."""
        return Unsupported(f"model {self.name!r}: {what} (take the model's folder of safetensors)")


def read_config(file: Path) -> PreTrainedConfig:
    """The configuration of the model in a GGUF file: transformers', and the RoPE that the header says.

    Raises:
        ValueError: it is no GGUF file.
        Unsupported: the header has something that transformers would not do, and that is not served; says what.
    """
    header = Header.read(file)
    scaling = rope_scaling(header)  # before transformers parses the vocabulary, which takes long
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return config  # of no family that is served
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if header.keys.get("rope.dimension_count", dim) != dim or len(header.divisors) not in (0, dim // 2):
        raise header.refuse(f"its RoPE turns part of the {dim} dimensions of a head")
    if header.family == "gemma3":  # its local layers are never scaled, and have a base of their own
        local, rope = rope["sliding_attention"], rope["full_attention"]
        local["rope_theta"] = header.keys.get("rope.freq_base_swa", local["rope_theta"])
    if scaling.get("rope_type") in ("yarn", "longrope"):
        scaling.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    rope.update(scaling)
    if header.family in LAYERS_27B:  # no key says it, and transformers takes 256
        big = config.num_hidden_layers == LAYERS_27B[header.family]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if big else dim
    return config


def rope_scaling(header: Header) -> dict[str, Any]:
    """What the header says of RoPE beside its base, as transformers' rope_parameters; empty: it is not scaled.

    Divisors of the frequencies are what transformers calls longrope, with the same ones at any length.

    Raises:
        Unsupported: transformers would not do what it says.
    """
    if header.family == "gpt-oss":
        raise header.refuse("transformers reads the RoPE of gpt-oss wrongly from GGUF files")
    given = {key.removeprefix("rope."): value for key, value in header.keys.items() if key.startswith("rope.")}
    if header.family == "gemma3":
        given.pop("freq_base_swa", None)
    kind = given.pop("scaling.type", "linear")
    factors = [float(given.pop(name, 0.0)) for name in ("scaling.factor", "scale_linear")]
    factor = 1.0 if kind == "none" else factors[0] or factors[1] or 1.0
    if kind not in ("none", "linear", "yarn") or factor < 1.0:
        raise header.refuse(f"its RoPE is scaled by {kind!r} with a factor of {factor:g}")
    found: dict[str, Any] = {}
    if kind == "yarn" and factor > 1.0:
        found = _yarn(header, given, factor)
    elif factor > 1.0:
        found = {"rope_type": "linear", "factor": factor}
    if header.divisors:
        if found:
            raise header.refuse(f"its RoPE is scaled twice, by {kind!r} and by {DIVISORS}")
        same = {"short_factor": header.divisors, "long_factor": header.divisors}
        found = {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0, **same}
    if header.family == "gemma3" and found.get("rope_type", "linear") != "linear":
        raise header.refuse(f"its RoPE is scaled by {found['rope_type']!r}, served is 'linear' for the global layers")
    given.pop("scaling.original_context_length", None)  # YaRN's alone
    if given.get("scaling.attn_factor") == 1.0:
        del given["scaling.attn_factor"]
    others = [*(f"{header.family}.rope.{key}" for key in given if key not in PLAIN), *header.tensors]
    if others:
        raise header.refuse(f"its RoPE has {', '.join(others)}, which is not served")
    return found


def _yarn(header: Header, given: dict[str, Any], factor: float) -> dict[str, Any]:
    """YaRN's rope_parameters; takes its keys out of the given ones. Raises Unsupported: transformers has none such."""
    usual = 1.0 + 0.1 * math.log(factor)  # by which both scale cos and sin
    for key, wanted in (("ext_factor", 1.0), ("attn_factor", usual), ("log_multiplier", 0.0)):
        value = given.pop(f"scaling.yarn_{key}", wanted)
        if not math.isclose(value, wanted, rel_tol=1e-5):
            raise header.refuse(f"its YaRN has {key} {value:g}, served is {wanted:g}")
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    found |= {name: float(given.pop(key)) for key, name in BETAS.items() if key in given}
    if "scaling.original_context_length" in given:
        found["original_max_position_embeddings"] = int(given.pop("scaling.original_context_length"))
    if "scaling.attn_factor" in given:
        found["attention_factor"] = usual * float(given.pop("scaling.attn_factor"))
    return found
