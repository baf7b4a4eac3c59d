"""Named ranges in a profile: which hop of which call a kernel belongs to, for Nsight Systems and its like."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_asked: ContextVar[bool] = ContextVar("ringfa3_nvtx", default=False)


@contextlib.contextmanager
def nvtx() -> Iterator[None]:
    """Name the hops of every call made in this block, and of its backward pass, as NVTX ranges.

    Wrap a few steps of a run under `nsys profile`: ranges are called "ringfa3 forward hop 1 of 2, keys of rank 0".
    Outside of such a block nothing is emitted and nothing is paid.

    Raises:
        RuntimeError: this torch is built without CUDA, so there is no NVTX.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("nvtx: wanted a machine with CUDA, where NVTX ranges can be seen; this one has none")
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def asked() -> bool:
    """Whether this call is made in an `nvtx` block."""
    return _asked.get()


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """An NVTX range called `name` around the block."""
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
