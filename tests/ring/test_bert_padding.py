"""bert_padding: packing drops padding alone, padding undoes it, and gradients take the same way back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringfa3.bert_padding import index_first_axis, pad_input, unpad_input


@st.composite
def batches(draw):
    B, S = draw(st.integers(1, 4)), draw(st.integers(0, 7))
    state = draw(st.lists(st.sampled_from([0, 1, 2]), min_size=B * S, max_size=B * S))  # padding, token, reserved
    return torch.tensor(state, dtype=torch.int64).reshape(B, S), draw(st.sampled_from([(), (3,), (2, 3)]))


@given(batches(), st.booleans(), st.sampled_from([torch.bool, torch.int32, torch.int64]))
def test_unpad_then_pad(batch, with_unused, dtype):
    state, tail = batch
    B, S = state.shape
    x = torch.randn(B, S, *tail, dtype=torch.float64, requires_grad=True)
    kept = (state == 1) | ((state == 2) & with_unused)
    unused = (state == 2).to(dtype) if with_unused else None
    packed, indices, cu_seqlens, longest, seqused = unpad_input(x, (state == 1).to(dtype), unused)

    rows = [(b, s) for b in range(B) for s in range(S) if kept[b, s]]
    assert indices.tolist() == [b * S + s for b, s in rows]
    assert packed.shape == (len(rows), *tail)
    for row, (b, s) in zip(packed, rows, strict=True):
        assert torch.equal(row, x[b, s])
    lengths = kept.sum(1).tolist()
    assert cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert longest == max(lengths)
    assert isinstance(longest, int)
    assert seqused.tolist() == (state == 1).sum(1).tolist()
    assert cu_seqlens.dtype == seqused.dtype == torch.int32

    padded = pad_input(packed, indices, B, S)
    assert torch.equal(padded, pad_input(packed, indices.int(), B, S))
    where = kept.reshape(B, S, *(1,) * len(tail))
    assert torch.equal(padded, torch.where(where, x, 0))
    weight = torch.randn_like(padded)
    (padded * weight).sum().backward()
    assert torch.equal(x.grad, torch.where(where, weight, 0))


def test_index_first_axis_repeats_and_adds_gradients():
    x = torch.arange(6.0).reshape(3, 2).requires_grad_()
    y = index_first_axis(x, torch.tensor([2, 0, 2]))
    assert y.tolist() == [[4, 5], [0, 1], [4, 5]]
    y.sum().backward()
    assert x.grad.tolist() == [[1, 1], [0, 0], [2, 2]]


def test_refuses():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"attention_mask: wanted \[B, S\] = \[2, 3\], got \[3, 2\]"):
        unpad_input(x, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"unused_mask: wanted \[B, S\] = \[2, 3\], got \[2\]"):
        unpad_input(x, torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"indices: wanted one per row of hidden_states \[4\], got 3"):
        pad_input(torch.zeros(4), torch.arange(3), 2, 3)
    with pytest.raises(ValueError, match=r"indices: wanted int64 \[n\], got torch.float32 \[3\]"):
        index_first_axis(x, torch.zeros(3))
    with pytest.raises(ValueError, match="x: wanted at least 1 dimension"):
        index_first_axis(torch.tensor(1.0), torch.arange(1))
