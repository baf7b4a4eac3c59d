"""Streams on a GPU: the current one is torch's, and another one for a moment is left again."""

from __future__ import annotations

import pytest
import torch

from ringfa3.transport import streams

pytestmark = pytest.mark.gpu


def test_the_current_stream_is_torchs():
    other = torch.cuda.Stream()
    index = torch.cuda.current_device()
    assert streams.current(index) == torch.cuda.current_stream()
    with torch.cuda.stream(other):
        assert streams.current(index) == other
        assert streams.current(index).cuda_stream == other.cuda_stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert streams.current(index) == torch.cuda.current_stream()
        x = torch.zeros(4, device="cuda") + 1
    graph.replay()
    assert streams.current(index) == torch.cuda.default_stream()
    assert x.sum() == 4


def test_a_stream_for_a_moment():
    index, other = torch.cuda.current_device(), torch.cuda.Stream(priority=-1)
    before = torch.cuda.current_stream()
    with streams.On(other, index):
        assert torch.cuda.current_stream() == other
    assert torch.cuda.current_stream() == before


@pytest.mark.multigpu(2)
def test_a_stream_of_another_gpu_for_a_moment():
    index = torch.cuda.current_device()
    there = (index + 1) % torch.cuda.device_count()
    other = torch.cuda.Stream(there)
    before = torch.cuda.current_stream(index), torch.cuda.current_stream(there)
    with streams.On(other, there):
        assert torch.cuda.current_device() == there
        assert torch.cuda.current_stream() == other
    assert torch.cuda.current_device() == index
    assert (torch.cuda.current_stream(index), torch.cuda.current_stream(there)) == before
