"""NAME.png: time to the first token, time per token and memory over the prompt's length, for every world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from ringfa3_launch.bench.case import format_size
from ringfa3_launch.bench.inference_case import Served
from ringfa3_launch.bench.inference_verdicts import PEER, Results

COLOURS = ("#08306b", "#1fb5d6", "#31a354", "#8c510a")  # by world
MARKS = ("o", "^", "D", "v")

Figure = Callable[[Served], float | None]


def draw(results: Results, path: Path, title: str) -> None:
    """Write the plot."""
    figure, axes = pyplot.subplots(2, 2, figsize=(14, 10), layout="constrained")
    panels: tuple[tuple[str, str, Figure], ...] = (
        ("time to the first token", "s", lambda served: served.first.median),
        ("time per token", "ms", lambda served: 1e3 * served.each.median),
        ("memory of the rank that has most", "GiB", lambda served: served.memory and served.memory / 2**30),
    )
    for panel, (name, unit, of) in zip(axes.flat, panels, strict=False):
        panel.set_title(name)
        panel.set_ylabel(unit)
        _lines(panel, results, of)
        _lengths(panel, results)
    _parts(axes[1, 1], results)
    figure.suptitle(title, fontsize=14)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _lines(panel: Any, results: Results, of: Figure) -> None:
    loads = [load for load in results.program.loads if load.batch == 1]
    peers = [(load.length, y) for load in loads if (peer := results.peer(load)) and (y := of(peer)) is not None]
    if peers:
        panel.plot(*zip(*peers, strict=True), "s--", color="#d95f02", label=f"{PEER}, one device")
    for i, world in enumerate(results.worlds):
        points = [
            (load.length, y) for load in loads if load in world.served if (y := of(world.served[load])) is not None
        ]
        if points:
            style = {"marker": MARKS[i % len(MARKS)], "color": COLOURS[i % len(COLOURS)], "linewidth": 2.2}
            panel.plot(*zip(*points, strict=True), label=f"ours, {world.world} rank{'s' * (world.world > 1)}", **style)


def _parts(panel: Any, results: Results) -> None:
    """Decode attention alone, as a share of a device copy."""
    panel.set_title("decode attention alone: speed over a device copy")
    kernels = [kernel for world in results.worlds for kernel in world.kernels]
    if not kernels:
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes, color="grey")
        return
    names = [f"{format_size(k.length)}\nB{k.batch}" for k in kernels]
    panel.bar(names, [k.rate / k.copy for k in kernels], color=COLOURS[1])
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set_xlabel("cached tokens, batch")


def _lengths(panel: Any, results: Results) -> None:
    lengths = sorted({load.length for load in results.program.loads})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [format_size(n) for n in lengths])
    panel.minorticks_off()
    if len(lengths) == 1:
        panel.set_xlim(lengths[0] / 2, lengths[0] * 2)
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    panel.set_xlabel("tokens of the prompt")
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8)
