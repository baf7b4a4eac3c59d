"""The forward's benchmark cases: shapes and masks by name, and their tensors."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ringfa3_kernels.types import Visible

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One shape and mask.

    Args:
        mask: "full", "causal", "intervals" (causal said by row intervals), "window4K" (causal, that many keys),
            "documents" (packed, causal inside, lengths drawn at random).
        D, Hq, Hkv, S, B: sizes; queries and keys are as long as each other.
        state: continues a Partial in place (into=) and keeps fp32.
        dtype: "bf16" or "fp16".
    """

    mask: str
    D: int
    Hq: int
    Hkv: int
    S: int
    B: int
    state: bool = False
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """Tokens in the order that all results share."""
        into = ["into"] if self.state else []
        return " ".join(
            ["fwd", self.mask, *into, f"D{self.D}", f"H{self.Hq}:{self.Hkv}", f"S{self.S // 1024}K", "W1", self.dtype]
        )

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, random normal."""
        make = torch.randn if device == "cuda" else torch.empty
        return tuple(  # type: ignore[return-value]
            make(self.B, self.S, h, self.D, device=device, dtype=DTYPES[self.dtype])
            for h in (self.Hq, self.Hkv, self.Hkv)
        )

    def visible(self, device: str) -> Visible:
        """The mask as the kernel takes it."""
        if self.mask == "full":
            return Visible.full(self.S, self.S, device)
        causal = Visible.causal(self.S, self.S, device)
        if self.mask == "causal":
            return causal
        if self.mask.startswith("window"):
            return Visible((causal.hi - int(self.mask[6:-1]) * 1024).clamp(min=0), causal.hi)
        if self.mask == "documents":
            starts = torch.tensor(documents(self.S), dtype=torch.int32).to(device)
            return Visible(starts, causal.hi)
        return Visible(causal.lo, causal.hi)

    def flops(self) -> float:
        """4 per visible pair, head and element of head_dim."""
        if self.mask == "full":
            pairs = self.S * self.S
        elif self.mask.startswith("window") or self.mask == "documents":
            visible = self.visible("cpu")
            pairs = int((visible.hi - visible.lo).sum(dtype=torch.int64))
        else:
            pairs = self.S * self.S // 2
        return 4.0 * pairs * self.B * self.Hq * self.D


def documents(S: int, seed: int = 0) -> list[int]:
    """For every position the start of its document: lengths from a long-tailed distribution, S in all."""
    draw = random.Random(seed)
    starts: list[int] = []
    while len(starts) < S:
        length = min(int(draw.lognormvariate(7.5, 1.0)) + 16, S - len(starts))
        starts += [len(starts)] * length
    return starts


def mean_document(S: int) -> int:
    """Mean length of the documents that `documents` draws."""
    return S // len(set(documents(S)))


TOKENS = 32768  # a batch holds as many sequences as make this


def table(*, quick: bool) -> list[Case]:
    """The cases that docs/results/attend_forward shows; `quick` keeps the shape that tells most of each."""
    K = 1024
    plan: list[tuple[str, int, int, int, tuple[int, ...]]] = []
    for mask in ("full", "causal"):
        plan += [
            (mask, 128, 16, 16, (8 * K,) if quick else (2 * K, 8 * K, 16 * K, 64 * K)),
            (mask, 128, 32, 8, (8 * K,) if quick else (2 * K, 8 * K, 16 * K)),
            (mask, 64, 32, 32, (16 * K,) if quick else (2 * K, 16 * K)),
            (mask, 256, 8, 8, (16 * K,) if quick else (2 * K, 16 * K)),
        ]
    plan.append(("intervals", 128, 16, 16, (8 * K,) if quick else (2 * K, 8 * K, 16 * K, 64 * K)))
    plan += [(mask, 128, 16, 16, (64 * K,)) for mask in ("window4K", "documents")]
    cases = [Case(m, D, Hq, Hkv, S, max(1, TOKENS // S)) for m, D, Hq, Hkv, lengths in plan for S in lengths]
    return cases + [Case(m, 128, 32, 8, 8 * K, 1, state=True) for m in ("full", "causal")]
