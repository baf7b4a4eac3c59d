"""Sampling: transformers' filters are the oracle; draws follow the probabilities, and depend on nobody else."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ringfa3.inference.sampling import Sampling, choose, probabilities

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 5, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.7, 0.1, 1e-9]),
    seed=st.integers(0, 5),
)


def theirs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """fp64 [vocab], by transformers, top-k first as its generate has it."""
    scores = logits.double().unsqueeze(0)
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1)[0]


def ours(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    weights, tokens = probabilities(logits.unsqueeze(0), [sampling])
    return torch.zeros(logits.shape[-1], dtype=torch.float64).scatter(0, tokens[0], weights[0] / weights.sum())


@given(seed=st.integers(0, 2**32 - 1), sampling=SAMPLINGS, vocab=st.sampled_from([1, 2, 7, 300]))
@settings(max_examples=200)
def test_probabilities_are_transformers(seed, sampling, vocab):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3
    if sampling.temperature == 0:
        return
    torch.testing.assert_close(ours(logits, sampling), theirs(logits, sampling), rtol=1e-9, atol=1e-12)


def test_ties_and_impossible_tokens():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, float("-inf")])
    assert ours(logits, Sampling(temperature=1.0, top_k=2)).tolist() == [0, 0.5, 0.5, 0, 0]
    assert ours(logits, Sampling(temperature=1.0, top_p=0.5)).nonzero().flatten().tolist() == [1, 2]
    assert ours(logits, Sampling(temperature=1.0))[4] == 0
    for seed in range(50):
        assert choose(logits[None], [Sampling(temperature=5.0)], [random.Random(seed)])[0] != 4


class Fixed(random.Random):
    """Always the same chance."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def random(self) -> float:
        return self.chance


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3, top_p=0.999)])
def test_the_ends_of_chance_fall_on_tokens_that_can_come(chance, sampling):
    """Also where the first or the last tokens cannot, and sums are rounded."""
    for logits in ([float("-inf"), 0.0, 0.0, float("-inf")], [0.0, float("-inf")], [float("-inf"), 0.1]):
        row = torch.tensor([logits])
        (token,) = choose(row, [sampling], [Fixed(chance)])
        assert row[0, token].isfinite()
        finite = row[0].isfinite().nonzero().flatten().tolist()
        assert token == (finite[0] if chance == 0 else finite[-1])


def test_top_p_1_keeps_the_unlikeliest():
    assert ours(torch.tensor([0.0, -60.0]), Sampling(temperature=1.0, top_k=2))[1] > 0


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=4),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=1.2, top_k=5, top_p=0.9),
    ],
)
def test_draws_follow_the_probabilities(sampling):
    """20,000 draws: chi-square over tokens, which is above 40 for fewer than 12 of them once in 30,000 runs."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 1.5
    rng, count = random.Random(seed), 20_000
    drawn = choose(logits.expand(count, 12), [sampling] * count, [rng] * count)
    seen = np.bincount(np.array(drawn), minlength=12)
    wanted = theirs(logits, sampling).numpy() * count
    assert (seen[wanted == 0] == 0).all()
    some = wanted > 0
    assert ((seen - wanted)[some] ** 2 / wanted[some]).sum() < 40


@given(seed=st.integers(0, 2**32 - 1), samplings=st.lists(SAMPLINGS, min_size=1, max_size=6))
@settings(max_examples=100)
def test_a_row_does_not_depend_on_the_others(seed, samplings):
    logits = torch.randn(len(samplings), 50, generator=torch.Generator().manual_seed(seed)) * 2
    together = choose(logits, samplings, [each.generator() for each in samplings])
    alone = [choose(row[None], [each], [each.generator()])[0] for row, each in zip(logits, samplings, strict=True)]
    assert together == alone
    for row, each, token in zip(logits, samplings, together, strict=True):
        if each.greedy:
            assert token == row.argmax()


def test_greedy_takes_nothing_from_the_generator():
    generator = random.Random(1)
    state = generator.getstate()
    choose(torch.randn(1, 9), [Sampling()], [generator])
    choose(torch.randn(1, 9), [Sampling(temperature=2.0, top_k=1)], [generator])
    assert generator.getstate() == state
    choose(torch.randn(1, 9), [Sampling(temperature=2.0)], [generator])
    assert generator.getstate() != state


def test_seeds():
    logits = torch.zeros(1, 1000)
    draws = {
        seed: [choose(logits, [Sampling(temperature=1.0)], [generator])[0] for _ in range(20)]
        for seed, generator in ((seed, Sampling(seed=seed).generator()) for seed in (1, 2))
    }
    again = Sampling(seed=1).generator()
    assert [choose(logits, [Sampling(temperature=1.0)], [again])[0] for _ in range(20)] == draws[1]
    assert draws[1] != draws[2]
    unseeded = [Sampling().generator().random() for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(bad):
    logits = torch.randn(3, 8)
    logits[1, 5] = bad
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.5)):
        tokens = choose(logits, [sampling] * 3, [random.Random(0)] * 3)
        assert tokens[1] is None
        assert None not in (tokens[0], tokens[2])
    assert choose(torch.full((1, 4), float("-inf")), [Sampling()], [random.Random(0)]) == [None]
    assert choose(torch.zeros(0, 4), [], []) == []
    with pytest.raises(
        ValueError, match=r"logits: wanted a row for each of 2 requests with 1 generators, got \(3, 8\)"
    ):
        choose(logits, [Sampling()] * 2, [random.Random(0)])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None, True]),
        ("top_k", [-1, 1.5, "3", None, False]),
        ("top_p", [0.0, -0.5, 1.01, float("nan"), "1", None]),
        ("seed", [1.5, "x", True]),
        ("max_tokens", [0, -3, 2.0, None]),
        ("stop", ["text", ("a", ""), (1,), 3, None]),
        ("stop_ids", [(-1,), (1.5,), "12", 3, (True,)]),
        ("ignore_eos", [1, None, "yes"]),
    ],
)
def test_refusals_name_the_argument(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}: wanted .*, got "):
            Sampling(**{name: value})


def test_lists_are_as_good_as_tuples():
    assert Sampling(stop=["a"], stop_ids=[3]) == Sampling(stop=("a",), stop_ids=(3,))
    hash(Sampling(stop=["a"], temperature=1))
