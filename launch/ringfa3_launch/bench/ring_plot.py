"""NAME.png: speed of every method over the length, what the ring adds to its kernels, and speed over the GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from ringfa3_launch.bench.case import DIRECTIONS, format_size
from ringfa3_launch.bench.match import Outcome
from ringfa3_launch.bench.ring_matches import KERNELS, ONE_GPU, ONE_LAUNCH
from ringfa3_launch.bench.verdicts import best, over_kernels

OUR_COLOURS = ("#08306b", "#31a354", "#1fb5d6", "#54278f", "#8c510a", "#a1d99b")
OUR_MARKS = ("o", "^", "D", "v", "P", "X")
PEER_COLOURS = ("#d95f02", "#7570b3", "#e7298a", "#a6761d", "#e6ab02", "#666666", "#fb8072", "#bc80bd")
MANY = 6  # names that a legend inside of a panel has room for
PARTS = {KERNELS: (":", "."), ONE_LAUNCH: ("-.", "x"), ONE_GPU: ("--", "+")}

Figure = Callable[[Outcome, str], float | None]


def draw(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Write the plot: a row of panels for each direction of plain causal attention."""
    plain = [o for o in outcomes if o.match.case.mask == "causal" and o.ours]
    directions = [d for d in DIRECTIONS if any(o.match.case.direction == d for o in plain)]
    worlds = {o.match.case.world for o in plain} | {1 for o in plain if o.rate(ONE_GPU) is not None}
    wide = 3 if len(worlds) > 1 else 2
    figure, axes = pyplot.subplots(
        max(1, len(directions)), wide, figsize=(7.5 * wide, 4.8 * max(1, len(directions)) + 0.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for direction, row in zip(directions, axes, strict=False):
        own = [o for o in plain if o.match.case.direction == direction]
        largest = sorted(
            (o for o in own if o.match.case.world == max(x.match.case.world for x in own)),
            key=lambda o: o.match.case.seqlen,
        )
        _speed(row[0], largest, direction)
        _overhead(row[1], largest, direction)
        if wide == 3:
            _scaling(row[2], own, direction)
    figure.suptitle(title, fontsize=14)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _speed(panel: Any, outcomes: list[Outcome], direction: str) -> None:
    panel.set_title(f"{direction}, causal, {outcomes[0].match.case.world} ranks: speed")
    panel.set_ylabel(f"TFLOP/s per {_rank(outcomes)}")
    ours = list(dict.fromkeys(name for o in outcomes for name in o.ours))
    peers = list(dict.fromkeys(name for o in outcomes for name in o.peers))
    for i, name in enumerate(ours):
        _line(panel, outcomes, name, _rate, **_own_style(i))
    for part, (style, mark) in PARTS.items():
        _line(panel, outcomes, part, _rate, marker=mark, linestyle=style, color="black", linewidth=1.2)
    for i, name in enumerate(peers):
        colour = PEER_COLOURS[i % len(PEER_COLOURS)]
        _line(panel, outcomes, name, _rate, marker="s", linestyle="--", color=colour, linewidth=1.2, markersize=4)
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    _lengths(panel, outcomes)


def _overhead(panel: Any, outcomes: list[Outcome], direction: str) -> None:
    panel.set_title(f"{direction}: time of the ring over its kernels alone")
    ours = list(dict.fromkeys(name for o in outcomes for name in o.ours))
    for i, name in enumerate(ours):
        _line(panel, outcomes, name, over_kernels, **_own_style(i))
    limit = 1.03 if direction == "fwd" else 1.05
    if panel.lines:
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.axhline(limit, color="grey", linewidth=1.2, linestyle=":", label=f"asked of 2 GPUs: at most {limit}")
    _lengths(panel, outcomes)


def _scaling(panel: Any, outcomes: list[Outcome], direction: str) -> None:
    """The best of ours over the number of ranks: solid at the same length, dashed at the same tokens a rank."""
    panel.set_title(f"{direction}: best of ours over the ranks")
    panel.set_ylabel(f"TFLOP/s per {_rank(outcomes)}")
    points = {(o.match.case.world, o.match.case.seqlen): o.rate(best(o)) for o in outcomes}
    for o in outcomes:
        if o.rate(ONE_GPU) is not None:
            points.setdefault((1, o.match.case.seqlen), o.rate(ONE_GPU))
    for key, style, label in ((lambda w, s: s, "o-", "in all"), (lambda w, s: s // w, "s--", "a rank")):
        for value in sorted({key(w, s) for w, s in points}):
            line = sorted((w, rate) for (w, s), rate in points.items() if key(w, s) == value and rate)
            if len(line) > 1:
                panel.plot(*zip(*line, strict=True), style, markersize=4, label=f"{format_size(value)} {label}")
    worlds = sorted({w for w, _ in points})
    panel.set_xscale("log", base=2)
    panel.set_xticks(worlds, [str(w) for w in worlds])
    panel.set_xlabel("ranks")
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    _legend(panel)


def _own_style(i: int) -> dict[str, Any]:
    """Of our i-th line."""
    n = i % len(OUR_COLOURS)
    return {"marker": OUR_MARKS[n], "color": OUR_COLOURS[n], "linewidth": 2.2, "markersize": 5}


def _line(panel: Any, outcomes: list[Outcome], name: str, figure: Figure, **style: Any) -> None:
    points = [(o.match.case.seqlen, y) for o in outcomes if (y := figure(o, name)) is not None]
    if points:
        panel.plot(*zip(*points, strict=True), label=name, **style)


def _lengths(panel: Any, outcomes: list[Outcome]) -> None:
    lengths = sorted({o.match.case.seqlen for o in outcomes})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [format_size(n) for n in lengths])
    panel.minorticks_off()
    if len(lengths) == 1:
        panel.set_xlim(lengths[0] / 2, lengths[0] * 2)
    panel.set_xlabel("sequence length, tokens on all ranks together")
    _legend(panel)


def _legend(panel: Any) -> None:
    panel.grid(alpha=0.3)
    names = panel.get_legend_handles_labels()[1]
    if len(names) > MANY:  # beside the lines: no corner is free of them
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    elif names:
        panel.legend(fontsize=8, framealpha=0.8)
    else:
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes, color="grey")


def _rate(outcome: Outcome, name: str) -> float | None:
    return outcome.rate(name)


def _rank(outcomes: list[Outcome]) -> str:
    return "GPU" if outcomes and outcomes[0].device == "cuda" else "CPU rank"
