"""NAME.png: throughput and latency over the number of clients, and what the service adds to the bare engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from ringfa3_launch.bench.case import format_size
from ringfa3_launch.bench.service_case import QUANTILES, Level
from ringfa3_launch.bench.service_report import ADDED_MS, ADDED_PERCENT, FIGURES, Results
from ringfa3_launch.bench.timing import Timing

COLOURS = dict(zip(QUANTILES, ("#08306b", "#1fb5d6", "#d95f02"), strict=True))
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # a line behind a number stops at it
MARKS = dict(zip(QUANTILES, ("o", "^", "s"), strict=True))


def draw(results: Results, path: Path, title: str) -> None:
    """Write the plot."""
    figure, axes = pyplot.subplots(2, 3, figsize=(17, 9.5), layout="constrained")
    levels = [level for level in results.played.levels if level.good]
    for panel, name, figures in (
        (axes[0, 0], "requests/s", [level.requests_s for level in levels]),
        (axes[1, 0], "tokens/s", [level.tokens_s for level in levels]),
    ):
        panel.set_title(name)
        panel.plot([level.concurrency for level in levels], figures, "o-", color="#08306b", linewidth=2.2)
        _clients(panel, levels)
    for panel, name, (_, metric, factor, of) in zip(
        axes[:, 1], ("time to the first token", "time per token"), FIGURES, strict=True
    ):
        panel.set_title(name)
        panel.set_ylabel(metric.split()[0])
        for quantile in QUANTILES:
            ys = [factor * level.quantiles(of)[quantile] for level in levels]
            style = {"marker": MARKS[quantile], "color": COLOURS[quantile], "linewidth": 2.2}
            panel.plot([level.concurrency for level in levels], ys, label=quantile, **style)
        _clients(panel, levels)
        panel.legend(fontsize=9)
    _added(axes[0, 2], results, "added to the first token, one client", "ms", "first", 1e3, ADDED_MS)
    _added(axes[1, 2], results, "added to the time per token, one client", "%", "each", 1e2, ADDED_PERCENT)
    figure.suptitle(title, fontsize=14)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _added(panel: Any, results: Results, title: str, unit: str, figure: str, factor: float, asked: float) -> None:
    """Each pair a dot, the median a bar, by length of the prompt."""
    panel.set_title(title)
    panel.set_ylabel(unit)
    overheads = [each for each in results.played.overheads if getattr(each, figure).seconds]
    if not overheads or not results.played.service.launcher:
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes, color="grey")
        return
    for at, overhead in enumerate(overheads):
        added: Timing = getattr(overhead, figure)
        count = len(added.seconds)
        spread = [at + 0.5 * ((i + 0.5) / count - 0.5) for i in range(count)]  # in the order of the pairs
        panel.plot(spread, [factor * x for x in added.seconds], "o", color="#1fb5d6", alpha=0.7, label="a pair")
        median = factor * added.median
        panel.plot([at - 0.35, at + 0.35], [median, median], color="#08306b", linewidth=3, label="median")
        panel.annotate(f"{median:+.3g}", (at + 0.37, median), va="center", bbox=PAPER, color="#08306b", zorder=5)
    panel.axhline(asked, color="#d95f02", linestyle="--", linewidth=1.2, label=f"asked: below {asked:g} {unit}")
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(range(len(overheads)), [format_size(overhead.length) for overhead in overheads])
    panel.set_xlim(-0.6, len(overheads) - 0.4)
    panel.set_xlabel("tokens of the prompt")
    panel.grid(axis="y", alpha=0.3)
    handles, labels = panel.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    panel.legend(once.values(), once.keys(), fontsize=9)


def _clients(panel: Any, levels: list[Level]) -> None:
    numbers = [level.concurrency for level in levels]
    panel.set_xscale("log", base=2)
    panel.set_xticks(numbers, [str(n) for n in numbers])
    panel.minorticks_off()
    if len(numbers) == 1:
        panel.set_xlim(numbers[0] / 2, numbers[0] * 2)
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    panel.set_xlabel("clients at once")
    panel.grid(alpha=0.3)
