"""Tile configurations of the Hopper forward on fp8, one table; `kernels/bench/bench_fp8.py` times the alternatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ringfa3_kernels.hopper.configs import CAUSAL, FULL, INTERVALS, OUT_REGISTERS, OUT_SHARED, Config


@dataclass(frozen=True)
class Fp8Config(Config):
    """Everything the fp8 forward is compiled for: the tile (from the table) and the call's variant, as in Config.

    BN divides the 128 keys that a scale covers; 16-bit output always has its buffer (OUT_SHARED); a given state is read
    when the tile is done, so there is no PREFETCH.

    Args:
        LAZY: leave the running maximum (and O) alone while it is at most 2^LAZY too small. P then fills that much less
            of e4m3's range from below. 0: never. (Instead of LAZY_RESCALE.)
        TWO_LEVEL: add every block's P V to O in the fp32 pipe: wgmma on fp8 adds with some 14 bits, and a sum over 16K
            values of one sign loses a quarter. The multiplication that rescales O becomes the addition's, so it costs
            registers only; those of head_dim 256 do not suffice. False is for tuning.
    """

    LAZY: int = 0
    TWO_LEVEL: bool = False

    # a kernel's Constants are the fields and properties of the class itself
    WM, THREADS, BRANCH, FILL, GUARD = Config.WM, Config.THREADS, Config.BRANCH, Config.FILL, Config.GUARD

    @property
    def SHIFT(self) -> int:
        """P is at most 2^SHIFT where the maximum is up to date, and 2^8 where it is not; e4m3 ends at 448."""
        return 8 - self.LAZY

    @property
    def WEIGHT(self) -> float:
        """P of a key whose score is the maximum: what a given state, which counts as one key, weighs."""
        return 2.0**self.SHIFT


# (D, MASK) -> tile; measured rows: docs/results/fp8.md.
TABLE: dict[tuple[int, int], Fp8Config] = {
    (D, mask): Fp8Config(D, 128, 128, STAGES=4, K_LATE=True, TWO_LEVEL=True)
    for D in (64, 128)
    for mask in (FULL, CAUSAL, INTERVALS)
}


def variant(tile: Fp8Config, *, into: bool, wide: bool, **call: Any) -> Fp8Config:
    """The table's tile made ready for one call; as `configs.variant`."""
    out = OUT_REGISTERS if wide else OUT_SHARED
    return replace(tile, INTO=into, OUT=out, **call)
