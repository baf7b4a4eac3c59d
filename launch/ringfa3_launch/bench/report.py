"""Results for people and programs: the table, and NAME.json, NAME.md and NAME.png in docs/results' format."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ringfa3
import ringfa3_kernels
import ringfa3_launch
from ringfa3_launch import machine
from ringfa3_launch.bench.case import format_size, mask_token
from ringfa3_launch.bench.match import GEMM, OURS
from ringfa3_launch.bench.sweep import Result
from ringfa3_launch.bench.timing import Timing
from ringfa3_launch.console import Console

# Dense matrix rates by datasheet, TFLOP/s: (bf16 and fp16, fp32 without tf32). The first name that fits counts.
PEAKS = (
    ("H200 NVL", 835.0, 60.0),
    ("H200", 989.4, 66.9),
    ("GH200", 989.4, 66.9),
    ("H100 NVL", 835.0, 60.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100", 989.4, 66.9),
    ("H800", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
)


def document(results: Sequence[Result], *, command: str) -> dict[str, Any]:
    """What NAME.json holds: {"command", "date", "commit", "device", "versions", "rows"}."""
    kind, world = results[0].device, max(result.case.world for result in results)
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": machine.device_name(kind, world),
        "versions": machine.version_table(),
        "rows": rows(results, dense_peak(machine.device_name(kind), results[0].case.dtype)),
    }


def rows(results: Sequence[Result], peak: float | None) -> list[dict[str, Any]]:
    """One row for each case and whom it is compared with; a ratio above 1 always means that ours is better.

    TFLOP/s are per GPU (CPU rank). A peer that did not run has its reason beside its name, and no figures.

    Args:
        peak: of the device, TFLOP/s.
    """
    alone = {_key(result): result.tflops(OURS) for result in results if result.case.world == 1}
    found = []
    for result in results:
        rates = result.tflops(OURS)
        ours, spread = (None, None) if rates is None else (rates.median, half_range(rates))
        compared: dict[str, float | None] = {
            name: timing.median for name in peer_names(result) if (timing := result.tflops(name))
        }
        compared |= {f"{name} (missing: {reason})": None for name, reason in result.missing.items()}
        if result.failure:
            compared = {f"none (ours failed: {result.failure})": None, **compared}
        compared |= {"dense peak" if peak else "dense peak (missing: unknown device)": peak}
        gemm = result.tflops(GEMM)
        compared["matrix product"] = gemm.median if gemm else None
        one = alone.get(_key(result))
        if result.case.world > 1:
            compared["ours on W1" if one else "ours on W1 (missing: not in this run)"] = one.median if one else None
        for peer, theirs in compared.items():
            found.append(_row(result, "TFLOP/s", ours, spread, peer, theirs, theirs and ours and ours / theirs))
        found += _memory_rows(result)
        for peer in ("plain", *(name for name in result.errors if name not in ("plain", OURS))):
            mine, theirs = result.errors.get(OURS), result.errors.get(peer)
            if mine is not None and theirs is not None:
                name = "plain attention" if peer == "plain" else peer
                found.append(_row(result, "relative error", mine, 0.0, name, theirs, theirs / mine if mine else None))
    return found


def _memory_rows(result: Result) -> list[dict[str, Any]]:
    mine = result.memory.get(OURS)
    if mine is None:
        return []
    found = [_row(result, "GiB", mine / 2**30, 0.0, "none", None, None)]
    for peer, theirs in result.memory.items():
        if peer != OURS and peer in result.timings:
            found.append(_row(result, "GiB", mine / 2**30, 0.0, peer, theirs / 2**30, theirs / mine))
    return found


def _row(
    result: Result,
    metric: str,
    ours: float | None,
    spread: float | None,
    peer: str,
    theirs: float | None,
    ratio: float | None,
) -> dict[str, Any]:
    return {
        "case": result.case.name,
        "metric": metric,
        "ours": _round(ours),
        "spread": _round(spread),
        "peer": peer,
        "theirs": _round(theirs),
        "ratio": _round(ratio),
    }


HEAD = ("tokens", "ranks", "")
QUALITY = ("efficiency", "% peak", "% GEMM", "GiB/rank", "error", "plain")


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of everything, one row a case: for files, which have room."""
    columns, speeds = speed_table(results)
    qualities = quality_table(results)[1]
    lines = [speed + quality[len(HEAD) :] for speed, quality in zip(speeds, qualities, strict=True)]
    return [*columns, *QUALITY], lines


