"""A lane: calls of one group run one after another, beside whatever the caller does meanwhile.

On CPU a call runs in a thread, where gloo's hops and the kernels (which release the interpreter's lock) make progress;
on CUDA it is queued on a stream of the lane's own. One at a time and in the order in which they were made, so that
every rank posts the same messages in the same order.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Work = Callable[[], Tensors]


class Started(Protocol):
    """A call under way."""

    def done(self) -> bool:
        """It has ended, well or not."""
        ...

    def join(self) -> None:
        """Let what follows here come after it: waits on CPU, makes the current stream wait on CUDA."""
        ...

    def result(self) -> Tensors:
        """`join`, and what it returned: once. Raises what it raised."""
        ...


class Lane:
    """The calls of one group on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._last: Started | None = None
        self.latest: weakref.ref[Any] | None = None  # the last call's Handle

    def start(self, work: Work, inputs: Sequence[Tensor]) -> Started:
        """Begin work(), which reads the inputs, once what was started before has ended."""
        if self._device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._last = _Queued(work, inputs, self._stream)
        else:
            self._last = _Threaded(work, self._last)
        return self._last

    def run(self, work: Work) -> Tensors:
        """Do work() here, once what was started before has ended."""
        self.settle()
        return work()

    def settle(self) -> None:
        """Let what follows here come after what was started."""
        if self._last is not None:
            self._last.join()
            self._last = None


class _Threaded:
    """A call in a thread of its own."""

    def __init__(self, work: Work, before: Started | None) -> None:
        self._work, self._before = work, before
        self._result: Tensors = ()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)  # a peer that never comes must not stop an exit
        _threads.add(self._thread)
        self._thread.start()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def result(self) -> Tensors:
        self._thread.join()
        if self._error is not None:
            raise self._error
        result, self._result = self._result, ()  # the lane holds its last call until the next one
        return result

    def _run(self) -> None:
        try:
            if self._before is not None:
                self._before.join()
                self._before = None
            with torch.no_grad():  # a new thread begins with gradients on
                self._result = self._work()
        except BaseException as error:  # result() raises it
            self._error = error
        del self._work  # and what it reads


class _Queued:
    """A call queued on the lane's stream, after everything the current stream holds so far."""

    def __init__(self, work: Work, inputs: Sequence[Tensor], stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        self._result: Tensors = ()
        self._error: BaseException | None = None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), torch.no_grad():
            try:
                self._result = work()
            except BaseException as error:  # result() raises it
                self._error = error
            self._end = stream.record_event()
        for x in inputs:
            x.record_stream(stream)  # the caller may let go of them before the stream has read them

    def done(self) -> bool:
        return bool(self._end.query())

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._end)

    def result(self) -> Tensors:
        self.join()
        if self._error is not None:
            raise self._error
        result, self._result = self._result, ()  # the lane holds its last call until the next one
        for x in result:
            x.record_stream(torch.cuda.current_stream(self._device))
        return result


_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _drain(seconds: float = 10.0) -> None:
    """Let calls that nobody waited for end: gloo aborts a process that exits under them."""
    deadline = time.monotonic() + seconds
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
