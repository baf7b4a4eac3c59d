"""A Hugging Face model within sequence_parallel, compiled as a whole and layer by layer, without a graph break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import ringfa3
from ringfa3 import Mask
from ringfa3.integrations.transformers import sequence_parallel

# while it traces, torch looks at gradients of tensors that are no leaves, and hides its own warning from the user alone
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
HOW: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: Any) -> Any:
    return torch.compile(model, **HOW)


def in_place(model: Any) -> Any:
    model.compile(**HOW)
    return model


def layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(**HOW)
    return model


def llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)  # the same weights on every rank
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **config,
        )
    )  # fmt: skip


def step(model: Any, called: Any, plan: ringfa3.Plan, ids: Tensor, **options: Any) -> list[Tensor]:
    """The loss and all gradients of one step."""
    model.zero_grad()
    out = called(input_ids=plan.shard(ids), shift_labels=plan.labels(ids), **options)
    out.loss.backward()
    return [out.loss.detach(), out.logits.detach(), *(p.grad.clone() for p in model.parameters())]


def check(through: Callable[[Any], Any], plan: ringfa3.Plan, **options: Any) -> None:
    model, ids = llama(), torch.randint(64, (2, plan.seqlen))
    with sequence_parallel(model, plan):
        plain = step(model, model, plan, ids, **options)
        for got, want in zip(step(model, through(model), plan, ids, **options), plain, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("through", [whole, layers])
def test_a_llama_compiles_without_a_break(through: Callable[[Any], Any]) -> None:
    check(through, ringfa3.plan(Mask(documents=(10, 14)), "zigzag", 24))


def test_it_recomputes_too() -> None:
    def checkpointed(model: Any) -> Any:
        model.train()
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        return in_place(model)

    check(checkpointed, ringfa3.plan(Mask(), "zigzag", 24))


def test_layers_take_padding() -> None:
    padding = torch.ones(2, 24, dtype=torch.long)
    padding[0, :5] = 0
    check(layers, ringfa3.plan(Mask(), "zigzag", 24), attention_mask=padding)


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("attention_mask", {}, {"attention_mask": torch.ones(2, 24, dtype=torch.long)}),
        ("position_ids", {}, {"position_ids": torch.arange(24)[None]}),
        ("past_key_values", {}, {"use_cache": True}),
        ("model", {"sliding_window": 5}, {}),
        ("model", {"layer_types": ["full_attention", "sliding_attention"]}, {}),
    ],
)
def test_a_whole_model_names_what_it_cannot_have(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    model, plan = llama(**config), ringfa3.plan(Mask(), "contiguous", 24)
    with sequence_parallel(model, plan), pytest.raises(Exception, match=f"{name}: wanted .* takes a whole model"):
        whole(model)(input_ids=torch.randint(64, (2, 24)), **options)


def ranks_compile(rank: int, size: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)  # the same tokens on every rank
    check(whole, ringfa3.plan(Mask(documents=(10, 14)), "zigzag", 24))


def test_two_ranks_compile(world: Any) -> None:
    world(2)(ranks_compile, timeout=500.0)
