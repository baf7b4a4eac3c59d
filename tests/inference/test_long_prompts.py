"""A real model reads real prompts of up to 8K tokens as transformers does. Minutes: only with --long-prompts.

pytest tests/inference/test_long_prompts.py --long-prompts -s
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ringfa3.inference.runner import Runner

BOOK = Path(__file__).parents[2] / "docs"
QUESTION = "What is the text above about? Answer in one sentence."
MOST = 16  # tokens of an answer
ROUNDING = 2e-3  # of fp32 logits through 30 layers: transformers' sdpa and eager attention differ by as much

pytestmark = pytest.mark.slow


def prompt(tokenizer: Any, length: int) -> list[int]:
    """So many tokens: prose of this repository, and a question about it."""
    text = "\n".join(file.read_text("utf-8") for file in sorted(BOOK.glob("*.md")))
    ids = tokenizer(text)["input_ids"]
    end = tokenizer(f"\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    begin = tokenizer("<|im_start|>user\n")["input_ids"]
    room = length - len(begin) - len(end)
    assert len(ids) >= room, f"docs have {len(ids)} tokens only"
    return [*begin, *ids[:room], *end]


def read(rank: int, size: int, folder: Path, ids: list[int], chunk: int) -> tuple[list[int], torch.Tensor, float]:
    """The answer's tokens, the logits that they were chosen by, and seconds until the first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    runner = Runner(model, pages=-(-len(ids) // (64 * size)) + 4, page_size=64)
    runner.create(0)
    begun = time.monotonic()
    for start in range(0, len(ids), chunk):
        logits = [runner.prefill(0, ids[start : start + chunk])]
    first = time.monotonic() - begun
    while len(logits) < MOST:
        logits.append(runner.decode([0], [[int(logits[-1].argmax())]])[0, 0])
    return [int(each.argmax()) for each in logits], torch.stack(logits), first


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("length", [2048, 4096, 8192 - MOST])
def test_a_real_model_reads_a_long_prompt(length: int, world: Any, request: pytest.FixtureRequest) -> None:
    """At 1 rank in chunks, at 2 at once; the token at which answers part, if any, is a tie within rounding."""
    if not request.config.getoption("--long-prompts", default=False):
        pytest.skip("minutes: asked for by --long-prompts")
    folder, tokenizer = request.getfixturevalue("smollm2")
    ids = prompt(tokenizer, length)
    assert len(ids) == length
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    begun = time.monotonic()
    wanted = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=MOST, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    seconds = time.monotonic() - begun
    theirs, usual = wanted.sequences[0, len(ids) :].tolist(), torch.cat(wanted.logits)
    both = world(2)(read, folder, ids, 1 << 20, timeout=1800.0)
    for ranks, (got, logits, first) in ((1, read(0, 1, folder, ids, 1024)), *((2, each) for each in both)):
        part = next((at for at, pair in enumerate(zip(got, theirs, strict=True)) if pair[0] != pair[1]), MOST)
        off = float((logits[: part + 1] - usual[: part + 1]).abs().max())
        print(f"{length} tokens, {ranks} ranks: {part} of {MOST} equal, logits off by {off:.1e}, first {first:.1f} s")
        assert off < ROUNDING
        if part < MOST:
            best = usual[part].topk(2)
            assert {got[part], theirs[part]} == set(best.indices.tolist())
            assert best.values[0] - best.values[1] <= 2 * off
    print(f"{length} tokens, transformers: {seconds:.1f} s; answer {tokenizer.decode(theirs)!r}")