def speed_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: TFLOP/s of ours and of each peer that ran in one of these cases."""
    peers = list(dict.fromkeys(name for result in results for name in peer_names(result)))
    lines = []
    for result in results:
        rates = result.tflops(OURS)
        line = [
            *_head(result),
            f"{rates.median:.4g}" if rates else "failed",
            f"{half_range(rates):.2g}" if rates else "",
        ]
        for peer in peers:
            theirs = result.tflops(peer)
            ratio = f" ({rates.median / theirs.median:.2f}x)" if rates and theirs else ""
            line.append(f"{theirs.median:.4g}{ratio}" if theirs else "-")
        lines.append(line)
    return [*HEAD, "TFLOP/s", "±", *peers], lines


def quality_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: ours alone, in proportion to the device and to one rank; memory; error."""
    peak = dense_peak(machine.device_name(results[0].device), results[0].case.dtype)
    alone = {_key(result): result.tflops(OURS) for result in results if result.case.world == 1}
    lines = []
    for result in results:
        rates, gemm, one = result.tflops(OURS), result.tflops(GEMM), alone.get(_key(result))
        mine, used = rates.median if rates else None, result.memory.get(OURS)
        lines.append(
            [
                *_head(result),
                f"{mine / one.median:.2f}" if mine and one and result.case.world > 1 else "-",
                f"{100 * mine / peak:.0f}" if mine and peak else "n/a",
                f"{100 * mine / gemm.median:.0f}" if mine and gemm else "n/a",
                "n/a" if used is None else f"{used / 2**30:.3g}",
                *(f"{result.errors[x]:.1e}" if x in result.errors else "n/a" for x in (OURS, "plain")),
            ]
        )
    return [*HEAD, *QUALITY], lines


def _head(result: Result) -> list[str]:
    return [format_size(result.case.seqlen), str(result.case.world), result.case.direction]


def missing(results: Sequence[Result]) -> list[str]:
    """Which peers did not run where they apply, and why; cases with the same reason share a line."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        where = f"{result.case.direction} S{format_size(result.case.seqlen)} W{result.case.world}"
        for name, reason in result.missing.items():
            reasons.setdefault((name, reason), []).append(where)
        if result.failure:
            reasons.setdefault(("ours FAILED", result.failure), []).append(where)
    return [f"{name}: {reason} ({abridged(where)})" for (name, reason), where in reasons.items()]


def title(results: Sequence[Result]) -> str:
    """What all cases have in common."""
    case = results[0].case
    return f"ring attention, {mask_token(case.mask)}, D{case.D}, H{case.Hq}:{case.Hkv}, {case.dtype}"


NOTE = (
    "TFLOP/s, GiB and % are per GPU (per CPU rank). In brackets beside each peer: ours over theirs; above 1, ours is "
    "faster. error and plain: relative, of out and dq on sampled rows against fp64; plain is plain PyTorch attention "
    "in the same precision."
)
METHOD = (
    "Method: ours, the peers and a matrix product are timed in turn, round by round, in the same processes (CUDA "
    "events; a monotonic clock on CPUs). Medians over the rounds, of the slowest rank; ± is half the range from the "
    "20th to the 80th percentile. Memory is a rank's peak in a first call: inputs, outputs, gradients, buffers "
    "(torch's allocator; on CPUs the growth of the resident set)."
)


def show(results: Sequence[Result], found: dict[str, Any], console: Console) -> None:
    """Print the tables, narrow enough for a terminal, and below them what is missing."""
    console.heading(f"{title(results)} on {found['device']}")
    for world in sorted({result.case.world for result in results}):  # each world has peers of its own
        own = [result for result in results if result.case.world == world]
        console.table(*speed_table(own), ["broken" if result.failure else "plain" for result in own])
    console.table(*quality_table(results), ["broken" if result.failure else "plain" for result in results])
    console.say(NOTE, "dim")
    for line in missing(results):
        failed = line.startswith("ours FAILED")
        console.say(line if failed else f"missing: {line}", "broken" if failed else "note")


def write(results: Sequence[Result], found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, NAME.png; returns their paths."""
    return save_all(
        found, folder, name, plotter="plot", drawn=results, title=title(results),
        markdown=lambda plot: markdown(results, found, plot),
    )  # fmt: skip


