"""Cargo: what travels of a shard, any tensors that lie along its keys; a slice of them in one buffer is a message.

A call packs, finds room for and cuts many slices of few lengths, while the device waits for what comes after: how a
message lies is worked out once, and each tensor in it costs one operation (two where dtypes differ).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ringfa3.transport.route import inside

Tensors = tuple[Tensor, ...]

ALIGN = 16  # bytes: where tensors of several dtypes begin in their buffer; what TMA asks of a pointer


class Along(NamedTuple):
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
        """What belongs to the keys, which begin with a group's first and end with a group's, or x's, last; a view."""
        if self.indices == 0:
            return x
        begin, length = self._span(keys.start, keys.stop)
        return x if length == x.size(self.dim) else x.narrow(self.dim, begin, length)

    def shape(self, whole: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
        """Of `cut`, for a shard of that shape but for its length."""
        if self.indices == 0:
            return whole
        return *whole[: self.dim], self._span(start, stop)[1], *whole[self.dim + 1 :]

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        """The first index, and their number."""
        assert start % self.keys == 0  # see Plan.aligned
        begin = start // self.keys
        return begin * self.indices, (-(-stop // self.keys) - begin) * self.indices


class Berth(NamedTuple):
    """Where a tensor lies in a message; strides and begin in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int


class Stowage(NamedTuple):
    """How a message lies: its elements, and every tensor's berth."""

    size: int
    berths: tuple[Berth, ...]


@dataclass(frozen=True, eq=False)
class Form:
    """All that messages with slices of a shard depend on. Shards that are alike have one, by which views are kept.

    Args:
        tensors: shape and dtype of each.
        dtype: of a message: theirs, or bytes where they differ or are fp8, which gloo does not know.
    """

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    along: tuple[Along, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Cargo:
    """The tensors of a shard that travel, and how each lies along its keys."""

    tensors: Tensors
    along: tuple[Along, ...]

    @classmethod
    def of(cls, shard: Tensors | Cargo) -> Cargo:
        """Tensors [B, n, ...], such as plain keys and values, are a cargo as they are."""
        return shard if isinstance(shard, Cargo) else cls(shard, (PLAIN,) * len(shard))

    @cached_property
    def form(self) -> Form:
        """See `Form`."""
        return _form(tuple([(x.shape, x.dtype) for x in self.tensors]), self.along)

    @property
    def device(self) -> torch.device:
        """Of all of them."""
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of a message; see `Form`."""
        return self.form.dtype

    def size(self, keys: slice | None) -> int:
        """Elements of a message with these keys."""
        return 0 if keys is None else _stowed(self.form, keys.start, keys.stop).size

    def read(self, keys: slice) -> Tensors:
        """What belongs to these keys; views."""
        return tuple([along.cut(x, keys) for x, along in zip(self.tensors, self.along, strict=True)])

    def room(self, keys: slice, out: Tensor | None = None) -> Parcel:
        """An uninitialised message with these keys of a shard like this; at the front of out, flat, where given."""
        form = self.form
        size, berths = _stowed(form, keys.start, keys.stop)
        if out is None:
            data = torch.empty(size, dtype=form.dtype, device=self.device)
        else:
            data = out if out.numel() == size else out[:size]
        views = []
        for dtype, shape, strides, begin in berths:
            typed = data if dtype == form.dtype else data.view(dtype)
            views.append(typed.as_strided(shape, strides, typed.storage_offset() + begin))
        return Parcel(keys, data, Cargo(tuple(views), self.along))

    def pack(self, keys: slice, out: Tensor | None = None) -> Parcel:
        """A copy of what belongs to these keys; see `room`."""
        return self.pack_into(self.room(keys, out))

    def pack_into(self, parcel: Parcel) -> Parcel:
        """Fill a message with what belongs to its keys."""
        for there, x in zip(parcel.cargo.tensors, self.read(parcel.keys), strict=True):
            there.copy_(x)
        return parcel


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


PLAIN = Along()  # of tensors [B, n, ...]


@lru_cache(maxsize=64)
def _form(tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...], along: tuple[Along, ...]) -> Form:
    """One for equal arguments, of the last ones asked for."""
    dtypes = {dtype for _, dtype in tensors}
    same = len(dtypes) == 1 and tensors[0][1].itemsize > 1
    return Form(tensors, along, tensors[0][1] if same else torch.uint8)


@lru_cache(maxsize=1024)  # packed training has other slices in every step
def _stowed(form: Form, start: int, stop: int) -> Stowage:
    """How a message with these keys lies."""
    step = ALIGN if form.dtype == torch.uint8 else 1
    shapes = [along.shape(whole, start, stop) for (whole, _), along in zip(form.tensors, form.along, strict=True)]
    dtypes = [dtype for _, dtype in form.tensors]
    sizes = (-(-prod(x) * dtype.itemsize // step) * step for x, dtype in zip(shapes, dtypes, strict=True))
    *begins, end = accumulate(sizes, initial=0)
    berths = tuple(
        Berth(dtype, tuple(shape), _contiguous(shape), begin // dtype.itemsize)
        for dtype, shape, begin in zip(dtypes, shapes, begins, strict=True)
    )
    return Stowage(end // form.dtype.itemsize, berths)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape, in elements."""
    return tuple(prod(max(n, 1) for n in shape[dim + 1 :]) for dim in range(len(shape)))
