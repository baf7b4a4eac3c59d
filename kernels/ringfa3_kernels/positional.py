"""What depends on global positions: ALiBi's bias and dropout's mask, for every implementation the same.

Dropout's decision is a random number that belongs to its place and to nothing else: word 0 of Philox4x32-7 (Salmon et
al., SC 2011) at the counter (key position, head, query position, batch row), the seed being the key. Hence it does not
depend on shards, tiles, hops or implementation; the backward pass and a recomputation find it again. Seven rounds are
the fewest that pass BigCrush there, and what flash-attn takes. Here is the torch twin; portable/positional.py has the
kernels'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ROUNDS = 7
_WORD = 2**32 - 1


@dataclass(frozen=True)
class Dropout:
    """Probabilities of attention that are dropped; the others are scaled by 1 / (1 - p).

    Args:
        p: share that is dropped, 0 <= p < 1, to the nearest multiple of 2**-32.
        seed: 0 <= seed < 2**64. Equal seeds drop equal places.
        head: number of the call's first query head, where the call has some of a model's heads only.
        row: number of its first batch row, likewise.

    Raises:
        ValueError: out of range, or not numbers.
    """

    p: float
    seed: int
    head: int = 0
    row: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 <= self.p < 1:
            raise ValueError(f"dropout p: wanted a number in [0, 1), got {self.p!r}")
        for name, bits in (("seed", 64), ("head", 31), ("row", 31)):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < 2**bits:
                raise ValueError(f"dropout {name}: wanted an integer in [0, 2**{bits}), got {x!r}")

    @property
    def threshold(self) -> int:
        """Random words below this one drop their place."""
        return min(round(self.p * 2**32), _WORD)

    @property
    def rescale(self) -> float:
        """Factor on the probabilities that stay."""
        return 1.0 / (1.0 - self.p)


@dataclass(frozen=True, eq=False)
class Positional:
    """The checked positions of one call's rows and keys, and what is computed from them; see `check`.

    Args:
        q_pos: int32 [Sq] or [B, Sq], contiguous.
        k_pos: int32 [Sk] or [B, Sk], contiguous.
        alibi: fp32 [Hq] or [B, Hq], contiguous: slopes; None: no bias.
        dropout: None: nothing is dropped.
        heads: Hq.
        batch: B.
    """

    q_pos: Tensor
    k_pos: Tensor
    alibi: Tensor | None
    dropout: Dropout | None
    heads: int
    batch: int

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """ALiBi's addition to the scores, -slope * distance: [B or 1, Hq, Sq, Sk] in this dtype."""
        if self.alibi is None:
            return None
        q, k = (torch.atleast_2d(x).to(torch.int64) for x in (self.q_pos, self.k_pos))
        distance = (q[:, :, None] - k[:, None, :]).abs_().to(dtype)
        bias: Tensor = torch.atleast_2d(self.alibi).to(dtype)[:, :, None, None] * distance.neg_()[:, None]
        return bias

    def weights(self, dtype: torch.dtype) -> Tensor | None:
        """Dropout's factors on the probabilities, 0 or 1 / (1 - p): [B, Hq, Sq, Sk] in this dtype."""
        if self.dropout is None:
            return None
        q, k = (torch.atleast_2d(x) for x in (self.q_pos, self.k_pos))
        heads, rows = (torch.arange(n, device=q.device) for n in (self.heads, self.batch))
        heads, rows = heads + self.dropout.head, rows + self.dropout.row
        words = random_words(
            k[:, None, None, :], heads[None, :, None, None], q[:, None, :, None], rows[:, None, None, None],
            self.dropout.seed,
        )  # fmt: skip
        return (words >= self.dropout.threshold).to(dtype).mul_(self.dropout.rescale)

    def cut(self, b: int, rows: slice, keys: slice) -> Positional:
        """The same of some rows and keys of one batch row."""
        q, k = (x if x.ndim == 1 else x[b] for x in (self.q_pos, self.k_pos))
        slopes = self.alibi if self.alibi is None or self.alibi.ndim == 1 else self.alibi[b]
        dropout = None if self.dropout is None else replace(self.dropout, row=self.dropout.row + b)
        return Positional(q[rows], k[keys], slopes, dropout, self.heads, 1)


