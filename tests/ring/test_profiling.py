"""Named ranges: for NVTX and a stopwatch where asked for, forward and backward, and nothing elsewhere."""

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


def test_a_stopwatch_sees_the_hops_of_its_block() -> None:
    call()
    with profiling.timed() as watch:
        call()
        call()
    call()
    ranges = watch.ranges()
    assert ranges is not None
    names = [f"ringfa3 {way} hop 1 of 1, keys of rank 0" for way in ("forward", "backward")]
    forward = [each for each in ranges if each[0] == names[0]]
    assert len(forward) == 2  # autograd's threads have no stopwatch
    times = [time for _, begin, end in forward for time in (begin, end)]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] < 60
