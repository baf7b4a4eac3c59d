"""Visible's tile bounds against brute force, what Visible refuses, and the laws of merge."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from ringfa3_kernels import Partial, Visible, merge


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def sights(draw: st.DrawFn) -> tuple[Visible, int]:
    """Any sorted bounds over up to 40 keys, empty rows among them, with or without a batch; and the number of keys."""
    Sq, Sk = draw(st.integers(1, 30)), draw(st.integers(0, 40))
    batch = draw(st.integers(0, 3))
    bound = st.lists(st.integers(0, Sk), min_size=Sq, max_size=Sq).map(sorted)
    rows = [[draw(bound) for _ in range(max(batch, 1))] for _ in "lh"]
    lo, hi = (torch.tensor(x, dtype=torch.int32) for x in rows)
    return (Visible(lo, hi) if batch else Visible(lo[0], hi[0])), Sk


def blocks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@given(sights(), st.integers(1, 9), st.integers(1, 9))
def test_key_tiles_are_the_hull_and_the_plain_part_of_what_a_tile_of_rows_sees(
    sight: tuple[Visible, int], block_m: int, block_n: int
) -> None:
    visible, Sk = sight
    tiles = visible.key_tiles(block_m, block_n)
    masks = visible.mask(Sk)[None] if visible.lo.ndim == 1 else visible.mask(Sk)
    assert tiles.shape == (len(masks), -(-visible.rows // block_m), 4)
    assert tiles.dtype == torch.int32
    for mask, per_tile in zip(masks, tiles.tolist(), strict=True):
        for rows, bounds in zip(blocks(visible.rows, block_m), per_tile, strict=True):
            begin, plain_begin, plain_end, end = bounds
            assert begin <= plain_begin <= plain_end <= end
            seen = mask[rows].any(0).nonzero().flatten().tolist()
            if not seen:
                assert begin == end
                continue
            assert (begin, end) == (seen[0] // block_n, seen[-1] // block_n + 1)
            whole = [b for b in range(Sk // block_n) if mask[rows, b * block_n : (b + 1) * block_n].all()]
            assert whole == list(range(plain_begin, plain_end))


@given(sights(), st.integers(1, 9), st.integers(1, 9))
@example((Visible(ints(0), ints(1)), 2), 2, 1)  # nobody sees the second key, and the only block of rows is a short one
def test_query_tiles_hold_all_rows_that_see_a_tile_of_keys(
    sight: tuple[Visible, int], block_m: int, block_n: int
) -> None:
    visible, Sk = sight
    tiles = visible.query_tiles(block_m, block_n, Sk)
    masks = visible.mask(Sk)[None] if visible.lo.ndim == 1 else visible.mask(Sk)
    assert tiles.shape == (len(masks), -(-Sk // block_n), 4)
    empty = bool((visible.hi <= visible.lo).any())
    for mask, per_tile in zip(masks, tiles.tolist(), strict=True):
        for keys, bounds in zip(blocks(Sk, block_n), per_tile, strict=True):
            begin, plain_begin, plain_end, end = bounds
            assert begin <= plain_begin <= plain_end <= end
            seeing = mask[:, keys].any(1).nonzero().flatten().tolist()
            if seeing:
                assert begin <= seeing[0] // block_m
                assert end > seeing[-1] // block_m
            if not empty:  # then the rows are exact; empty ones between those that see may be visited
                hull = (seeing[0] // block_m, seeing[-1] // block_m + 1) if seeing else (begin, begin)
                assert (begin, end) == hull
            whole = [b for b in range(visible.rows // block_m) if mask[b * block_m : (b + 1) * block_m, keys].all()]
            assert whole == list(range(plain_begin, plain_end))


def test_tiles_are_computed_once() -> None:
    visible = Visible.causal(10, 10)
    assert visible.key_tiles(4, 4) is visible.key_tiles(4, 4)
    assert visible.key_tiles(4, 4) is not visible.key_tiles(4, 2)
    assert visible.query_tiles(4, 4, 10) is visible.query_tiles(4, 4, 10)
    assert visible.query_tiles(4, 4, 10).shape != visible.query_tiles(4, 4, 20).shape


def test_tiles_of_no_rows_and_of_no_keys() -> None:
    assert Visible.full(0, 5).key_tiles(4, 4).shape == (1, 0, 4)
    assert not Visible.full(0, 5).query_tiles(4, 4, 5).any()
    assert not Visible.full(5, 0).key_tiles(4, 4).any()
    assert Visible.full(5, 0).query_tiles(4, 4, 0).shape == (1, 0, 4)


@pytest.mark.parametrize(("Sq", "Sk"), [(5, 5), (3, 7), (7, 3), (1, 4), (4, 0), (0, 4)])
def test_full_and_causal_are_what_their_masks_say(Sq: int, Sk: int) -> None:
    assert Visible.full(Sq, Sk).mask(Sk).all()
    wanted = torch.ones(Sq, Sk, dtype=torch.bool).tril(Sk - Sq)  # bottom-right aligned
    assert torch.equal(Visible.causal(Sq, Sk).mask(Sk), wanted)
    Visible.full(Sq, Sk).check(Sk)
    Visible.causal(Sq, Sk).check(Sk)


@pytest.mark.parametrize(
    ("lo", "hi", "kind", "message"),
    [
        (ints(0, 1).long(), ints(1, 2), "intervals", "Visible lo: wanted dtype torch.int32, got torch.int64"),
        (ints(0, 1), ints(1, 2).float(), "intervals", "Visible hi: wanted dtype torch.int32, got torch.float32"),
        (ints(0)[0], ints(1)[0], "intervals", r"Visible lo: wanted shape \[Sq\] or \[B, Sq\], got \[\]"),
        (ints(0, 1), ints(1), "intervals", r"Visible hi: wanted the shape and device of lo, \[2\] on cpu, got \[1\]"),
        (ints(0, 1), ints(1, 2), "band", "Visible kind: wanted one of 'full', 'causal', 'intervals', got 'band'"),
    ],
)
def test_visible_refuses(lo: Tensor, hi: Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Visible(lo, hi, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (Visible(ints(1, 0), ints(2, 3)), "Visible lo: wanted non-decreasing bounds, got one that moves left"),
        (Visible(ints(0, 0), ints(3, 2)), "Visible hi: wanted non-decreasing bounds"),
        (Visible(ints(-1, 0), ints(2, 3)), r"Visible lo: wanted values in \[0, 3\], got -1..0"),
        (Visible(ints(0, 0), ints(2, 4)), r"Visible hi: wanted values in \[0, 3\], got 2..4"),
        (Visible(ints(0, 0), ints(2, 3), "full"), "Visible kind: wanted 'intervals' for bounds not full over 3 keys"),
        (Visible(ints(0, 0), ints(3, 3), "causal"), "Visible kind: wanted 'intervals' for bounds not causal"),
        (Visible.full(2, 2), "Visible kind: wanted 'intervals' for bounds not full over 3 keys"),
        (Visible.causal(2, 2), "Visible kind: wanted 'intervals' for bounds not causal over 3 keys"),
    ],
)
def test_check_finds_broken_promises(visible: Visible, message: str) -> None:
    for _ in range(2):  # a refusal is not remembered as an approval
        with pytest.raises(ValueError, match=message):
            visible.check(3)


@st.composite
def partials(draw: st.DrawFn, count: int) -> list[Partial]:
    """Partials over disjoint keys, for the same queries; rows may have seen nothing."""
    S = draw(st.integers(1, 6))
    score = st.one_of(st.just(-float("inf")), st.floats(-3e3, 3e3, width=32), st.floats(-2, 2, width=32))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    found = []
    for _ in range(count):
        lse = torch.tensor(draw(st.lists(score, min_size=2 * S, max_size=2 * S))).view(1, 2, S)
        out = torch.randn(1, S, 2, 3, generator=generator)
        found.append(Partial(out.where(lse.mT[..., None] > -torch.inf, 0.0), lse))
    return found


def assert_same(a: Partial, b: Partial) -> None:
    """Equal but for roundings: an lse is off by its own, and a weight by as much as its exponent, the lse, is."""
    largest = float(a.lse.nan_to_num(0.0, neginf=0.0).abs().max())
    tolerance = 8 * torch.finfo(torch.float32).eps * (10 + 4 * largest)
    for x, y in zip((a.out, a.lse), (b.out, b.lse), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@given(partials(2))
def test_merge_commutes(ab: list[Partial]) -> None:
    a, b = ab
    assert_same(merge(a, b), merge(b, a))


@given(partials(3))
def test_merge_is_associative(abc: list[Partial]) -> None:
    a, b, c = abc
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(partials(1))
def test_empty_is_the_identity_of_merge(one: list[Partial]) -> None:
    a = one[0]
    for merged in (merge(a, Partial.empty(a.out)), merge(Partial.empty(a.out), a)):
        assert torch.equal(merged.out, a.out)
        assert torch.equal(merged.lse, a.lse)


@given(partials(4))
def test_merge_is_never_nan_and_its_weights_sum_to_one(parts: list[Partial]) -> None:
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    assert total.out.isfinite().all()
    assert not total.lse.isnan().any()
    torch.testing.assert_close(total.lse, torch.logsumexp(torch.stack([p.lse for p in parts]), 0))
    ones = [Partial((p.lse.mT[..., None] > -torch.inf).float().expand_as(p.out), p.lse) for p in parts]
    for a, b in itertools.pairwise(ones):
        seen = ((a.lse > -torch.inf) | (b.lse > -torch.inf)).mT[..., None]
        torch.testing.assert_close(merge(a, b).out, seen.float().expand_as(a.out))


@pytest.mark.parametrize(
    ("inputs", "asked", "out", "lse"),
    [
        (torch.bfloat16, None, torch.float32, torch.float32),
        (torch.float64, None, torch.float64, torch.float64),
        (torch.float16, torch.float16, torch.float16, torch.float32),
    ],
)
def test_empty_partial_is_kept_wide(
    inputs: torch.dtype, asked: torch.dtype | None, out: torch.dtype, lse: torch.dtype
) -> None:
    partial = Partial.empty(torch.ones(2, 5, 4, 8, dtype=inputs), asked)
    assert (partial.out.dtype, partial.lse.dtype) == (out, lse)
    assert (partial.out.shape, partial.lse.shape) == ((2, 5, 4, 8), (2, 4, 5))
    assert not partial.out.any()
    assert (partial.lse == -torch.inf).all()
