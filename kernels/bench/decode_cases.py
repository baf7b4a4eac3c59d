"""Decode's benchmark cases: shapes by name, their paged caches, and the answer in fp64 that ours is held to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ringfa3_kernels import Partial, Visible, paged

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NOISE = 2e-6  # of the largest value: where plain PyTorch happens to be exact


@dataclass(frozen=True)
class Case:
    """One batch that decodes.

    Args:
        S: keys of the longest sequence; `ragged`: the others have S / B more each, from S / B.
        Sq: new tokens a sequence.
        window: keys that a row sees at most; None: all.
    """

    B: int
    S: int
    Hq: int = 32
    Hkv: int = 8
    D: int = 128
    Sq: int = 1
    page: int = 64
    window: int | None = None
    softcap: float = 0.0
    ragged: bool = False
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """Tokens in the order that all results share; what is unusual comes last."""
        size = f"{self.S // 1024}K" if self.S % 1024 == 0 else str(self.S)
        mask = "full" if self.window is None else f"window{self.window}"
        words = ["decode", mask, f"D{self.D}", f"H{self.Hq}:{self.Hkv}", f"S{size}", f"B{self.B}", "W1", self.dtype]
        words += [f"Q{self.Sq}"] * (self.Sq > 1) + [f"page{self.page}"] * (self.page != 64)
        return " ".join(words + ["softcap"] * (self.softcap != 0) + ["ragged"] * self.ragged)

    def lengths(self) -> list[int]:
        """Keys of each sequence."""
        return [self.S * (b + 1) // self.B for b in range(self.B)] if self.ragged else [self.S] * self.B

    def visible(self, device: str = "cuda") -> Visible:
        """Rows are the last of their sequence, each sees up to itself."""
        ends = torch.tensor(self.lengths())[:, None] - self.Sq + 1 + torch.arange(self.Sq)
        hi = ends.clamp(min=0).int().to(device)
        return Visible(torch.zeros_like(hi) if self.window is None else (hi - self.window).clamp(min=0), hi)

    def nbytes(self) -> int:
        """Bytes of keys and values that must be read."""
        seen = self.visible("cpu")
        keys = int((seen.hi.amax(1) - seen.lo.amin(1)).sum(dtype=torch.int64))
        return 2 * keys * self.Hkv * self.D * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Cache:
    """A case's tensors; pages lie in random order, and keys that no row sees hold NaN, values infinity."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    visible: Visible

    @classmethod
    def draw(cls, case: Case) -> Cache:
        """Normal numbers."""
        dtype, blocks = DTYPES[case.dtype], -(-case.S // case.page)
        P = case.B * blocks
        k, v = (torch.randn(P, case.page, case.Hkv, case.D, device="cuda", dtype=dtype) for _ in "kv")
        q = torch.randn(case.B, case.Sq, case.Hq, case.D, device="cuda", dtype=dtype)
        table = torch.randperm(P, device="cuda").view(case.B, blocks).int()
        visible = case.visible()
        for b, (start, stop) in enumerate(paged.hulls(visible, case.B)):
            for x, bad in ((k, torch.nan), (v, torch.inf)):
                _poison(x, table[b], start, stop, bad)
        return cls(case, q, k, v, table, visible)

    def answer(self, b: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Sequence b by the definition, in `dtype` with the softmax in fp32 or wider: out [Sq, Hq, D], lse [Hq, Sq]."""
        case, wide = self.case, torch.promote_types(dtype, torch.float32)
        start, stop = paged.hulls(self.visible, case.B)[b]
        lo, hi = paged.within(self.visible, b, start, stop)
        j = torch.arange(stop - start, device="cuda")
        mask = ((j >= lo[:, None]) & (j < hi[:, None])).repeat_interleave(case.Hq // case.Hkv, 0)
        outs, lses = [], []
        for head in range(case.Hkv):  # one at a time: a head of 512K keys takes 0.5 GB in fp64
            k, v = (
                paged.read(x[:, :, head : head + 1], self.table[b], start, stop)[:, 0].to(dtype)
                for x in (self.k, self.v)
            )
            q = self.q[b].unflatten(1, (case.Hkv, -1))[:, head].flatten(0, 1).to(dtype)
            s = (q @ k.T).to(wide) * case.D**-0.5
            s = (case.softcap * torch.tanh(s / case.softcap) if case.softcap else s).masked_fill(~mask, -torch.inf)
            outs.append((s.softmax(-1).to(dtype) @ v).unflatten(0, (case.Sq, -1)))
            lses.append(s.logsumexp(-1).unflatten(0, (case.Sq, -1)))
        return torch.cat(outs, 1), torch.cat(lses, 1).T

    def wrong(self, found: Partial) -> str | None:
        """How the first and last sequences of an answer break the error rule, or None if they keep it."""
        for b in sorted({0, self.case.B - 1}):
            exact, plain = self.answer(b, torch.float64), self.answer(b, self.q.dtype)
            for name, got, x, y in zip(("out", "lse"), (found.out[b], found.lse[b]), exact, plain, strict=True):
                ours, theirs = (_rms(z.double() - x) for z in (got, y))
                if not ours <= 2 * theirs + NOISE * max(1.0, float(x.abs().max())):
                    return f"sequence {b}: {name} error {ours:.2e}, plain PyTorch's {theirs:.2e}"
        return None


def _poison(x: Tensor, table: Tensor, start: int, stop: int, value: float) -> None:
    page = x.shape[1]
    for block in range(table.shape[0]):
        first = block * page
        if first < start or first + page > stop:
            keys = torch.arange(first, first + page, device=x.device)
            x[table[block].long(), (keys < start) | (keys >= stop)] = value


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


K = 1024


def table(*, quick: bool) -> list[Case]:
    """What is timed. The first four are those that the kernel is judged by."""
    judged = [Case(B, S) for S, B in product((64 * K, 512 * K), (1, 16))]
    if quick:
        return judged[:2]
    return [
        *judged,
        *(Case(B, S) for S, B in product((4 * K, 16 * K), (1, 16, 128)) if S * B <= 1 << 21),
        *(Case(B, 64 * K, Sq=Sq) for Sq, B in product((4, 8), (1, 16))),
        *(Case(16, 64 * K, page=page) for page in (16, 256)),
        *(Case(16, 64 * K, Hq=Hq, Hkv=Hkv) for Hq, Hkv in ((8, 8), (64, 8), (32, 1))),
        *(Case(16, 64 * K, D=D, Hq=Hq, Hkv=Hkv) for D, Hq, Hkv in ((64, 32, 8), (256, 16, 8))),
        Case(16, 64 * K, ragged=True),
        Case(16, 64 * K, window=4 * K),
        Case(16, 64 * K, softcap=30.0),
        Case(16, 64 * K, dtype="fp16"),
    ]


def checks() -> list[Case]:
    """Small cases with edges, for what the timed ones do not show."""
    return [
        *(Case(3, 3000 + D, D=D, page=page, ragged=True) for D, page in product((64, 72, 128, 256), (16, 64, 256))),
        *(Case(2, 2500, Sq=Sq, Hq=Hq, Hkv=Hkv) for Sq, (Hq, Hkv) in product((2, 8, 16), ((32, 8), (6, 2), (16, 1)))),
        *(Case(2, 5000, window=w, Sq=3, page=page) for w, page in product((1, 700), (16, 64))),
        Case(2, 2500, softcap=15.0, dtype="fp16"),
        Case(200, 900, Hq=8, Hkv=2, D=64, ragged=True),
    ]
