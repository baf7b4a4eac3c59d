"""Tiny Llamas with random weights, and what transformers' own generate makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 64


def llama(seed: int = 0, *, longest: int = 512, eos: int | None = None) -> LlamaForCausalLM:
    """fp32, 2 layers, 4:2 heads; weights large enough for logits that differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=longest,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    return model


def greedy(model: LlamaForCausalLM, prompt: Sequence[int], most: int) -> list[int]:
    """Tokens of generate on one device, without a cache of ours."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def gap(model: LlamaForCausalLM, tokens: Sequence[int]) -> float:
    """By how much the likeliest next token leads."""
    with torch.no_grad():
        best = model(torch.tensor([list(tokens)])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def same_greedy(model: LlamaForCausalLM, prompt: Sequence[int], ours: Sequence[int], most: int) -> None:
    """Assert that ours are generate's tokens; they may part only where two logits lie closer than rounding."""
    theirs = greedy(model, prompt, most)
    assert len(ours) == len(theirs)
    for at, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
        if mine != their:
            assert gap(model, [*prompt, *theirs[:at]]) < 1e-4, f"token {at} of {most}: {mine} for {their}"
            return
