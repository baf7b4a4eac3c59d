"""Where rows and keys stand, ALiBi's bias and dropout's factors, by definitions that share no code with the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringfa3_kernels import Dropout

Words = NDArray[np.uint64]
LOW = np.uint64(0xFFFFFFFF)


def philox(counter: tuple[Words, Words, Words, Words], seed: int, rounds: int) -> tuple[Words, ...]:
    """Philox4x32 as the paper defines it (Salmon et al., SC 2011), on arrays that broadcast, in 64-bit arithmetic."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(rounds):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0), second & LOW
        c2, c3 = (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1), first & LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def kept(q_pos: Tensor, k_pos: Tensor, heads: range, rows: range, dropout: Dropout) -> Tensor:
    """Which places stay: bool [B, H, Sq, Sk], for positions [B or 1, S]."""
    q, k = (x.numpy().astype(np.uint64) for x in (q_pos, k_pos))
    h, b = (np.array(x, np.uint64) for x in (heads, rows))
    counter = (k[:, None, None, :], h[None, :, None, None], q[:, None, :, None], b[:, None, None, None])
    word = philox(counter, dropout.seed, 7)[0]
    return torch.from_numpy(word >= np.uint64(round(dropout.p * 2**32)))


@dataclass(frozen=True)
class Places:
    """What a call is told of positions; no options where neither ALiBi nor dropout is asked for.

    Args:
        q_pos: int64 [Sq] or [B, Sq]; k_pos likewise.
        slopes: fp32 [Hq] or [B, Hq].
        shape: B, Hq.
    """

    q_pos: Tensor
    k_pos: Tensor
    slopes: Tensor | None
    dropout: Dropout | None
    shape: tuple[int, int]

    @classmethod
    def draw(
        cls, B: int, Sq: int, Sk: int, Hq: int, *, alibi: bool, dropout: float, generator: torch.Generator
    ) -> Places:
        """Any ascending positions, as far out as they may be where only dropout reads them."""

        def positions(S: int) -> Tensor:
            shape = (B, S) if B > 1 else (S,)
            steps = torch.randint(1, 4, shape, generator=generator).cumsum(-1)
            return steps if alibi else steps + (2**31 - 1 - 4 * S)

        slopes = torch.rand((B, Hq) if B > 1 else (Hq,), generator=generator) / 4 if alibi else None
        seed, head, row = (int(torch.randint(0, high, (), generator=generator)) for high in (2**63 - 1, 99, 99))
        drop = Dropout(dropout, 2 * seed, head, row) if dropout else None
        return cls(positions(Sq), positions(Sk), slopes, drop, (B, Hq))

    def to(self, device: str) -> Places:
        """The same on another device."""
        slopes = None if self.slopes is None else self.slopes.to(device)
        return Places(self.q_pos.to(device), self.k_pos.to(device), slopes, self.dropout, self.shape)

    def options(self, keys: slice = slice(None)) -> dict[str, Any]:
        """For `attend` of these keys."""
        if self.slopes is None and self.dropout is None:
            return {}
        return {"positions": (self.q_pos, self.k_pos[..., keys]), "alibi": self.slopes, "dropout": self.dropout}

    def bias(self) -> Tensor | None:
        """fp64 [B or 1, Hq, Sq, Sk]."""
        if self.slopes is None:
            return None
        distance = (torch.atleast_2d(self.q_pos)[..., None] - torch.atleast_2d(self.k_pos)[:, None]).abs()
        return torch.atleast_2d(-self.slopes.double())[..., None, None] * distance[:, None]

    def weights(self) -> Tensor | None:
        """fp64 [B, Hq, Sq, Sk]."""
        if self.dropout is None:
            return None
        (B, Hq), d = self.shape, self.dropout
        q_pos, k_pos = (torch.atleast_2d(x).cpu() for x in (self.q_pos, self.k_pos))
        stays = kept(q_pos, k_pos, range(d.head, d.head + Hq), range(d.row, d.row + B), d)
        return stays.double().to(self.q_pos.device) / (1.0 - d.p)
