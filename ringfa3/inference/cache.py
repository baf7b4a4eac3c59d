"""PagedCache: this rank's keys and values, in pages, allocated once; `Pages` says which token lies where."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ringfa3_kernels import Unsupported

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class PagedCache:
    """Pages of keys and values of all layers.

    Beside the pages that can be given out there is one more, which belongs to nobody: writes to slots from `scratch` on
    (page_size of them) are lost. Padding goes there, so that a write can have a fixed shape (CUDA graphs).

    Args:
        layers: attention layers.
        kv_heads: Hkv.
        head_dim: D.
        pages: how many, as in `Pages`.
        page_size: tokens in a page.
        dtype: bf16 or fp16; fp32 and fp64 on the CPU's account.
        device: where they lie.

    Raises:
        ValueError: a number is not a positive int.
        Unsupported: another dtype.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        _check_sizes(layers=layers, kv_heads=kv_heads, head_dim=head_dim, pages=pages, page_size=page_size)
        if dtype not in DTYPES:
            raise Unsupported(f"a cache of {dtype}: wanted one of {', '.join(map(str, DTYPES))}")
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.pages, self.page_size = pages, page_size
        self.scratch = pages * page_size
        shape = (layers, pages + 1, page_size, kv_heads, head_dim)
        # zeros: kernels multiply what lies behind a sequence's end by 0, which makes NaN of what memory may hold
        self._k, self._v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.k, self.v = self._k[:, :pages], self._v[:, :pages]  # [layers, pages, page_size, Hkv, D]
        self._rows = [
            (k.view(-1, kv_heads, head_dim), v.view(-1, kv_heads, head_dim))
            for k, v in zip(self._k, self._v, strict=True)
        ]

    @staticmethod
    def pages_within(
        budget: int, *, layers: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
    ) -> int:
        """How many pages a cache of no more than `budget` bytes has.

        Raises:
            ValueError: the budget does not buy one page.
        """
        _check_sizes(layers=layers, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
        page = 2 * layers * page_size * kv_heads * head_dim * dtype.itemsize
        if budget < 2 * page:
            raise ValueError(
                f"budget: wanted at least {2 * page} bytes, for one page of {page} and a spare, got {budget}"
            )
        return budget // page - 1

    @property
    def nbytes(self) -> int:
        """Bytes allocated, on this rank."""
        return self._k.nbytes + self._v.nbytes

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put tokens into slots; no host synchronisation.

        Args:
            layer: which.
            slots: int64 [n], as `Placed` has them for this rank, on the cache's device.
            k, v: [n, Hkv, D] in the cache's dtype.

        Raises:
            ValueError: a wrong shape, dtype or device.
        """
        shape = (slots.numel(), self.kv_heads, self.head_dim)
        if slots.ndim != 1 or slots.dtype != torch.int64 or slots.device != self._k.device:
            raise ValueError(
                f"slots: wanted int64 [n] on {self._k.device}, got {slots.dtype} {list(slots.shape)} on {slots.device}"
            )
        for name, x in (("k", k), ("v", v)):
            if x.shape != shape or x.dtype != self._k.dtype or x.device != self._k.device:
                raise ValueError(
                    f"{name}: wanted {self._k.dtype} {list(shape)} on {self._k.device}, "
                    f"got {x.dtype} {list(x.shape)} on {x.device}"
                )
        rows_k, rows_v = self._rows[layer]
        rows_k.index_copy_(0, slots, k)
        rows_v.index_copy_(0, slots, v)

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy pages in all layers; of `Placed.copies`, before the write they belong to.

        Args:
            pairs: (source, destination) pages.

        Raises:
            ValueError: a page that there is not, a destination named twice, or one that is also a source.
        """
        pairs = list(pairs)
        if not pairs:
            return
        sources, destinations = {a for a, _ in pairs}, {b for _, b in pairs}
        if len(destinations) < len(pairs) or sources & destinations:
            raise ValueError(f"pairs: wanted each destination once and none a source, got {pairs}")
        if not 0 <= min(sources | destinations) <= max(sources | destinations) < self.pages:
            raise ValueError(f"pairs: wanted pages in [0, {self.pages}), got {pairs}")
        source, destination = torch.tensor(pairs, device=self._k.device).T
        for x in (self._k, self._v):
            x.index_copy_(1, destination, x.index_select(1, source))

    def read(self, layer: int, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first tokens of a table's pages, in order, copied out.

        Args:
            layer: which.
            table: ints [blocks] on the cache's device; entries past the last token are not looked at.
            length: how many tokens.

        Returns:
            k, v: [1, length, Hkv, D].

        Raises:
            ValueError: the table has fewer than `length` tokens.
        """
        blocks = -(-length // self.page_size)
        if length < 0 or table.ndim != 1 or blocks > table.numel():
            raise ValueError(
                f"length: wanted at most {table.numel()} pages of {self.page_size} tokens, got {length} tokens of a "
                f"table of shape {list(table.shape)}"
            )
        k, v = (x[layer].index_select(0, table[:blocks]).flatten(0, 1)[None, :length] for x in (self._k, self._v))
        return k, v


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: wanted an int, at least 1, got {value!r}")
