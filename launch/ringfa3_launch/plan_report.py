"""What `ringfa3 plan` prints of a prediction: the ways, the hops, the timeline, and all of it as JSON."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ringfa3_launch.bench.case import parse_mask
from ringfa3_launch.console import Console

if TYPE_CHECKING:
    from ringfa3.cost import Choice, Job, Machine, Prediction

ROWS = 12  # of the table of ways
RANKS = 16  # of the timelines


def show(choice: Choice, machine: Machine, mask: str, ranks: list[int], console: Console) -> None:
    """Print the ways, the hops of some ranks of the best one, and its timeline."""
    from ringfa3_launch.timeline import text

    best, job = choice.best, choice.best.job
    console.heading(title(job, mask))
    console.table(
        ("way", "layout", "ms", "TFLOP/s", "share", "waits", "slowed", "GiB"),
        *_ways(choice, machine),
    )
    console.say(choice.reason, "ok" if max(best.memory) <= machine.memory else "broken")
    for line in _notes(best, machine):
        console.say(line)
    if job.world > 1:
        one = f", rank {ranks[0]}" if len(ranks) == 1 else ""
        console.heading(f"hops of {best.name}{one}: milliseconds")
        columns = ("hop", "keys of", "Mpairs", "MiB", "there", "starts", "ends", "takes", "waited")
        console.table(columns, [row for rank in ranks for row in _hops(best, rank)])
        shown = min(best.scene.ring, RANKS)
        console.heading(f"timeline, {best.seconds * 1e3:.4g} ms" + _mesh_note(best))
        width = shutil.get_terminal_size((100, 24)).columns
        for line in text(best, shown, width):
            console.say(line)
        if shown < best.scene.ring:
            console.say(f"ranks {shown} to {best.scene.ring - 1} are like these", "dim")
    console.heading("figures used")
    console.table(("", ""), [(name, source) for name, source in machine.sources])


def title(job: Job, mask: str) -> str:
    """ "forward, causal, 128K tokens, 32:8 heads of 128, bf16, 8 GPUs"."""
    from ringfa3_launch.bench.case import format_size, mask_token

    way = "forward and backward" if job.backward else "forward"
    rows = f", batch {job.batch}" if job.batch > 1 else ""
    hosts = f" on {job.hosts} hosts" if job.hosts > 1 else ""
    gpus = f"{job.world} GPU{'s' if job.world > 1 else ''}"
    shape = f"{job.Hq}:{job.Hkv} heads of {job.D}, {job.dtype}"
    return f"{way}, {mask_token(parse_mask(mask))}, {format_size(job.seqlen)} tokens{rows}, {shape}, {gpus}{hosts}"


def document(choice: Choice, machine: Machine) -> dict[str, Any]:
    """What --json prints: seconds and bytes throughout."""
    best = choice.best
    return {
        "best": best.name,
        "reason": choice.reason,
        "hiding_tokens": _rule(best, machine),
        "ways": [
            {
                "name": p.name,
                "transport": p.way.transport,
                "layout": p.way.layout_name,
                "mesh": {"ulysses": p.scene.ulysses, "ring": p.scene.ring},
                "seconds": p.seconds,
                "tflops": p.tflops,
                "efficiency": p.efficiency,
                "hidden": p.hidden,
                "losses": p.losses,
                "memory": max(p.memory),
                "fits": max(p.memory) <= machine.memory,
            }
            for p in choice.ranked
        ],
        "refused": [
            {"transport": way.transport, "layout": way.layout_name, "ulysses": way.ulysses, "why": why}
            for way, why in choice.refused
        ],
        "hops": [vars(step) for step in best.steps],
        "copies": [vars(copy) for copy in best.copies],
        "memory": list(best.memory),
        "machine": {"name": machine.name, "sources": dict(machine.sources)},
    }


def _ways(choice: Choice, machine: Machine) -> tuple[list[Sequence[str]], list[str]]:
    """Rows and styles; layouts that make no difference share a row."""
    groups: list[list[Prediction]] = []
    for p in choice.ranked:
        same = next((g for g in groups if _same(g[0], p)), None)
        if same is None:
            groups.append([p])
        else:
            same.append(p)
    rows: list[Sequence[str]] = []
    styles = []
    for group in groups[:ROWS]:
        p = group[0]
        others = sorted(q.way.layout_name for q in group[1:])
        way = p.name.removesuffix(f", {p.way.layout_name}")
        layout = "any" if way == p.name else ", ".join([p.way.layout_name, *others])
        memory = max(p.memory)
        slowed = p.losses["kernels slowed by transfers"]
        waits = p.losses["waiting for messages"]
        rows.append(
            (
                way,
                layout,
                f"{p.seconds * 1e3:.4g}",
                f"{p.tflops:.0f}",
                f"{p.efficiency:.3f}",
                f"{100 * waits:.1f}%",
                f"{100 * abs(slowed):.1f}%",
                f"{memory / 2**30:.3g}",
            )
        )
        styles.append("broken" if memory > machine.memory else "ok" if p is choice.best else "plain")
    return rows, styles


def _same(a: Prediction, b: Prediction) -> bool:
    """Whether only the layout differs, and no figure that the table shows."""
    alike = a.way.transport == b.way.transport and a.scene.ulysses == b.scene.ulysses
    return alike and abs(a.seconds - b.seconds) < 1e-3 * a.seconds


def _hops(p: Prediction, rank: int) -> list[tuple[str, ...]]:
    steps = [step for step in p.steps if step.rank == rank]
    return [
        (
            f"{rank} " + ("fwd" if step.direction == "forward" else "bwd"),
            "itself" if step.source == rank else f"rank {step.source}",
            f"{step.pairs / 1e6:.4g}",
            f"{step.size / 2**20:.4g}",
            *(_ms(t) for t in (step.arrived, step.start, step.end, step.end - step.start, step.waited)),
        )
        for step in steps
    ]


def _ms(seconds: float) -> str:
    """Milliseconds, to a microsecond where they are few."""
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 10 else f"{ms:.2f}" if ms < 100 else f"{ms:.1f}"


def _notes(p: Prediction, machine: Machine) -> list[str]:
    """The rule of thumb, and what the figures do not cover."""
    if p.job.world == 1:
        return []
    tokens, have = _rule(p, machine), p.job.seqlen / p.job.world
    side = "above" if have >= tokens else "below"
    rule = f"messages hide from {tokens:,.0f} tokens a rank on"
    return [f"Rule of thumb, causal zigzag ring: {rule}; here are {have:,.0f}, {side} it."]


def _rule(p: Prediction, machine: Machine) -> float:
    """`hiding_tokens` for the slowest link that this way uses."""
    from ringfa3.cost import hiding_tokens

    job = p.job
    kind = "between" if p.scene.ring_hosts > 1 else "pull" if p.way.transport == "pull" else "sendrecv"
    link = machine.link(kind, job.world // job.hosts)
    share = job.operations / job.world / (3.5 if job.backward else 1.0)
    rate = machine.rate(share * (2.5 if job.backward else 1.0), job.D, backward=job.backward)
    return hiding_tokens(job.Hq, job.Hkv, rate, link.points[-1][1], backward=job.backward, itemsize=job.itemsize)


def totals(p: Prediction) -> str:
    return (
        f"{p.name}: {p.seconds * 1e3:.4g} ms, {p.tflops:.0f} TFLOP/s per GPU, {100 * p.efficiency:.1f}% of one GPU's, "
        f"{max(p.memory) / 2**30:.3g} GiB a rank (predicted)"
    )


def _mesh_note(p: Prediction) -> str:
    u = p.scene.ulysses
    return f"; each rank of the ring axis stands for {u} that share its rows" if u > 1 else ""
