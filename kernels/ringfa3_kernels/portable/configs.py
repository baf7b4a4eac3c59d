"""Tile sizes of the portable kernels, one table; kernels/bench/tune_portable.py times the alternatives to a row.

Timed so far: bf16 on an H200, D 64, 128 and 256 (docs/results/portable_tiles.json, by a script that is not kept). The
other rows are not timed; tests/kernels/test_aot.py says how they compile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

# Heads run together while their keys and values fit this much of the L2 cache (50 MB on H200): as in FlashAttention-3.
CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is cut into tiles and compiled.

    Args:
        block_m, block_n: query rows and keys of a tile.
        num_warps, num_stages: as Triton means them.
        tma: the tiles that change from step to step come by TMA, where strides allow.
        maxnreg: register cap per thread, or None.
        precision: tl.dot's input_precision; matters for fp32 inputs only.
        spills: bytes of register spill stores that ptxas may report, the larger of Triton 3.6 and 3.9;
            tests/kernels/test_aot.py holds the kernel to it.
        softcap_spills: the same where a softcap is applied.
        serialised: ptxas may say that it serialises wgmma (C75xx).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    maxnreg: int | None = None
    precision: str = "tf32"
    spills: int = 0
    softcap_spills: int = 0
    serialised: bool = False


# Shared memory that one block may have, bytes, and the compute capability that stands for the family.
SHARED = {"sm90": 232448, "sm80": 166912, "sm86": 101376}
CAPABILITY = {"sm90": (9, 0), "sm80": (8, 0), "sm86": (8, 6)}


def family(capability: tuple[int, int]) -> str:
    """Which configs a compute capability takes: wgmma and TMA (sm90), 163 KB of shared memory (sm80) or 99 (sm86)."""
    if capability == (9, 0):
        return "sm90"
    return "sm86" if capability in ((8, 6), (8, 9)) or capability[0] >= 12 else "sm80"


@cache
def pick(
    kernel: str, head_dim: int, dtype: torch.dtype, capability: tuple[int, int], positional: bool = False
) -> TileConfig:
    """The tile config of "forward", "keys" (dk, dv) or "queries" (dq) for a head_dim, dtype and compute capability.

    Args:
        positional: with ALiBi or dropout, which take registers.
    """
    if dtype == torch.float32:
        return FLOAT32[kernel, padded(head_dim)]
    chosen, width = family(capability), padded(head_dim)
    if positional and (kernel, width, chosen) in POSITIONAL:
        return POSITIONAL[kernel, width, chosen]
    same = chosen == "sm86" and (kernel, width, chosen) not in TABLE
    return TABLE[kernel, width, "sm80" if same else chosen]


def padded(head_dim: int) -> int:
    """Width of the tiles that hold head_dim columns: the next power of two, at least the 16 that tl.dot asks for."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _sm90(block_m: int, block_n: int, num_warps: int, num_stages: int, **more: Any) -> TileConfig:
    return TileConfig(block_m, block_n, num_warps, num_stages, tma=True, **more)


