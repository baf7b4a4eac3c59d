"""K and V, or dK and dV, of a slice of a shard in one contiguous buffer: what a message carries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringfa3.transport.route import hull, inside, length
from ringfa3.transport.transport import KV


@dataclass(frozen=True, eq=False)
class Piece:
    """The slice `keys` of a shard: data [2, B, n, Hkv, D], contiguous, K (or dK) first."""

    keys: slice
    data: Tensor

    def read(self, keys: slice) -> KV:
        """Views of the slice `keys` of the shard, which this piece holds."""
        k, v = self.data[:, :, inside(keys, self.keys)]
        return k, v

    def cut(self, keys: slice) -> Piece:
        """The piece for a narrower slice; a copy, unless it is all of this one."""
        if keys == self.keys:
            return self
        return Piece(keys, self.data[:, :, inside(keys, self.keys)].contiguous())


def shape(kv: KV, keys: slice) -> tuple[int, ...]:
    """Of the data of a piece of a shard like kv."""
    B, _, H, D = kv[0].shape
    return 2, B, length(keys), H, D


def room(kv: KV, keys: slice, *, gradient: int = 0) -> Piece:
    """An uninitialised piece of a shard like kv.

    Args:
        gradient: 0, or the world's size where dK and dV go in: fp32 (fp64 for fp64 inputs) unless the rank is alone.
    """
    dtype = kv[0].dtype
    if gradient > 1:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Piece(keys, torch.empty(shape(kv, keys), dtype=dtype, device=kv[0].device))


def zeros(kv: KV, keys: slice, *, gradient: int = 0) -> Piece:
    """A piece of zeros, otherwise as `room`."""
    piece = room(kv, keys, gradient=gradient)
    piece.data.zero_()
    return piece


def pack(kv: KV, keys: slice, out: Tensor | None = None) -> Piece:
    """A slice of this rank's shard, copied into one buffer (out, where given)."""
    piece = room(kv, keys) if out is None else Piece(keys, out)
    for i, x in enumerate(kv):
        piece.data[i].copy_(x[:, keys])
    return piece


def add(a: Piece | None, b: Piece | None) -> Piece | None:
    """Sum of two slices of one shard's gradient, over the hull of both; may reuse the memory of either."""
    if a is None or b is None:
        return a or b
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
    total.data[:, :, inside(part.keys, total.keys)] += part.data
    return total
