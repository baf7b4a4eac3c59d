"""NVTX ranges: named where asked for, forward and backward, and nothing elsewhere."""

from __future__ import annotations

import pytest
import torch

import ringfa3
from ringfa3 import profiling


def call() -> None:
    q, k, v = (torch.randn(1, 12, h, 16, requires_grad=True) for h in (2, 1, 1))
    ringfa3.ring_attention(q, k, v).sum().backward()


def test_hops_are_named_in_both_directions_and_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    call()
    assert seen == []
    with profiling.nvtx():
        call()
    assert seen == [f"ringfa3 {way} hop 1 of 1, keys of rank 0" for way in ("forward", "backward")]
    call()
    assert len(seen) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is NVTX here")
def test_without_cuda_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="wanted a machine with CUDA"), profiling.nvtx():
        pass