# (kernel, padded head_dim, family) -> tile config for bf16 and fp16. Where sm86 has no entry, sm80's fits it too.
TABLE: dict[tuple[str, int, str], TileConfig] = {
    ("forward", 16, "sm90"): _sm90(128, 64, 4, 3),
    ("forward", 32, "sm90"): _sm90(128, 64, 4, 3),
    ("forward", 64, "sm90"): _sm90(64, 128, 4, 3),
    ("forward", 128, "sm90"): _sm90(64, 64, 4, 3),
    ("forward", 256, "sm90"): _sm90(128, 64, 8, 2, spills=44),
    ("keys", 16, "sm90"): _sm90(64, 64, 4, 3),
    ("keys", 32, "sm90"): _sm90(64, 128, 8, 3),
    ("keys", 64, "sm90"): _sm90(64, 64, 4, 3),
    ("keys", 128, "sm90"): _sm90(64, 64, 4, 2, spills=16, softcap_spills=128),
    ("keys", 256, "sm90"): _sm90(64, 64, 8, 2, spills=148, serialised=True),
    ("queries", 16, "sm90"): _sm90(128, 64, 4, 3),
    ("queries", 32, "sm90"): _sm90(128, 64, 4, 3),
    ("queries", 64, "sm90"): _sm90(64, 64, 4, 3),
    ("queries", 128, "sm90"): _sm90(64, 64, 4, 2),
    ("queries", 256, "sm90"): _sm90(64, 64, 4, 2),
    ("forward", 16, "sm80"): TileConfig(128, 64, 4, 3),
    ("forward", 32, "sm80"): TileConfig(128, 64, 4, 3),
    ("forward", 64, "sm80"): TileConfig(128, 64, 4, 3),
    ("forward", 128, "sm80"): TileConfig(128, 64, 8, 3),
    ("forward", 128, "sm86"): TileConfig(128, 64, 8, 2),
    ("forward", 256, "sm80"): TileConfig(64, 64, 8, 2),
    ("forward", 256, "sm86"): TileConfig(64, 32, 4, 2, spills=4),
    ("keys", 16, "sm80"): TileConfig(64, 64, 4, 2),
    ("keys", 32, "sm80"): TileConfig(64, 64, 4, 2),
    ("keys", 64, "sm80"): TileConfig(32, 128, 8, 2),
    ("keys", 128, "sm80"): TileConfig(64, 64, 8, 2),
    ("keys", 256, "sm80"): TileConfig(32, 32, 8, 2),
    ("queries", 16, "sm80"): TileConfig(128, 64, 4, 2),
    ("queries", 32, "sm80"): TileConfig(128, 64, 4, 2, spills=4),
    ("queries", 64, "sm80"): TileConfig(128, 64, 8, 2, spills=4),
    ("queries", 128, "sm80"): TileConfig(64, 64, 4, 2),
    ("queries", 256, "sm80"): TileConfig(64, 32, 8, 2),
    ("queries", 256, "sm86"): TileConfig(64, 16, 8, 2),
}


# Where the table's tiles would spill with ALiBi or dropout (up to 1,488 bytes at D 64 and 128). Not timed.
POSITIONAL: dict[tuple[str, int, str], TileConfig] = {
    ("forward", 64, "sm90"): _sm90(64, 64, 4, 3),
    ("keys", 128, "sm90"): _sm90(16, 64, 4, 2),
    ("forward", 64, "sm80"): TileConfig(128, 64, 8, 3),
    ("queries", 128, "sm80"): TileConfig(64, 64, 8, 2),
}


# On the CPU: large enough that few programs are interpreted, small enough that small tests have inner and edge tiles.
INTERPRETED = TileConfig(64, 32, 4, 1, precision="ieee")


def _ieee(block_m: int, block_n: int, num_warps: int, num_stages: int = 2, **more: Any) -> TileConfig:
    return TileConfig(block_m, block_n, num_warps, num_stages, precision="ieee", **more)


# (kernel, padded head_dim) -> tile config for fp32, any device: fp32 FMAs, in small tiles because Triton unrolls them
FLOAT32: dict[tuple[str, int], TileConfig] = {
    ("forward", 16): _ieee(32, 32, 4),
    ("forward", 32): _ieee(32, 32, 4),
    ("forward", 64): _ieee(32, 32, 4, spills=4),
    ("forward", 128): _ieee(32, 32, 4, spills=32),
    ("forward", 256): _ieee(16, 16, 8),
    ("keys", 16): _ieee(32, 32, 4),
    ("keys", 32): _ieee(32, 32, 4),
    ("keys", 64): _ieee(32, 32, 8, spills=8),
    ("keys", 128): _ieee(16, 32, 8),
    ("keys", 256): _ieee(16, 16, 8),
    ("queries", 16): _ieee(32, 32, 4),
    ("queries", 32): _ieee(32, 32, 4),
    ("queries", 64): _ieee(32, 32, 4),
    ("queries", 128): _ieee(32, 16, 8),
    ("queries", 256): _ieee(16, 16, 8),
}


