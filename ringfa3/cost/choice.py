"""recommend: every way of doing a job, the quickest first, with the reason in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringfa3.cost.job import Job, Way
from ringfa3.cost.machine import Machine
from ringfa3.cost.predict import Prediction, predict
from ringfa3_kernels import Unsupported

LAYOUTS = ("zigzag", "contiguous", "striped", "balanced")
RING = ("pull", "ring", "gather", "hierarchical")


@dataclass(frozen=True, eq=False)
class Choice:
    """What to do and why.

    Args:
        best: the way to take.
        ranked: all predictions, best first; those that do not fit a GPU's memory last.
        reason: one sentence.
        refused: (way, why) of those that cannot serve.
    """

    best: Prediction
    ranked: tuple[Prediction, ...]
    reason: str
    refused: tuple[tuple[Way, str], ...]


def recommend(
    job: Job,
    machine: Machine | None = None,
    *,
    transports: Sequence[str] | None = None,
    layouts: Sequence[str] = LAYOUTS,
    ulysses: Sequence[int] | None = None,
    depth: int = 3,
) -> Choice:
    """Rank transport x layout x mesh by predicted time; the best needs least memory within 0.02% of the quickest.

    Args:
        transports: of the ring axis, and "ulysses"; None: all.
        layouts: to try.
        ulysses: sizes of the Ulysses axis to try; None: every divisor of the world.
        depth: as `Way`'s.

    Raises:
        Unsupported: none of the ways can serve this job.
        ValueError: a name is unknown, or the machine has no rates for this dtype.
    """
    machine = machine or Machine.h200()
    found, refused = [], []
    for way in _ways(job, transports, layouts, ulysses, depth):
        try:
            found.append(predict(job, way, machine))
        except Unsupported as error:
            refused.append((way, str(error)))
    if not found:
        why = refused[0][1] if refused else "transports, layouts and meshes to choose from leave none"
        raise Unsupported(f"plan: wanted a way to do this on {job.world} ranks, got none: {why}")
    quickest = min(found, key=lambda p: (max(p.memory) > machine.memory, p.seconds))
    tied = [p for p in found if p.seconds <= 1.0002 * quickest.seconds and max(p.memory) <= machine.memory]
    least = min((max(p.memory) for p in tied), default=0.0)
    best = next((p for p in tied if max(p.memory) <= 1.02 * least), quickest)
    found.sort(key=lambda p: (p is not best, max(p.memory) > machine.memory, p.seconds))
    ranked = tuple(found)
    return Choice(best, ranked, _reason(ranked), tuple(refused))


def _ways(
    job: Job, transports: Sequence[str] | None, layouts: Sequence[str], ulysses: Sequence[int] | None, depth: int
) -> Iterator[Way]:
    """All there are; a world of one has one, and without a ring axis the layout does not matter."""
    sizes = [u for u in range(1, job.world + 1) if job.world % u == 0] if ulysses is None else ulysses
    for u in sizes:
        if job.world % u:
            raise ValueError(f"ulysses: wanted a divisor of the {job.world} ranks, got {u}")
        if u == job.world:
            if transports is None or "ulysses" in transports or u == 1:
                yield Way("ulysses", "contiguous", depth=depth)
            continue
        for transport in transports or RING:
            if transport == "ulysses" or (transport == "hierarchical" and job.hosts == 1 and transports is None):
                continue  # not meant for this; but what was named is refused with its reason
            for layout in layouts:
                yield Way(transport, layout, u, depth)


def _reason(ranked: Sequence[Prediction]) -> str:
    """Why the first is first, in a sentence."""
    best = ranked[0]
    if best.job.world == 1:
        return "One GPU holds it all, so nothing has to travel."
    if max(best.memory) > best.scene.machine.memory:
        return f"Nothing fits: even {best.name} needs {max(best.memory) / 2**30:.0f} GiB a rank; take more ranks."
    other = next((p for p in ranked[1:] if _kind(p) != _kind(best)), None)
    text = f"{best.name} {_loss(best)}"
    if other is None:
        return f"{text}."
    if max(other.memory) > best.scene.machine.memory:
        return f"{text}; {other.name} would not fit a GPU's memory."
    return f"{text}; the next best kind, {other.name}, {_loss(other)}."


def _kind(p: Prediction) -> tuple[str, int]:
    return p.way.transport, p.scene.ulysses


def _loss(p: Prediction) -> str:
    """How much of one GPU's speed is lost, and what most of it is lost to."""
    cause = max(p.losses, key=lambda name: p.losses[name])
    lost = 100 * (1 - p.efficiency)
    if lost < 0.1:
        return "loses nothing of one GPU's speed"
    return f"loses {lost:.1f}% of one GPU's speed, most of it to {cause}"
