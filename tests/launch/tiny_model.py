"""A language model of a hundred words, with random weights, as a folder that transformers reads."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

WORDS = 100
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"


def write(folder: Path, *, chat: bool = True) -> Path:
    """Words w0 to w99, "user", "system", "assistant" and the end of sequence; two layers; fp32."""
    words = [*(f"w{i}" for i in range(WORDS)), "system", "user", "assistant", "<eos>"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE if chat else None
    )
    fast.save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, eos_token_id=len(words) - 1,
        bos_token_id=None, pad_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def prompt(words: int, seed: int = 0) -> str:
    """That many random words."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(0, WORDS, (words,), generator=generator).tolist())


def greedy(folder: Path, ids: list[int], tokens: int) -> list[int]:
    """transformers' answer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=tokens, pad_token_id=0,
    )  # fmt: skip
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer
