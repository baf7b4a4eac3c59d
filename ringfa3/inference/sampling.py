"""Sampling: how a request's next token is chosen from the logits. OpenAI's words; Hugging Face's order of filters."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What a request asks of its tokens.

    Args:
        temperature: 0: the likeliest token, always; else logits are divided by it.
        top_k: only the k likeliest tokens; 0: all.
        top_p: of those only the fewest whose probabilities sum to at least this (the nucleus); 1: all.
        seed: equal seeds give equal tokens for equal logits, whatever else runs beside; None: a new one every time.
        max_tokens: ends with "length" after that many.
        stop: ends with "stop" before the first of these strings; it is not part of the text.
        stop_ids: ends with "stop" at the first of these tokens; it counts, but is not part of the text.
        ignore_eos: the model's end-of-sequence tokens do not end it (stop_ids do).

    Raises:
        ValueError: names the argument, what was wanted and what came.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, "a finite number, 0 or more", low=0.0)
        _check_number("top_p", self.top_p, "a number above 0, at most 1", low=0.0, high=1.0)
        if self.top_p == 0:
            raise ValueError(f"top_p: wanted a number above 0, at most 1, got {self.top_p!r}")
        _check_integer("top_k", self.top_k, 0)
        _check_integer("max_tokens", self.max_tokens, 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, None)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: wanted True or False, got {self.ignore_eos!r}")
        if isinstance(self.stop, str) or not isinstance(self.stop, Sequence):
            raise ValueError(f"stop: wanted a tuple of strings, got {self.stop!r}")
        if isinstance(self.stop_ids, str) or not isinstance(self.stop_ids, Sequence):
            raise ValueError(f"stop_ids: wanted a tuple of token ids, got {self.stop_ids!r}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop: wanted strings that are not empty, got {text!r}")
        for token in self.stop_ids:
            _check_integer("stop_ids", token, 0)
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))

    @property
    def greedy(self) -> bool:
        """Whether chance has no part in it."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def filters(self) -> bool:
        """Whether some tokens cannot come, however likely."""
        return self.top_k > 0 or self.top_p < 1

    def generator(self) -> random.Random:
        """A new request's own source of chance."""
        return random.Random(self.seed)


def choose(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[random.Random]) -> list[int | None]:
    """Each request's next token.

    Args:
        logits: [B, vocab] floating point, any device; a row's -inf are tokens that cannot come.
        samplings: per row.
        generators: per row; one that is not greedy gives one number.

    Returns:
        Token per row; None where the logits are no numbers (NaN, +inf or all -inf), which no token can follow from.
    """
    if logits.dim() != 2 or not len(samplings) == len(generators) == logits.shape[0]:
        raise ValueError(
            f"logits: wanted a row for each of {len(samplings)} requests with {len(generators)} generators, "
            f"got {tuple(logits.shape)}"
        )
    if not samplings:
        return []
    best = logits.max(-1)  # a NaN anywhere in a row is its maximum
    fine = best.values.abs() < math.inf
    # in one message: whoever asks a GPU waits for it
    tokens: list[int | None] = [None if token < 0 else token for token in best.indices.where(fine, -1).tolist()]
    drawn = [row for row, sampling in enumerate(samplings) if tokens[row] is not None and not sampling.greedy]
    for filtered in (False, True):  # apart, so that how a row is drawn does not depend on the others
        part = [row for row in drawn if samplings[row].filters == filtered]
        if part:
            rows = torch.tensor(part, device=logits.device)
            chosen = _draw(logits[rows], [samplings[row] for row in part], [generators[row].random() for row in part])
            for row, token in zip(part, chosen, strict=True):
                tokens[row] = token
    return tokens


def probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """What tokens are drawn from: fp64 [B, vocab], rows not normalised, and the tokens int64 [B, vocab] they are of.

    Temperature first, then top-k, then the nucleus of what top-k left: transformers' order. Among equal logits the
    lower token comes first.
    """
    scaled = logits.double() / _column(logits, [sampling.temperature or 1.0 for sampling in samplings])
    if not any(sampling.filters for sampling in samplings):
        tokens = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        return scaled.softmax(-1), tokens
    scaled, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    weights = scaled.softmax(-1)
    vocab = logits.shape[-1]
    kept = _column(logits, [min(sampling.top_k or vocab, vocab) for sampling in samplings])
    weights.masked_fill_(torch.arange(vocab, device=logits.device) >= kept, 0.0)
    before = weights.cumsum(-1) - weights  # mass of the likelier tokens
    nucleus = _column(logits, [sampling.top_p for sampling in samplings])
    whole = nucleus == 1  # exactly all of it, whatever rounding makes of the sum
    weights.masked_fill_((before >= nucleus * weights.sum(-1, keepdim=True)) & ~whole, 0.0)
    return weights, tokens


def _draw(logits: Tensor, samplings: Sequence[Sampling], chances: Sequence[float]) -> list[int]:
    """The token at which the sum of probabilities passes each row's chance, 0 <= chance < 1."""
    weights, tokens = probabilities(logits, samplings)
    sums = weights.cumsum(-1)
    wanted = sums[:, -1:] * _column(logits, chances)
    place = (sums <= wanted).sum(-1, keepdim=True)  # the first whose sum is above it: one of weight 0 never is
    last = logits.shape[-1] - 1 - weights.flip(-1).gt(0).to(torch.uint8).argmax(-1, keepdim=True)
    return tokens.gather(-1, torch.minimum(place, last)).squeeze(-1).tolist()


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(-1)


def _check_integer(name: str, value: object, low: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
        wanted = "an integer" if low is None else f"an integer, {low} or more"
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")


def _check_number(name: str, value: object, wanted: str, *, low: float, high: float = math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")
