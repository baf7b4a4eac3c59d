"""A real model reads real prompts as transformers does: eight at once, three turns of a conversation, up to 8K tokens.

Those of thousands of tokens take minutes: only with --long-prompts.

pytest tests/inference/test_long_prompts.py --long-prompts -s
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ringfa3.inference import Engine, Sampling
from ringfa3.inference.runner import Runner
from tests.inference.talk import Said, talk

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


LENGTHS = (2, 170, 9, 64, 33, 128, 5, 90)  # tokens of prompts that are answered together
TURNS = (120, 40, 1)  # tokens that each turn adds
SHORT = 10  # tokens of their answers


def converse(rank: int, size: int, folder: Path, ids: list[int], chunk: int) -> Said | None:
    """All of LENGTHS together, then a conversation, by an Engine; rank 0's prompts and answers."""
    engine = Engine(Runner(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), pages=64), chunk=chunk)
    if rank > 0:
        engine.serve()
        return None
    sampling = Sampling(max_tokens=SHORT, ignore_eos=True)
    batch = [ids[50 * i : 50 * i + length] for i, length in enumerate(LENGTHS)]
    turns = [ids[500 + 200 * turn : 500 + 200 * turn + length] for turn, length in enumerate(TURNS)]
    return talk(engine, batch, turns, sampling)


@pytest.mark.parametrize(("size", "chunk"), [(1, 48), (2, 512), (3, 48), (4, 512)])
def test_a_real_model_talks(size: int, chunk: int, world: Any, request: pytest.FixtureRequest) -> None:
    """Batched or turn by turn, in chunks or not: greedy tokens are transformers', but for ties within rounding."""
    if size != 3 and not request.config.getoption("--long-prompts", default=False):
        pytest.skip("half a minute: asked for by --long-prompts")
    folder, tokenizer = request.getfixturevalue("smollm2")
    ids = prompt(tokenizer, 1200)
    said = (world(size)(converse, folder, ids, chunk) if size > 1 else [converse(0, 1, folder, ids, chunk)])[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    assert len(said) == len(LENGTHS) + len(TURNS)
    for asked, got in said:
        wanted = model.generate(
            torch.tensor([asked]), attention_mask=torch.ones(1, len(asked)), max_new_tokens=SHORT, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        theirs = wanted.sequences[0, len(asked) :].tolist()
        part = next((at for at, pair in enumerate(zip(got, theirs, strict=True)) if pair[0] != pair[1]), None)
        if part is not None:
            best = wanted.logits[part][0].topk(2)
            assert {got[part], theirs[part]} == set(best.indices.tolist()), (got, theirs)
            assert best.values[0] - best.values[1] <= 2 * ROUNDING