def save_all(
    found: dict[str, Any],
    folder: Path,
    name: str,
    *,
    plotter: str,
    drawn: Any,
    title: str,
    markdown: Callable[[Path | None], str],
) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, NAME.png; returns their paths.

    Args:
        plotter: the module of this package whose `draw` makes the plot, of `drawn`.
        markdown: NAME.md's text; it is given the plot's path, if there is one.
    """
    paths = [save(found, folder, name), folder / f"{name}.md"]
    plot: Path | None = folder / f"{name}.png"
    try:
        draw = importlib.import_module(f"ringfa3_launch.bench.{plotter}").draw
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        plot = None
    if plot is not None:
        draw(drawn, plot, f"{title} on {found['device']}")
        paths.append(plot)
    paths[1].write_text(markdown(plot))
    return paths


def save(found: dict[str, Any], folder: Path, name: str) -> Path:
    """Write NAME.json whole or not at all: a run may be ended at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".json.part")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)
    return path


def markdown(results: Sequence[Result], found: dict[str, Any], plot: Path | None) -> str:
    """NAME.md: the table, what is missing, and how it was measured."""
    columns, lines = table(results)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [f"# {title(results)}", f"{found['device']}, {found['date']}, commit {found['commit']}; {versions}."]
    parts.append(f"    {found['command']}")
    grid = [columns, ["---"] * len(columns), *lines]
    parts.append("\n".join("| " + " | ".join(line) + " |" for line in grid))
    parts.append(NOTE)
    if plot is not None:
        parts.append(f"![{title(results)}]({plot.name})")
    absent = missing(results)
    if absent:
        parts.append("Not measured:\n\n" + "\n".join(f"- {line}" for line in absent))
    parts.append(METHOD)
    return "\n\n".join(parts) + "\n"


def dense_peak(device: str, dtype: str) -> float | None:
    """The device's dense matrix rate in TFLOP/s by its datasheet, None where that is not known."""
    for name, half, single in PEAKS:
        if name in device:
            return single if dtype == "fp32" else half
    return None


def commit() -> str:
    """The git commit of the sources ("+changes" if they differ); where they are in no clone, a hash over them."""
    root = Path(ringfa3.__file__).parent
    git = ["git", "-C", str(root)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
        return head.stdout.strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        for package in (ringfa3_kernels, ringfa3, ringfa3_launch):
            for path in sorted(Path(package.__file__ or "").parent.rglob("*.py")):
                digest.update(path.read_bytes())
        return f"sources {digest.hexdigest()[:12]}"


def peer_names(result: Result) -> list[str]:
    """The peers that were timed."""
    return [name for name in result.timings if name not in (OURS, GEMM)]


def _key(result: Result) -> tuple[int, str]:
    return result.case.seqlen, result.case.direction


def half_range(rates: Timing) -> float:
    """Half the way from the 20th to the 80th percentile."""
    return float(rates.quantile(0.8) - rates.quantile(0.2)) / 2


def _round(x: float | None) -> float | None:
    """Four significant digits."""
    return None if x is None else float(f"{x:.4g}")


def abridged(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
