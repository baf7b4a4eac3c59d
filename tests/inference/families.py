"""Tiny models of every family that is served, with random weights, and with what makes its attention its own."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SMALL: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0,
    bos_token_id=None, eos_token_id=None, attn_implementation="eager",
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "gemma2": ("Gemma2Config", {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 4}),
    "gpt_oss": (
        "GptOssConfig",
        {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": YARN},
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model, alike in every process, with transformers' eager attention."""
    kind, more = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**(SMALL | more)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):
                parameter.normal_()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the default knows no fp64
    return model.to(dtype).eval()
