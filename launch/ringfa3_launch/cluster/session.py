"""Session: a caller's keys and values that stay on the ranks, sharded by position, to be added to and attended to."""

from __future__ import annotations

import contextlib
import copy
import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ringfa3 import RankFailed
from ringfa3.inference.pages import CacheFull, Pages
from ringfa3.layout import deal, resolve
from ringfa3_launch.cluster.arrays import CODES, Kind, finite, pick, take
from ringfa3_launch.cluster.faults import Closed, Overloaded, SessionLost
from ringfa3_launch.cluster.tensors import Array

if TYPE_CHECKING:
    from ringfa3_launch.cluster.channel import Message
    from ringfa3_launch.cluster.gang import Gang, Header, Tensors

FEW_ROWS = 16  # queries that every rank gets all of; more are dealt
SEQUENCE = 0


class Session:
    """One sequence's keys and values on the ranks of a cluster; made by `RingCluster.session`. Any thread may call.

    It is bound to the gang of ranks that was there when it was opened: when that fails, it is lost.
    """

    def __init__(
        self,
        gang: Gang,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: str,
        max_tokens: int,
        timeout: float | None = None,
    ) -> None:
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "max_tokens": max_tokens}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: wanted an integer, 1 or more, got {value!r}")
        if heads % kv_heads:
            raise ValueError(f"heads: wanted a multiple of kv_heads {kv_heads}, got {heads}")
        if head_dim % 8 or head_dim > 256:
            raise ValueError(f"head_dim: wanted a multiple of 8, at most 256, got {head_dim}")
        if dtype not in CODES:
            raise ValueError(f"dtype: wanted one of {', '.join(CODES)}, got {dtype!r}")
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.max_tokens = max_tokens
        self.id = secrets.token_urlsafe(16)
        self._gang, self._timeout = gang, timeout
        self._lock = threading.Lock()
        self._closed = False
        opened = self._call({"do": "open", **sizes, "dtype": dtype}, [{}] * gang.world)[0].header
        self._pages = Pages(gang.world, opened["pages"], opened["page_size"])  # equal to the ranks' own
        self._pages.create(SEQUENCE)

    @property
    def length(self) -> int:
        """Tokens that it holds."""
        return self._pages.length(SEQUENCE)

    def append(self, k: Array, v: Array) -> int:
        """Add tokens; returns the new length.

        Args:
            k, v: [1, n, kv_heads, head_dim] numpy arrays or torch tensors of the session's dtype.

        Raises:
            ValueError: an argument is wrong; names it.
            Overloaded: there is no room for so many; nothing was added.
            SessionLost: the ranks that held it have failed.
        """
        kind = Kind.of(k=k, v=v)
        for name, x in (("k", k), ("v", v)):
            self._check(name, x, kind, self.kv_heads)
        if k.shape != v.shape:
            raise ValueError(f"v: wanted k's shape {list(k.shape)}, got {list(v.shape)}")
        with self._lock:
            self._check_open()
            start, count = self.length, int(k.shape[1])
            if count == 0:
                return start
            if start + count > self.max_tokens:
                raise Overloaded(f"session: wanted at most max_tokens {self.max_tokens}, got {start} and {count} more")
            try:
                placed = self._pages.append(SEQUENCE, count)
            except CacheFull as error:
                raise Overloaded(str(error)) from None
            parts = [{"k": pick(k, rows - start), "v": pick(v, rows - start)} for rows in placed.positions]
            try:
                self._call({"do": "append", "count": count, "start": start}, parts)
            except BaseException:
                self._pages.truncate(SEQUENCE, start)
                raise
            return start + count

    def attend(
        self,
        q: Array,
        *,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
    ) -> Array:
        """Attention of queries at the session's last positions over all that it holds.

        Args:
            q: [1, n, heads, head_dim], n at most `length`: row i is position length - n + i.
            causal, window, softcap, scale: see `ringfa3.ring_attention`.

        Returns:
            [1, n, heads, head_dim], of q's kind and dtype.

        Raises:
            ValueError: an argument is wrong; names it.
            SessionLost: the ranks that held it have failed.
        """
        kind = Kind.of(q=q)
        self._check("q", q, kind, self.heads)
        header: dict[str, Any] = {"do": "attend", **options(causal, window, softcap, scale)}
        with self._lock:
            self._check_open()
            rows, world = int(q.shape[1]), self._gang.world
            if not 1 <= rows <= self.length:
                raise ValueError(f"q: wanted 1 to {self.length} rows, as the session has, got {rows}")
            header |= {"rows": rows, "length": self.length}
            if rows <= FEW_ROWS:
                answers = self._call(header, [{"q": q}] * world)
                return kind.back([answers[0].tensors["out"]], [[(0, rows, 1)]], 1)
            dealing = deal(resolve("zigzag"), rows, world)
            answers = self._call(header, [{"q": take(q, runs)} for runs in dealing.runs])
        return kind.back([answer.tensors["out"] for answer in answers], dealing.runs, 1)

    def close(self) -> None:
        """Give its memory back. Again: does nothing. Nor does it where the session is lost."""
        with self._lock:
            if not self._closed:
                self._closed = True
                with contextlib.suppress(SessionLost, RankFailed, Closed):
                    self._call({"do": "close"}, [{}] * self._gang.world)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, name: str, x: Array, kind: Kind, heads: int) -> None:
        if kind.name != self.dtype:
            raise ValueError(f"{name}: wanted the session's dtype {self.dtype}, got {kind.name}")
        finite(name, x)
        if (x.shape[0], *x.shape[2:]) != (1, heads, self.head_dim):
            raise ValueError(f"{name}: wanted [1, n, {heads}, {self.head_dim}], got shape {list(x.shape)}")

    def _check_open(self) -> None:
        """Raise Closed or SessionLost unless it can be used."""
        if self._closed:
            raise Closed("the session has been closed")
        failure = self._gang.failure
        if isinstance(failure, Closed):
            raise copy.copy(failure)
        if failure is not None:
            raise SessionLost(f"the session was lost with the ranks that held it: {failure}")

    def _call(self, header: Header, tensors: Sequence[Tensors]) -> list[Message]:
        return self._gang.call({**header, "session": self.id}, tensors, timeout=self._timeout)


def options(causal: bool, window: tuple[int, int] | None, softcap: float, scale: float | None) -> dict[str, Any]:
    """The options of attention as a call says them; ValueError names what is wrong."""
    if not isinstance(causal, bool):
        raise ValueError(f"causal: wanted True or False, got {causal!r}")
    if window is not None and (len(window) != 2 or not all(type(x) is int for x in window)):
        raise ValueError(f"window: wanted (left, right) or None, got {window!r}")
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name}: wanted a number, got {value!r}")
    return {"causal": causal, "window": window and list(window), "softcap": float(softcap), "scale": scale}
