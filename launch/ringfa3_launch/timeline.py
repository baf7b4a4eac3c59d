"""A prediction's timeline: every rank's hops and copies side by side, as text and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringfa3.cost import Prediction
    from ringfa3.cost.schedule import Copy

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
MARKS = {"keys": "-", "gradients": "=", "heads": "#"}
COLOURS = {"keys": "#08519c", "gradients": "#a63603", "heads": "#54278f"}
NAMES = {"keys": "keys and values", "gradients": "fp32 dK, dV", "heads": "heads (Ulysses)"}
WHOSE = {"keys": ", in their rank's colour", "gradients": ", in the sender's colour", "heads": ""}
LEGEND = "0-9a-z: that rank's keys   . idle   arriving: - keys   = dK, dV   # heads"
MOST = 16  # ranks in the picture


def text(p: Prediction, ranks: int, width: int) -> list[str]:
    """Two lines a rank, hops above what comes to it; a column is a moment, at its middle.

    Args:
        ranks: of the ring axis, how many.
        width: characters a line may take.
    """
    room = max(20, min(width, 160) - 10)
    lines = []
    for rank in range(ranks):
        hops, copies = ["."] * room, [" "] * room
        for step in p.steps:
            if step.rank == rank:
                _fill(hops, step.start, step.end, p.seconds, DIGITS[step.source % len(DIGITS)])
        for copy in p.copies:
            if copy.rank == rank:
                _fill(copies, copy.start, copy.end, p.seconds, MARKS[copy.what])
        lines += [f"rank {rank:<4} {''.join(hops)}", f"{'':9} {''.join(copies)}".rstrip()]
    lines.append(f"{'':9} 0{f'{p.seconds * 1e3:.4g} ms':>{room - 1}}")
    return [*lines, LEGEND]


def _fill(cells: list[str], start: float, end: float, whole: float, mark: str) -> None:
    """Mark the cells whose middle lies in [start, end); one cell at least, so that nothing gets lost."""
    n = len(cells)
    if end <= start:
        return
    first = min(n - 1, round(start / whole * n))
    for i in range(first, max(first + 1, round(end / whole * n))):
        if i < n:
            cells[i] = mark


def draw(p: Prediction, path: Path, title: str) -> None:
    """Write the picture: two bars a rank, hops in their source's colour above what comes to the rank."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    ranks = min(p.scene.ring, MOST)
    figure, panel = pyplot.subplots(figsize=(16, 2.2 + 0.78 * ranks), layout="constrained")
    colours = pyplot.get_cmap("Set3")
    unit, name = (1e3, "ms") if p.seconds >= 1e-3 else (1e6, "µs")
    for step in p.steps:
        if step.rank < ranks:
            left, width = step.start * unit, (step.end - step.start) * unit
            panel.broken_barh(
                [(left, width)], (step.rank - 0.02, 0.4), facecolors=colours(step.source % 12), edgecolors="white"
            )
            if width > 0.02 * p.seconds * unit:
                label = f"{step.source}" + ("'" if step.direction == "backward" else "")
                panel.text(left + width / 2, step.rank + 0.18, label, ha="center", va="center", fontsize=9)
    for copy in p.copies:
        if copy.rank < ranks:
            left, width, source = copy.start * unit, (copy.end - copy.start) * unit, _source(p, copy)
            fill = COLOURS[copy.what] if source is None else colours(source % 12)
            bar, style = (copy.rank - 0.3, 0.24), {"edgecolors": COLOURS[copy.what], "linewidth": 1.2}
            panel.broken_barh([(left, width)], bar, facecolors=fill, **style)
            if source is not None and width > 0.02 * p.seconds * unit:
                panel.text(left + width / 2, copy.rank - 0.18, str(source), ha="center", va="center", fontsize=8)
    _finish(panel, p, ranks, unit, name)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=100, format="png")
    pyplot.close(figure)


def _source(p: Prediction, copy: Copy) -> int | None:
    """Whose keys arrive, or who sends a share of gradients; None for heads, which come from all peers at once."""
    if copy.what != "keys":
        return None if copy.what == "heads" else copy.peer
    if p.way.transport == "ring":  # whose sender passes on what came to it, in the order of steps
        ring, rank = p.scene.ring, copy.rank
        sources = [(rank - i) % ring for i in range(1, ring) if p.scene.passed((rank - i) % ring, i)]
        own = [c for c in p.copies if (c.rank, c.direction, c.what) == (rank, copy.direction, "keys")]
        return sources[own.index(copy)]
    # between hosts a sender passes on another's keys, too: they are those of the hop that waited for this copy
    hops = (s for s in p.steps if (s.rank, s.direction, s.arrived) == (copy.rank, copy.direction, copy.end))
    return next((step.source for step in hops if step.source != copy.rank), copy.peer)


def _finish(panel: Any, p: Prediction, ranks: int, unit: float, name: str) -> None:
    from matplotlib.patches import Patch

    if p.job.backward:
        at = max(p.forward_ends) * unit
        panel.axvline(at, color="black", linestyle="--", linewidth=1)
        for x, label, side in ((at, "forward ", "right"), (at, " backward", "left")):
            panel.text(x, -0.62, label, ha=side, va="center", fontsize=9)
    panel.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    panel.set_ylim(ranks - 0.4, -0.8)
    panel.set_xlim(0, p.seconds * unit * 1.005)
    panel.set_xlabel(name + (f"; the first {ranks} of {p.scene.ring} ranks" if ranks < p.scene.ring else ""))
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    used = dict.fromkeys(copy.what for copy in p.copies)

    def face(what: str) -> str:
        return COLOURS[what] if what == "heads" else "white"

    handles = [Patch(facecolor="#dddddd", edgecolor="white", label="hop, in the colour of the keys' rank")]
    handles += [
        Patch(facecolor=face(what), edgecolor=COLOURS[what], label=f"arriving: {NAMES[what]}{WHOSE[what]}")
        for what in used
    ]
    panel.figure.legend(handles=handles, loc="outside lower center", ncols=4)
