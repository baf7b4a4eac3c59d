"""Tile configurations of the Hopper forward, one table; `kernels/bench/tune.py` times the alternatives to each row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

FULL, CAUSAL, INTERVALS = 0, 1, 2  # Config.MASK
NO_CAP, CAP_FAST, CAP_EXACT = 0, 1, 2  # Config.SOFTCAP
OUT_REGISTERS, OUT_SHARED, OUT_ALIAS, OUT_DIRECT = 0, 1, 2, 3  # Config.OUT


@dataclass(frozen=True)
class Config:
    """Everything the forward kernel is compiled for: the tile (from the table) and the call's variant.

    Args:
        D: head_dim rounded up to 64, 128 or 256; TMA fills the rest with zeros.
        BM, BN: query rows and keys of a tile.
        NWG: consumer warpgroups; each has BM / NWG rows.
        STAGES: key/value blocks in flight.
        QB: query buffers; 2 load the next tile's queries under this one's last keys.
        CONSUMER_REGS, PRODUCER_REGS: setmaxnreg. Past 504 in all (NWG 2) or 512 (NWG 3) it is silently dropped.
        V_LATE: wait for V between the issue of QK and of PV, not before both.
        LAZY_RESCALE: leave the running maximum (and O) alone while it is at most 2^8 too small.
        PINGPONG: warpgroups issue their matrix products in turns.
        DIRECT: where shared memory has no room for 16-bit output, that leaves from registers.
        K_LATE: give K's buffer back only after the row maximum: where ptxas would hoist the PV wait above it.
        MASK: FULL, CAUSAL (bounds from the row number, Sq <= Sk) or INTERVALS (lo and hi read per row).
        ALIGNED: causal whose diagonal lies inside the first block visited: no other block is masked.
        TAIL: full, and Sk is no multiple of BN.
        SOFTCAP: NO_CAP, CAP_FAST or CAP_EXACT.
        INTO: the softmax continues from given fp32 out and lse.
        PREFETCH: with INTO, that out comes through shared memory, loaded with the queries (does not fit at D 256).
        LIVE: visit only the row tiles that see a key; with INTO the others' state in memory stays as it is.
        OUT: OUT_REGISTERS (fp32), OUT_SHARED (16 bits, own buffer), OUT_ALIAS (16 bits, through Q's buffer) or
            OUT_DIRECT (16 bits, from registers).
        PACK: query heads folded into the rows of a tile (a power of two, at least the GQA group), or 1.
        EVEN: head_dim is D itself.
    """

    D: int
    BM: int
    BN: int
    NWG: int = 2
    STAGES: int = 2
    QB: int = 2
    CONSUMER_REGS: int = 240
    PRODUCER_REGS: int = 24
    V_LATE: bool = False
    LAZY_RESCALE: bool = False
    PINGPONG: bool = False
    K_LATE: bool = False
    DIRECT: bool = False
    MASK: int = FULL
    ALIGNED: bool = False
    TAIL: bool = False
    SOFTCAP: int = NO_CAP
    INTO: bool = False
    PREFETCH: bool = False
    LIVE: bool = False
    OUT: int = OUT_SHARED
    PACK: int = 1
    EVEN: bool = True

    @property
    def WM(self) -> int:
        """Rows of one warpgroup."""
        return self.BM // self.NWG

    @property
    def THREADS(self) -> int:
        """Threads that meet at a "buffer free" barrier: the consumers and the producer warp."""
        return self.NWG * 128 + 32

    @property
    def BRANCH(self) -> bool:
        """Blocks past the first may need the mask: one loop with a branch (two loops cost 32 PRMT a step)."""
        return self.MASK != FULL and not self.ALIGNED

    @property
    def FILL(self) -> bool:
        """Rows of tiles that are not visited must be written all the same."""
        return self.LIVE and not self.INTO

    @property
    def PACKED(self) -> bool:
        """P goes round the key loop as int32, two numbers in each.

        As 16-bit numbers ptxas packs them again in every step (32 PRMT of 450 instructions) in some of D 64's three
        copies of the loop. With INTO the ptxas of Triton 3.9 serialises wgmma over it.
        """
        return self.D == 64 and not self.INTO

    @property
    def GUARD(self) -> bool:
        """A whole block may be hidden from a row: keep its maximum finite."""
        return self.BRANCH


# (D, MASK) -> tile. Printed by kernels/bench/tune.py; what they reach: docs/results/attend_forward.md.
TABLE: dict[tuple[int, int], Config] = {
    (64, FULL): Config(64, 192, 128, NWG=3, STAGES=3, CONSUMER_REGS=160, LAZY_RESCALE=True, K_LATE=True),
    (64, CAUSAL): Config(64, 192, 128, NWG=3, CONSUMER_REGS=160, K_LATE=True),
    (64, INTERVALS): Config(64, 192, 128, NWG=3, CONSUMER_REGS=160, K_LATE=True),
    (128, FULL): Config(128, 128, 128, V_LATE=True),
    (128, CAUSAL): Config(128, 128, 128, V_LATE=True),
    (128, INTERVALS): Config(128, 128, 128, V_LATE=True),
    (256, FULL): Config(256, 128, 64, QB=1, LAZY_RESCALE=True, PINGPONG=True, DIRECT=True),
    (256, CAUSAL): Config(256, 128, 64, QB=1, LAZY_RESCALE=True, PINGPONG=True, K_LATE=True, DIRECT=True),
    (256, INTERVALS): Config(256, 128, 64, QB=1, LAZY_RESCALE=True, PINGPONG=True, K_LATE=True, DIRECT=True),
}
# Causal D 64 up to this many keys: a diagonal through 128 rows wastes less than one through 192 (+7% at 2K, -4% at 8K).
SHORT = 4096
SHORT_CAUSAL_64 = Config(64, 128, 128, V_LATE=True)


def pick(D: int, mask: int, Sk: int) -> Config:
    """The table's tile for a padded head_dim, a mask and a number of keys."""
    return SHORT_CAUSAL_64 if (D, mask) == (64, CAUSAL) and Sk <= SHORT else TABLE[D, mask]


def padded_head_dim(D: int) -> int:
    """The tile's head_dim: 64, 128 or 256."""
    return 64 if D <= 64 else 128 if D <= 128 else 256


def packed_heads(group: int, Sq: int, BM: int) -> int:
    """How many query heads a tile's rows should hold: 1, or the GQA group rounded up to a power of two.

    Folding pays where it saves row tiles: short queries whose heads would each leave most of a tile empty.
    """
    pack = 1 << (group - 1).bit_length()
    if pack == 1 or pack > 64:
        return 1
    tiles, folded = group * -(-Sq // BM), -(-Sq * pack // BM)
    return pack if folded < 0.9 * tiles else 1


def variant(tile: Config, *, into: bool, wide: bool, **call: Any) -> Config:
    """The table's tile made ready for one call: where the output leaves and where the state comes from.

    Args:
        into: the call continues a Partial.
        wide: out is fp32 (leaves from registers), else 16 bits.
        call: the remaining fields that a call decides: MASK, ALIGNED, TAIL, SOFTCAP, LIVE, PACK, EVEN.
    """
    small = tile.D <= 64
    # shared memory is full: at D 256 with Q, K and V alone, at D 128 with the prefetched state besides
    roomy = small or (tile.D == 128 and not into)
    direct = tile.DIRECT and not into
    out = OUT_REGISTERS if wide else OUT_SHARED if roomy else OUT_DIRECT if direct else OUT_ALIAS
    prefetch = into and tile.D <= 128
    buffers = 1 if out == OUT_ALIAS or (prefetch and not small) else tile.QB
    return replace(tile, INTO=into, PREFETCH=prefetch, OUT=out, QB=buffers, **call)


@dataclass(frozen=True)
class BackwardConfig:
    """Everything the backward kernel is compiled for: the tile (from the table) and the call's variant.

    Args:
        D: head_dim rounded up to 64, 128 or 256; TMA fills the rest with zeros.
        BM, BN: query rows of a block, keys of a tile.
        Q_STAGES, DO_STAGES: blocks of queries and of dout in flight.
        SPLIT_D: both warpgroups hold all keys and half of head_dim of dK and dV (D 256), instead of half the keys each.
        WRITER: a warp of its own sends dQ to memory and waits for it (PARTS 1).
        PARTS: dQ leaves in so many parts a step (1 or 2), through one buffer.
        DQ: compute and add dQ; without it the launch gives dK and dV alone.
        CONSUMER_REGS, PRODUCER_REGS: setmaxnreg; past 504 in all it is silently dropped.
        MASK: FULL, CAUSAL (bounds from the row number) or INTERVALS (query bounds read per key).
        TAIL: full, and Sk is no multiple of BN.
        SOFTCAP: NO_CAP, CAP_FAST or CAP_EXACT.
        PRESCALE: dS carries the scale, at no cost, so that dQ and dK need none; not for fp16, whose range is short.
        WIDE: dK and dV leave as fp32, else in the inputs' dtype.
        ACCUMULATE: with WIDE, they are added to what is there.
    """

    D: int
    BM: int
    BN: int = 128
    Q_STAGES: int = 2
    DO_STAGES: int = 2
    SPLIT_D: bool = False
    WRITER: bool = False
    PARTS: int = 1
    DQ: bool = True
    CONSUMER_REGS: int = 240
    PRODUCER_REGS: int = 24
    MASK: int = FULL
    TAIL: bool = False
    SOFTCAP: int = NO_CAP
    PRESCALE: bool = True
    WIDE: bool = False
    ACCUMULATE: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for what the kernel's barriers and buffers are not made for."""
        if max(self.Q_STAGES, self.DO_STAGES) > 2 or (self.WRITER and self.PARTS > 1):
            raise ValueError(f"backward tile: wanted at most 2 stages, and PARTS 1 with WRITER, got {self}")
        if self.ROLES and self.Q_STAGES < 2:  # its scores are a block ahead
            raise ValueError(f"backward tile: wanted 2 stages of queries for SPLIT_D without softcap, got {self}")

    @property
    def ROLES(self) -> bool:
        """With SPLIT_D, one warpgroup computes P of all rows and the other dS, not each both of half the rows.

        Not with a softcap: dS then needs more than P.
        """
        return self.SPLIT_D and not self.SOFTCAP

    @property
    def EARLY(self) -> bool:
        """lse and delta are loaded ahead of the waits for what they are used with; those of 128 rows would spill.

        Loads from shared memory take hundreds of cycles while products read it.
        """
        return self.BM == 64

    @property
    def TURN(self) -> bool:
        """dQ is computed transposed, whose stores to shared memory meet no bank twice (those of dQ do).

        Its columns are then rows of wgmma, 64 at the least: a share of 32 (BM 64 at D 64, with a softcap) is not.
        """
        return self.QD >= 64

    @property
    def WN(self) -> int:
        """Keys whose dK and dV a warpgroup holds."""
        return self.BN if self.SPLIT_D else self.BN // 2

    @property
    def WD(self) -> int:
        """Columns of head_dim whose dK and dV a warpgroup holds."""
        return self.D // 2 if self.SPLIT_D else self.D

    @property
    def SM(self) -> int:
        """Query rows of the block of S^T that a warpgroup computes."""
        return self.BM // 2 if self.SPLIT_D and not self.ROLES else self.BM

    @property
    def QM(self) -> int:
        """Query rows of a warpgroup's share of dQ: half of them where that is a whole wgmma, else half the columns."""
        return self.BM // 2 if self.BM > 64 else self.BM

    @property
    def QD(self) -> int:
        """Columns of a warpgroup's share of dQ."""
        return self.D if self.BM > 64 else self.D // 2

    @property
    def DS_STAGES(self) -> int:
        """Buffers of dS: with SPLIT_D the consumers meet over P between a step's reads and the next step's stores."""
        return 1 if self.SPLIT_D else 2

    @property
    def P_STAGES(self) -> int:
        """Buffers of P; with ROLES one barrier more says that it is free."""
        return 1 if self.ROLES else 2

    @property
    def QR(self) -> int:
        """Rows of a part of dQ that leaves at a time: all warps hold all rows of dQ^T, and each its own columns."""
        return self.QM // self.PARTS

    @property
    def BRANCH(self) -> bool:
        """Some blocks need the mask."""
        return self.MASK != FULL or self.TAIL


# (D, MASK) -> tile of the backward; kernels/bench/bench_backward.py sweep times the alternatives to each row.
BACKWARD_TABLE: dict[tuple[int, int], BackwardConfig] = {
    **{(64, mask): BackwardConfig(64, 128, WRITER=mask != FULL) for mask in (FULL, CAUSAL, INTERVALS)},
    **{(128, mask): BackwardConfig(128, 64, WRITER=mask != FULL) for mask in (FULL, CAUSAL, INTERVALS)},
    **{
        (256, mask): BackwardConfig(256, 64, 64, DO_STAGES=1, SPLIT_D=True, PARTS=2)
        for mask in (FULL, CAUSAL, INTERVALS)
    },
}
