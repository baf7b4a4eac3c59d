"""Parts of a decode step, timed alone: attention over a paged cache beside a device copy, and the merge over ranks.

And one part of a prefill, timed within it: attention, beside ring attention as a caller has it.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ringfa3_launch.bench.inference_case import Attention, Kernel, Sizes
from ringfa3_launch.bench.inference_rounds import prefill
from ringfa3_launch.bench.timing import Clock, Contestant, Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from ringfa3.inference import Runner

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


def time_attention(
    runner: Runner, prompt: Sequence[int], chunk: int, sizes: Sizes, *, dtype: torch.dtype, device: torch.device,
    seconds: float,
) -> Attention:  # fmt: skip
    """Of a prompt that the ranks have prefilled before; its model has causal attention alone. Collective."""
    import torch
    import torch.distributed as dist

    from ringfa3 import ring_attention

    clock = Clock(device, dist.group.WORLD)
    with _stamped(device) as spans:
        begin = _now(device)
        prefill(runner, prompt, chunk)
        spans.append((begin, _now(device)))
    times = [_between(*span) for span in spans]
    whole, attention = clock.agreed([times[-1], sum(times[:-1])])
    rows = len(prompt) // dist.get_world_size()
    q, k, v = (torch.randn(1, rows, H, sizes.D, dtype=dtype, device=device) for H in (sizes.Hq, sizes.Hkv, sizes.Hkv))
    with torch.inference_mode():
        contestant = Contestant("ring", lambda: ring_attention(q, k, v, causal=True, layout="zigzag"))
        contestant.call()
        ring = clock.interleaved([contestant], seconds)["ring"]
    return Attention(len(prompt), attention, whole, ring, sizes.layers)


@contextmanager
def _stamped(device: torch.device) -> Iterator[list[tuple[Any, Any]]]:
    """Within, the list gets the begin and the end of every layer's attention in a prefill."""
    from ringfa3.inference.attend import Prefill

    spans: list[tuple[Any, Any]] = []
    attend = Prefill.attend

    def stamped(step: Prefill, *args: Any, **kwargs: Any) -> torch.Tensor:
        begin = _now(device)
        out = attend(step, *args, **kwargs)
        spans.append((begin, _now(device)))
        return out

    Prefill.attend = stamped  # type: ignore[method-assign, assignment]
    try:
        yield spans
    finally:
        Prefill.attend = attend  # type: ignore[method-assign]


def _now(device: torch.device) -> Any:
    """A moment on the device's stream."""
    import torch

    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    """Seconds."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


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