@dataclass(frozen=True)
class DecodeConfig:
    """How decode is cut up and compiled.

    Args:
        block_m: rows of a tile at most: query rows times heads of a group; smaller where there are fewer.
        block_n: keys of a tile.
        num_warps, num_stages: as Triton means them.
        programs: that a multiprocessor is to have, all resident at once (shared memory admits them).
        maxnreg: register cap per thread, or None.
        precision: tl.dot's input_precision; matters for fp32 inputs only.
        spills: bytes of register spill stores that ptxas may report, as in TileConfig.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int
    maxnreg: int | None = None
    precision: str = "tf32"
    spills: int = 0


def pick_decode(head_dim: int, dtype: torch.dtype, capability: tuple[int, int], rows: int) -> DecodeConfig:
    """The config of decode for a head_dim, dtype and compute capability; `rows` are query rows times heads of a group.

    Above 16 rows a tile needs more registers: two programs then share a multiprocessor, without a cap.
    """
    if dtype == torch.float32:
        return DECODE_FLOAT32[padded(head_dim)]
    config = DECODE[padded(head_dim), "sm90" if family(capability) == "sm90" else "sm86"]
    return config if rows <= 16 else replace(config, programs=2, maxnreg=None)


# (padded head_dim, family) -> config for bf16 and fp16; sm86's stand for sm80 too. None is timed yet: they are sized
# for H200, where 4.3 TB/s x 1 us of latency asks for 33 KB of loads in flight on each multiprocessor. Three programs
# with two tiles of K and V of 16 KB each (72 KB of shared memory) have 96 to 192 KB, and hide each other's beginnings
# and ends. 168 registers let three programs of 4 warps in; what spills does so outside the loop over keys.
# kernels/bench/bench_decode.py times the alternatives.
DECODE: dict[tuple[int, str], DecodeConfig] = {
    (16, "sm90"): DecodeConfig(64, 64, 4, 4, 3, maxnreg=168),
    (32, "sm90"): DecodeConfig(64, 128, 4, 4, 4, maxnreg=128),
    (64, "sm90"): DecodeConfig(64, 128, 4, 3, 3, maxnreg=168, spills=4),
    (128, "sm90"): DecodeConfig(64, 64, 4, 3, 3, maxnreg=168, spills=16),
    (256, "sm90"): DecodeConfig(32, 32, 4, 3, 3, maxnreg=168, spills=32),
    (16, "sm86"): DecodeConfig(64, 64, 4, 3, 4, maxnreg=128),
    (32, "sm86"): DecodeConfig(64, 64, 4, 3, 4, maxnreg=128),
    (64, "sm86"): DecodeConfig(64, 64, 4, 3, 2),
    (128, "sm86"): DecodeConfig(32, 64, 4, 2, 2),
    (256, "sm86"): DecodeConfig(32, 32, 4, 2, 2, spills=16),
}

# padded head_dim -> config for fp32, any device
DECODE_FLOAT32: dict[int, DecodeConfig] = {
    16: DecodeConfig(16, 64, 4, 3, 4, precision="ieee"),
    32: DecodeConfig(16, 64, 4, 3, 4, precision="ieee"),
    64: DecodeConfig(16, 32, 4, 3, 4, precision="ieee"),
    128: DecodeConfig(16, 16, 4, 3, 2, precision="ieee", spills=8),
    256: DecodeConfig(16, 16, 4, 2, 2, precision="ieee"),
}

# On the CPU: tiles small enough that small tests have many, and larger than the smallest pages
DECODE_INTERPRETED = DecodeConfig(32, 32, 4, 1, 2, precision="ieee")
