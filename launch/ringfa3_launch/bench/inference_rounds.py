"""One load for one engine: its prompts answered round by round; and whether the answers are right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ringfa3_launch.bench.inference_case import Checked, Served, Truth
from ringfa3_launch.bench.timing import Timing

if TYPE_CHECKING:
    from torch import Tensor

    from ringfa3.inference import Engine, Event, Runner

FLOOR = 1e-5  # of the largest logit: fp32 rounding, where one device happens to have less
CHECKING = 1 << 40  # number of the sequence that is checked: no engine counts so far


class Rounds:
    """The same prompts again and again: the first time unseen, then timed.

    Args:
        engine: of this rank; rank 0's is given the prompts.
        prompts: all at once.
        tokens: answered to each.
        rounds: that are timed.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, rounds: int) -> None:
        from ringfa3.inference import Sampling

        self.engine, self.prompts = engine, prompts
        self.sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        self.left = rounds + 1
        self.times: list[tuple[float, float, float]] = []
        self.pages = 0
        self.failure = ""

    def run(self) -> None:
        """All rounds, on every rank.

        Raises:
            RuntimeError: a request failed.
        """
        if self.engine.leads:
            self._begin()
        self.engine.serve()
        if self.failure:
            raise RuntimeError(self.failure)

    def served(self) -> Served:
        """How it went; nothing but zeros on ranks that do not lead."""
        if not self.engine.leads:
            zero = Timing((0.0,))
            return Served(zero, zero, zero, ())
        first, each, total = (Timing(column) for column in zip(*self.times[1:], strict=True))
        return Served(first, each, total, tuple(map(tuple, self.answers)), pages=self.pages)

    def _begin(self) -> None:
        self.answers: list[list[int]] = [[] for _ in self.prompts]
        self.stamps: list[list[float]] = [[] for _ in self.prompts]
        self.going = len(self.prompts)
        self.begun = time.perf_counter()
        for i, prompt in enumerate(self.prompts):
            self.engine.submit(prompt, self.sampling, on_event=partial(self._hear, i))

    def _hear(self, i: int, event: Event) -> None:
        if event.token is not None:
            self.stamps[i].append(time.perf_counter())
            self.answers[i].append(event.token)
        if event.finish is None:
            return
        self.pages = max(self.pages, *self.engine.stats()["pages_used"])
        if event.finish != "length" or event.cached_tokens:
            self.failure = self.failure or event.error or f"finished by {event.finish!r}, {event.cached_tokens} cached"
        self.going -= 1
        if self.going:
            return
        if not self.failure:
            count = len(self.stamps)
            first = sum(stamps[0] for stamps in self.stamps) / count - self.begun
            together = max(stamps[0] for stamps in self.stamps)  # before it prompts are read between the tokens
            late = [[s for s in stamps if s >= together] for stamps in self.stamps]
            late = [s for s in late if len(s) > 1]  # nobody, where a token is all that is answered
            each = sum((s[-1] - s[0]) / (len(s) - 1) for s in late) / max(1, len(late))
            self.times.append((first, each, max(stamps[-1] for stamps in self.stamps) - self.begun))
        self.left -= 1
        if self.left and not self.failure:
            self._begin()
        else:
            self.engine.close()


def prefill(runner: Runner, prompt: Sequence[int], chunk: int) -> Tensor:
    """The logits after a prompt, fp32 [vocab], on every rank; nothing stays in the cache."""
    runner.create(CHECKING)
    for begin in range(0, len(prompt), chunk):
        logits = runner.prefill(CHECKING, prompt[begin : begin + chunk])
    runner.free(CHECKING)
    return logits


def check(logits: Tensor, answer: Sequence[int], truth: Truth, worst: float) -> Checked:
    """Ours beside what one device says.

    Where wider precision was computed: at most twice the error of one device there. Else the distance from one device:
    at most three times its error in shorter prompts, as both are off.

    Args:
        logits: fp32 [vocab], ours after the prompt.
        answer: our greedy tokens.
        worst: one device's largest error in shorter prompts.
    """
    exact = truth.exact
    against = truth.steps[0] if exact is None else exact
    scale = float(against.abs().max())
    error = float((logits - against).abs().max()) / scale
    plain = worst if exact is None else float((truth.steps[0] - exact).abs().max()) / scale
    allowed = (3 if exact is None else 2) * plain + FLOOR
    pairs = list(zip(answer, truth.answer, strict=True))
    same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    agree = same == len(pairs)
    if not agree:  # what follows answers another beginning, and cannot be compared
        (ours, theirs), step = pairs[same], truth.steps[same]
        agree = bool(step[theirs] - step[ours] <= allowed * float(step.abs().max()))
    by = "one device" if exact is None else "wider precision"
    return Checked(agree, same, len(pairs), error, plain, allowed, by)
