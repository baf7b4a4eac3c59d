"""Cargo: what travels of a shard, any tensors that lie along its keys; a slice of them in one buffer is a message."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ringfa3.transport.route import inside

Tensors = tuple[Tensor, ...]

ALIGN = 16  # bytes: where tensors of several dtypes begin in their buffer; what TMA asks of a pointer


@dataclass(frozen=True)
class Along:
    """How a tensor lies along the keys of its shard.

    Args:
        dim: its dimension that counts keys.
        keys, indices: every group of `keys` keys takes up `indices` indices of it. No indices: the tensor is of the
            whole shard, and goes along with every slice.
    """

    dim: int = 1
    keys: int = 1
    indices: int = 1

    def cut(self, x: Tensor, keys: slice) -> Tensor:
        """A view of what belongs to the keys, which begin with a group's first and end with a group's, or x's, last."""
        if self.indices == 0:
            return x
        groups = self._groups(keys)
        return x.narrow(self.dim, groups.start * self.indices, (groups.stop - groups.start) * self.indices)

    def shape(self, x: Tensor, keys: slice) -> tuple[int, ...]:
        """Of `cut`, for a shard like x but for its length."""
        if self.indices == 0:
            return tuple(x.shape)
        groups = self._groups(keys)
        return *x.shape[: self.dim], (groups.stop - groups.start) * self.indices, *x.shape[self.dim + 1 :]

    def _groups(self, keys: slice) -> slice:
        assert keys.start % self.keys == 0  # see Plan.aligned
        return slice(keys.start // self.keys, -(-keys.stop // self.keys))


@dataclass(frozen=True, eq=False)
class Cargo:
    """The tensors of a shard that travel, and how each lies along its keys."""

    tensors: Tensors
    along: tuple[Along, ...]

    @classmethod
    def of(cls, shard: Tensors | Cargo) -> Cargo:
        """Tensors [B, n, ...], such as plain keys and values, are a cargo as they are."""
        return shard if isinstance(shard, Cargo) else cls(shard, (Along(),) * len(shard))

    @property
    def device(self) -> torch.device:
        """Of all of them."""
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of a message: theirs, or bytes where they differ or are fp8, which gloo does not know."""
        dtypes = {x.dtype for x in self.tensors}
        return torch.uint8 if len(dtypes) > 1 or self.tensors[0].element_size() == 1 else self.tensors[0].dtype

    def size(self, keys: slice | None) -> int:
        """Elements of a message with these keys."""
        return 0 if keys is None else self._places(keys)[-1] // self.dtype.itemsize

    def read(self, keys: slice) -> Tensors:
        """Views of what belongs to these keys."""
        return tuple(along.cut(x, keys) for x, along in zip(self.tensors, self.along, strict=True))

    def room(self, keys: slice, out: Tensor | None = None) -> Parcel:
        """An uninitialised message with these keys of a shard like this; at the front of out, flat, where given."""
        size = self.size(keys)
        data = torch.empty(size, dtype=self.dtype, device=self.device) if out is None else out[:size]
        buffer, views = data.view(torch.uint8), []
        for x, along, begin in zip(self.tensors, self.along, self._places(keys), strict=False):
            shape = along.shape(x, keys)
            views.append(buffer[begin : begin + prod(shape) * x.element_size()].view(x.dtype).view(shape))
        return Parcel(keys, data, Cargo(tuple(views), self.along))

    def pack(self, keys: slice, out: Tensor | None = None) -> Parcel:
        """A copy of what belongs to these keys; see `room`."""
        parcel = self.room(keys, out)
        for there, x in zip(parcel.cargo.tensors, self.read(keys), strict=True):
            there.copy_(x)
        return parcel

    def _places(self, keys: slice) -> list[int]:
        """Bytes at which the tensors begin in a message, and where it ends."""
        step = ALIGN if self.dtype == torch.uint8 else 1
        places = [0]
        for x, along in zip(self.tensors, self.along, strict=True):
            places.append(places[-1] + -(-prod(along.shape(x, keys)) * x.element_size() // step) * step)
        return places


@dataclass(frozen=True, eq=False)
class Parcel:
    """The slice `keys` of a shard: data is the message, flat, and cargo the tensors that lie in it."""

    keys: slice
    data: Tensor
    cargo: Cargo

    def read(self, keys: slice) -> Tensors:
        """Views of the slice `keys` of the shard, which this one holds."""
        return self.cargo.read(inside(keys, self.keys))

    def cut(self, keys: slice) -> Parcel:
        """The parcel of a narrower slice; a copy, unless it is all of this one."""
        if keys == self.keys:
            return self
        cut = self.cargo.pack(inside(keys, self.keys))
        return Parcel(keys, cut.data, cut.cargo)
