"""A match: contestants that are timed against each other, round by round, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from ringfa3_launch.bench.case import Case
from ringfa3_launch.bench.timing import Timing

OURS, GEMM, HOPS, LAUNCH = "ours", "gemm", "hops", "launch"


@dataclass(frozen=True)
class Entry:
    """Who takes part.

    Args:
        name: unique in the match.
        method: "ours" (ring_attention), "hops" (its kernels hop by hop on local tensors, no transport), "launch" (one
            kernel over all keys at once, on local tensors), "gemm" (a matrix product), or a peer's name.
        case: what it computes. Where its world is 1 and the match's is larger, every rank does it alone, all at once.
        layout: how the sequence is dealt; a peer's own, for those who have one.
        transport: of "ours": as ring_attention's, or "mesh:UxR" for a 2-D mesh of U ulysses by R ring ranks.
        impl: of the kernels.
    """

    name: str
    method: str
    case: Case
    layout: str = "zigzag"
    transport: str = "auto"
    impl: str = "auto"


@dataclass(frozen=True)
class Match:
    """Entries, one of which at least is not a peer.

    Args:
        case: what it is about, and on which world.
        entries: who takes part.
        seconds: for the rounds; 0: nobody is called but once, and that call is what counts.
        fewest: rounds at least.
        note: what makes it another match than one of the same case.
    """

    case: Case
    entries: tuple[Entry, ...]
    seconds: float
    fewest: int = 2
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.note}".rstrip()

    def entry(self, name: str) -> Entry:
        """The entry of that name."""
        return next(entry for entry in self.entries if entry.name == name)


@dataclass(frozen=True)
class Outcome:
    """A match as it was measured; figures of the slowest or fullest rank.

    Args:
        match: what was measured.
        device: "cuda" or "cpu".
        timings: by entry; those that ran.
        flops: by entry, operations of one call on one rank (the mean over the ranks).
        missing: entry -> why it did not run.
        memory: by entry, bytes of one rank at a call's fullest: its inputs, what the call took, and `outside`.
        outside: by entry, bytes of the device outside torch's allocator (symmetric memory) that its transport's pools
            hold (of a peer: that its first call took and kept).
        errors: by entry, relative, on sampled rows against fp64.
        plain: by entry, the error of plain PyTorch attention in the same precision on the same rows.
        wall: seconds that the match took.
    """

    match: Match
    device: str
    timings: dict[str, Timing]
    flops: dict[str, float]
    missing: dict[str, str]
    memory: dict[str, int]
    outside: dict[str, int]
    errors: dict[str, float]
    plain: dict[str, float]
    wall: float = 0.0

    def tflops(self, name: str) -> Timing | None:
        """TFLOP/s per GPU in each round."""
        timing = self.timings.get(name)
        return None if timing is None else Timing(tuple(self.flops[name] / t / 1e12 for t in timing.seconds))

    def rate(self, name: str) -> float | None:
        """The median of `tflops`."""
        rates = self.tflops(name)
        return None if rates is None else rates.median

    def seconds(self, name: str) -> float | None:
        """The median of a call."""
        timing = self.timings.get(name)
        return None if timing is None else timing.median

    @property
    def ours(self) -> list[str]:
        """Entries that are ring_attention on this match's own case and ran, in their order."""
        return [
            entry.name
            for entry in self.match.entries
            if entry.method == OURS and entry.case == self.match.case and entry.name in self.timings
        ]

    @property
    def peers(self) -> list[str]:
        """Entries that are somebody else's and ran."""
        known = (OURS, GEMM, HOPS, LAUNCH)
        return [entry.name for entry in self.match.entries if entry.method not in known and entry.name in self.timings]
