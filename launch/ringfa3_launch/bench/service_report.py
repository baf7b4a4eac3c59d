"""What `ringfa3 bench service` found, for people and programs: tables, NAME.json, NAME.md and NAME.png."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ringfa3_launch import machine
from ringfa3_launch.bench import report
from ringfa3_launch.bench.case import format_size
from ringfa3_launch.bench.inference_report import grid, row, timed
from ringfa3_launch.bench.ring_report import ENVIRONMENT
from ringfa3_launch.bench.service_case import Overhead, Played, Program
from ringfa3_launch.bench.service_load import Answer
from ringfa3_launch.bench.timing import Timing
from ringfa3_launch.bench.verdicts import Verdict
from ringfa3_launch.console import Console

BARE = "bare engine"
ADDED_MS = 5.0  # that the service may add to the first token
ADDED_PERCENT = 3.0  # and to the time per token
FIGURES: tuple[tuple[str, str, float, Callable[[Answer], float]], ...] = (
    ("first", "s to first token", 1.0, lambda answer: answer.first),
    ("each", "ms per token", 1e3, lambda answer: answer.each),
)
LEVELS = (
    "clients", "requests", "requests/s", "tokens/s", "first token s p50", "p95", "p99", "each token ms p50", "p95",
    "p99", "429", "errors", "equal", "ties", "wrong",
)  # fmt: skip
OVERHEADS = (
    "prompt", "pairs", "equal", "ties", "first token s", "bare", "added ms", "±",
    "each token ms", "bare", "added %", "±",
)  # fmt: skip
NOTE = (
    "clients: at once, each asking again as soon as it has its answer. first token: from sending the request to its "
    "first text; each token: from one to the next, an answer's mean; p50, p95, p99: over the answers. 429: times that "
    "a client was told to come back; its clock begins anew with the attempt that is let in. equal: answers that are "
    "the lone one; ties: leave it where two tokens are equally likely to what rounding does; wrong: neither. added: "
    "what the service takes more than the engine alone, the same prompt asked of both one right after the other; the "
    "median of those differences, ± half the range from their 20th to their 80th percentile."
)
METHOD = (
    "Method: the app of `ringfa3 serve` and the bare engine (`RingCluster.complete`) have the same ranks, and one "
    "process, as under `ringfa3 serve`; the clients (httpx, streaming, temperature 0) are in a process of their own. "
    "Prompts are token ids, no two are alike and none is in the cache. At one client every prompt is asked of the "
    "engine and of the service, who is first taking turns; the engine's answers are the lone ones that all others "
    "have to equal. One that does not is judged by transformers on one device, in the same precision and in a wider "
    "one: a tie is where the other token's logit is below the best by no more than twice plain transformers' error "
    "for each of the two. Wider precision takes too long for prompts of more than 16K tokens: there it is three times "
    "the largest error of the first short answer's tokens, for each of the two, in transformers' logits of the same "
    "precision, which err themselves."
)


@dataclass(frozen=True)
class Results:
    """All of it."""

    program: Program
    played: Played

    @property
    def title(self) -> str:
        """What all cases have in common."""
        program, service = self.program, self.played.service
        random = ", random weights" if program.random else ""
        words = [f"service, {program.name}{random}", service.dtype, f"{program.tokens} tokens answered"]
        return ", ".join(word for word in words if word)

    @property
    def long(self) -> Overhead | None:
        """At the long prompt, which is measured last."""
        there = [each for each in self.played.overheads if each.length == self.program.long]
        return there[-1] if there else None

    @property
    def wrong(self) -> bool:
        """Whether some answer was not what it should be, or none came."""
        levels = self.played.levels
        wrong = any(overhead.wrong for overhead in self.played.overheads)
        return bool(self.played.wrong) or wrong or any(level.errors or level.wrong for level in levels)


def judge(results: Results) -> list[Verdict]:
    """What is asked of these cases (of times: on GPUs), and what was reached."""
    found = []
    played, service = results.played, results.played.service
    on_gpu = service.device == "cuda"
    if results.program.long is not None:
        where = service.case("completion", results.program.long)
        long = results.long
        count = len(long.pairs) if long else 0
        found.append(Verdict(where, "requests answered", "ours", "> 0", count, count > 0))
        if long and service.launcher:
            words = "answers neither the bare engine's nor a tie"
            found.append(Verdict(where, words, "ours", "0", long.wrong, long.wrong == 0))
    for overhead in played.overheads if service.launcher else ():
        where = service.case("completion", overhead.length)
        for what, added, bound, factor in (
            ("ms added to first token", overhead.first, ADDED_MS, 1e3),
            ("% added per token", overhead.each, ADDED_PERCENT, 1e2),
        ):
            if added.seconds:
                got = factor * added.median
                ok = got < bound if on_gpu else None
                found.append(Verdict(where, what, "ours", f"< {bound:g}" if on_gpu else "", got, ok))
    for level in played.levels:
        where = f"{service.case('completion', results.program.length)} C{level.concurrency}"
        found.append(Verdict(where, "errors but 429", "ours", "0", level.errors, level.errors == 0))
        if played.lone:
            words = "answers neither the lone one nor a tie"
            found.append(Verdict(where, words, "ours", "0", level.wrong, level.wrong == 0))
    return found


def document(results: Results, *, command: str) -> dict[str, Any]:
    """What NAME.json holds: docs/results' format, and beside it verdicts, pairs, answers' times, what is missing."""
    service = results.played.service
    versions = ("fastapi", "uvicorn", "httpx", *(("ray",) if service.launcher == "ray" else ()))
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": report.commit(),
        "device": device(results),
        "versions": machine.version_table() | {name: machine.version(name) or "none" for name in versions},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ENVIRONMENT)},
        "model": results.title,
        "launcher": service.launcher or "another process",
        "rows": rows(results),
        "verdicts": [verdict.as_row() for verdict in judge(results)],
        "pairs": {
            format_size(overhead.length): {
                f"{who} {figure}_s": overhead.of(who, figure).seconds
                for who in (("bare", "served") if service.launcher else ("served",)) for figure in ("first", "each")
            } for overhead in results.played.overheads
        },
        "answers": {
            str(level.concurrency): {
                "seconds": level.seconds,
                "first_s": [answer.first for answer in level.good], "each_s": [answer.each for answer in level.good],
            } for level in results.played.levels
        },
        "missing": results.played.missing,
        "wrong": wrongs(results),
    }  # fmt: skip


def device(results: Results) -> str:
    """Where the ranks are; of a service elsewhere only what it says itself."""
    service = results.played.service
    if not service.launcher:
        return f"{service.world} {'GPU' if service.device == 'cuda' else 'CPU'} ranks of a running service"
    return machine.device_name(service.device, service.world)


def rows(results: Results) -> list[dict[str, Any]]:
    """One row for each figure and whom it is compared with; a ratio above 1 always means that ours is better."""
    found: list[dict[str, Any]] = []
    played, service = results.played, results.played.service
    for overhead in played.overheads:
        case = f"{service.case('completion', overhead.length)} C1"
        for figure, metric, factor, _ in FIGURES:
            theirs = overhead.of("bare", figure) if service.launcher else None
            peer = BARE if service.launcher else "none"
            found.append(timed(case, metric, overhead.of("served", figure), peer, theirs, factor))
        if service.launcher:
            found.append(_added(case, "ms added to first token", overhead.first, 1e3, ADDED_MS))
            found.append(_added(case, "% added per token", overhead.each, 1e2, ADDED_PERCENT))
    one = next((level for level in played.levels if level.concurrency == 1), None)
    for level in played.levels:
        case = f"{service.case('completion', results.program.length)} C{level.concurrency}"
        peer = "one client" if one is not None and one.good else "none"
        for rate in ("requests_s", "tokens_s"):
            mine, theirs = getattr(level, rate), getattr(one, rate) if peer != "none" else None
            found.append(row(case, rate.replace("_s", "/s"), mine, 0.0, peer, theirs, theirs and mine / theirs))
        for _, metric, factor, of in FIGURES:
            for quantile, x in level.quantiles(of).items():
                found.append(row(case, f"{metric} {quantile}", factor * x, 0.0, "none", None, None))
        for metric, count in (("429", level.refused), ("errors", level.errors)):
            found.append(row(case, metric, count, 0.0, "none", None, None))
        if played.lone:
            right, of_all = level.equal + level.ties, len(level.answers)
            found.append(row(case, "right answers", right, 0.0, "lone answers", of_all, right / of_all))
            found.append(row(case, "ties", level.ties, 0.0, "none", None, None))
    return found


def _added(case: str, metric: str, added: Timing, factor: float, bound: float) -> dict[str, Any]:
    """A row of what the service adds: the ratio is what may be added over what is; none where nothing is."""
    if not added.seconds:
        return row(case, metric, float("nan"), 0.0, "asked", bound, None)
    got = factor * added.median
    return row(case, metric, got, factor * report.half_range(added), "asked", bound, bound / got if got > 0 else None)


def level_table(results: Results) -> list[list[str]]:
    """LEVELS, a line each."""
    lines = []
    for level in results.played.levels:
        cells = [str(level.concurrency), str(len(level.answers)), f"{level.requests_s:.3g}", f"{level.tokens_s:.4g}"]
        for _, _, factor, of in FIGURES:
            found = level.quantiles(of)
            cells += [f"{factor * x:.4g}" for x in found.values()] or ["n/a"] * 3
        cells += [str(level.refused), str(level.errors), str(level.equal), str(level.ties), str(level.wrong)]
        lines.append(cells)
    return lines


def overhead_table(results: Results) -> list[list[str]]:
    """OVERHEADS, a line for each length of prompt."""
    lines = []
    bare = bool(results.played.service.launcher)
    for overhead in results.played.overheads:
        cells = [format_size(overhead.length), str(len(overhead.pairs))]
        cells += [str(len(overhead.pairs) - len(overhead.parted)), str(overhead.ties)] if bare else ["n/a"] * 2
        for figure, factor, unit in (("first", 1.0, 1e3), ("each", 1e3, 1e2)):
            cells.append(f"{factor * overhead.of('served', figure).median:.4g}")
            added: Timing = getattr(overhead, figure)
            if bare and added.seconds:
                cells.append(f"{factor * overhead.of('bare', figure).median:.4g}")
                cells += [f"{unit * added.median:+.3g}", f"{unit * report.half_range(added):.2g}"]
            else:
                cells += ["n/a"] * 3
        lines.append(cells)
    return lines


def wrongs(results: Results) -> list[str]:
    """What was not as it should be, in words; each error once."""
    found = dict.fromkeys(results.played.wrong)
    if results.long and results.long.wrong:
        where = f"S{format_size(results.long.length)}"
        found[f"{where}: {results.long.wrong} answers neither the bare engine's nor a tie"] = None
    for level in results.played.levels:
        if level.wrong and results.played.lone:
            found[f"{level.concurrency} clients: {level.wrong} answers neither the lone one nor a tie"] = None
        for answer in level.answers:
            if answer.error:
                found[f"{level.concurrency} clients: {answer.error}"] = None
    return list(found)


def show(results: Results, found: dict[str, Any], console: Console) -> None:
    """Print the tables, and below them verdicts and what is missing."""
    console.heading(f"{results.title} on {found['device']}")
    styles = ["broken" if level.errors or level.wrong else "plain" for level in results.played.levels]
    console.table(LEVELS, level_table(results), styles)
    if results.played.overheads:
        console.heading("what the service adds, one client")
        console.table(OVERHEADS, overhead_table(results))
    console.say(NOTE, "dim")
    for verdict in judge(results):
        if verdict.asked and not (verdict.ok and verdict.asked == "0"):
            words = f"{verdict.case}: {verdict.what} {verdict.asked}, got {verdict.reached:.4g}"
            console.say(f"{'reached' if verdict.ok else 'NOT REACHED'}: {words}", "ok" if verdict.ok else "broken")
    right = [verdict for verdict in judge(results) if verdict.asked == "0"]
    if right and all(verdict.ok for verdict in right):
        console.say("reached: no errors but 429s, every answer the lone one or a tie", "ok")
    for line in wrongs(results):
        console.say(f"WRONG: {line}", "broken")
    for line in results.played.missing:
        console.say(f"missing: {line}", "note")


def write(results: Results, found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, NAME.png; returns their paths."""
    return report.save_all(
        found, folder, name, plotter="service_plot", drawn=results, title=results.title,
        markdown=lambda plot: markdown(results, found, plot),
    )  # fmt: skip


def markdown(results: Results, found: dict[str, Any], plot: Path | None) -> str:
    """NAME.md: what was asked and reached, the tables, what is missing, and how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [f"# {results.title}", f"{found['device']}, {found['date']}, commit {found['commit']}; {versions}."]
    parts.append(f"    {found['command']}")
    words = {True: "reached", False: "NOT REACHED", None: ""}
    lines = [[v.case, v.what, v.asked, f"{v.reached:.4g}", words[v.ok]] for v in judge(results) if v.asked]
    parts += ["## Asked and reached", grid(["case", "figure", "asked", "got", "verdict"], lines)]
    if plot is not None:
        parts.append(f"![{results.title}]({plot.name})")
    if results.played.overheads:
        parts += ["## What the service adds, one client", grid(OVERHEADS, overhead_table(results))]
    prompt = format_size(results.program.length)
    parts += [f"## Many clients, prompts of {prompt} tokens", grid(LEVELS, level_table(results)), NOTE]
    for title, told in (("Wrong", wrongs(results)), ("Not measured", results.played.missing)):
        if told:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {line}" for line in told))
    parts.append(METHOD)
    return "\n\n".join(parts) + "\n"
