"""Draws results of attention on one GPU: TFLOP/s over length, a row a mask and a column a shape, peers as lines.

    python kernels/bench/plot_attend.py docs/results/attend_forward.json

bench_attend.py and bench_backward.py do the same after measuring. The figures in the panels are ours over the first
peer of the results. Causal said by row intervals is the dashed line in the causal row.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rounds import Row

DIRECTIONS = {"fwd": "forward", "bwd": "backward"}
ROWS = {"full": "full", "causal": "causal", "intervals": "causal"}
NAMES = {
    "ours": "ours",
    "intervals": "ours, by row intervals",
    "fa3": "FlashAttention-3",
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
    "portable": "ours, portable",
}
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "#1f5fbf", "lw": 2.6, "marker": "o", "zorder": 5},
    "intervals": {"color": "#1f5fbf", "lw": 1.4, "ls": "--", "marker": "o", "mfc": "white", "zorder": 4},
    "fa3": {"color": "#e07b00", "lw": 1.6, "marker": "s", "ms": 5, "zorder": 3},
    "cudnn": {"color": "#6a9a3a", "lw": 1.2, "marker": "^", "ms": 5, "zorder": 2},
    "fa2": {"color": "#999999", "lw": 1.2, "marker": "v", "ms": 5, "zorder": 1},
    "portable": {"color": "#8fb4e8", "lw": 1.2, "ls": ":", "marker": "d", "ms": 5, "zorder": 1},
}
Line = dict[int, float]  # thousands of tokens -> TFLOP/s


def panels(rows: Iterable[Row]) -> tuple[dict[tuple[str, str], dict[str, Line]], dict[tuple[str, str], Line]]:
    """(mask, shape) -> the lines by name, and ours over the first peer named in the results."""
    lines: dict[tuple[str, str], dict[str, Line]] = {}
    ratios: dict[tuple[str, str], Line] = {}
    for row in rows:
        _, mask, *rest = row.case.split()
        if mask not in ROWS or rest[0] == "into" or row.peer.startswith("ours"):
            continue
        length = int(next(t for t in rest if re.fullmatch(r"S\d+K", t))[1:-1])
        at = ROWS[mask], f"D {rest[0][1:]}, heads {rest[1][1:]}"
        panel = lines.setdefault(at, {})
        # beside every peer ours was timed anew: shown is the figure beside the first one
        panel.setdefault("intervals" if mask == "intervals" else "ours", {}).setdefault(length, row.ours)
        if mask != "intervals":
            panel.setdefault(row.peer, {})[length] = row.theirs
            ratios.setdefault(at, {}).setdefault(length, row.ratio)
    return lines, ratios


def plot(path: Path, rows: Sequence[Row], *, device: str = "") -> None:
    """Write path.png; nothing where no row has a peer. `device` is for the title: this machine's unless given."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, ratios = panels(rows)
    if not lines:
        return
    masks, shapes = (list(dict.fromkeys(at[i] for at in lines)) for i in (0, 1))
    size = (3.3 * len(shapes) + 0.6, 3.0 * len(masks) + 1.0)
    figure, axes = pyplot.subplots(
        len(masks), len(shapes), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    shown: dict[str, Any] = {}
    for (mask, shape), panel in lines.items():
        axis = axes[masks.index(mask), shapes.index(shape)]
        for name in sorted(panel, key=list(STYLES).index):
            shown[name] = axis.plot(*zip(*sorted(panel[name].items()), strict=True), **STYLES[name])[0]
        _dress(axis, f"{mask}, {shape}", panel, ratios.get((mask, shape), {}))
    for row in axes:
        row[0].set_ylabel("TFLOP/s")
    order = [name for name in STYLES if name in shown]
    figure.legend([shown[n] for n in order], [NAMES[n] for n in order], loc="outside lower center", ncols=len(order))
    peer = next(n for n in order if n not in ("ours", "intervals"))  # the one that the ratios are to
    what = " and ".join(DIRECTIONS[x] for x in rows[0].case.split()[0].split("+"))
    where = (device or torch.cuda.get_device_name()).removeprefix("NVIDIA ")
    dtype = rows[0].case.split()[-1]
    figure.suptitle(f"Attention {what}, {dtype}, {where}; figures: ours / {NAMES[peer]}", fontsize=12)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def _dress(axis: Any, title: str, panel: dict[str, Line], ratios: Line) -> None:
    lengths = sorted({length for line in panel.values() for length in line})
    axis.set_title(title, fontsize=10)
    axis.set(ylim=(0, 940), xlabel="tokens")
    axis.set_xscale("log", base=2)
    axis.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)
    axis.set_xticks(lengths, [f"{length}K" for length in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    for length, ratio in ratios.items():
        top = max(line[length] for line in panel.values() if length in line)
        axis.annotate(
            f"{ratio:.2f}", (length, top), (0, 7), textcoords="offset points", ha="center", fontsize=9, color="#1f5fbf"
        )


def main() -> None:
    """Redraw the JSON files named on the command line."""
    for name in sys.argv[1:]:
        document = json.loads(Path(name).read_text())
        rows = [Row(**row) for row in document["rows"]]
        plot(Path(name), rows, device=document["device"])


if __name__ == "__main__":
    main()
