"""Writes tiny models as GGUF files, as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
FAMILIES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "gemma3": gguf.MODEL_ARCH.GEMMA3}


def write(
    file: Path,
    family: str,
    model: Any = None,
    *,
    keys: dict[str, Any] | None = None,
    divisors: Any = None,
    tensors: dict[str, Any] | None = None,
    without: str | None = None,
) -> Path:
    """The model, in fp32, without one tensor, or a header alone; more keys of the family and more tensors."""
    writer = gguf.GGUFWriter(file, family)
    if model is not None:
        _sizes(writer, model.config)
        tensors = _tensors(family, model) | (tensors or {})
    if divisors is not None:
        tensors = {"rope_freqs.weight": divisors} | (tensors or {})
    for name, tensor in (tensors or {}).items():
        if name != without:
            writer.add_tensor(name, np.asarray(tensor, np.float32))
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{family}.{key}", value)
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        finish()
    writer.close()
    return file


def _sizes(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghij", "ab", *(f"<{i}>" for i in range(config.vocab_size - 11))])
    writer.add_token_merges(["a b"])
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _tensors(family: str, model: Any) -> dict[str, torch.Tensor]:
    """By the names of GGUF; llama's rotated pairs are neighbours there, and gemma's norms are one more."""
    names = gguf.get_tensor_name_map(FAMILIES[family], model.config.num_hidden_layers)
    found = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        part, suffix = name.rsplit(".", 1)
        if family == "llama" and part.endswith(("q_proj", "k_proj")):
            pairs = weight.unflatten(0, (-1, 2, model.config.head_dim // 2))
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        if family == "gemma3" and part.endswith("norm"):
            weight = weight + 1
        found[f"{names.get_name(part)}.{suffix}"] = weight.contiguous()
    return found
