"""Parts of a decode step, timed alone: attention over a paged cache beside a device copy, and the merge over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ringfa3_launch.bench.inference_case import Kernel, Sizes
from ringfa3_launch.bench.timing import Clock, Contestant, Timing

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

CALLS = 32  # in a graph, as many as a model has layers
COPY_BYTES = {"cuda": 1 << 30, "cpu": 32 << 20}  # of a device copy: far more than any cache between


def time_kernel(
    sizes: Sizes, length: int, batch: int, *, page_size: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> Kernel:
    """Decode attention of one layer, one new token a sequence, over pages in random order; and a copy, in turn.

    On a GPU as a decode step has it: many in one CUDA graph, so that no launch counts.
    """
    import torch

    from ringfa3_kernels import Visible, decode

    blocks = -(-length // page_size)
    torch.manual_seed(length + batch)
    shape = (batch * blocks, page_size, sizes.Hkv, sizes.D)
    k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    q = torch.randn(batch, 1, sizes.Hq, sizes.D, dtype=dtype, device=device)
    table = torch.randperm(batch * blocks, device=device).view(batch, blocks).int()
    hi = torch.full((batch, 1), length, dtype=torch.int32, device=device)
    visible = Visible(torch.zeros_like(hi), hi)
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        call, times = _captured(lambda: decode(q, k, v, table, visible), device)
        contestants = [Contestant("decode", call), Contestant("copy", lambda: target.copy_(source))]
        timings = Clock(device, None).interleaved(contestants, seconds)
    read = 2 * batch * length * sizes.Hkv * sizes.D * dtype.itemsize
    each = Timing(tuple(t / times for t in timings["decode"].seconds))
    return Kernel(length, batch, each, read, 2 * source.nbytes / timings["copy"].median)


def time_merge(sizes: Sizes, batch: int, ranks: Any, *, device: torch.device, seconds: float) -> Timing:
    """The merge of all ranks' Partials of one layer, one new token a sequence; the slowest rank's. Collective.

    On a GPU as a decode step has it: many in one CUDA graph, so that no launch counts.
    """
    import torch

    from ringfa3 import shards
    from ringfa3.inference.attend import joined

    mine = torch.randn(batch, 1, sizes.Hq, sizes.D + 1, device=device)  # out and lse together
    every = mine.new_empty(ranks.world, *mine.shape)

    def merge() -> None:
        shards.all_gather(every.view(-1), mine.view(-1), group=ranks.group)
        joined(every, None)

    with torch.inference_mode():
        call, times = _captured(merge, device)
        clock = Clock(device, ranks.group or torch.distributed.group.WORLD)
        timing = clock.interleaved([Contestant("merge", call)], seconds)["merge"]
    return Timing(tuple(t / times for t in timing.seconds))


def _captured(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], int]:
    """What does this many calls at once; called once before, so that it is compiled."""
    import torch

    call()
    if device.type != "cuda":
        return call, 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay, CALLS
