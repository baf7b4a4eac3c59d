"""What is measured: a Sweep (the command line's options as one value) and its Cases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ringfa3.mask import Mask

DIRECTIONS = ("fwd", "fwd+bwd")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PEERS = ("sdpa-math", "sdpa-flash", "sdpa-cudnn", "fa3", "context-parallel", "context-parallel-cudnn")
RING_PEERS = (
    "context-parallel-fa3",
    "context-parallel-fa3-alltoall",
    "context-parallel-cudnn",
    "context-parallel",
    "ring-flash-attn-zigzag",
    "ring-flash-attn-stripe",
    "yunchang-zigzag",
    "yunchang-ulysses",
)
PACKED = (256, 32 << 10)  # shortest and longest document of mask "packed"
DOCUMENTS = 16  # packed documents a sequence of mask "documents" is made of


@dataclass(frozen=True)
class Sweep:
    """Everything a rank has to know to measure; see `ringfa3 bench attention --help` for the fields."""

    seqlens: tuple[int, ...]
    worlds: tuple[int, ...]
    Hq: int
    Hkv: int
    D: int
    dtype: str
    mask: str
    directions: tuple[str, ...]
    layout: str
    transport: str
    impl: str
    peers: tuple[str, ...]
    device: str
    seconds: float
    seed: int

    def cases(self, world: int) -> Iterator[Case]:
        """The cases of one world, short sequences first."""
        for seqlen in self.seqlens:
            for direction in self.directions:
                yield Case(direction, self.mask, self.D, self.Hq, self.Hkv, seqlen, world, self.dtype)


@dataclass(frozen=True)
class Case:
    """One shape, mask and direction on one world."""

    direction: str
    mask: str
    D: int
    Hq: int
    Hkv: int
    seqlen: int
    world: int
    dtype: str

    @property
    def name(self) -> str:
        """As docs/results writes it: "fwd causal D128 H32:8 S16K W2 bf16"."""
        return (
            f"{self.direction} {mask_token(self.mask)} D{self.D} H{self.Hq}:{self.Hkv} "
            f"S{format_size(self.seqlen)} W{self.world} {self.dtype}"
        )

    @cached_property
    def visible(self) -> Mask:
        """The mask as ringfa3 knows it."""
        from ringfa3.mask import Mask

        kind, _, value = self.mask.partition("=")
        if kind == "window":
            return Mask(causal=True, window=(parse_size(value) - 1, 0))
        if kind == "documents":
            return Mask(causal=True, documents=document_lengths(self.seqlen, int(value or DOCUMENTS)))
        if kind == "packed":
            return Mask(causal=True, documents=packed_lengths(self.seqlen, int(value or 0)))
        return Mask(causal=kind == "causal")

    @property
    def flops(self) -> float:
        """Operations of all ranks together: 4 a visible pair, head and head_dim forward; 2.5 times that backward."""
        forward = 4.0 * self.visible.pairs(self.seqlen) * self.Hq * self.D
        return forward * (3.5 if self.direction == "fwd+bwd" else 1.0)


def document_lengths(seqlen: int, documents: int) -> tuple[int, ...]:
    """Lengths of packed documents, uneven as real ones are (log-normal), always the same for the same arguments."""
    documents = min(documents, seqlen)
    weights = np.random.default_rng(documents).lognormal(0.0, 0.8, documents)
    edges = np.rint(np.cumsum(weights) / weights.sum() * seqlen).astype(int)
    return tuple(int(x) for x in np.diff(edges, prepend=0))


def packed_lengths(seqlen: int, seed: int) -> tuple[int, ...]:
    """Lengths of packed documents drawn log-uniformly until the sequence is full, the last one cut short.

    From 256 to 32K tokens; in a sequence below 64K, from at most a 64th of it to half of it.
    """
    random, lengths, left = np.random.default_rng(seed), [], seqlen
    shortest, longest = min(PACKED[0], max(1, seqlen // 64)), min(PACKED[1], max(1, seqlen // 2))
    while left:
        drawn = int(np.exp(random.uniform(np.log(shortest), np.log(longest))).round())
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return tuple(lengths)


def parse_size(text: str, option: str = "size") -> int:
    """ "1K" -> 1024, "1M" -> 1048576, "1000" -> 1000.

    Args:
        option: where it was given, for errors.

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"(\d+)([KkMm]?)", text.strip())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{option}: wanted a number of tokens such as 4096, 4K or 1M, got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2].upper()]


def format_size(n: int) -> str:
    """1024 -> "1K", 1048576 -> "1M", 1000 -> "1000"."""
    for shift, unit in ((20, "M"), (10, "K")):
        if n >= 1 << shift and n % (1 << shift) == 0:
            return f"{n >> shift}{unit}"
    return str(n)


def parse_mask(text: str) -> str:
    """The mask option, checked: "causal", "full", "window=4096", "documents[=16]" or "packed[=SEED]".

    Raises:
        ValueError: no mask has that name or its number is wrong.
    """
    kind, equals, value = text.partition("=")
    if kind == "window" and equals:
        return f"window={parse_size(value, '--mask window=')}"
    if text in ("causal", "full", "documents", "packed") or (
        kind == "documents" and value.isdigit() and int(value) > 0
    ):
        return text
    if kind == "packed" and value.isdigit():
        return text
    raise ValueError(
        f"--mask: wanted causal, full, window=TOKENS, documents, documents=COUNT, packed or packed=SEED, got {text!r}"
    )


def mask_token(mask: str) -> str:
    """The mask in a case's name: "window=4096" -> "window4K"."""
    kind, _, value = mask.partition("=")
    return kind + (format_size(int(value)) if value else "")
