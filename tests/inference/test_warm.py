"""Warming: the steps that a runner captures beforehand are those that it later needs, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringfa3.inference.attend import Decode
from ringfa3.inference.newest import Form, Newest
from ringfa3.inference.runner import Runner
from tests.inference.families import build


class Captures:
    """What CUDA graphs would do, on a CPU: steps are padded as theirs, and each new form is taken down."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.forms: list[Form] = []

    def __call__(self, ids: NDArray[np.int64], newest: Newest) -> Tensor:
        runner, form = self._runner, Form.of(newest, padded=True)
        if form not in self.forms:
            self.forms.append(form)
        sent = form.unpack(form.pack(ids, newest, runner.cache.scratch))
        logits = runner._model(Decode(runner.cache, runner._ranks, sent), sent.ids, sent.positions)
        return logits[: ids.shape[0]]


def captured(**options: Any) -> tuple[Runner, Captures]:
    runner = Runner(build("gemma2"), page_size=4, **options)
    captures = Captures(runner)
    runner._graphs = captures  # type: ignore[assignment]
    return runner, captures


def said(runner: Runner) -> list[Tensor]:
    """Logits of three sequences' beginnings, and of a decode of them."""
    for seq in range(3):
        runner.create(seq)
    first = [runner.prefill(seq, [seq + 1] * (5 + seq)) for seq in range(3)]
    return [*first, runner.decode(range(3), [[7], [8], [9]])]


def warmed(rank: int, size: int) -> list[tuple[int, int, int]]:
    """Forms after warming for 6 sequences; nothing is added by what follows, which is what it would have been."""
    runner, captures = captured(pages=30)
    free = [list(pages) for pages in runner.pages._free]
    runner.warm(6)
    assert runner.pages.sequences == ()
    assert [sorted(pages) for pages in runner.pages._free] == [sorted(pages) for pages in free]
    runner.pages.audit()
    forms = list(captures.forms)
    cold, _ = captured(pages=30)
    for ours, theirs in zip(said(runner), said(cold), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert captures.forms == forms
    return [(form.batch, form.tokens, form.blocks) for form in forms]


@pytest.mark.parametrize("size", [1, 2])
def test_later_steps_find_theirs(world: Any, size: int) -> None:
    for forms in world(2)(warmed) if size == 2 else [warmed(0, 1)]:
        assert forms == [(1, 1, 16), (2, 1, 16), (4, 1, 16), (8, 1, 16)]


def test_no_more_than_there_are_pages_for() -> None:
    runner, captures = captured(pages=3)
    runner.warm(64)
    assert [form.batch for form in captures.forms] == [1, 2, 4]
    runner, captures = captured(pages=3)
    runner.warm(1)
    assert [form.batch for form in captures.forms] == [1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="graphs: wanted True where decode steps are to be captured, got False"):
        Runner(build("llama"), pages=6, page_size=4).warm(4)
    runner, captures = captured(pages=6)
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"most: wanted an integer, 1 or more, got {wrong}"):
            runner.warm(wrong)  # type: ignore[arg-type]
    runner.create(0)
    with pytest.raises(ValueError, match="sequences: wanted none yet, got 1"):
        runner.warm(4)
    assert captures.forms == []


def differ(rank: int, size: int) -> None:
    runner, captures = captured(pages=6)
    with pytest.raises(ValueError, match="most"):
        runner.warm(4 + rank)
    assert captures.forms == []


def test_ranks_that_differ_hear_of_it(world: Any) -> None:
    world(2)(differ)
