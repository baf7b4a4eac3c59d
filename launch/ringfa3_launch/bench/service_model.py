"""Random weights as a folder that `ringfa3 serve` takes: with a tokenizer whose every token is a word of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write_random(folder: Path, name: str, *, dtype: str, device: str, seed: int) -> Path:
    """Weights of that shape, drawn on the device and written in this dtype, and the tokenizer.

    Args:
        folder: is made.
        name: of a shape of `ringfa3_launch.bench.shapes`.
        dtype: "float32", "float16" or "bfloat16".
        device: "cpu" or "cuda".
    """
    import tokenizers
    import torch
    from safetensors.torch import save_model
    from transformers import PreTrainedTokenizerFast

    from ringfa3_launch.bench.shapes import random_model

    folder.mkdir(parents=True)
    model = random_model(name, seed=seed, dtype=getattr(torch, dtype), device=torch.device(device))
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()  # the ranks need it
    return folder


def prompts_from(vocab: int, tokenizer: Any, seed: int) -> Callable[[int, int], list[list[int]]]:
    """Makes so many prompts of so many tokens: prose, each from another place; random tokens without a tokenizer."""
    import numpy as np

    prose: Sequence[int] = ()
    if tokenizer is not None:
        from ringfa3_launch import haystack

        prose = tokenizer("\n\n".join(haystack.document()), add_special_tokens=False)["input_ids"]

    def prompts(count: int, length: int) -> list[list[int]]:
        random = np.random.default_rng((seed, count, length))
        if not prose:
            drawn: list[list[int]] = random.integers(0, vocab, (count, length)).tolist()
            return drawn
        repeated = [*prose] * (2 + length // len(prose))
        begins = random.choice(len(prose), count, replace=False).tolist()
        return [repeated[begin : begin + length] for begin in begins]

    return prompts
