"""What `ringfa3 bench inference` found, for people and programs: tables, NAME.json, NAME.md and NAME.png."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ringfa3_launch import machine
from ringfa3_launch.bench import report
from ringfa3_launch.bench.case import format_size
from ringfa3_launch.bench.inference_case import Load, Played, Served, case_name
from ringfa3_launch.bench.inference_verdicts import PEER, Results, judge
from ringfa3_launch.bench.ring_report import ENVIRONMENT
from ringfa3_launch.bench.timing import Timing
from ringfa3_launch.console import Console

COLUMNS = (
    "prompt", "batch", "ranks", "first token s", "±", "x one rank", "x theirs", "each token ms", "±", "x one rank",
    "x theirs", "tokens/s", "cache GiB", "memory GiB",
)  # fmt: skip
CHECKS = ("prompt", "ranks", "tokens", "logits' error", "one device's", "allowed", "against", "verdict")
PARTS = ("part", "ranks", "µs", "±", "GB/s", "of a copy")
ATTENTION = ("prompt", "ranks", "prefill s", "of them attention", "share", "as ring attention", "±", "of its speed")
NOTE = (
    "first token: from the request to its first token; each token: from one to the next, once all prompts are read; "
    "tokens/s: of the whole batch, prefill included. x one rank and x theirs: time of one rank, and of transformers' "
    "generate on one device, over ours; above 1, ours is better. cache: pages in use on the rank that has most. "
    "memory: peak of the rank that has "
    "most, weights and the whole cache included (torch's allocator; on CPUs the growth of the resident set). logits' "
    "error: largest difference after the prompt, as a part of the largest logit, against wider precision; for longer "
    "prompts the distance from transformers in the same precision."
)
METHOD = (
    "Method: each world is a set of processes of its own. transformers' greedy generate (its sdpa attention, the same "
    "weights) runs on rank 0 of the first world, before ours. A load's first round is not counted; medians over the "
    "others; ± is half the range from the 20th to the 80th percentile. Times are those of the events that a caller of "
    "the engine gets: scheduling, announcing and sampling are in them. Parts are timed alone, decode attention in turn "
    "with a device copy (reads and writes counted), the merge as in a decode step (CUDA graphs). Attention within a "
    "prefill is timed in one of its own, layer by layer, with what it waits for; as ring attention: one causal call "
    "over as many tokens, for each layer."
)


def document(results: Results, *, command: str) -> dict[str, Any]:
    """What NAME.json holds: docs/results' format, and beside it verdicts, rounds, and what is missing."""
    kind = results.worlds[0].device
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": report.commit(),
        "device": machine.device_name(kind, max(world.world for world in results.worlds)),
        "versions": machine.version_table() | {"transformers": machine.version("transformers") or "none"},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ENVIRONMENT)},
        "model": results.title,
        "rows": rows(results),
        "verdicts": [verdict.as_row() for verdict in judge(results)],
        "rounds": {
            f"{who} {case_name('prefill+decode', load, world.sizes, world.world, results.program.dtype)}": {
                "first_s": served.first.seconds, "each_s": served.each.seconds, "total_s": served.total.seconds
            }
            for who, world, load, served in _everybody(results)
        },
        "missing": results.missing(),
    }  # fmt: skip


def rows(results: Results) -> list[dict[str, Any]]:
    """One row for each figure and whom it is compared with; a ratio above 1 always means that ours is better."""
    found: list[dict[str, Any]] = []
    dtype = results.program.dtype
    for world, load, ours in results.served():
        others = {"one rank": results.alone(load) if world.world > 1 else None, PEER: results.peer(load)}
        there = {name: other for name, other in others.items() if other is not None}
        prefill, decode = (case_name(what, load, world.sizes, world.world, dtype) for what in ("prefill", "decode"))
        for name, other in there.items() or [("none", None)]:
            found.append(timed(prefill, "s to first token", ours.first, name, other.first if other else None))
            found.append(timed(decode, "ms per token", ours.each, name, other.each if other else None, 1e3))
            rate = _rates(ours, load, results.program.tokens)
            theirs = _rates(other, load, results.program.tokens).median if other else None
            ratio = rate.median / theirs if theirs else None
            found.append(row(decode, "tokens/s", rate.median, report.half_range(rate), name, theirs, ratio))
        found.append(row(decode, "cache pages", ours.pages, 0.0, "none", None, None))
        found.append(row(decode, "cache GiB", ours.cache / 2**30, 0.0, "none", None, None))
        if ours.memory is not None:
            peer = there.get(PEER)
            theirs = peer.memory / 2**30 if peer is not None and peer.memory else None
            mine = ours.memory / 2**30
            found.append(row(prefill, "GiB", mine, 0.0, PEER if theirs else "none", theirs, theirs and theirs / mine))
        checked = world.checked.get(load)
        if checked is not None:
            ratio = checked.allowed / checked.error if checked.error else None
            found.append(
                row(prefill, f"logits' error ({checked.by})", checked.error, 0.0, "allowed", checked.allowed, ratio)
            )
            found.append(
                row(decode, "equal greedy tokens", checked.same, 0.0, PEER, checked.of, checked.same / checked.of)
            )
    return found + _part_rows(results)


