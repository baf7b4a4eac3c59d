"""The newest tokens of a batch of sequences, as a decode step needs them: gathered on the host, sent in one message.

The message is one int32 buffer, whose parts lie where the step's sizes say (`Form`). Batches and block tables may be
padded to larger sizes, so that few of them serve all steps: each is a CUDA graph (`ringfa3.inference.graphs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringfa3.inference.pages import Pages, Placed
from ringfa3.layout import Ints32
from ringfa3.mask import Mask
from ringfa3_kernels import Visible


@dataclass(frozen=True, eq=False)
class Newest:
    """The newest tokens of some sequences, equally many of each, as one rank sees them.

    Args:
        positions: int64 [B, n], global.
        slots: int64 [B, n], where this rank keeps them; the cache's scratch for those that another rank keeps.
        tables: int32 [B, blocks], this rank's pages of each sequence, filled up with -1; at least one block, and as
            many as the longest table of any rank.
        bounds: by mask, int32 [2, B, n]: the first of this rank's keys that a token sees, and the first past the last.
    """

    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    tables: Ints32
    bounds: Mapping[Mask, Ints32]

    @classmethod
    def of(cls, pages: Pages, placed: Mapping[int, Placed], masks: tuple[Mask, ...], rank: int, scratch: int) -> Newest:
        """Of the sequences and tokens that pages has just appended.

        Args:
            masks: of all layers.
            scratch: the slot for what is not kept here.
        """
        sequences = list(placed)
        count = placed[sequences[0]].count
        positions = np.array([each.start for each in placed.values()])[:, None] + np.arange(count)
        slots = np.full(positions.shape, scratch, np.int64)
        for row, each in enumerate(placed.values()):
            if each.slots[rank].size == 1 == count:  # nearly always
                slots[row, 0] = each.slots[rank][0]
            elif each.slots[rank].size:
                slots[row, each.positions[rank] - each.start] = each.slots[rank]
        ordered, back = np.unique(positions, return_inverse=True) if len(sequences) > 1 else (positions[0], slice(None))
        bounds = {}
        for mask in masks:
            whole = (bound[back].reshape(positions.shape) for bound in mask.bounds(ordered, int(ordered[-1]) + 1))
            bounds[mask] = np.array(
                [pages.below_each(rank, sequences, bound) if bound.any() else np.zeros_like(bound) for bound in whole],
                np.int32,
            )
        # as wide as any rank's: ranks of other forms would capture CUDA graphs, and their collectives, at other steps
        tables = pages.block_tables(rank, sequences, max(1, pages.blocks(sequences)))
        return cls(positions, slots, tables, bounds)


@dataclass(frozen=True, eq=False)
class Sent:
    """What a decode step reads on the device; views of one buffer.

    Args:
        ids, positions: int32 [B, n].
        slots: int32 [B, n].
        tables: int32 [B, blocks].
        visible: by mask, bounds [B, n].
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    tables: Tensor
    visible: Mapping[Mask, Visible]


@dataclass(frozen=True)
class Form:
    """The sizes of a decode step, which say where its parts lie in the buffer.

    Args:
        batch: B, sequences; those beyond a step's see nothing and keep nothing.
        tokens: n, of each.
        blocks: pages in a row of the block table.
        masks: of all layers.
    """

    batch: int
    tokens: int
    blocks: int
    masks: tuple[Mask, ...]

    @classmethod
    def of(cls, newest: Newest, *, padded: bool = False) -> Form:
        """Just large enough for these tokens; or (padded) batch and blocks the next powers of 2, blocks at least 16."""
        (batch, tokens), blocks = newest.positions.shape, newest.tables.shape[1]
        if padded:
            batch, blocks = _power(batch), max(16, _power(blocks))
        return cls(batch, tokens, blocks, tuple(newest.bounds))

    def pack(self, ids: NDArray[np.int64], newest: Newest, scratch: int, *, pinned: bool = False) -> Tensor:
        """The buffer on the host: int32.

        Args:
            ids: int64 [B, n], B at most this form's.
            newest: of the same B and n.
            scratch: the slot for the tokens of no sequence.
            pinned: in memory that a GPU can copy from without waiting for the host.
        """
        bounds = [bound for mask in self.masks for bound in newest.bounds[mask]]
        parts: list[NDArray[Any]] = [ids, newest.positions, newest.slots, newest.tables, *bounds]
        paddings = [0, 0, scratch, -1, *[0] * len(bounds)]
        buffer = torch.empty(self._size, dtype=torch.int32, pin_memory=pinned)
        for array, given, padding in zip(self._views(buffer.numpy()), parts, paddings, strict=True):
            if array.shape != given.shape:
                array[:] = padding
            array[: given.shape[0], : given.shape[1]] = given
        return buffer

    def unpack(self, buffer: Tensor) -> Sent:
        """The parts of a buffer, on whatever device."""
        ids, positions, slots, tables, *bounds = self._views(buffer)
        pairs = zip(self.masks, bounds[::2], bounds[1::2], strict=True)
        return Sent(ids, positions, slots, tables, {mask: Visible(lo, hi) for mask, lo, hi in pairs})

    def _views(self, buffer: Any) -> Iterator[Any]:
        """The parts of a buffer, of torch or numpy as it is."""
        begin = 0
        for shape in self._shapes:
            size = shape[0] * shape[1]
            yield buffer[begin : begin + size].reshape(shape)
            begin += _aligned(size)

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        small = (self.batch, self.tokens)
        return [small, small, small, (self.batch, self.blocks), *[small] * (2 * len(self.masks))]

    @property
    def _size(self) -> int:
        return sum(_aligned(math.prod(shape)) for shape in self._shapes)


def _aligned(size: int) -> int:
    """To 16 bytes: Triton compiles another kernel for pointers that are less aligned."""
    return -(-size // 4) * 4


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
