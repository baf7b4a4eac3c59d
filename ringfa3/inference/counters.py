"""Counters: what an engine has done, as numbers that a metrics endpoint can show as they are."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ringfa3.inference.answer import Answer

# Upper bounds in seconds, from a small model's token to the prefill of a million of them; what is above is in count
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)


class Histogram:
    """How long something took, as Prometheus counts it."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0
        self._buckets = [0] * (len(BOUNDS) + 1)

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.sum += seconds
        self.count += 1
        self._buckets[bisect_left(BOUNDS, seconds)] += 1

    def read(self) -> dict[str, Any]:
        """sum in seconds; count; and buckets: (upper bound, how many took that long at most) pairs."""
        return {
            "sum": self.sum,
            "count": self.count,
            "buckets": list(zip(BOUNDS, accumulate(self._buckets), strict=False)),
        }


@dataclass
class Counters:
    """Of one engine; all only grow.

    Args:
        submitted, refused: requests that were taken, and that found the queue full.
        finished: requests that ended, by how.
        prompt_tokens, cached_tokens: of requests that got a token; how many of them were in the cache already.
        prefilled_tokens: what was prefilled, again after a preemption too.
        completion_tokens: tokens sampled.
        steps: orders that computed something.
        first: from submission to a request's first token. each: from each token of a request to its next.
    """

    submitted: int = 0
    refused: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "error"), 0))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    first: Histogram = field(default_factory=Histogram)
    each: Histogram = field(default_factory=Histogram)

    def sampled(self, answer: Answer, now: float) -> None:
        """An answer gets a token; it has not been entered yet."""
        (self.each if answer.begun else self.first).observe(now - answer.since)
        self.completion_tokens += 1
        if not answer.begun:
            self.prompt_tokens += answer.request.prompt
            self.cached_tokens += answer.request.cached or 0

    def read(self) -> dict[str, Any]:
        """As a dict of numbers, and of histograms as `Histogram.read` gives them."""
        numbers = {
            name: getattr(self, name)
            for name in ("submitted", "refused", "prompt_tokens", "cached_tokens", "prefilled_tokens")
        }
        return {
            **numbers,
            "completion_tokens": self.completion_tokens,
            "steps": self.steps,
            "finished": dict(self.finished),
            "first_token_seconds": self.first.read(),
            "each_token_seconds": self.each.read(),
        }
