"""Layouts: every position on one rank, ascending; balanced deals equal work; counts of positions below a bound."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfa3.layout import Layout, balanced, deal, resolve
from ringfa3.mask import Mask
from tests.ring.masks import masks

NAMES = ["contiguous", "zigzag", "striped", "balanced"]


@dataclass(frozen=True)
class Foreign(Layout):
    """Somebody else's layout, of several runs with steps: stripes of a first half forwards, of the second backwards."""

    name = "foreign"

    def runs(self, seqlen, world, rank):
        half = seqlen // 2
        halves = [(rank, half, world), (half + world - 1 - rank, seqlen, world)]
        return [run for run in halves if run[0] < run[1]]


@st.composite
def dealt(draw):
    seqlen = draw(st.integers(0, 100))
    mask = draw(masks(seqlen)) if seqlen else Mask()
    layout = draw(st.sampled_from([resolve(name, mask) for name in NAMES] + [Foreign()]))
    return layout, seqlen, draw(st.integers(1, 8))


@given(dealt())
def test_deals_every_position_once_and_ascending(case):
    layout, seqlen, world = case
    hands = [layout.positions(seqlen, world, rank) for rank in range(world)]
    assert all((np.diff(hand) > 0).all() for hand in hands)
    np.testing.assert_array_equal(np.sort(np.concatenate(hands)), np.arange(seqlen))
    dealing = deal(layout, seqlen, world)
    assert dealing.lengths == tuple(map(len, hands))
    for rank, hand in enumerate(hands):
        np.testing.assert_array_equal(dealing.positions(rank), hand)
        assert all(len(range(*run)) > 0 for run in dealing.runs[rank])


@given(dealt(), st.data())
def test_below_counts_positions(case, data):
    layout, seqlen, world = case
    dealing = deal(layout, seqlen, world)
    x = np.array(sorted(data.draw(st.lists(st.integers(0, seqlen), max_size=30))), np.int32)
    ranks = data.draw(st.lists(st.integers(0, world - 1), min_size=1, unique=True))
    offsets = np.array(data.draw(st.lists(st.integers(-5, 5), min_size=len(ranks), max_size=len(ranks))), np.int32)
    out = np.empty((len(ranks), x.size), np.int32)
    dealing.below(x, ranks, offsets, out)
    for rank, offset, count in zip(ranks, offsets, out, strict=True):
        held = layout.positions(seqlen, world, rank)
        np.testing.assert_array_equal(count, (held[None] < x[:, None]).sum(1) - offset)


@given(st.integers(0, 500), st.integers(1, 9))
def test_lengths_are_even(seqlen, world):
    for name, tolerance in (("contiguous", 1), ("striped", 1), ("zigzag", 2)):
        lengths = deal(resolve(name), seqlen, world).lengths
        assert max(lengths) - min(lengths) <= tolerance, name


def test_what_each_layout_deals():
    def runs(layout, seqlen, world):
        return [resolve(layout).runs(seqlen, world, rank) for rank in range(world)]

    assert runs("contiguous", 10, 3) == [[(0, 3, 1)], [(3, 6, 1)], [(6, 10, 1)]]
    assert runs("zigzag", 12, 3) == [[(0, 2, 1), (10, 12, 1)], [(2, 4, 1), (8, 10, 1)], [(4, 8, 1)]]
    assert runs("striped", 7, 3) == [[(0, 7, 3)], [(1, 7, 3)], [(2, 7, 3)]]
    assert runs("striped", 2, 3) == [[(0, 2, 3)], [(1, 2, 3)], []]
    assert runs("contiguous", 1, 3) == [[], [], [(0, 1, 1)]]


def pairs_per_rank(layout, mask, seqlen, world):
    lo, hi = mask.bounds(np.arange(seqlen), seqlen)
    row = (hi - lo).reshape(-1, seqlen).sum(0)
    return np.array([row[layout.positions(seqlen, world, rank)].sum() for rank in range(world)])


def random_documents(seqlen, count, seed):
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, seqlen), count - 1, replace=False))
    return np.diff([0, *cuts, seqlen])


WORK = [
    Mask(),
    Mask(window=(1000, 0)),
    Mask(causal=False, window=(700, 300)),
    Mask(documents=random_documents(65536, 16, 0)),
    Mask(documents=random_documents(65536, 300, 1)),
    Mask(documents=[random_documents(65536, 20, 2), random_documents(65536, 30, 3)], chunk=5000),
    Mask(prefix=9000),
]


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("mask", WORK, ids=range(len(WORK)))
def test_balanced_gives_every_rank_the_same_work(mask, world):
    layout = balanced(mask)
    pairs = pairs_per_rank(layout, mask, 65536, world)
    lengths = deal(layout, 65536, world).lengths
    assert max(lengths) - min(lengths) <= 16
    assert pairs.max() <= 1.01 * pairs.mean()  # 0.8% for the window, whose first rows see less; others 0.1%


@given(st.data(), st.integers(1, 300), st.integers(1, 8))
def test_balanced_ranks_differ_by_less_than_a_chunk(data, seqlen, world):
    mask = data.draw(masks(seqlen))
    pairs = pairs_per_rank(balanced(mask), mask, seqlen, world)
    lo, hi = mask.bounds(np.arange(seqlen), seqlen)
    rows = np.sort((hi - lo).reshape(-1, seqlen).sum(0))
    chunk = -(-seqlen // (4 * world))  # rows of the longest chunk: so short a sequence has 4 chunks a rank
    assert pairs.max() - pairs.min() <= rows[-chunk:].sum()


def test_balanced_beats_zigzag_on_documents():
    mask = Mask(documents=random_documents(65536, 16, 0))
    zigzag = pairs_per_rank(resolve("zigzag"), mask, 65536, 8)
    assert zigzag.max() > 1.2 * zigzag.mean()  # what balanced is for: 1.01 at most, above


def test_equal_layouts_are_equal():
    assert balanced(Mask(window=(3, 0))) == resolve("balanced", Mask(window=(3, -1)))
    assert hash(resolve("zigzag")) == hash(resolve("zigzag"))
    assert resolve(Foreign()) == Foreign()


@pytest.mark.parametrize("layout", ["ring", "balanced", 3, None, ["zigzag"]])
def test_refuses_unknown_layouts(layout):
    with pytest.raises(ValueError, match="layout: wanted 'contiguous', 'zigzag', 'striped', 'balanced' with a mask"):
        resolve(layout)


@dataclass(frozen=True)
class Broken(Layout):
    """Deals every rank the same runs."""

    hand: tuple[tuple[int, int, int], ...]
    name = "broken"

    def runs(self, seqlen, world, rank):
        return self.hand


@pytest.mark.parametrize(
    ("world", "hand"),
    [
        (2, [(0, 4, 1)]),  # twice
        (1, [(0, 7, 1)]),  # lost
        (1, [(4, 8, 1), (0, 4, 1)]),  # descending
        (1, [(0, 8, 2), (1, 8, 2)]),  # interleaved
        (1, [(0, 8, 1), (8, 8, 1)]),  # empty
        (1, [(0, 7, 1), (7, 10, 2)]),  # beyond the end
    ],
)
def test_refuses_layouts_that_lose_positions(world, hand):
    with pytest.raises(
        ValueError, match="wanted each of 8 positions on one rank, ascending, got otherwise from Broken"
    ):
        deal(Broken(tuple(hand)), 8, world)
