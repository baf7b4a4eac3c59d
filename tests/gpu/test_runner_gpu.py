"""A Runner on one and on two GPUs: both ways of prefill, decode with and without CUDA graphs, against one GPU alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from ringfa3.inference.runner import Runner

SMALL: dict[str, Any] = dict(
    vocab_size=1024, hidden_size=512, intermediate_size=768, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, initializer_range=0.1, pad_token_id=0,
    bos_token_id=None, eos_token_id=None, attn_implementation="eager",
)  # fmt: skip
DIVIDED: dict[str, Any] = {  # as of a GGUF file of Llama 3.1: transformers picks the frequencies in every forward pass
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0, "attention_factor": 1.0,
    "original_max_position_embeddings": 4096, **dict.fromkeys(("short_factor", "long_factor"), [1.0] * 16 + [8.0] * 16),
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "divided": ("LlamaConfig", {"rope_parameters": DIVIDED}),
    "gemma2": ("Gemma2Config", {"sliding_window": 200, "query_pre_attn_scalar": 64}),
    "mistral": ("MistralConfig", {"sliding_window": 300}),
}
TURNS = ((1500, 611), (40, 40), (3, 3), (900, 900))  # tokens, of which so many at once
STEPS = 6


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model, of equal weights in every dtype and process."""
    kind, more = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**(SMALL | more)))
    return model.to(torch.bfloat16).to(dtype).cuda().eval()


def ids(number: int, count: int) -> list[int]:
    return torch.randint(1, 1024, (count,), generator=torch.Generator().manual_seed(number)).tolist()


def play(rank: int, size: int, name: str, way: str, graphs: bool) -> list[tuple[list[int], Tensor]]:
    """Everything said in some sequences with the logits of their last tokens, on the CPU."""
    runner = Runner(build(name), memory=64 << 20, prefill=way, graphs=graphs)
    said: list[tuple[list[int], Tensor]] = []
    held: dict[int, list[int]] = {0: []}
    runner.create(0)
    for turn, (count, chunk) in enumerate(TURNS):
        new = ids(turn, count)
        for start in range(0, count, chunk):
            logits = runner.prefill(0, new[start : start + chunk])
        held[0] = held[0] + new
        said.append((held[0], logits[None].cpu()))
    for child in (1, 2):
        runner.fork(0, child)
        held[child] = held[0]
    runner.create(3)
    held[3] = []
    for batch, tokens in (([0, 1, 3], 1), ([2], 1), ([3, 2, 1, 0], 4)):
        steps = []
        for step in range(STEPS):
            new = [ids(100 + 10 * s + step, tokens) for s in batch]
            steps.append(runner.decode(batch, new).cpu())
            for s, more in zip(batch, new, strict=True):
                held[s] = held[s] + more
        said += [(held[s], torch.cat([step[b] for step in steps])) for b, s in enumerate(batch)]
    for s in list(held):
        runner.free(s)
    assert [runner.pages.used(r) for r in range(size)] == [0] * size
    return said


@cache
def models(name: str) -> tuple[Any, Any]:
    return build(name), build(name, torch.float64)


def judge(name: str, said: list[tuple[list[int], Tensor]]) -> None:
    """Logits err at most twice as much as eager attention on one GPU."""
    for tokens, logits in said:
        with torch.no_grad():
            usual, truth = (
                model(input_ids=torch.tensor([tokens], device="cuda"), use_cache=False)
                .logits[0, -logits.shape[0] :].double().cpu()
                for model in models(name)
            )  # fmt: skip
        error, rounding = ((x.double() - truth).square().mean().sqrt() for x in (logits, usual))
        assert error <= 2 * rounding + 1e-6, (len(tokens), float(error), float(rounding))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_gpu(name: str, graphs: bool) -> None:
    judge(name, play(0, 1, name, "auto", graphs))


@pytest.mark.multigpu(2)
@pytest.mark.xdist_group("ranks, engine")
@pytest.mark.parametrize(("way", "graphs"), [("pass-kv", False), ("pass-q", True), ("auto", True)])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_gpus(gpu_world: Any, name: str, way: str, graphs: bool) -> None:
    first, second = gpu_world(2)(play, name, way, graphs)
    judge(name, first)
    for (_, ours), (_, theirs) in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
