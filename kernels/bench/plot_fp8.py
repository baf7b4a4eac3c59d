"""Draws the speed rows of docs/results/fp8.json: TFLOP/s over length, a panel a mask, peers as lines.

python kernels/bench/plot_fp8.py docs/results/fp8.json

The figures in the panels are ours over FlashAttention-3, both on tensors already quantised.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rounds import Row

MASKS = ("full", "causal")
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "#1f5fbf", "lw": 2.6, "marker": "o", "zorder": 5},
    "ours with quantize": {"color": "#1f5fbf", "lw": 1.4, "ls": "--", "marker": "o", "mfc": "white", "zorder": 4},
    "fa3": {"color": "#e07b00", "lw": 1.6, "marker": "s", "ms": 5, "zorder": 3},
    "ours bf16": {"color": "#999999", "lw": 1.4, "marker": "v", "ms": 5, "zorder": 1},
}
NAMES = {"ours": "ours, fp8", "fa3": "FlashAttention-3, fp8", "ours bf16": "ours, bf16"}
Line = dict[int, float]  # thousands of tokens -> TFLOP/s


def panels(rows: Sequence[Row]) -> tuple[dict[str, dict[str, Line]], dict[str, Line]]:
    """mask -> the lines by name, and ours over FlashAttention-3."""
    lines: dict[str, dict[str, Line]] = {}
    ratios: dict[str, Line] = {}
    for row in rows:
        if row.metric != "TFLOP/s":
            continue
        mask = row.case.split()[1]
        length = int(next(t for t in row.case.split() if re.fullmatch(r"S\d+K", t))[1:-1])
        quantized = row.case.endswith("with quantize")
        panel = lines.setdefault(mask, {})
        panel.setdefault("ours with quantize" if quantized else "ours", {})[length] = row.ours
        if not quantized:
            panel.setdefault(row.peer, {})[length] = row.theirs
            if row.peer == "fa3":
                ratios.setdefault(mask, {})[length] = row.ratio
    return lines, ratios


def plot(path: Path, rows: Sequence[Row], *, device: str = "") -> None:
    """Write path.png; nothing where there are no rows of speed. `device` is this machine's unless given."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, ratios = panels(rows)
    if not lines:
        return
    masks = [m for m in MASKS if m in lines]
    size = (4.2 * len(masks) + 0.6, 4.0)
    figure, axes = pyplot.subplots(1, len(masks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, mask in zip(axes[0], masks, strict=True):
        for name in [n for n in STYLES if n in lines[mask]]:
            axis.plot(
                *zip(*sorted(lines[mask][name].items()), strict=True), label=NAMES.get(name, name), **STYLES[name]
            )
        _dress(axis, mask, lines[mask], ratios.get(mask, {}))
    axes[0][0].set_ylabel("TFLOP/s")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES))
    where = (device or torch.cuda.get_device_name()).removeprefix("NVIDIA ")
    figure.suptitle(f"Attention forward, fp8, D 128, {where}; figures: ours / FlashAttention-3", fontsize=11)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def _dress(axis: Any, title: str, panel: dict[str, Line], ratios: Line) -> None:
    lengths = sorted({length for line in panel.values() for length in line})
    axis.set_title(title, fontsize=10)
    axis.set(ylim=(0, 1300), xlabel="tokens")
    axis.set_xscale("log", base=2)
    axis.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)
    axis.set_xticks(lengths, [f"{length}K" for length in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    for length, ratio in ratios.items():
        top = max(line[length] for line in panel.values() if length in line)
        axis.annotate(f"{ratio:.2f}", (length, top), (0, 7), textcoords="offset points", ha="center", color="#1f5fbf")


def main() -> None:
    """Redraw the JSON files named on the command line."""
    for name in sys.argv[1:]:
        document = json.loads(Path(name).read_text())
        plot(Path(name), [Row(**row) for row in document["rows"]], device=document["device"])


if __name__ == "__main__":
    main()
