"""The matches that show what a ring costs: against its own kernels, one GPU, packed documents and other libraries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ringfa3_launch.bench.case import Case
from ringfa3_launch.bench.match import HOPS, LAUNCH, OURS, Entry, Match
from ringfa3_launch.bench.ring_peers import layout_of

KERNELS, ONE_LAUNCH, ONE_GPU, CAUSAL = "kernels alone", "one launch", "one GPU", "plain causal"


def duel(
    case: Case,
    transports: Sequence[str],
    peers: Sequence[str],
    seconds: float,
    *,
    parts: Iterable[str] = (KERNELS, ONE_LAUNCH, ONE_GPU),
    impl: str = "auto",
    fewest: int = 2,
) -> Match:
    """Ours by each transport against its parts and the peers, on one case.

    Args:
        parts: of KERNELS (hop by hop, no transport), ONE_LAUNCH (forward only) and ONE_GPU (the whole sequence on every
            rank, all at once, so that GPUs draw the power that they draw in the ring).
    """
    entries = [Entry(name, OURS, case, own_layout(name), name, impl) for name in transports]
    for part in parts:
        if part == KERNELS and case.world > 1:
            entries.append(Entry(part, HOPS, case, impl=impl))
        elif part == ONE_LAUNCH and case.direction == "fwd" and case.world > 1:
            entries.append(Entry(part, LAUNCH, case, impl=impl))
        elif part == ONE_GPU and case.world > 1:
            entries.append(Entry(part, OURS, replace(case, world=1), impl=impl))
    entries += [Entry(name, name, case, layout_of(name)) for name in peers]
    return Match(case, tuple(entries), seconds, fewest)


def beside_causal(
    case: Case, transports: Sequence[str], layouts: Sequence[str], seconds: float, *, impl: str = "auto"
) -> Match:
    """Ours under a mask, by each transport and layout, beside plain causal attention of the same length."""
    entries = [Entry(f"{name} {layout}", OURS, case, layout, name, impl) for name in transports for layout in layouts]
    causal = replace(case, mask="causal")
    entries += [Entry(f"{CAUSAL}, {name}", OURS, causal, "zigzag", name, impl) for name in transports]
    return Match(case, tuple(entries), seconds)


def single(case: Case, transports: Sequence[str], *, impl: str = "auto") -> Match:
    """One call of each, for lengths at which a call takes tens of seconds."""
    entries = tuple(Entry(name, OURS, case, own_layout(name), name, impl) for name in transports)
    return Match(case, entries, 0.0, note="one call")


def own_layout(transport: str) -> str:
    """Ulysses' ranks hold contiguous slices, as the whole sequence comes together for each head; rings want zigzag."""
    return "contiguous" if transport == "ulysses" else "zigzag"
