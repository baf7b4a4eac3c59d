"""What a program of matches found, for people and programs: tables, and NAME.json, NAME.md and NAME.png."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ringfa3_launch import machine
from ringfa3_launch.bench import report
from ringfa3_launch.bench.case import format_size, mask_token
from ringfa3_launch.bench.match import Outcome
from ringfa3_launch.bench.program import Played
from ringfa3_launch.bench.ring_matches import KERNELS, ONE_GPU
from ringfa3_launch.bench.verdicts import Verdict, best, declared, judge, over_kernels
from ringfa3_launch.console import Console

ENVIRONMENT = (*machine.COMMUNICATION, "FA_SHIM_", "PYTORCH_", "CUDA_DEVICE_MAX_CONNECTIONS")
COLUMNS = ("who", "TFLOP/s", "±", "ours/it", "time/kernels", "of one GPU", "GiB", "error", "plain")
NOTE = (
    "TFLOP/s are per GPU (per CPU rank), on visible pairs. ours/it: the fastest of ours over this one. time/kernels: "
    "of a ring, over that of its attend calls on local tensors with no transport. of one GPU: speed over that of one "
    "GPU with the whole sequence, all ranks at once. error and plain: relative, on sampled rows against fp64; plain is "
    "plain PyTorch attention in the same precision, on the same rows."
)
METHOD = (
    "Method: everybody in a case is timed in turn, round by round, in one process group (CUDA events; a monotonic "
    "clock on CPUs). Medians over the rounds, of the slowest rank; ± is half the range from the 20th to the 80th "
    "percentile. GiB: a rank's inputs, what its first call took at the fullest, and its transport's pools (symmetric "
    "memory). one GPU and the ring are compared on the same rows."
)


def document(played: Played, *, command: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """What NAME.json holds: docs/results' format, and beside it the verdicts, every round, and what is missing."""
    outcomes = played.outcomes
    kind = outcomes[0].device if outcomes else "cpu"
    world = max((outcome.match.case.world for outcome in outcomes), default=1)
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": report.commit(),
        "device": machine.device_name(kind, world),
        "versions": machine.version_table(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ENVIRONMENT)},
        "rows": [row for outcome in outcomes for row in rows(outcome)],
        "verdicts": [verdict.as_row() for verdict in judge(outcomes)],
        "rounds": {outcome.match.name: _rounds(outcome) for outcome in outcomes},
        "missing": missing(outcomes),
        "skipped": [f"{name}: {reason}" for name, reason in played.skipped] + list(notes),
    }


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """One row for each of ours and whom it is compared with; a ratio above 1 always means that ours is better."""
    found = []
    for name in outcome.ours:
        rates = outcome.tflops(name)
        assert rates is not None
        case = f"{outcome.match.name} {name}"
        for other in outcome.timings:
            theirs = outcome.rate(other)
            if other not in outcome.ours and theirs:
                found.append(
                    _row(case, "TFLOP/s", rates.median, report.half_range(rates), other, theirs, rates.median / theirs)
                )
        if len(outcome.timings) == len(outcome.ours):
            found.append(_row(case, "TFLOP/s", rates.median, report.half_range(rates), "none", None, None))
        if name in outcome.memory:
            bound, used = declared(outcome.match.case), outcome.memory[name]
            found.append(_row(case, "GiB", used / 2**30, 0.0, "declared", bound / 2**30, bound / used))
        if name in outcome.errors:
            mine, plain = outcome.errors[name], outcome.plain[name]
            found.append(_row(case, "relative error", mine, 0.0, "plain attention", plain, plain / mine if mine else 0))
    return found


def table(outcome: Outcome) -> list[list[str]]:
    """COLUMNS of every entry that ran."""
    fastest = outcome.rate(best(outcome)) if outcome.ours else None
    one = outcome.rate(ONE_GPU)
    lines = []
    for name in outcome.timings:
        rates = outcome.tflops(name)
        assert rates is not None
        ours, kernels = name in outcome.ours, over_kernels(outcome, name)
        used, error, plain = outcome.memory.get(name), outcome.errors.get(name), outcome.plain.get(name)
        lines.append(
            [
                name,
                f"{rates.median:.4g}",
                f"{report.half_range(rates):.2g}",
                f"{fastest / rates.median:.3f}" if fastest and not ours else "",
                f"{kernels:.3f}" if kernels else "",
                f"{rates.median / one:.3f}" if one and name != ONE_GPU else "",
                f"{used / 2**30:.3g}" if used and name != KERNELS else "",
                f"{error:.1e}" if error is not None else "",
                f"{plain:.1e}" if plain is not None else "",
            ]
        )
    return lines


