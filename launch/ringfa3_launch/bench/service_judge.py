"""Judges answers that are not the lone one: is every token the model's choice, within what rounding does to logits?

Answers are compared token by token. Those that part do so at a tie, where two tokens are equally likely; what follows
has another beginning, so each answer is held against the model's logits after its own tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfa3_launch.bench.case import DTYPES
from ringfa3_launch.bench.service_case import Level, Played, Said, differing, said
from ringfa3_launch.bench.service_load import Answer

if TYPE_CHECKING:
    from torch import Tensor

WIDER = {"bf16": "float32", "fp16": "float32", "fp32": "float64"}
TIMES = 2  # of plain transformers' error: what ours may have, for each of the two logits
FLOOR = 1e-6  # of the largest logit
LIKELY = 64  # tokens whose error counts: others' is never in question, and there are many
LONG = 1 << 14  # tokens: fp32 attention over 128K is 1e15 operations; above, the first short prompt's error serves


def judge(played: Played, *, device: str) -> None:
    """Count each level's equal answers and ties; the rest are wrong. The model is loaded if any differs.

    Args:
        device: "cpu" or "cuda", which the ranks have left.
    """
    others = differing(played)
    ties: set[Said] = set()
    folder = played.service.folder
    if others and folder is not None:
        try:
            ties = _ties(folder, others, played, device)
        except Exception as error:  # out of memory, most often: what was measured is not to be lost
            played.missing.append(f"the judge of ties: {type(error).__name__}: {error}"[:300])
    elif others:
        played.missing.append(f"{len(others)} answers differ from the lone one; without the model no tie can be seen")
    played.levels = [_counted(level, played.lone, ties) for level in played.levels]
    played.overheads = [
        replace(overhead, ties=sum(said(pair.served) in ties for pair in overhead.parted))
        for overhead in played.overheads
    ]


def _counted(level: Level, lone: dict[int, Answer], ties: set[Said]) -> Level:
    equal = sum(answer.prompt in lone and said(answer) == said(lone[answer.prompt]) for answer in level.good)
    return replace(level, equal=equal, ties=sum(said(answer) in ties for answer in level.good))


def _ties(folder: Path, others: Sequence[Answer], played: Played, device: str) -> set[Said]:
    import torch

    from ringfa3.inference.model import read

    dtype = played.service.dtype
    plain = read(folder, dtype=getattr(torch, DTYPES[dtype])).to(device)
    exact = copy.deepcopy(plain).to(getattr(torch, WIDER[dtype]))

    def measured(prompt: int, ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Logits in wider precision, and plain's error in those that count, token by token."""
        near, wide = (_logits(model, played.prompts[prompt], ids, device) for model in (plain, exact))
        return wide, rounding(near, wide)

    @cache
    def usual_error() -> Tensor:
        short = min(i for i in played.lone if len(played.prompts[i]) <= LONG)
        return measured(short, played.lone[short].ids)[1].max()

    @cache  # the lone answer is asked of once for each that parts from it
    def right(prompt: int, ids: tuple[int, ...]) -> bool:
        if len(played.prompts[prompt]) <= LONG:
            logits, error = measured(prompt, ids)
            return chosen(ids, logits, TIMES * error)
        return chosen(ids, _logits(plain, played.prompts[prompt], ids, device), (TIMES + 1) * usual_error())

    found = set()
    for answer in others:
        lone = played.lone[answer.prompt].ids
        parts = len(answer.ids) == len(lone) and answer.ids != lone  # the same tokens with another text are wrong
        if parts and right(answer.prompt, answer.ids) and right(answer.prompt, lone):
            found.add(said(answer))
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


def rounding(plain: Tensor, exact: Tensor) -> Tensor:
    """[n]: the largest error of plain's logits [n, vocab] among the likeliest tokens."""
    likely = exact.topk(min(LIKELY, exact.shape[1])).indices
    return (plain - exact).gather(1, likely).abs().amax(1)


def chosen(ids: Sequence[int], logits: Tensor, allowed: Tensor) -> bool:
    """Whether each token is the likeliest after those before it, or as likely, for what rounding may do.

    Args:
        ids: of an answer, n.
        logits: [n, vocab], of its tokens.
        allowed: [n] or [], the error of a logit.
    """
    import torch

    lacking = logits.amax(1) - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    return bool((lacking <= 2 * (allowed + FLOOR * logits.abs().amax(1))).all())
