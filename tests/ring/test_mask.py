"""Mask: its intervals are its definition pair by pair and never move left; wrong arguments are refused."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringfa3.mask import Mask
from tests.ring.masks import dense, masks


@given(st.data(), st.integers(1, 24), st.sampled_from([np.int32, np.int64]))
def test_bounds_are_the_definition(data, seqlen, dtype):
    mask = data.draw(masks(seqlen))
    lo, hi = mask.bounds(np.arange(seqlen, dtype=dtype), seqlen)
    assert lo.dtype == hi.dtype == dtype
    assert lo.shape == ((seqlen,) if mask.batch is None else (mask.batch, seqlen))
    j = np.arange(seqlen)
    painted = (j >= lo[..., None]) & (j < hi[..., None])
    np.testing.assert_array_equal(painted.reshape(-1, seqlen, seqlen), dense(mask, seqlen))
    assert (lo >= 0).all()
    assert (hi <= seqlen).all()


@given(st.data(), st.integers(1, 200))
def test_bounds_never_move_left_and_hold_for_any_subset(data, seqlen):
    mask = data.draw(masks(seqlen))
    lo, hi = mask.bounds(np.arange(seqlen), seqlen)
    assert (np.diff(lo) >= 0).all()
    assert (np.diff(hi) >= 0).all()
    assert (hi > lo).all()
    assert mask.pairs(seqlen) == (hi - lo).sum()
    some = np.array(sorted(data.draw(st.sets(st.integers(0, seqlen - 1)))), np.int64)
    some_lo, some_hi = mask.bounds(some, seqlen)
    np.testing.assert_array_equal(some_lo, lo[..., some])
    np.testing.assert_array_equal(some_hi, hi[..., some])


def test_pairs():
    assert Mask().pairs(1000) == 1000 * 1001 // 2
    assert Mask(causal=False).pairs(1000) == 10**6
    assert Mask(window=(9, 0)).pairs(1000) == 45 + 991 * 10
    assert Mask(documents=((1, 3), (2, 2))).pairs(4) == 1 + 6 + 3 + 3
    assert Mask(causal=False).pairs(1 << 20) == 1 << 40
    assert Mask().pairs(0) == 0


def test_last():
    np.testing.assert_array_equal(np.flatnonzero(Mask(documents=(2, 0, 3)).last(5)), [1, 4])
    np.testing.assert_array_equal(Mask(documents=((1, 1), (2,))).last(2), [[True, True], [False, True]])
    np.testing.assert_array_equal(np.flatnonzero(Mask().last(4)), [3])
    assert Mask().last(0).shape == (0,)


@pytest.mark.parametrize("lengths", [[3, 4], np.array([3, 4]), torch.tensor([3, 4]), (np.int32(3), 4)])
def test_documents_are_a_value(lengths):
    mask = Mask(documents=lengths)
    assert mask.documents == (3, 4)
    assert mask == Mask(documents=(3, 4))
    assert hash(mask) == hash(Mask(documents=(3, 4)))
    assert mask != Mask(documents=(4, 3))
    nested = Mask(documents=[lengths, [7]])
    assert nested.documents == ((3, 4), (7,))
    assert nested.batch == 2
    assert mask.batch is None


def test_equal_masks_are_equal():
    assert Mask(window=(5, -1)) == Mask(window=(5, 0)) == Mask(window=[5, 0])
    assert Mask(window=(-1, 0)) == Mask(window=(-1, -1)) == Mask()
    assert Mask(causal=False, window=(-1, -1)) == Mask(causal=False) != Mask(causal=False, window=(-1, 0))
    copy = pickle.loads(pickle.dumps(Mask(documents=(3, 4), window=(1, 0))))
    assert copy == Mask(documents=(3, 4), window=(1, 0))
    assert "_hash" not in vars(copy)  # another process hashes None otherwise


REFUSED = [
    ({"window": (-2, 0)}, "window: wanted an integer of at least -1, got -2"),
    ({"window": 5}, r"window: wanted \(left, right\), got 5"),
    ({"window": (1.5, 0)}, "window: wanted an integer of at least -1, got 1.5"),
    ({"window": (5, 3)}, r"window: wanted right = 0 or -1 with causal=True, got \(5, 3\)"),
    ({"window": (5, 0), "prefix": 2}, r"window: wanted right = -1 with a prefix.*got \(5, 0\)"),
    ({"prefix": 2, "causal": False}, "prefix: wanted causal=True.*got 2"),
    ({"prefix": 0}, r"prefix: wanted an integer of at least 1 \(None for no prefix\), got 0"),
    ({"prefix": (2,)}, "prefix: wanted an int where there are no documents"),
    ({"prefix": (2,), "documents": (3, 4)}, "prefix: wanted one length per document, 2, got 1"),
    ({"prefix": (2, 5), "documents": (3, 4)}, "prefix: wanted at most the document's length 4, got 5"),
    ({"prefix": (2, 2), "documents": ((3, 4),)}, r"prefix: wanted one length per document, \(2,\), got 2"),
    ({"chunk": 0}, "chunk: wanted an integer of at least 1, got 0"),
    ({"chunk": True}, "chunk: wanted an integer of at least 1, got True"),
    ({"documents": ()}, "documents: wanted lengths"),
    ({"documents": (3, -1)}, "documents: wanted an integer of at least 0, got -1"),
    ({"documents": (3.0, 4)}, "documents: wanted an integer of at least 0, got 3.0"),
    ({"documents": "34"}, "documents: wanted lengths"),
    ({"documents": ((3,), 4)}, "documents: .* got a mixture"),
    ({"documents": (((3,),),)}, "documents: wanted at most one level"),
    ({"causal": 2}, "causal: wanted True or False, got 2"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[str(list(a.items())) for a, _ in REFUSED])
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mask(**arguments)


def test_refuses_documents_that_do_not_fit():
    with pytest.raises(ValueError, match=r"documents: wanted lengths that sum to seqlen 8, got 7$"):
        Mask(documents=(3, 4)).check(8)
    with pytest.raises(ValueError, match="sum to seqlen 8, got 9 in batch row 1"):
        Mask(documents=((8,), (9,))).bounds(np.arange(8), 8)
