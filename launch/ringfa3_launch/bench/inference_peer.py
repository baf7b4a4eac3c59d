"""transformers' own generate on one device: how fast it answers, and what is right."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ringfa3_launch.bench.inference_case import Served
from ringfa3_launch.bench.timing import Memory, Timing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WIDER = {"bf16": "float32", "fp16": "float32", "fp32": "float64"}


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """The model with PyTorch's attention, for the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def generate(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int, rounds: int, memory: Memory
) -> tuple[Served, Tensor]:
    """Greedy answers to a batch of prompts of one length.

    Returns:
        How it went; and the logits of the first prompt's tokens, fp32 [n, vocab] on the CPU.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    ids = torch.tensor(prompts, device=device)
    times: list[tuple[float, float, float]] = []
    _, most, _ = memory.peak(lambda: _timed(model, ids, tokens, device)[0])
    for _ in range(rounds):
        out, stamps, begun = _timed(model, ids, tokens, device)
        times.append((stamps[0] - begun, (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1), stamps[-1] - begun))
    answers = tuple(tuple(row) for row in out.sequences[:, ids.shape[1] :].tolist())
    steps = torch.stack([step[0].float().cpu() for step in out.logits])
    first, each, total = (Timing(column) for column in zip(*times, strict=True))
    return Served(first, each, total, answers, most), steps


def _timed(model: Any, ids: Tensor, tokens: int, device: torch.device) -> tuple[Any, list[float], float]:
    """One call of generate; when each token was there; when it began."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    stamps: list[float] = []

    class Stamp(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
        """Called after every token; ends nothing."""

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            stamps.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=device)

    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=tokens, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True, use_cache=True,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config,
            stopping_criteria=StoppingCriteriaList([Stamp()]),
        )  # fmt: skip
    return out, stamps, begun


def exact_logits(model: Any, prompt: Sequence[int], dtype: str) -> Tensor:
    """Logits after the prompt in wider precision than the dtype: fp32 [vocab] on the CPU."""
    import torch

    wide = copy.deepcopy(model).to(getattr(torch, WIDER[dtype]))
    device = wide.get_input_embeddings().weight.device
    with torch.inference_mode():
        out = wide(input_ids=torch.tensor([prompt], device=device), use_cache=False, logits_to_keep=1)
    logits: Tensor = out.logits[0, -1].float().cpu()
    return logits
