"""Models by their shapes: random weights where no checkpoint can be had, alike on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LONGEST = 1 << 20  # positions that a random model takes: there is no trained length to respect


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes.

    Args:
        hidden, intermediate, layers, Hq, Hkv, D, vocab: as its config has them.
        tied: whether input and output embeddings are one.
    """

    hidden: int
    intermediate: int
    layers: int
    Hq: int
    Hkv: int
    D: int
    vocab: int
    tied: bool = False

    def config(self) -> Any:
        """As transformers has it; RoPE as Llama 3's, without scaling."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=self.layers,
            num_attention_heads=self.Hq, num_key_value_heads=self.Hkv, head_dim=self.D, vocab_size=self.vocab,
            max_position_embeddings=LONGEST, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=self.tied, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip


SHAPES = {
    "tiny": Shape(64, 160, 2, 4, 2, 16, 512),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True),
    "llama-3-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
}


def random_model(name: str, *, seed: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of that shape, drawn on the device: equal seeds give equal weights on equal devices."""
    import torch
    from transformers import AutoModelForCausalLM

    with device:  # where it will be, and as: fp32 weights would not fit beside those of another model
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(SHAPES[name].config(), dtype=dtype)
    return model.to(device).eval()


def model_of(
    folder: Path | None, shape: str | None, *, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    """The model of a folder and its tokenizer, or a random one of a shape and None."""
    if folder is None:
        assert shape is not None
        return random_model(shape, seed=seed, dtype=dtype, device=device), None
    from ringfa3.inference import load

    return load(folder, device=device, dtype=dtype)
