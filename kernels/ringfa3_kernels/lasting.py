"""Device memory that is kept from call to call, although the caller's allocations may go somewhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def lasting(make: Callable[[], T], device: torch.device) -> T:
    """What make() returns, which lies on the device: tables, bounds, counters that later calls will find again.

    The CUDA graph trees of torch.compile(mode="reduce-overhead") put all that a thread allocates into their graphs'
    memory, which they take back; other threads' they leave alone. So it is made in another one, on the current stream.
    In a capture, whose memory is the graph's anyway, nothing can be kept: make() is simply called.
    """
    if (
        device.type != "cuda"
        or "torch._inductor.cudagraph_trees" not in sys.modules
        or torch.cuda.is_current_stream_capturing()
    ):
        return make()
    stream = torch.cuda.current_stream(device)

    def there() -> T:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as elsewhere:  # a thread a time: rare, and what a fork leaves of a kept one would hang
        return elsewhere.submit(there).result()
