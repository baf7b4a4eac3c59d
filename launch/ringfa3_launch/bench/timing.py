"""Clocks and memory: contestants timed in turn, round by round, and the peak memory of one call."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Call = Callable[[], Any]

SAMPLE_SECONDS = 0.02  # calls are repeated within a sample up to this, so that a sample outlasts launch gaps and clocks
FEWEST_ROUNDS, MOST_ROUNDS = 2, 20


@dataclass(frozen=True)
class Contestant:
    """Something to time. All ranks of the group call it together.

    Args:
        name: unique among those timed together.
        call: one call; what it returns is dropped.
        session: what must be entered around its calls.
    """

    name: str
    call: Call
    session: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, in each round; of the slowest rank."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def quantile(self, q: float) -> float:
        """Linear between the rounds' times, sorted."""
        ordered = sorted(self.seconds)
        at = q * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


class Clock:
    """Times calls on this rank's device: CUDA events on a GPU, a monotonic clock on CPUs.

    Args:
        device: this rank's.
        group: ranks that call together; None on a rank alone.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self.device, self.group = device, group

    def interleaved(
        self, contestants: Sequence[Contestant], seconds: float, *, fewest: int = FEWEST_ROUNDS
    ) -> dict[str, Timing]:
        """Time every contestant once a round, the order turning by one each round, for about `seconds`.

        Each has been called before (compiled, warm). The slowest rank's time counts.

        Args:
            fewest: rounds at least.
        """
        once = self.agreed([self._sample(contestant, 1) for contestant in contestants])
        repeats = [int(max(1, min(200, SAMPLE_SECONDS // max(t, 1e-7)))) for t in once]
        a_round = sum(t * n for t, n in zip(once, repeats, strict=True))
        rounds = max(fewest, min(MOST_ROUNDS, int(seconds / a_round)))
        # a long call is not repeated within a sample, so its first sample is its first round
        times = [[t] if n == 1 else [] for t, n in zip(once, repeats, strict=True)]
        for r in range(rounds):
            for i in range(len(contestants)):
                j = (i + r) % len(contestants)
                if len(times[j]) <= r:
                    times[j].append(self._sample(contestants[j], repeats[j]))
        slowest = iter(self.agreed([t for own in times for t in own]))
        return {
            contestant.name: Timing(tuple(next(slowest) for _ in own))
            for contestant, own in zip(contestants, times, strict=True)
        }

    def _sample(self, contestant: Contestant, repeats: int) -> float:
        """Seconds of one call, from `repeats` in a row."""
        with contestant.session():
            if self.group is not None:
                dist.barrier(self.group)
            if self.device.type == "cpu":
                begin = time.perf_counter()
                for _ in range(repeats):
                    contestant.call()
                return (time.perf_counter() - begin) / repeats
            torch.cuda.synchronize(self.device)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if repeats > 1:
                contestant.call()  # what follows is queued behind it: neither a launch gap nor a rested clock counts
            start.record()
            for _ in range(repeats):
                contestant.call()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3 / repeats

    def agreed(self, values: Sequence[float]) -> list[float]:
        """The largest over the ranks, each."""
        if self.group is None:
            return list(values)
        worst = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.group)
        return worst.tolist()


class Memory:
    """Peak memory of this rank.

    On a GPU torch's allocator knows it (what NCCL itself takes is not in it). On a CPU it is the high-water mark of the
    process's resident set, which Linux can reset, above what the process held when this was made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        self._idle = 0 if device.type == "cuda" else _trimmed()

    def peak(self, call: Callable[[], T]) -> tuple[T, int | None, int | None]:
        """What the call returns; bytes at the call's fullest, in all; and what it added to what was held before it.

        None where nothing can tell.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            result = call()
            torch.cuda.synchronize(self.device)
            most = torch.cuda.max_memory_allocated(self.device)
            return result, most, most - before
        before = _trimmed()
        known = _reset_high_water()
        result = call()
        if not known:
            return result, None, None
        most = _status("VmHWM")
        return result, most - self._idle, most - before


def _trimmed() -> int:
    """Resident bytes, once malloc has given back what is free: kept, it would hide what a call takes from it."""
    if sys.platform != "linux":
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _reset_high_water() -> bool:
    """Set the high-water mark back to the resident size; whether that worked."""
    if sys.platform != "linux":
        return False
    try:
        with open("/proc/self/clear_refs", "w") as marks:
            marks.write("5")
    except OSError:
        return False
    return _status("VmHWM") <= _status("VmRSS") + (1 << 20)


def _status(name: str) -> int:
    """A size in /proc/self/status, bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))
