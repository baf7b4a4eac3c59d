"""Fair timing and one format of results: variants and peers by turns, medians, ratios, JSON and Markdown."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
import triton


@dataclass(frozen=True)
class Time:
    """Milliseconds a call: the median over rounds, and how far the middle half of the rounds lies apart."""

    ms: float
    spread: float


@dataclass(frozen=True)
class Row:
    """One comparison; ratio > 1 means that ours is better. `spread` is in the metric's unit."""

    case: str
    metric: str
    ours: float
    spread: float
    peer: str
    theirs: float
    ratio: float


def interleaved(calls: Mapping[str, Callable[[], object]], *, rounds: int, ms: float) -> dict[str, Time]:
    """Time callables on the GPU by turns.

    A power-limited card gives whoever runs after a pause a higher clock, and drifts over seconds: timed one after
    another, equal kernels differ by up to 10%; by turns, each meets the same clocks. Whoever comes after a kernel that
    draws little power runs on what that left over: in `orders` each comes after each other one equally often.

    Args:
        calls: name -> callable that launches work on the current stream.
        rounds: turns that count (one more, the first, does not); rounded up to whole cycles of `orders`.
        ms: length of one turn, at least two calls.
    """
    repeats = {name: max(2, round(ms / max(_once(call), 1e-3))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    cycle = orders(list(calls))
    rounds = -(-rounds // len(cycle)) * len(cycle)
    for turn in range(rounds + 1):
        for name in cycle[turn % len(cycle)]:
            call = calls[name]
            call()  # refills caches and keeps the clock up while the events are recorded
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats[name]):
                call()
            end.record()
            torch.cuda.synchronize()
            if turn:
                samples[name].append(begin.elapsed_time(end) / repeats[name])
    return {name: Time(median(x), _middle_half(x)) for name, x in samples.items()}


def duels(
    calls: Mapping[str, Callable[[], object]], *, ours: str, chief: str, rounds: int, ms: float
) -> dict[str, dict[str, Time]]:
    """`interleaved` of ours and each other one, two by two: peer -> both times.

    A third contestant that draws half the power (FlashAttention-2 on Hopper) lets whoever follows it run on a higher
    clock: among four, equal kernels differed by 5% from run to run.

    Args:
        chief: the peer whose ratio is judged: twice as many rounds.
    """
    return {
        peer: interleaved({ours: calls[ours], peer: call}, rounds=2 * rounds if peer == chief else rounds, ms=ms)
        for peer, call in calls.items()
        if peer != ours
    }


def orders(names: Sequence[str]) -> list[list[str]]:
    """Orders in which each name follows each other one equally often (Williams, 1949): n, or 2 n where n is odd."""
    n = len(names)
    first = [(i + 1) // 2 if i % 2 else -(i // 2) % n for i in range(n)]
    rows = [[names[(i + shift) % n] for i in first] for shift in range(n)]
    return rows + [row[::-1] for row in rows] if n % 2 else rows


def _once(call: Callable[[], object]) -> float:
    call()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 2


def _middle_half(samples: Sequence[float]) -> float:
    x = sorted(samples)
    return x[(3 * len(x)) // 4 - (len(x) % 4 == 0)] - x[len(x) // 4]


def compare(case: str, times: Mapping[str, Time], work: float, *, ours: str, metric: str = "TFLOP/s") -> list[Row]:
    """Ours against every peer that was timed with it.

    Args:
        work: floating-point operations of a call.
    """
    rate = {name: work / t.ms / 1e9 for name, t in times.items()}
    spread = rate[ours] * times[ours].spread / times[ours].ms
    return [
        Row(
            case,
            metric,
            round(rate[ours], 1),
            round(spread, 1),
            peer,
            round(rate[peer], 1),
            round(rate[ours] / rate[peer], 3),
        )
        for peer in times
        if peer != ours
    ]


TURNS = (
    "Each peer by turns with ours, two by two, in one process; ratio > 1: ours is faster. Beside a peer that draws "
    "less power ours runs on a higher clock: compare peers by their own column."
)
TOGETHER = "All by turns in one process; ratio > 1: ours is faster."


def save(
    path: Path, rows: Sequence[Row], *, command: str, title: str, device: str | None = None, method: str = TURNS
) -> None:
    """Write path.json and path.md; `device` is the GPU's, or the processor's, name unless given."""
    own = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    document = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device or own,
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [f"# {title}", "", f"`{command}` on {document['device']}, {document['date']}, commit {document['commit']}."]
    lines += [method, ""]
    lines += ["| case | ours | peer | theirs | ratio |", "|---|---|---|---|---|"]
    lines += [f"| {r.case} | {r.ours} ± {r.spread} {r.metric} | {r.peer} | {r.theirs} | {r.ratio:.3f} |" for r in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
