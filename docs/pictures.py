"""Draw the documentation's pictures: `python docs/pictures.py` writes docs/pictures/*.svg and figures.json beside them.

Nothing in them is drawn by hand: every number is one of `figures.figures()`. tests/docs/test_pictures.py says when they
are out of date.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from figures import LAYOUTS, LONG, TINY, WORLD, figures
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

HERE = Path(__file__).parent / "pictures"
RANKS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")  # Tol's bright palette: told apart by colour-blind readers
COPY = "#777777"
STYLE = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "figure.dpi": 100,
    "svg.hashsalt": "ringfa3", "legend.frameon": False,
}  # fmt: skip


def main() -> None:
    """Compute, draw, write."""
    found = figures()
    write(found, HERE)
    print(f"wrote {len(PICTURES)} pictures and figures.json in {HERE}")


def write(found: dict[str, Any], folder: Path) -> None:
    """All pictures, and the numbers in them."""
    folder.mkdir(exist_ok=True)
    with pyplot.rc_context(STYLE):
        for name, draw in PICTURES.items():
            figure = draw(found)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)
    (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")


def ring(found: dict[str, Any]) -> Any:
    """Left: who holds what, and which way keys travel. Right: whose keys a rank meets in which hop."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.4), width_ratios=(1, 1.1), layout="constrained")
    places = [(math.sin(2 * math.pi * r / WORLD), math.cos(2 * math.pi * r / WORLD)) for r in range(WORLD)]
    for rank, (x, y) in enumerate(places):
        there = places[(rank + 1) % WORLD]
        left.add_patch(
            FancyArrowPatch(
                (x, y),
                there,
                connectionstyle="arc3,rad=-0.38",
                arrowstyle="-|>",
                mutation_scale=18,
                color=COPY,
                lw=1.5,
                shrinkA=46,
                shrinkB=46,
            )
        )
        left.scatter([x], [y], s=5600, color=RANKS[rank], zorder=2)
        held = "\n".join(f"{a // 1024}K to {b // 1024}K" for a, b in found["ring"]["held"][rank])
        left.text(x, y + 0.17, f"rank {rank}", ha="center", va="center", color="white", weight="bold", zorder=3)
        left.text(x, y - 0.12, held, ha="center", va="center", color="white", fontsize=9, zorder=3)
    left.text(0, 0, "keys and\nvalues", ha="center", va="center", color=COPY)
    left.set(xlim=(-1.6, 1.6), ylim=(-1.55, 1.55), aspect="equal")
    left.axis("off")
    left.set_title(f"{LONG // 1024}K positions, zigzag: what each rank holds")
    for rank, sources in enumerate(found["ring"]["sources"]):
        for hop, source in enumerate(sources):
            right.add_patch(Rectangle((hop + 0.03, rank + 0.05), 0.94, 0.9, color=RANKS[source]))
            label = f"rank {source}'s" + ("\n(its own)" if source == rank else "")
            right.text(hop + 0.5, rank + 0.5, label, ha="center", va="center", color="white")
    _grid(right, "whose keys and values each rank computes with")
    return figure


def _grid(panel: Any, title: str) -> None:
    """Ranks from top to bottom, hops from left to right."""
    ticks = [i + 0.5 for i in range(WORLD)]
    panel.set(xlim=(0, WORLD), ylim=(WORLD, 0), title=title)
    panel.set_xticks(ticks, [f"hop {i + 1}" for i in range(WORLD)])
    panel.set_yticks(ticks, [f"rank {i}" for i in range(WORLD)])
    panel.tick_params(length=0)
    for side in ("left", "bottom"):
        panel.spines[side].set_visible(False)


def layouts(found: dict[str, Any]) -> Any:
    """The causal triangle of a few positions, in the colour of the rank that computes it."""
    figure, panels = pyplot.subplots(1, len(LAYOUTS), figsize=(10, 3.9), layout="constrained")
    for panel, name in zip(panels, LAYOUTS, strict=True):
        held = found["layouts"][name]
        for row, rank in enumerate(held):
            panel.add_patch(Rectangle((0, row), row + 1, 1, color=RANKS[rank], lw=0))
        panel.set(xlim=(0, TINY), ylim=(TINY, 0), aspect="equal", title=name, xlabel="keys")
        panel.set_xticks([0, TINY // 2, TINY])
        panel.set_yticks([0, TINY // 2, TINY])
    panels[0].set_ylabel("rows")
    _rank_legend(figure, "computed by rank")
    return figure


def load(found: dict[str, Any]) -> Any:
    """Pairs that each rank computes in each hop: a hop lasts as long as its longest bar."""
    figure, panels = pyplot.subplots(1, len(LAYOUTS), figsize=(10, 3.4), sharey=True, layout="constrained")
    for panel, name in zip(panels, LAYOUTS, strict=True):
        pairs = found["load"][name]
        for rank in range(WORLD):
            at = [hop + 0.2 * (rank - (WORLD - 1) / 2) for hop in range(WORLD)]
            panel.bar(at, [n / 1e6 for n in pairs[rank]], 0.18, color=RANKS[rank])
        longest = sum(max(pairs[rank][hop] for rank in range(WORLD)) for hop in range(WORLD))
        share = sum(map(sum, pairs)) / WORLD / longest
        panel.set_title(f"{name}\nwork fills {share:.0%} of the time")
        panel.set_xticks(range(WORLD), [f"hop {hop + 1}" for hop in range(WORLD)])
        panel.tick_params(axis="x", length=0)
    panels[0].set_ylabel("million pairs")
    _rank_legend(figure, "rank")
    return figure


def softmax(found: dict[str, Any]) -> Any:
    """Left: lse of three rows after every hop. Right: how far out is from the whole sequence's."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    case = found["softmax"]
    hops = range(1, len(case["hops"]) + 1)
    names = [f"hop {i}\nrank {hop['source']}'s keys" for i, hop in zip(hops, case["hops"], strict=True)]
    for colour, (row, position) in zip(RANKS, case["positions"].items(), strict=False):
        left.axhline(case["exact"][row], color=colour, lw=1, ls=":")
        values = [hop["lse"][row] for hop in case["hops"]]
        left.plot(hops, values, "o-", color=colour, label=f"row at position {position}")
    left.set_title(f"log-sum-exp so far, rank {case['rank']}\n(dotted: of the whole sequence at once)")
    left.legend(loc="lower right", fontsize=9)
    right.semilogy(hops, [hop["error"] for hop in case["hops"]], "o-", color="black")
    for i, hop in zip(hops, case["hops"], strict=True):
        label = f"{hop['error']:.1e}" if i == len(hops) else f"{hop['error']:.2g}"
        right.annotate(
            label,
            (i, hop["error"]),
            (-7, 0) if i == len(hops) else (7, 3),
            textcoords="offset points",
            ha="right" if i == len(hops) else "left",
        )
    right.set(title="distance of out from the exact one, all rows\n(relative, fp32 against fp64)", ylim=(1e-8, 30))
    for panel in (left, right):
        panel.set_xticks(hops, names, fontsize=9)
        panel.set_xlim(0.6, len(hops) + 0.4)
    return figure


def timeline(found: dict[str, Any]) -> Any:
    """Predicted hops of 16K tokens, three ways, on one scale of time."""
    cases = found["timeline"]
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(10, 7.4), sharex=True, layout="constrained")
    for panel, case in zip(panels, cases, strict=True):
        for rank, source, start, end in case["hops"]:
            panel.broken_barh([(start, end - start)], (rank - 0.12, 0.42), facecolors=RANKS[source], edgecolors="white")
            panel.text((start + end) / 2, rank + 0.09, str(source), ha="center", va="center", color="white", fontsize=9)
        for rank, start, end in case["copies"]:
            panel.broken_barh([(start, end - start)], (rank - 0.34, 0.17), facecolors=COPY)
        panel.axvline(case["ms"], color="black", lw=1, ls=":")
        panel.set(ylim=(WORLD - 0.45, -0.6))
        panel.set_title(f"{case['name']}: {case['ms']:.2f} ms, {case['efficiency']:.0%} of one GPU's speed", loc="left")
        panel.set_yticks(range(WORLD), [f"rank {rank}" for rank in range(WORLD)])
        panel.tick_params(axis="y", length=0)
    panels[-1].set_xlabel("ms; predicted for 16K tokens, causal, 32:8 heads of 128, bf16, 4 H200")
    _rank_legend(figure, "keys of rank", Patch(color=COPY, label="arriving"))
    return figure


def trace(found: dict[str, Any]) -> Any:
    """What two H200s did: hops above, what they pulled from each other below."""
    case = found["trace"]
    figure, panel = pyplot.subplots(figsize=(10, 2.9), layout="constrained")
    for rank, way, source, start, end in case["hops"]:
        panel.broken_barh([(start, end - start)], (rank - 0.12, 0.42), facecolors=RANKS[source], edgecolors="white")
        panel.text(
            (start + end) / 2, rank + 0.09, f"{way}, {source}", ha="center", va="center", color="white", fontsize=9
        )
    for rank, _, start, end in case["copies"]:
        panel.broken_barh([(start, end - start)], (rank - 0.36, 0.19), facecolors=COPY, edgecolors=COPY)
    panel.set(ylim=(1.45, -0.6), xlabel=f"ms, recorded on 2 H200: {case['title']}")
    panel.set_yticks(range(2), ["rank 0", "rank 1"])
    panel.tick_params(axis="y", length=0)
    _rank_legend(figure, "keys of rank", Patch(color=COPY, label="pulled: keys, then gradients"), ranks=2)
    return figure


def ways(found: dict[str, Any]) -> Any:
    """Predicted speed per GPU of every layout and every transport, for some jobs."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 6.2), sharey=True, layout="constrained")
    jobs = found["ways"]
    colours = (*RANKS, "#aa3377")
    titles = ("layouts (by pull; over hosts hierarchical)", "transports (each in its best layout)")
    for panel, kind, title in zip(panels, ("layouts", "transports"), titles, strict=True):
        names = list(dict.fromkeys(name for job in jobs.values() for name in job[kind]))
        names = sorted(names, key=ORDER.index)
        for i, name in enumerate(names):
            for j, job in enumerate(jobs.values()):
                if name in job[kind]:
                    value = job[kind][name] if kind == "layouts" else job[kind][name][1]
                    at = j + 0.8 / len(names) * (i - (len(names) - 1) / 2)
                    panel.barh(at, 100 * value, 0.72 / len(names), color=colours[i], label=name if j == 0 else None)
        handles = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=False)]
        panel.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=10)
        panel.set(title=title, xlim=(0, 100), xlabel="% of one GPU's speed, predicted, forward")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(jobs)), [name.replace(", ", "\n", 1) for name in jobs])
    panels[0].set_ylim(len(jobs) - 0.5, -0.5)
    return figure


ORDER = ["zigzag", "contiguous", "striped", "balanced", "pull", "hierarchical", "ring", "gather", "ulysses"]


def _rank_legend(figure: Any, title: str, *more: Patch, ranks: int = WORLD) -> None:
    handles = [Patch(color=RANKS[rank], label=f"{title} {rank}") for rank in range(ranks)]
    figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=WORLD + 1)


PICTURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ring": ring,
    "layouts": layouts,
    "load": load,
    "softmax": softmax,
    "timeline": timeline,
    "trace": trace,
    "ways": ways,
}

if __name__ == "__main__":
    main()
