"""Named ranges: which hop of which call a kernel belongs to, for Nsight Systems, torch.profiler and a stopwatch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch.profiler import record_function

Mark = float | torch.cuda.Event

_asked: ContextVar[bool] = ContextVar("ringfa3_named", default=False)
_stopwatch: ContextVar[Stopwatch | None] = ContextVar("ringfa3_stopwatch", default=None)


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Name the hops of every call made in this block, and of its backward pass, in any profiler that is watching.

    Hops are called "ringfa3 forward hop 1 of 2, keys of rank 0": for torch.profiler (`record_function`), and where
    there is CUDA for Nsight Systems (NVTX). `ringfa3 trace` is made of these names. Outside of such a block nothing is
    emitted and nothing is paid.
    """
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def nvtx() -> Iterator[None]:
    """As `named`, for a run under `nsys profile`.

    Raises:
        RuntimeError: this torch is built without CUDA, so there is no NVTX.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("nvtx: wanted a machine with CUDA, where NVTX ranges can be seen; this one has none")
    with named():
        yield


@dataclass
class Stopwatch:
    """When the named ranges of a block began and ended: on the device where that is CUDA's, else on the host."""

    _ranges: list[tuple[str, Mark, Mark]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = _mark()

    def ranges(self) -> list[tuple[str, float, float]] | None:
        """Name, begin and end, in seconds since the block began; None: the device is not done with them yet."""
        if self._ranges and isinstance(last := self._ranges[-1][2], torch.cuda.Event) and not last.query():
            return None
        return [(name, _between(self._began, a), _between(self._began, b)) for name, a, b in self._ranges]


@contextlib.contextmanager
def timed() -> Iterator[Stopwatch]:
    """As `named`, for a program's own eyes: a Stopwatch of the hops that this thread computes in this block.

    It costs two readings of the clock (on CUDA two events) a hop; not to be used while a CUDA graph is captured.
    """
    watch = Stopwatch()
    names, token = _asked.set(True), _stopwatch.set(watch)
    try:
        yield watch
    finally:
        _asked.reset(names)
        _stopwatch.reset(token)


def asked() -> bool:
    """Whether this call is made in a `named` or `nvtx` block."""
    return _asked.get()


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A range called `name` around the block, for torch.profiler and NVTX. Needs no context: any thread may use it."""
    there_is_nvtx = torch.cuda.is_available()
    watch = _stopwatch.get()
    began = _mark() if watch is not None else 0.0
    with record_function(name):
        if there_is_nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if there_is_nvtx:
                torch.cuda.nvtx.range_pop()
            if watch is not None:
                watch._ranges.append((name, began, _mark()))


def _mark() -> Mark:
    """This moment: on the current stream of a program that uses CUDA, else on the host."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(a: Mark, b: Mark) -> float:
    """Seconds from one to the other, both of a kind."""
    if isinstance(a, torch.cuda.Event):
        assert isinstance(b, torch.cuda.Event)
        return 1e-3 * float(a.elapsed_time(b))
    assert isinstance(b, float)
    return b - a
