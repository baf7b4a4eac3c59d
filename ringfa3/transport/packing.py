"""The gradient of a slice of a shard, dK and dV in one contiguous buffer: summed, and carried by a message."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringfa3.transport.route import hull, length
from ringfa3.transport.transport import KV


@dataclass(frozen=True, eq=False)
class Piece:
    """The slice `keys` of a shard's gradient: data [2, B, n, Hkv, D], contiguous, dK first."""

    keys: slice
    data: Tensor

    def read(self, keys: slice) -> KV:
        """Views of the slice `keys` of the shard, which this piece holds."""
        dk, dv = self.part(keys).unbind(0)
        return dk, dv

    def part(self, keys: slice) -> Tensor:
        """The data of the slice `keys` of the shard, which this piece holds; a view."""
        if keys == self.keys:
            return self.data
        return self.data.narrow(2, keys.start - self.keys.start, length(keys))


def shape(kv: KV, keys: slice) -> tuple[int, ...]:
    """Of the data of a piece of a shard like kv."""
    B, _, H, D = kv[0].shape
    return 2, B, length(keys), H, D


def room(kv: KV, keys: slice, *, gradient: int) -> Piece:
    """An uninitialised piece of the gradient of a shard like kv.

    Args:
        gradient: ranks that add to it: fp32 (fp64 for fp64 inputs) unless there is one.
    """
    return Piece(keys, torch.empty(shape(kv, keys), dtype=dtype_of(kv, gradient=gradient), device=kv[0].device))


def dtype_of(kv: KV, *, gradient: int) -> torch.dtype:
    """Of the data of a piece; see `room`."""
    dtype = kv[0].dtype
    if gradient <= 1:
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def zeros(kv: KV, keys: slice, *, gradient: int) -> Piece:
    """A piece of zeros, otherwise as `room`."""
    piece = room(kv, keys, gradient=gradient)
    piece.data.zero_()
    return piece


def add(a: Piece | None, b: Piece | None) -> Piece | None:
    """Sum of two slices of one shard's gradient, over the hull of both; may reuse the memory of either."""
    if a is None or b is None:
        return a or b
    if a.keys == b.keys:
        return _add_(b, a)
    keys = hull([a.keys, b.keys])
    assert keys is not None
    if keys == b.keys:
        a, b = b, a
    if keys != a.keys:  # neither holds the other
        size = (*a.data.shape[:2], length(keys), *a.data.shape[3:])
        a = _add_(Piece(keys, a.data.new_zeros(size)), a)
    return _add_(a, b)


def _add_(total: Piece, part: Piece) -> Piece:
    """Add a slice of a gradient to the piece that holds it, in place."""
    total.part(part.keys).add_(part.data)  # +=, on a slice, would then copy the sum to where it is
    return total