def verdict_table(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, rows and their styles: what is asked. Figures of which nothing is asked are in NAME.json."""
    asked = [verdict for verdict in verdicts if verdict.asked]
    words = {True: "reached", False: "NOT REACHED", None: ""}
    lines = [
        [v.case, v.what, v.who, v.asked, "not measured" if v.reached is None else f"{v.reached:.3f}", words[v.ok]]
        for v in asked
    ]
    styles = ["broken" if v.ok is False else "ok" if v.ok else "dim" for v in asked]
    return ["case", "figure", "of", "asked", "got", "verdict"], lines, styles


def missing(outcomes: Sequence[Outcome]) -> list[str]:
    """Who did not run and why; cases with the same reason share a line."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        case = outcome.match.case
        where = f"{case.direction} {mask_token(case.mask)} S{format_size(case.seqlen)} W{case.world}"
        for name, reason in outcome.missing.items():
            reasons.setdefault((name, reason), []).append(where)
    return [f"{name}: {reason} ({report.abridged(where)})" for (name, reason), where in reasons.items()]


def show(played: Played, found: dict[str, Any], title: str, console: Console) -> None:
    """Print a table a match, the verdicts, and what is missing."""
    console.heading(f"{title} on {found['device']}")
    for outcome in played.outcomes:
        console.heading(outcome.match.name)
        styles = ["ok" if name in outcome.ours else "plain" for name in outcome.timings]
        console.table(COLUMNS, table(outcome), styles)
    console.say(NOTE, "dim")
    columns, lines, styles = verdict_table(judge(played.outcomes))
    if lines:
        console.heading("asked and reached")
        console.table(columns, lines, styles)
    for line in [*(f"missing: {x}" for x in found["missing"]), *(f"skipped: {x}" for x in found["skipped"])]:
        console.say(line, "note")


def write(played: Played, found: dict[str, Any], title: str, folder: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, NAME.png; returns their paths."""
    return report.save_all(
        found, folder, name, plotter="ring_plot", drawn=played.outcomes, title=title,
        markdown=lambda plot: markdown(played, found, title, plot),
    )  # fmt: skip


def markdown(played: Played, found: dict[str, Any], title: str, plot: Path | None) -> str:
    """NAME.md: what was asked and reached, a table a match, what is missing, and how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [f"# {title}", f"{found['device']}, {found['date']}, commit {found['commit']}; {versions}."]
    parts.append(f"    {found['command']}")
    columns, lines, _ = verdict_table(judge(played.outcomes))
    if lines:
        parts += ["## Asked and reached", _grid(columns, lines)]
    if plot is not None:
        parts.append(f"![{title}]({plot.name})")
    parts += ["## Every case", NOTE]
    for outcome in played.outcomes:
        parts += [f"### {outcome.match.name}", _grid(COLUMNS, table(outcome))]
    absent = [*found["missing"], *found["skipped"]]
    if absent:
        parts.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in absent))
    parts.append(METHOD)
    return "\n\n".join(parts) + "\n"


def _grid(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *lines])


def _rounds(outcome: Outcome) -> dict[str, Any]:
    """Per entry its milliseconds: median, spread and every round; and its bytes outside torch's allocator."""
    return {
        name: {
            "median_ms": _digits(1e3 * timing.median),
            "spread_ms": _digits(1e3 * report.half_range(timing)),
            "ms": [_digits(1e3 * t) for t in timing.seconds],
            "tflops": _digits(outcome.rate(name) or 0.0),
            "outside_mib": round(outcome.outside.get(name, 0) / 2**20),
        }
        for name, timing in outcome.timings.items()
    }


def _row(
    case: str, metric: str, ours: float, spread: float, peer: str, theirs: float | None, ratio: float | None
) -> dict[str, Any]:
    figures = {"ours": ours, "spread": spread, "peer": peer, "theirs": theirs, "ratio": ratio}
    return {"case": case, "metric": metric} | {
        key: _digits(x) if isinstance(x, float | int) else x for key, x in figures.items()
    }


def _digits(x: float) -> float:
    """Four significant digits."""
    return float(f"{x:.4g}")
