"""Accuracy on sampled rows: what attention gives there in fp64, and what plain PyTorch attention gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringfa3_kernels import Visible, reference
from ringfa3_launch.bench.case import Case
from ringfa3_launch.bench.peers import Inputs, Outputs

SAMPLES = 32  # rows a rank

Rows = tuple[Tensor, ...]  # out, or (out, dq), at the sampled rows: [1, R, Hq, D]


class Sample:
    """Some of a rank's rows, spread over its positions, the first and the last among them.

    Args:
        case: what is computed.
        positions: int64 [n], the rank's.
        inputs: its shard.
        keys: makes the whole k and v [1, S, Hkv, D] (and nothing keeps them).
        at: int64, ascending: the positions to take instead, all of which the rank holds.
    """

    def __init__(
        self,
        case: Case,
        positions: Tensor,
        inputs: Inputs,
        keys: Callable[[], tuple[Tensor, Tensor]],
        at: Tensor | None = None,
    ) -> None:
        self.case, self.inputs, self._keys = case, inputs, keys
        n = positions.numel()
        if at is None:
            self.rows = torch.linspace(0, n - 1, min(SAMPLES, n), device=positions.device).round().long()
        else:
            self.rows = torch.searchsorted(positions, at)
        self.positions = positions[self.rows]
        seen = case.visible.bounds(self.positions.cpu().numpy().astype(np.int64), case.seqlen)
        lo, hi = (torch.from_numpy(x).to(positions.device, torch.int32) for x in seen)
        self.visible = Visible(lo, hi)

    def take(self, outputs: Outputs) -> Rows:
        """The sampled rows of (out[, dq, dk, dv]): of out, and of dq."""
        return tuple(x[:, self.rows].clone() for x in outputs[:2])

    @property
    def exact(self) -> Rows:
        """In fp64."""
        return self._both[0]

    @property
    def plain(self) -> Rows:
        """In the inputs' own precision."""
        return self._both[1]

    def squares(self, rows: Rows) -> Tensor:
        """Sums of squares, fp64 [2 or 1, 2]: of the errors and of the exact values; of out, and of dq."""
        sums = [
            torch.stack([(got.double() - wanted).square().sum(), wanted.square().sum()])
            for got, wanted in zip(rows, self.exact, strict=True)
        ]
        return torch.stack(sums)

    @cached_property
    def _both(self) -> tuple[Rows, Rows]:
        k, v = self._keys()
        return self._attend(k, v, torch.float64), self._attend(k, v, self.inputs.q.dtype)

    def _attend(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> Rows:
        """Head by key/value head, so that fp64 copies of long keys fit."""
        group = self.case.Hq // self.case.Hkv
        heads = []
        for h in range(self.case.Hkv):
            own = slice(h * group, (h + 1) * group)
            q = self.inputs.q.detach()[:, self.rows, own].to(dtype)
            dout = self.inputs.dout[:, self.rows, own].to(dtype) if self.inputs.dout.ndim == 4 else self.inputs.dout
            keys, values = (x[:, :, h : h + 1].to(dtype) for x in (k, v))
            heads.append(self._one_head(q, keys, values, dout))
        return tuple(torch.cat(parts, 2) for parts in zip(*heads, strict=True))

    def _one_head(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Rows:
        q = q.requires_grad_(self.case.direction == "fwd+bwd")
        options: dict[str, Any] = {"scale": self.case.D**-0.5, "softcap": 0.0, "into": None, "out_dtype": q.dtype}
        out = reference.attend(q, k, v, self.visible, **options).out
        if self.case.direction == "fwd":
            return (out,)
        return out.detach(), torch.autograd.grad(out, q, dout)[0]
