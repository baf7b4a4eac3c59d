"""Mask: which keys each position sees, as one interval per position whose bounds never move left."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lengths = tuple[int, ...]
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Mask:
    """Position p sees key j when every condition below allows it. A value: hashable, equal by content.

    Args:
        causal: j <= p, so that no position sees what follows it.
        window: (left, right) as flash-attn's: p - left <= j <= p + right; -1 is unlimited. With causal, right must be
            0 or -1, which then mean the same; with a prefix it must be -1 (0 would take back what the prefix grants).
        documents: lengths of packed documents that sum to the sequence length; j must lie in p's document. Nested,
            one sequence of lengths per batch row, where rows are packed differently. Lists, numpy arrays and torch
            tensors (one on a GPU costs a synchronisation) become tuples of ints. Zero lengths are allowed.
        prefix: prefix-LM: the first `prefix` positions of each document (of the sequence, without documents) see each
            other both ways. An int (longer than a document: all of that document), or with documents one length per
            document, nested as they are and not longer than them. Wants causal: without it nothing hides the future.
        chunk: chunked-local attention: j must lie in p's chunk of this many positions; chunks restart in each document.

    Why every combination is monotone intervals: each condition alone allows an interval [lo(p), hi(p)) whose bounds
    do not decrease with p: causal [0, max(p + 1, end of the prefix of p's document)), window [p - left,
    p + right + 1), document and chunk [their start, their end). Several conditions allow the intersection, [max of
    the lo, min of the hi), and the maximum and minimum of functions that do not decrease do not decrease. p always
    sees itself, so no row is empty.

    Raises:
        ValueError: an argument is wrong or contradicts another; names it, what was wanted and what came.
    """

    causal: bool = True
    window: tuple[int, int] | None = None
    documents: Lengths | tuple[Lengths, ...] | None = None
    prefix: int | Lengths | tuple[Lengths, ...] | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        _set = object.__setattr__  # the dataclass is frozen; equal masks must be stored equally
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal: wanted True or False, got {self.causal!r}")
        if self.documents is not None:
            _set(self, "documents", _lengths("documents", self.documents))
        if self.prefix is not None:
            _set(self, "prefix", self._checked_prefix())
        if self.chunk is not None:
            _set(self, "chunk", _integer("chunk", self.chunk, 1))
        if self.window is not None:
            _set(self, "window", self._checked_window())

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:  # what is cached stays behind: hash(None) differs between processes
        return Mask, (self.causal, self.window, self.documents, self.prefix, self.chunk)

    @cached_property
    def _hash(self) -> int:  # kept: a plan is looked up in every layer, and packed documents can be thousands
        return hash((self.causal, self.window, self.documents, self.prefix, self.chunk))

    @property
    def batch(self) -> int | None:
        """B, where documents are given per batch row; None where all batch rows see the same."""
        return len(self.documents) if self.documents and isinstance(self.documents[0], tuple) else None

    @property
    def full(self) -> bool:
        """Every position sees every position, whatever the length."""
        return self == Mask(causal=False)

    def check(self, seqlen: int) -> None:
        """Raise ValueError unless this mask fits a sequence of seqlen positions: documents must sum to it."""
        for b, edges in enumerate(self._edges):
            if edges[-1] != seqlen:
                row = "" if self.batch is None else f" in batch row {b}"
                raise ValueError(f"documents: wanted lengths that sum to seqlen {seqlen}, got {edges[-1]}{row}")

    def bounds(self, positions: Ints, seqlen: int) -> tuple[Ints, Ints]:
        """Position p sees the keys lo <= j < hi.

        Args:
            positions: int64 (or int32, where seqlen < 2**30) [n], ascending, each in [0, seqlen).
            seqlen: length of the sequence.

        Returns:
            lo, hi: [n], or [B, n] where documents differ between batch rows; positions' dtype, non-decreasing, hi > lo.

        Raises:
            ValueError: as `check`.
        """
        self.check(seqlen)
        if self.batch is None:
            return self._row_bounds(positions, seqlen, 0)
        lo = np.empty((self.batch, positions.size), positions.dtype)
        hi = np.empty_like(lo)
        for b in range(self.batch):
            lo[b], hi[b] = self._row_bounds(positions, seqlen, b)
        return lo, hi

    def pairs(self, seqlen: int) -> int:
        """Number of visible (query, key) pairs, summed over batch rows where documents differ; O(seqlen)."""
        lo, hi = self.bounds(np.arange(seqlen), seqlen)
        return int((hi - lo).sum())

    def last(self, seqlen: int) -> Ints:
        """Positions after which another document, or nothing, follows.

        Returns:
            bool [seqlen], or [B, seqlen] where documents differ between batch rows.
        """
        self.check(seqlen)
        edges = self._edges or (np.array([0, seqlen]),)
        last = np.zeros((len(edges), seqlen), bool)
        for row, edge in zip(last, edges, strict=True):
            row[edge[edge > 0] - 1] = True
        return last if self.batch is not None else last[0]

    def _row_bounds(self, p: Ints, seqlen: int, b: int) -> tuple[Ints, Ints]:
        """lo and hi [n] in batch row b; the arrays are fresh."""
        start, end, prefix_end = self._document_of(p, seqlen, b)
        lo = np.full_like(p, start) if np.ndim(start) == 0 else start  # np.repeat's, fresh
        if self.causal:
            hi = p + 1
            if prefix_end is not None:
                np.maximum(hi, prefix_end, out=hi)
        else:
            hi = np.full_like(p, end) if np.ndim(end) == 0 else end
        if self.chunk is not None:
            chunk = min(self.chunk, max(seqlen, 1))  # clamped so that int32 cannot overflow
            np.maximum(lo, p - (p - start) % chunk, out=lo)
            np.minimum(hi, lo + chunk, out=hi)  # lo is the chunk's start: a chunk never begins before its document
        left, right = self.window or (-1, -1)
        if left >= 0:
            np.maximum(lo, p - min(left, seqlen), out=lo)
        if right >= 0 and not self.causal:
            np.minimum(hi, p + (min(right, seqlen) + 1), out=hi)
        return lo, hi

    def _document_of(self, p: Ints, seqlen: int, b: int) -> tuple[Any, Any, Any]:
        """Start, end and end of prefix of the document that holds each position: [n], or a scalar for all of them."""
        if not self._edges:
            return 0, seqlen, min(self.prefix, seqlen) if isinstance(self.prefix, int) else None
        edges = self._edges[b]
        rows = np.diff(np.searchsorted(p, edges.astype(p.dtype)))  # rows in each document: p ascends
        start, end = (np.repeat(x.astype(p.dtype), rows) for x in (edges[:-1], edges[1:]))
        if self.prefix is None:
            return start, end, None
        if isinstance(self.prefix, int):
            prefix: Any = min(self.prefix, seqlen)
        else:
            prefix = np.array(self.prefix if self.batch is None else self.prefix[b])
        prefix_end = np.minimum(edges[:-1] + prefix, edges[1:])
        return start, end, np.repeat(prefix_end.astype(p.dtype), rows)

    @cached_property
    def _edges(self) -> tuple[Ints, ...]:
        """Per batch row (one, where rows do not differ) where documents start and end: int64 [documents + 1]."""
        if self.documents is None:
            return ()
        rows = self.documents if self.batch is not None else (self.documents,)
        return tuple(np.concatenate(([0], np.cumsum(np.array(row, np.int64)))) for row in rows)

    def _checked_window(self) -> tuple[int, int] | None:
        window = self.window
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window: wanted (left, right), got {window!r}")
        left, right = (_integer("window", side, -1) for side in window)
        if self.causal:
            if right > 0:
                raise ValueError(f"window: wanted right = 0 or -1 with causal=True, got {window!r}")
            if self.prefix is not None and right == 0:
                raise ValueError(f"window: wanted right = -1 with a prefix, whose positions look ahead, got {window!r}")
            right = 0 if self.prefix is None and left >= 0 else -1
        return None if (left, right) == (-1, -1) else (left, right)

    def _checked_prefix(self) -> int | Lengths | tuple[Lengths, ...]:
        if not self.causal:
            raise ValueError(f"prefix: wanted causal=True (without it every position sees ahead), got {self.prefix!r}")
        if not _is_sequence(self.prefix):
            return _integer("prefix", self.prefix, 1, " (None for no prefix)")
        if self.documents is None:
            raise ValueError(f"prefix: wanted an int where there are no documents, got {self.prefix!r}")
        prefix = _lengths("prefix", self.prefix)
        flat = _flatten(prefix)
        if _shape(prefix) != _shape(self.documents):
            raise ValueError(f"prefix: wanted one length per document, {_shape(self.documents)}, got {_shape(prefix)}")
        for length, document in zip(flat, _flatten(self.documents), strict=True):
            if length > document:
                raise ValueError(f"prefix: wanted at most the document's length {document}, got {length}")
        return prefix


def _is_sequence(x: Any) -> bool:
    return hasattr(x, "__len__") and not (hasattr(x, "ndim") and x.ndim == 0)


def _integer(name: str, x: Any, at_least: int, or_else: str = "") -> int:
    wrong = isinstance(x, bool)
    try:
        value = operator.index(x)
    except TypeError:
        wrong, value = True, at_least
    if wrong or value < at_least:
        raise ValueError(f"{name}: wanted an integer of at least {at_least}{or_else}, got {x!r}")
    return value


def _lengths(name: str, x: Any) -> Lengths | tuple[Lengths, ...]:
    """Lengths of a list, tuple, numpy array or torch tensor, flat or one sequence per batch row, as tuples of ints."""
    x = x.tolist() if hasattr(x, "tolist") else x
    if not isinstance(x, (list, tuple)) or not x:
        raise ValueError(f"{name}: wanted lengths, or one sequence of lengths per batch row, got {x!r}")
    if set(map(type, x)) == {int} and min(x) >= 0:  # the common case, and there can be thousands
        return tuple(x)
    nested = [_is_sequence(row) for row in x]
    if not any(nested):
        return tuple(_integer(name, length, 0) for length in x)
    if not all(nested):
        raise ValueError(f"{name}: wanted lengths, or one sequence of lengths per batch row, got a mixture of both")
    rows = tuple(_lengths(name, row) for row in x)
    if any(isinstance(length, tuple) for row in rows for length in row):
        raise ValueError(f"{name}: wanted at most one level of nesting, got more")
    return rows  # type: ignore[return-value]  # just checked


def _shape(x: Any) -> int | tuple[int, ...]:
    return tuple(map(len, x)) if isinstance(x[0], tuple) else len(x)


def _flatten(x: Any) -> list[int]:
    return [length for row in x for length in row] if isinstance(x[0], tuple) else list(x)