def _part_rows(results: Results) -> list[dict[str, Any]]:
    found = []
    for world in results.worlds:
        if (attention := world.attention) is not None:
            case = case_name("prefill", Load(attention.length), world.sizes, world.world, results.program.dtype)
            ring = Timing(tuple(attention.layers * t for t in attention.ring.seconds))
            found.append(timed(case, "s of attention", Timing((attention.seconds,)), "ring attention", ring))
        for kernel in world.kernels:
            case = case_name(
                "decode-attention", Load(kernel.length, kernel.batch), world.sizes, 1, results.program.dtype
            )
            rate = Timing(tuple(kernel.bytes / t / 1e9 for t in kernel.timing.seconds))
            copy = kernel.copy / 1e9
            found.append(
                row(case, "GB/s", rate.median, report.half_range(rate), "device copy", copy, rate.median / copy)
            )
        for batch, timing in world.merges.items():
            sizes = world.sizes
            case = f"merge D{sizes.D} H{sizes.Hq}:{sizes.Hkv} W{world.world} fp32" + (f" B{batch}" if batch > 1 else "")
            found.append(timed(case, "µs per layer", timing, "none", None, 1e6))
    return found


def table(results: Results) -> list[list[str]]:
    """COLUMNS of every load, world and transformers."""
    lines = []
    for load in results.program.loads:
        alone, peer = results.alone(load), results.peer(load)
        if peer is not None:
            lines.append(_line(results, load, "theirs", peer, None, None))
        for world in results.worlds:
            if load in world.served:
                one = alone if world.world > 1 else None
                lines.append(_line(results, load, str(world.world), world.served[load], one, peer))
    return lines


def checks(results: Results) -> list[list[str]]:
    """CHECKS of every case that was judged."""
    return [
        [
            format_size(load.length),
            str(world.world),
            f"{checked.same} of {checked.of} equal"
            + ("" if checked.same == checked.of or not checked.tokens else ", tie"),
            f"{checked.error:.1e}",
            f"{checked.plain:.1e}",
            f"{checked.allowed:.1e}",
            checked.by,
            "right" if checked.ok else "WRONG",
        ]
        for world in results.worlds
        for load, checked in world.checked.items()
    ]


def part_table(results: Results) -> list[list[str]]:
    """PARTS that were timed alone."""
    lines = []
    for world in results.worlds:
        for kernel in world.kernels:
            name = f"decode attention, {format_size(kernel.length)} cached, batch {kernel.batch}"
            rate, share = f"{kernel.rate / 1e9:.4g}", f"{kernel.rate / kernel.copy:.2f}"
            lines.append([name, "1", *_microseconds(kernel.timing), rate, share])
        for batch, timing in world.merges.items():
            lines.append([f"merge, batch {batch}", str(world.world), *_microseconds(timing), "", ""])
    return lines


def attention_table(results: Results) -> list[list[str]]:
    """ATTENTION of every world."""
    return [
        [
            format_size(each.length),
            str(world.world),
            f"{each.prefill:.4g}",
            f"{each.seconds:.4g}",
            f"{each.seconds / each.prefill:.2f}",
            f"{each.layers * each.ring.median:.4g}",
            f"{each.layers * report.half_range(each.ring):.2g}",
            f"{each.speed:.3f}",
        ]
        for world in results.worlds
        if (each := world.attention) is not None
    ]