def random_words(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> Tensor:
    """Word 0 of Philox4x32 at counters (c0, c1, c2, c3), which broadcast: int64 in [0, 2**32)."""
    c0, c1, c2, c3 = (x.to(torch.int64) & _WORD for x in (c0, c1, c2, c3))
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(ROUNDS):
        # x * M as x * (M - 2**32) + x * 2**32, since x * M itself would overflow int64
        a, b = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        c0, c1, c2, c3 = (
            (((b >> 32) + c2) & _WORD) ^ c1 ^ k0,
            b & _WORD,
            (((a >> 32) + c0) & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0


def check(positions: Any, alibi: Tensor | None, dropout: Dropout | None, q: Tensor, k: Tensor) -> Positional | None:
    """The arguments of these names of `attend`, or None where they ask for nothing.

    Raises:
        ValueError: one is wrong, or positions are missing or not needed; names it, what was wanted and what came.
    """
    if dropout is not None and not isinstance(dropout, Dropout):
        raise ValueError(f"dropout: wanted a Dropout or None, got {type(dropout).__name__}")
    if alibi is None and dropout is None:
        if positions is not None:
            raise ValueError("positions: wanted None, as neither alibi nor dropout needs them, got positions")
        return None
    if not isinstance(positions, tuple) or len(positions) != 2:
        got = "None" if positions is None else type(positions).__name__
        raise ValueError(f"positions: wanted (q_pos, k_pos) beside alibi or dropout, got {got}")
    B, Hq = q.shape[0], q.shape[2]
    slopes = None if alibi is None else check_slopes("alibi", alibi, q)
    q_pos, k_pos = (
        _positions(f"positions[{i}]", x, B, y.shape[1], q.device)
        for i, (x, y) in enumerate(zip(positions, (q, k), strict=True))
    )
    drops = dropout if dropout is not None and dropout.threshold else None
    return None if slopes is None and drops is None else Positional(q_pos, k_pos, slopes, drops, Hq, B)


def check_slopes(name: str, slopes: Any, q: Tensor) -> Tensor:
    """ALiBi's slopes, contiguous, if they are fp32 [Hq] or [B, Hq] for q [B, Sq, Hq, D] and want no gradient.

    Raises:
        ValueError: they are not; says so by this name.
    """
    B, Hq = q.shape[0], q.shape[2]
    if not isinstance(slopes, Tensor) or slopes.dtype != torch.float32 or slopes.shape not in ((Hq,), (B, Hq)):
        got = f"{slopes.dtype} {list(slopes.shape)}" if isinstance(slopes, Tensor) else type(slopes).__name__
        raise ValueError(f"{name}: wanted torch.float32 [{Hq}] or [{B}, {Hq}], got {got}")
    if slopes.device != q.device:
        raise ValueError(f"{name}: wanted q's device {q.device}, got {slopes.device}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: wanted no requires_grad outside torch.no_grad(), as slopes get no gradient")
    return slopes.detach().contiguous()


def _positions(name: str, x: Any, B: int, S: int, device: torch.device) -> Tensor:
    """x as int32, contiguous; where it is on the CPU it must lie in [0, 2**31): elsewhere it would synchronise."""
    wanted = f"torch.int32 or torch.int64 [{S}] or [{B}, {S}] on {device}"
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: wanted {wanted}, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64) or x.shape not in ((S,), (B, S)) or x.device != device:
        raise ValueError(f"{name}: wanted {wanted}, got {x.dtype} {list(x.shape)} on {x.device}")
    if device.type == "cpu" and x.numel() and (int(x.min()) < 0 or int(x.max()) >= 2**31):
        raise ValueError(f"{name}: wanted positions in [0, 2**31), got {int(x.min())}..{int(x.max())}")
    return x.int().contiguous()
