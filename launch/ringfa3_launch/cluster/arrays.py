"""What callers hand a cluster, numpy or torch: checked, dealt to the ranks, and put together again as it came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringfa3.layout import Run
from ringfa3_launch.cluster.tensors import Array, Raw, is_torch

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as safetensors names them


@dataclass(frozen=True)
class Kind:
    """What a caller's arrays are: numpy's or torch's, of which dtype, where."""

    torch: bool
    dtype: Any
    device: Any

    @classmethod
    def of(cls, **arrays: Array) -> Kind:
        """The kind that all of them are.

        Raises:
            ValueError: they differ, have not 4 dimensions, or are not floats; names the first that is wrong.
        """
        kinds = []
        for name, x in arrays.items():
            if not (is_torch(x) or isinstance(x, np.ndarray)):
                raise ValueError(f"{name}: wanted a numpy array or a torch tensor, got {type(x).__name__}")
            if x.ndim != 4:
                raise ValueError(f"{name}: wanted 4 dimensions [B, S, H, D], got shape {list(x.shape)}")
            if (str(x.dtype).removeprefix("torch.") if is_torch(x) else x.dtype.name) not in CODES:
                raise ValueError(f"{name}: wanted {', '.join(CODES)}, got {x.dtype}")
            if is_torch(x) and x.requires_grad and _records():
                raise ValueError(f"{name}: wanted no requires_grad outside torch.no_grad(), as the ranks keep no graph")
            kinds.append(cls(is_torch(x), x.dtype, x.device if is_torch(x) else None))
            if kinds[-1] != kinds[0]:
                raise ValueError(f"{name}: wanted what the first argument is, {kinds[0]}, got {kinds[-1]}")
        return kinds[0]

    def back(self, parts: Sequence[Raw], runs: Sequence[Sequence[Run]], dim: int) -> Array:
        """The whole from the ranks' parts, whose rows along dim lie where the runs say; of this kind.

        Args:
            parts: of any float dtype (lse: fp32), by rank.
        """
        same = parts[0].dtype == CODES[self.name]
        if self.torch:
            import torch

            whole: Array = torch.empty(_whole(parts, dim), dtype=parts[0].torch().dtype)
            arrays: list[Array] = [part.torch() for part in parts]
        else:
            native = self.dtype if self.dtype.isnative else self.dtype.newbyteorder("=")
            arrays = [part.numpy(native if same else None) for part in parts]
            whole = np.empty(_whole(parts, dim), self.dtype if same else arrays[0].dtype)
        before = (slice(None),) * dim
        for part, hand in zip(arrays, runs, strict=True):
            at = 0
            for run in hand:
                size = len(range(*run))
                whole[(*before, slice(*run))] = part[(*before, slice(at, at + size))]
                at += size
        return whole.to(self.device) if self.torch else whole

    @property
    def name(self) -> str:
        """Of the dtype, "float32"."""
        return str(self.dtype).removeprefix("torch.") if self.torch else np.dtype(self.dtype).name


def take(x: Array, runs: Sequence[Run], dim: int = 1) -> Array:
    """A rank's rows: a copy, or a view where they are one run."""
    before = (slice(None),) * dim
    pieces = [x[(*before, slice(*run))] for run in runs] or [x[(*before, slice(0))]]
    if len(pieces) == 1:
        return pieces[0]
    if is_torch(x):
        import torch

        return torch.cat(pieces, dim)
    return np.concatenate(pieces, dim)


def pick(x: Array, rows: NDArray[np.int64]) -> Array:
    """A copy of some rows of x [B, S, ...]."""
    if is_torch(x):
        import torch

        return x.index_select(1, torch.from_numpy(rows).to(x.device))
    return x[:, rows]


def finite(name: str, x: Array) -> None:
    """Raise ValueError where a number is NaN or infinite."""
    if is_torch(x):
        import torch

        fine = bool(torch.isfinite(x).all())
    else:
        fine = bool(np.isfinite(x).all())
    if not fine:
        raise ValueError(f"{name}: wanted finite numbers, got NaN or infinity")


def _records() -> bool:
    import torch

    return torch.is_grad_enabled()


def _whole(parts: Sequence[Raw], dim: int) -> list[int]:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return shape
