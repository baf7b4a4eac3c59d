"""The nouns of the kernels: what rows see (Visible) and the state of an online softmax (Partial)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ringfa3_kernels.lasting import lasting

Kind = Literal["full", "causal", "intervals"]
_FAR = 2**31 - 1  # beyond every key


class Unsupported(RuntimeError):
    """A correct call that the named implementation cannot serve; the message says what it lacks."""


@dataclass(frozen=True, eq=False)
class Visible:
    """Row i sees the keys lo[i] <= j < hi[i]; neither bound decreases with i. A row with hi <= lo sees nothing.

    Args:
        lo: int32 [Sq], or [B, Sq] where batch rows differ; local key indices, 0 <= lo.
        hi: int32, same shape and device; hi <= Sk.
        kind: what the intervals amount to, for kernels with a shorter path: "full" (every row sees every
            key), "causal" (lo 0, hi = i + 1 + Sk - Sq clamped to [0, Sk]) or "intervals" (read lo and hi).

    Raises:
        ValueError: wrong kind, dtype, shape or device. That the bounds are sorted, inside [0, Sk] and of that kind is
            the caller's promise on a GPU (checking would synchronise it); `check()` verifies it, and `attend` calls
            that where the bounds are on the CPU.
    """

    lo: Tensor
    hi: Tensor
    kind: Kind = "intervals"
    _tiles: dict[tuple[str | int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _checked: set[int] = field(default_factory=set, init=False, repr=False)  # the Sk that `check` found right

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Visible kind: wanted one of {', '.join(map(repr, get_args(Kind)))}, got {self.kind!r}")
        for name, x in (("lo", self.lo), ("hi", self.hi)):
            if x.dtype != torch.int32:
                raise ValueError(f"Visible {name}: wanted dtype torch.int32, got {x.dtype}")
            if x.ndim not in (1, 2):
                raise ValueError(f"Visible {name}: wanted shape [Sq] or [B, Sq], got {list(x.shape)}")
        if self.lo.shape != self.hi.shape or self.lo.device != self.hi.device:
            raise ValueError(
                f"Visible hi: wanted the shape and device of lo, {list(self.lo.shape)} on {self.lo.device}, "
                f"got {list(self.hi.shape)} on {self.hi.device}"
            )

    @classmethod
    def full(cls, Sq: int, Sk: int, device: torch.device | str | None = None) -> Visible:
        """Every row sees every key."""
        lo = torch.zeros(Sq, dtype=torch.int32, device=device)
        return cls(lo, torch.full_like(lo, Sk), "full")

    @classmethod
    def causal(cls, Sq: int, Sk: int, device: torch.device | str | None = None) -> Visible:
        """Row i sees keys up to i + Sk - Sq: bottom-right aligned, as flash-attn's; rows before the first see none."""
        lo = torch.zeros(Sq, dtype=torch.int32, device=device)
        hi = torch.arange(Sk - Sq + 1, Sk + 1, dtype=torch.int32, device=device).clamp_(min=0)
        return cls(lo, hi, "causal")

    @property
    def device(self) -> torch.device:
        return self.lo.device

    @property
    def rows(self) -> int:
        """Sq, the number of query rows."""
        return self.lo.shape[-1]

    def to(self, device: torch.device | str) -> Visible:
        """The same intervals on another device."""
        return Visible(self.lo.to(device), self.hi.to(device), self.kind)

    def check(self, Sk: int) -> None:
        """Raise ValueError unless the bounds are sorted, inside [0, Sk] and as `kind` says. Synchronises the device."""
        if Sk in self._checked:
            return
        for name, x in (("lo", self.lo), ("hi", self.hi)):
            if x.numel() and bool((x.diff(dim=-1) < 0).any()):
                raise ValueError(f"Visible {name}: wanted non-decreasing bounds, got one that moves left")
            if x.numel() and bool(((x < 0) | (x > Sk)).any()):
                raise ValueError(f"Visible {name}: wanted values in [0, {Sk}], got {int(x.min())}..{int(x.max())}")
        if self.kind != "intervals":
            wanted = (Visible.full if self.kind == "full" else Visible.causal)(self.rows, Sk, self.device)
            if bool((self.lo != wanted.lo).any()) or bool((self.hi != wanted.hi).any()):
                raise ValueError(f"Visible kind: wanted 'intervals' for bounds not {self.kind} over {Sk} keys")
        self._checked.add(Sk)

    def mask(self, Sk: int) -> Tensor:
        """bool [Sq, Sk] or [B, Sq, Sk], True where visible. For tests: it is quadratic."""
        j = torch.arange(Sk, dtype=torch.int32, device=self.device)
        return (j >= self.lo[..., None]) & (j < self.hi[..., None])

    def key_tiles(self, block_m: int, block_n: int) -> Tensor:
        """Key blocks that each tile of rows visits, computed on the device once and kept.

        Returns:
            int32 [B or 1, ceil(Sq / block_m), 4]: begin, unmasked begin, unmasked end, end, in blocks of block_n keys.
            begin <= unmasked begin <= unmasked end <= end; blocks outside [unmasked begin, unmasked end) need the mask.
            begin == end where a tile sees nothing.
        """
        return self.kept(("key", block_m, block_n), lambda: self._key_tiles(block_m, block_n))

    def query_tiles(self, block_m: int, block_n: int, Sk: int) -> Tensor:
        """Row blocks that see each tile of keys (the backward's view), computed on the device once and kept.

        Returns:
            int32 [B or 1, ceil(Sk / block_n), 4]: begin, unmasked begin, unmasked end, end, in blocks of block_m rows.
            Ordered as in `key_tiles`. Keys past Sk, in the last tile, do not count: kernels must not store those.
        """
        return self.kept(("query", block_m, block_n, Sk), lambda: self._query_tiles(block_m, block_n, Sk))

    def kept(self, key: tuple[str | int, ...], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` made of these bounds when `key` was first asked for.

        While a CUDA graph is captured, what is not there yet becomes part of the graph and is not kept: its memory is
        the graph's, which writes it anew in every replay. Call once before capturing to compute it once.
        """
        found = self._tiles.get(key)
        if found is None:
            found = lasting(compute, self.device)
            if not (found.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._tiles[key] = found
        return found

    def _key_tiles(self, block_m: int, block_n: int) -> Tensor:
        lo, hi = (torch.atleast_2d(x) for x in (self.lo, self.hi))
        first = torch.arange(0, self.rows, block_m, device=self.device)
        last = (first + block_m - 1).clamp_(max=self.rows - 1)
        # the hull is that of the rows which see something: others may stand anywhere between their neighbours' bounds
        seeing = hi > lo
        begin = _reduced(torch.where(seeing, lo, _FAR), block_m, _FAR).amin(-1) // block_n
        end = (_reduced(torch.where(seeing, hi, 0), block_m, 0).amax(-1) + block_n - 1) // block_n
        begin = torch.minimum(begin, end)
        # an empty row ends the unmasked part by itself: there hi[first] <= hi[i] <= lo[i] <= lo[last]
        full_begin = ((lo[:, last] + block_n - 1) // block_n).clamp(begin, end)
        full_end = (hi[:, first] // block_n).clamp(full_begin, end)
        return torch.stack([begin, full_begin, full_end, end], -1).int().contiguous()

    def _query_tiles(self, block_m: int, block_n: int, Sk: int) -> Tensor:
        lo, hi = (torch.atleast_2d(x).contiguous() for x in (self.lo, self.hi))
        first = torch.arange(0, Sk, block_n, device=self.device, dtype=torch.int32).expand(lo.shape[0], -1).contiguous()
        stop = (first + block_n).clamp_(max=Sk)
        # row i sees a key of [first, stop) iff lo[i] < stop and hi[i] > first; all iff lo[i] <= first and hi[i] >= stop
        row, row_end = torch.searchsorted(hi, first, right=True), torch.searchsorted(lo, stop)
        begin = row // block_m
        end = torch.where(row < row_end, (row_end + block_m - 1) // block_m, begin)
        full_begin = ((torch.searchsorted(hi, stop) + block_m - 1) // block_m).clamp(begin, end)
        full_end = (torch.searchsorted(lo, first, right=True) // block_m).clamp(full_begin, end)
        return torch.stack([begin, full_begin, full_end, end], -1).int().contiguous()


@dataclass(frozen=True, eq=False)
class Partial:
    """The state of an online softmax over the keys seen so far; `merge` makes these a commutative monoid.

    Args:
        out: [B, Sq, Hq, D], normalised; fp32 while hops are still to come, q's dtype where the last one wrote it so.
        lse: fp32 [B, Hq, Sq], natural log of the sum of exp(score).

    A row that has seen no key holds out 0 and lse -inf, never NaN.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, q: Tensor, dtype: torch.dtype | None = None) -> Partial:
        """The identity of `merge` for queries q [B, Sq, Hq, D]: nothing seen yet; out is fp32 (fp64) or dtype."""
        B, Sq, Hq, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=dtype or wide, device=q.device)
        return cls(out, torch.full((B, Hq, Sq), -torch.inf, dtype=wide, device=q.device))


def merge(a: Partial, b: Partial) -> Partial:
    """The Partial over the keys of both; associative, commutative, with `Partial.empty` as identity.

    Source: the online softmax of Milakov and Gimelshein (arXiv 1805.02867), as FlashAttention uses it.
    """
    m = torch.maximum(a.lse, b.lse)
    m = torch.where(m == -torch.inf, 0.0, m)  # rows empty on both sides: keep exp(-inf - m) at 0 instead of NaN
    wa, wb = torch.exp(a.lse - m), torch.exp(b.lse - m)
    total = wa + wb
    lse = m + torch.log(total)
    total = torch.where(total == 0, 1.0, total)
    wa, wb = (_per_row(w / total) for w in (wa, wb))
    return Partial(a.out * wa + b.out * wb, lse)


def _reduced(x: Tensor, block: int, pad: int) -> Tensor:
    """[B, S] -> [B, ceil(S / block), block], ready to reduce each tile; the last is padded."""
    tiles: Tensor = F.pad(x, (0, -x.shape[1] % block), value=pad).unflatten(1, (-1, block))
    return tiles


def _per_row(x: Tensor) -> Tensor:
    """[B, H, S] -> [B, S, H, 1]: a number per row, ready to scale out."""
    return x.transpose(1, 2).unsqueeze(-1)
