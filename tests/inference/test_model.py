"""Models are loaded from files; what cannot be served, and what a layer would ask for in vain, is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ringfa3 import Mask
from ringfa3.inference.model import Sight, attention, load, longest, served, text_config
from ringfa3.inference.runner import Runner
from ringfa3_kernels import Unsupported
from ringfa3_launch.checkpoint import Checkpoint
from tests.inference.families import CONFIGS, SMALL, YARN, build


def test_refusals_of_the_attention_function() -> None:
    """What a layer asks for and would not get."""
    q = torch.zeros(1, 2, 3, 16)
    layer = torch.nn.Identity()
    sight = Sight(Mask(window=(3, 0)), None)  # type: ignore[arg-type]  # never reached
    for match, options in (
        ("head_mask: wanted none", {"head_mask": torch.zeros(1)}),
        ("position_bias: wanted none", {"position_bias": torch.zeros(1)}),
        ("dropout: wanted 0, got 0.1", {"dropout": 0.1}),
        ("is_causal: wanted what the layer's mask has, True, got False", {"is_causal": False}),
        (r"sliding_window: wanted what the layer's mask has, \(3, 0\), got 3", {"sliding_window": 3}),
    ):
        with pytest.raises(ValueError, match=match):
            attention(layer, q, q, q, sight, **options)
    with pytest.raises(ValueError, match="attention_mask: wanted the mask that"):
        attention(layer, q, q, q, torch.zeros(1, 1, 3, 3))  # type: ignore[arg-type]


def test_a_model_called_without_its_runner_is_refused() -> None:
    model = build("llama")
    Runner(model, pages=3)
    with pytest.raises(ValueError, match="by a Runner"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


def config(kind: str, **options: Any) -> Any:
    return getattr(transformers, kind)(**options)


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: config("LlavaConfig"), "vision_config"),
        (lambda: config("Gemma3Config"), "vision_config"),
        (lambda: config("T5Config"), "encoder-decoder"),
        (lambda: config("MambaConfig"), "'mamba'"),
        (lambda: config("BloomConfig"), "'bloom'"),
        (lambda: config("Llama4TextConfig"), "'llama4_text'"),
        (lambda: config("LlamaConfig", rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
        (
            lambda: config(
                "LlamaConfig",
                rope_parameters={
                    "rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
                    "original_max_position_embeddings": 4096, "factor": 2.0,
                },
            ),
            "'longrope'",
        ),
        (
            lambda: config(
                "Gemma3TextConfig",
                rope_parameters={
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            "'dynamic'",
        ),
    ],
    ids=[
        "vision", "gemma3", "encoder-decoder", "mamba", "alibi", "llama4", "dynamic", "longrope",
        "dynamic in some layers",
    ],
)  # fmt: skip
def test_models_that_are_refused(made: Any, match: str) -> None:
    with pytest.raises(Unsupported, match=match):
        served(made())


def test_a_model_that_looks_ahead_is_refused() -> None:
    torch.manual_seed(0)
    kind, more = CONFIGS["gemma3"]
    both_ways = AutoModelForCausalLM.from_config(config(kind, **(SMALL | more), use_bidirectional_attention=True))
    with pytest.raises((Unsupported, ValueError), match=r"mask_function|see what follows"):
        Runner(both_ways, pages=3)


def test_longest() -> None:
    assert longest(build("llama").config) == 128
    assert longest(config("LlamaConfig", **(SMALL | {"max_position_embeddings": 32}), rope_parameters=YARN)) == 128


def test_loading(tmp_path: Path) -> None:
    build("qwen3").save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert tokenizer is None
    assert model.dtype == torch.bfloat16
    assert not model.training
    for path in (tmp_path / "nothing", tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match="path: wanted a GGUF file, or a folder"):
            load(path, device="cpu", dtype=torch.float32)
    config("MambaConfig").save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="mamba"):
        load(tmp_path, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("names", ["on disk", "in memory"])
def test_the_text_model_of_one_that_also_sees(names: str, tmp_path: Path) -> None:
    """Files call its weights as the Hub does, or as the model itself does."""
    torch.manual_seed(0)
    kind, more = CONFIGS["gemma3"]
    text = config(kind, **(SMALL | more)).to_dict()
    sight = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "num_hidden_layers": 1}
    sight |= {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    whole = transformers.Gemma3ForConditionalGeneration(
        config("Gemma3Config", text_config=text, vision_config=sight, mm_tokens_per_image=4, image_token_index=96)
    ).eval()
    whole.save_pretrained(tmp_path, save_original_format=names == "on disk")
    model, _ = load(tmp_path, device="cpu", dtype=torch.float32)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    ids = torch.randint(0, 96, (2, 60))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    Checkpoint(tmp_path).check_served(tmp_path)
    Runner(model, pages=3)
    with pytest.raises(Unsupported, match="it has a vision_config, only text is served"):
        Runner(whole, pages=3)
    whole.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(Unsupported, match="'gemma3': its weights are quantised"):
        text_config(whole.config)
