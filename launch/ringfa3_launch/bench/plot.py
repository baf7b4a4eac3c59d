"""NAME.png: speed, efficiency, memory and error over the sequence length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from ringfa3_launch.bench.case import DIRECTIONS, format_size
from ringfa3_launch.bench.match import GEMM, OURS
from ringfa3_launch.bench.sweep import Result

Figure = Callable[[Result], float | None]  # a case's figure, or None

OUR_COLOURS = ("#08306b", "#1fb5d6", "#31a354", "#8c510a")  # by world
OUR_MARKS = ("o", "^", "D", "v")
PEER_COLOURS = ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#a6761d", "#666666")


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """Write the plot: a row of panels for each direction."""
    directions = [d for d in DIRECTIONS if any(result.case.direction == d for result in results)]
    figure, axes = pyplot.subplots(
        len(directions), 4, figsize=(21, 6.2 * len(directions) + 0.6), squeeze=False, layout="constrained"
    )
    for direction, row in zip(directions, axes, strict=True):
        own = [result for result in results if result.case.direction == direction]
        _speed(row[0], own, direction)
        _efficiency(row[1], own, direction)
        _memory(row[2], own, direction)
        _error(row[3], own, direction)
        for panel in row:
            _finish(panel, own)
    figure.suptitle(title, fontsize=14)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _speed(panel: Any, results: list[Result], direction: str) -> None:
    panel.set_title(f"{direction}: speed")
    panel.set_ylabel(f"TFLOP/s per {_rank(results)}")
    _ours(panel, results, lambda result: _median(result, OURS), spread=True)
    _peers(panel, results, lambda result, peer: _median(result, peer))
    gemm = sorted(rate for result in results if (rate := _median(result, GEMM)))
    panel.axhline(gemm[len(gemm) // 2], color="black", linestyle=":", linewidth=1.2, label="matrix product")
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])


def _efficiency(panel: Any, results: list[Result], direction: str) -> None:
    panel.set_title(f"{direction}: efficiency against one {_rank(results)}")
    panel.set_ylabel(f"speed per {_rank(results)}, share of W1's")
    alone = {result.case.seqlen: _median(result, OURS) for result in results if result.case.world == 1}

    def share(result: Result) -> float | None:
        mine, one = _median(result, OURS), alone.get(result.case.seqlen)
        return mine / one if mine and one else None

    _ours(panel, results, share)
    panel.set_ylim(0, max(1.15, panel.get_ylim()[1]))
    panel.axhline(1, color="grey", linewidth=0.8)


def _memory(panel: Any, results: list[Result], direction: str) -> None:
    panel.set_title(f"{direction}: peak memory")
    panel.set_ylabel("bytes per rank")
    _ours(panel, results, lambda result: result.memory.get(OURS))
    _peers(panel, results, lambda result, name: result.memory.get(name))
    if panel.lines:
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda y, _: f"{y / 2**30:g} GiB" if y >= 2**30 else f"{y / 2**20:g} MiB")
        panel.set_ylim(panel.get_ylim()[0] / 1.5, panel.get_ylim()[1] * 1.5)


def _error(panel: Any, results: list[Result], direction: str) -> None:
    panel.set_title(f"{direction}: error against fp64")
    panel.set_ylabel("relative error of sampled rows")
    _ours(panel, results, lambda result: result.errors.get(OURS))
    largest = max(result.case.world for result in results)
    plain = [
        (result.case.seqlen, result.errors["plain"])
        for result in results
        if result.case.world == largest and "plain" in result.errors
    ]
    if plain:
        panel.plot(
            *zip(*plain, strict=True),
            "s--",
            color="#d95f02",
            markersize=5,
            label=f"plain attention, rows of W{largest}",
        )
    panel.set_ylim(0, 1.25 * panel.get_ylim()[1])


def _ours(panel: Any, results: list[Result], figure: Figure, *, spread: bool = False) -> None:
    """A thick line for each world."""
    for i, world in enumerate(sorted({result.case.world for result in results})):
        own = [result for result in results if result.case.world == world and figure(result) is not None]
        if not own:
            continue
        x, y = [result.case.seqlen for result in own], [figure(result) or 0.0 for result in own]
        n = min(i, len(OUR_COLOURS) - 1)
        colour, mark = OUR_COLOURS[n], OUR_MARKS[n]
        panel.plot(x, y, f"{mark}-", color=colour, linewidth=2, label=f"ringfa3 W{world}", zorder=3)
        if spread:
            rates = [rates for result in own if (rates := result.tflops(OURS))]
            low, high = ([r.quantile(q) for r in rates] for q in (0.2, 0.8))
            panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _peers(panel: Any, results: list[Result], figure: Callable[[Result, str], float | None]) -> None:
    """A thin dashed line for each peer and world."""
    names = list(dict.fromkeys(name for result in results for name in result.timings if name not in (OURS, GEMM)))
    for i, name in enumerate(names):
        for world in sorted({result.case.world for result in results}):
            points = [
                (result.case.seqlen, y)
                for result in results
                if result.case.world == world and (y := figure(result, name)) is not None
            ]
            if points:
                colour = PEER_COLOURS[i % len(PEER_COLOURS)]
                panel.plot(
                    *zip(*points, strict=True),
                    "s--",
                    color=colour,
                    linewidth=1.2,
                    markersize=4,
                    label=f"{name} W{world}",
                )


def _finish(panel: Any, results: list[Result]) -> None:
    lengths = sorted({result.case.seqlen for result in results})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [format_size(n) for n in lengths])
    panel.minorticks_off()
    if len(lengths) == 1:
        panel.set_xlim(lengths[0] / 2, lengths[0] * 2)
    panel.set_xlabel("sequence length, tokens on all ranks together")
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)  # covers no line there
    else:
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes, color="grey")


def _median(result: Result, name: str) -> float | None:
    rates = result.tflops(name)
    return rates.median if rates else None


def _rank(results: list[Result]) -> str:
    return "GPU" if results[0].device == "cuda" else "CPU rank"
