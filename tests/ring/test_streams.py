"""Streams and CUDA's queues without CUDA: whom they ask, what they switch to and that they switch back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ringfa3.transport import cuda, streams
from ringfa3.transport.flags import Op


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, stream_id: int, device_index: int, device_type: int = 1) -> None:
        self.id = stream_id, device_index, device_type
        self.cuda_stream = 1000 * device_index + stream_id


class Machine:
    """Which device is current, and which stream on each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.streams = 0, {0: (0, 0, 1), 1: (0, 1, 1)}
        self.log: list[Any] = []
        for owner, name, what in (
            (torch._C, "_cuda_getCurrentStream", self.streams.__getitem__),
            (torch._C, "_cuda_setStream", self.switch),
            (torch.cuda, "set_stream", lambda stream: self.switch(*stream.id)),
            (torch.cuda, "current_device", lambda: self.device),
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "stream", self.stream),
            (torch.cuda, "device", self.selected),
        ):
            monkeypatch.setattr(owner, name, what, raising=False)

    def switch(self, stream_id: int, device_index: int, device_type: int) -> None:
        self.device, self.streams[device_index] = device_index, (stream_id, device_index, device_type)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.device, dict(self.streams)
        self.switch(*stream.id)
        try:
            yield
        finally:
            self.device = before[0]
            self.streams.update(before[1])

    @contextmanager
    def selected(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before


@pytest.fixture
def machine(monkeypatch):
    streams._stream.cache_clear()
    yield Machine(monkeypatch)
    streams._stream.cache_clear()


def test_the_current_stream_is_the_devices(machine):
    machine.switch(7, 1, 1)
    assert streams.current(0).id == (0, 0, 1)
    assert streams.current(1).id == (7, 1, 1)
    assert streams.current(1) is streams.current(1)
    machine.switch(8, 1, 1)
    assert streams.current(1).id == (8, 1, 1)


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_for_a_moment(machine, current, fails):
    machine.switch(3, current, 1)
    before = machine.device, dict(machine.streams)
    for _ in range(2):
        try:
            with streams.On(Stream(9, 1), 1):
                assert machine.device == 1
                assert machine.streams[1] == (9, 1, 1)
                with streams.On(Stream(10, 1), 1):
                    assert machine.streams[1] == (10, 1, 1)
                assert machine.streams[1] == (9, 1, 1)
                if fails:
                    raise KeyError("inside")
        except KeyError:
            assert fails
        assert (machine.device, machine.streams) == before


@pytest.fixture
def commons(machine, monkeypatch):
    """Of GPU 1, beside a driver that writes down what it is asked for, on which device."""
    commons = object.__new__(cuda.CudaCommons)
    vars(commons).update(index=1, device=torch.device("cuda", 1), failure=None, _streams={}, _batches={}, _base=1 << 20)

    def batch(handle: ctypes.c_void_p, count: int, ops: Any, flags: int) -> int:
        seen = [(op.operation, op.address - (1 << 20), op.value, op.flags) for op in ops]
        machine.log.append((machine.device, handle.value, count, flags, seen))
        return 0

    monkeypatch.setattr(cuda, "driver", lambda: SimpleNamespace(cuStreamBatchMemOp_v2=batch))
    return commons


@pytest.mark.parametrize("current", [0, 1])
def test_a_queue_does_its_operations_on_its_own_device(machine, commons, current):
    machine.switch(5, 1, 1)
    machine.device = current
    ops = [Op(False, 16, 3), Op(True, 32, 1)]
    commons.here().run(ops)
    commons.here().run(list(ops))
    want = [(cuda.WRITE_32, 64, 3, 0), (cuda.WAIT_32, 128, 1, cuda.EQUAL)]
    assert machine.log == [(1, 1005, 2, 0, want)] * 2
    assert len(commons._batches) == 1
    assert machine.device == current


@pytest.mark.parametrize("current", [0, 1])
def test_a_queue_copies_on_its_own_stream(machine, commons, current):
    machine.device = current
    before = dict(machine.streams)
    target, source, seen = torch.zeros(4), torch.arange(4.0), []
    commons._streams[2] = Stream(11, 1)

    class Seen(torch.Tensor):
        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            seen.append((machine.device, machine.streams[1], non_blocking))
            return super().copy_(source)

    commons.beside(2).copy([(target.as_subclass(Seen), source)])
    assert torch.equal(target, source)
    assert seen == [(1, (11, 1, 1), True)]
    assert (machine.device, machine.streams) == (current, before)


def test_a_failed_queue_does_nothing_more(machine, commons):
    commons.failure = RuntimeError("a rank has died")
    with pytest.raises(RuntimeError, match="a rank has died"):
        commons.here().run([Op(True, 0, 0)])
    assert machine.log == []
