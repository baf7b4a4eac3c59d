"""Judges answers that are not the lone one: do they leave it at a tie, within what rounding does to logits?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfa3_launch.bench.case import DTYPES
from ringfa3_launch.bench.service_case import Level, Played, differing
from ringfa3_launch.bench.service_load import Answer

if TYPE_CHECKING:
    from torch import Tensor

WIDER = {"bf16": "float32", "fp16": "float32", "fp32": "float64"}
TIMES = 2  # of plain transformers' error: what ours may have, for each of the two logits
FLOOR = 1e-6  # of the largest logit
LIKELY = 64  # tokens that are looked at
BACK = 3  # tokens by which two answers may have parted before their texts do


def judge(played: Played, *, device: str) -> None:
    """Count each level's equal answers and ties; the rest are wrong. The model is loaded if any differs.

    Args:
        device: "cpu" or "cuda", which the ranks have left.
    """
    others = differing(played.levels, played.lone)
    ties: set[tuple[int, str]] = set()
    folder = played.service.folder
    if others and folder is not None:
        try:
            ties = _ties(folder, others, played, device)
        except Exception as error:  # out of memory, most often: what was measured is not to be lost
            played.missing.append(f"the judge of ties: {type(error).__name__}: {error}"[:300])
    elif others:
        played.missing.append(f"{len(others)} answers differ from the lone one; without the model no tie can be seen")
    played.levels = [_counted(level, played.lone, ties) for level in played.levels]


def _counted(level: Level, lone: dict[int, Answer], ties: set[tuple[int, str]]) -> Level:
    equal = sum(answer.prompt in lone and answer.text == lone[answer.prompt].text for answer in level.good)
    return replace(level, equal=equal, ties=sum((answer.prompt, answer.text) in ties for answer in level.good))


def _ties(folder: Path, others: Sequence[Answer], played: Played, device: str) -> set[tuple[int, str]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = played.service.dtype
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPES[dtype])).to(device).eval()
    exact = copy.deepcopy(plain).to(getattr(torch, WIDER[dtype]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = set()
    for answer in others:
        lone = played.lone[answer.prompt]
        prompt, ids = played.prompts[answer.prompt], list(lone.ids)
        logits = [_logits(model, prompt, ids, device) for model in (plain, exact)]
        if leaves_at_tie(answer.text, ids, logits[0], logits[1], tokenizer):
            found.add((answer.prompt, answer.text))
    return found


def _logits(model: Any, prompt: Sequence[int], ids: Sequence[int], device: str) -> Tensor:
    """[n, vocab] fp64 on the CPU: those that each of the n answered tokens was chosen by."""
    import torch

    with torch.inference_mode():
        out = model(
            input_ids=torch.tensor([[*prompt, *ids[:-1]]], device=device), use_cache=False, logits_to_keep=len(ids)
        )
    logits: Tensor = out.logits[0].double().cpu()
    return logits


def leaves_at_tie(text: str, ids: Sequence[int], plain: Tensor, exact: Tensor, tokenizer: Any) -> bool:
    """Whether the text goes on, where it leaves the lone answer, with a token as likely as the lone answer's.

    What follows then answers another beginning, and cannot be compared.

    Args:
        ids: of the lone answer, n.
        plain, exact: [n, vocab] logits of its tokens, in the dtype that is served and in wider precision.
        tokenizer: has decode.
    """
    last = max(n for n in range(len(ids)) if text.startswith(_text(tokenizer, ids[:n])))
    for n in range(last, max(-1, last - BACK), -1):
        scores = exact[n]
        scale = float(scores.abs().max())
        allowed = 2 * (TIMES * float((plain[n] - scores).abs().max()) + FLOOR * scale)
        best, tokens = scores.topk(min(LIKELY, len(scores)))
        begun = _text(tokenizer, ids[:n])
        for score, token in zip(best.tolist(), tokens.tolist(), strict=True):
            more = _text(tokenizer, [*ids[:n], token])
            if token != ids[n] and len(more) > len(begun) and text.startswith(more):
                return bool(float(best[0]) - score <= allowed)
    return False


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """As the service tells it, without a character whose bytes are not complete."""
    if not ids:
        return ""
    text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text.rstrip("\ufffd")