def show(results: Results, found: dict[str, Any], console: Console) -> None:
    """Print the tables, and below them what is missing."""
    console.heading(f"{results.title} on {found['device']}")
    console.table(COLUMNS, table(results))
    for title, columns, lines in _more(results):
        if lines:
            console.heading(title.lower())
            styles = ["broken" if "WRONG" in line else "plain" for line in lines]
            console.table(columns, lines, styles)
    console.say(NOTE, "dim")
    for verdict in judge(results):
        if verdict.ok is False:
            console.say(
                f"NOT REACHED: {verdict.case}: {verdict.what} {verdict.asked}, got {verdict.reached:.4g}", "broken"
            )
    for line in results.missing():
        console.say(f"missing: {line}", "broken" if "FAILED" in line else "note")


def _more(results: Results) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Tables below the first: title, columns, lines."""
    return [
        ("Checked", CHECKS, checks(results)),
        ("Attention within a prefill", ATTENTION, attention_table(results)),
        ("Parts, alone", PARTS, part_table(results)),
    ]


def write(results: Results, found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, NAME.png; returns their paths."""
    return report.save_all(
        found, folder, name, plotter="inference_plot", drawn=results, title=results.title,
        markdown=lambda plot: markdown(results, found, plot),
    )  # fmt: skip


def markdown(results: Results, found: dict[str, Any], plot: Path | None) -> str:
    """NAME.md: what was asked and reached, the tables, what is missing, and how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [f"# {results.title}", f"{found['device']}, {found['date']}, commit {found['commit']}; {versions}."]
    parts.append(f"    {found['command']}")
    asked = [v for v in judge(results) if v.asked]
    if asked:
        words = {True: "reached", False: "NOT REACHED", None: ""}
        lines = [
            [v.case, v.what, v.asked, "not measured" if v.reached is None else f"{v.reached:.4g}", words[v.ok]]
            for v in asked
        ]
        parts += ["## Asked and reached", grid(["case", "figure", "asked", "got", "verdict"], lines)]
    if plot is not None:
        parts.append(f"![{results.title}]({plot.name})")
    parts += ["## Every case", NOTE, grid(COLUMNS, table(results))]
    for title, columns, rows_ in _more(results):
        if rows_:
            parts += [f"## {title}", grid(columns, rows_)]
    if results.missing():
        parts.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in results.missing()))
    parts.append(METHOD)
    return "\n\n".join(parts) + "\n"


def _everybody(results: Results) -> Iterator[tuple[str, Played, Load, Served]]:
    for world in results.worlds:
        for who, every in (("ours", world.served), (PEER, world.peer)):
            for load, served in every.items():
                yield who, world, load, served


def _rates(served: Served, load: Load, tokens: int) -> Timing:
    """Tokens a second in each round."""
    return Timing(tuple(load.batch * tokens / t for t in served.total.seconds))


def _line(
    results: Results, load: Load, who: str, served: Served, alone: Served | None, peer: Served | None
) -> list[str]:
    rate = _rates(served, load, results.program.tokens).median
    cells = [format_size(load.length), str(load.batch), who]
    for name, factor in (("first", 1.0), ("each", 1e3)):
        timing: Timing = getattr(served, name)
        cells += [f"{factor * timing.median:.4g}", f"{factor * report.half_range(timing):.2g}"]
        cells += [
            "" if other is None else f"{getattr(other, name).median / timing.median:.2f}" if timing.median else ""
            for other in (alone, peer)
        ]
    cells += [f"{rate:.4g}", f"{served.cache / 2**30:.3g}" if served.cache else ""]
    return [*cells, "n/a" if served.memory is None else f"{served.memory / 2**30:.3g}"]


def _microseconds(timing: Timing) -> list[str]:
    return [f"{1e6 * timing.median:.4g}", f"{1e6 * report.half_range(timing):.2g}"]


def timed(
    case: str, metric: str, ours: Timing, peer: str, theirs: Timing | None, factor: float = 1.0
) -> dict[str, Any]:
    """A row of times: the ratio is theirs over ours."""
    other = None if theirs is None else factor * theirs.median
    mine = factor * ours.median
    return row(
        case, metric, mine, factor * report.half_range(ours), peer, other, other / mine if other and mine else None
    )


def row(
    case: str, metric: str, ours: float, spread: float, peer: str, theirs: float | None, ratio: float | None
) -> dict[str, Any]:
    figures = {"ours": ours, "spread": spread, "peer": peer, "theirs": theirs, "ratio": ratio}
    return {"case": case, "metric": metric} | {
        key: float(f"{x:.4g}") if isinstance(x, float | int) else x for key, x in figures.items()
    }


def grid(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *lines])
