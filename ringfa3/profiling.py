"""Named ranges in a profile: which hop of which call a kernel belongs to, for Nsight Systems and torch.profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch.profiler import record_function

_asked: ContextVar[bool] = ContextVar("ringfa3_named", default=False)


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


def asked() -> bool:
    """Whether this call is made in a `named` or `nvtx` block."""
    return _asked.get()


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A range called `name` around the block, for torch.profiler and NVTX. Needs no context: any thread may use it."""
    there_is_nvtx = torch.cuda.is_available()
    with record_function(name):
        if there_is_nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if there_is_nvtx:
                torch.cuda.nvtx.range_pop()
