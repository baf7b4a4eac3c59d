"""GGUF files: the scaled RoPE that transformers does not read, against models that are built with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ringfa3.inference.gguf_config import read_config
from ringfa3.inference.model import load, longest, read
from ringfa3.inference.runner import Runner
from ringfa3_kernels import Unsupported
from ringfa3_launch.checkpoint import Checkpoint
from tests.inference.families import LLAMA3, SMALL, YARN
from tests.inference.tiny_gguf import write

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
GLOBAL = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}
LOCAL = {"sliding_window": 6, "query_pre_attn_scalar": 16, "num_hidden_layers": 6}  # GGUF: every 6th layer is global
UNSCALED = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}
SAID = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
YARN_MORE = YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.5 * 1.1386294361119891}
SAID_MORE = SAID | {
    "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 1.5,
    "rope.scaling.yarn_ext_factor": 1.0,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama3": ("llama", "LlamaConfig", {"rope_parameters": LLAMA3}, UNSCALED),
    "linear": ("llama", "LlamaConfig", {"rope_parameters": LINEAR}, {"rope.scaling.factor": 4.0}),
    "old linear": ("llama", "LlamaConfig", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
    "yarn": ("qwen2", "Qwen2Config", {"rope_parameters": YARN}, SAID),
    "all of yarn": ("llama", "LlamaConfig", {"rope_parameters": YARN_MORE}, SAID_MORE),
    "gemma3": (
        "gemma3",
        "Gemma3TextConfig",
        LOCAL | {"rope_parameters": GLOBAL},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base_swa": 5e3},
    ),
}


def built(kind: str, more: dict[str, Any]) -> Any:
    """The model with its RoPE as its configuration has it."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, kind)(**(SMALL | more))).eval()


def divisors(model: Any) -> torch.Tensor:
    """By which the model divides the frequencies of an unscaled RoPE."""
    rotary = model.model.rotary_emb
    plain, _ = rotary.compute_default_rope_parameters(model.config)
    return plain / rotary.inv_freq


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("case", CASES)
def test_scaled_rope(case: str, tmp_path: Path) -> None:
    """At 100 positions, of which 32 were the original ones."""
    family, kind, more, keys = CASES[case]
    wanted = built(kind, more)
    divided = divisors(wanted) if case == "llama3" else None
    file = write(tmp_path / "a.gguf", family, wanted, keys=keys, divisors=divided)
    model = read(file, dtype=torch.float32)
    model.set_attn_implementation("eager")
    ids = torch.randint(0, SMALL["vocab_size"], (2, 100))
    right = logits(wanted, ids)
    torch.testing.assert_close(logits(model, ids), right, atol=1e-5, rtol=1e-5)
    assert longest(model.config) == longest(wanted.config)
    unscaled = built(kind, more | {"rope_parameters": None})
    unscaled.load_state_dict(wanted.state_dict())
    assert (logits(unscaled, ids) - right).abs().max() > 0.1, "the RoPE makes no difference here"


def test_divided_frequencies_from_file_to_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ranks get them: from a plain folder, in chunks, then token by token, with frequencies that stay."""
    wanted = built("LlamaConfig", {"rope_parameters": LLAMA3})
    file = write(tmp_path / "a.gguf", "llama", wanted, divisors=divisors(wanted))
    folder = tmp_path / "plain"
    folder.mkdir()
    Checkpoint.find(str(file)).unpack(folder)
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_type"] == "longrope"
    runner = Runner(load(folder, device="cpu", dtype=torch.float32)[0], pages=8)
    ids = torch.randint(0, SMALL["vocab_size"], (60,)).tolist()
    right = logits(wanted, torch.tensor([ids]))[0]
    runner.create(0)
    ours = {upto: runner.prefill(0, ids[since:upto]) for since, upto in ((0, 20), (20, 58))}
    # with which transformers would look at positions in every pass, which a CUDA graph of it could not
    monkeypatch.setattr(torch, "max", lambda *_: pytest.fail("positions were read back from the device"))
    ours |= {upto: runner.decode([0], [[ids[upto - 1]]])[0, 0] for upto in (59, 60)}
    for upto, got in ours.items():
        torch.testing.assert_close(got, right[upto - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "keys", "match"),
    [
        ("llama", {"rope.scaling.type": "longrope"}, "its RoPE is scaled by 'longrope' with a factor of 1"),
        ("qwen2", {"rope.scaling.factor": 0.5}, "scaled by 'linear' with a factor of 0.5"),
        ("qwen3", SAID | {"rope.scaling.yarn_ext_factor": 0.5}, "its YaRN has ext_factor 0.5, served is 1"),
        ("qwen3", SAID | {"rope.scaling.yarn_attn_factor": 1.0}, "attn_factor 1, served is 1.13863"),
        ("qwen3", SAID | {"rope.scaling.yarn_log_multiplier": 0.1}, "log_multiplier 0.1, served is 0"),
        ("llama", {"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5}, "has llama.rope.scaling.attn_factor"),
        ("llama", {"rope.scaling.yarn_ext_factor": 1.0}, "has llama.rope.scaling.yarn_ext_factor, which is not served"),
        ("llama", {"rope.freq_base_swa": 1e3}, "has llama.rope.freq_base_swa"),
        ("qwen3", {"rope.dimension_count": 64, "vocab_size": 9}, "its RoPE turns part of the 128 dimensions of a head"),
        ("gpt2", {"vocab_size": 9}, "'gpt2': served are llama"),
        ("gemma3", SAID, "its RoPE is scaled by 'yarn', served is 'linear' for the global layers"),
        ("gpt-oss", SAID, "transformers reads the RoPE of gpt-oss wrongly"),
    ],
)
def test_headers_that_are_refused(family: str, keys: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=match):
        read(write(tmp_path / "a.gguf", family, keys=keys), dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"--model: wanted one that can be served, got a \(model .*{match}"):
        Checkpoint(tmp_path, "a.gguf").unpack(tmp_path)


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    both = write(tmp_path / "both.gguf", "llama", keys={"rope.scaling.factor": 4.0}, divisors=[1.0] * 8)
    with pytest.raises(Unsupported, match=r"scaled twice, by 'linear' and by rope_freqs\.weight"):
        read_config(both)
    by_length = write(tmp_path / "by_length.gguf", "llama", tensors={"rope_factors_long.weight": [1.0] * 8})
    with pytest.raises(Unsupported, match=r"its RoPE has rope_factors_long\.weight, which is not served"):
        read_config(by_length)
    short = write(tmp_path / "short.gguf", "llama", keys={"rope.dimension_count": 16, "vocab_size": 9}, divisors=[2.0])
    with pytest.raises(Unsupported, match="its RoPE turns part of the 16 dimensions"):
        read_config(short)


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_scale_of_queries_that_only_the_number_of_layers_tells(family: str, layers: int, tmp_path: Path) -> None:
    sizes = {"embedding_length": 96, "attention.head_count": 4, "attention.key_length": 16, "vocab_size": 9}
    for count, scalar in ((layers, 24), (26, 16)):
        file = write(tmp_path / "a.gguf", family, keys=sizes | {"block_count": count})
        assert read_config(file).query_pre_attn_scalar == scalar


def test_missing_weights_are_not_drawn_at_random(tmp_path: Path) -> None:
    model = built("LlamaConfig", {})
    file = write(tmp_path / "a.gguf", "llama", model, without="blk.1.attn_q.weight")
    with pytest.raises(ValueError, match=r"wanted all weights of .*, got none for 1, as model\.layers\.1\.self_attn\."):
        read(file, dtype=torch.float32)
