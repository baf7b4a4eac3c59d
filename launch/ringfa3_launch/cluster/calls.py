"""Calls: what a rank does, together with the others, for a caller of the cluster: attention, and sessions.

A call is prepared first, which must not involve other ranks and may fail; when all ranks could (`Roll`), it is carried
out, which must not fail: who fails then has left the others in the middle of something, and the gang is of no use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringfa3 import Mask, ring_attention
from ringfa3.inference.attend import Decode, Prefill
from ringfa3.inference.cache import PagedCache
from ringfa3.inference.newest import Sent
from ringfa3.inference.pages import CacheFull, Pages, Placed
from ringfa3.inference.ranks import Ranks
from ringfa3.layout import deal, resolve
from ringfa3_kernels import Unsupported, Visible
from ringfa3_launch.cluster.arrays import CODES
from ringfa3_launch.cluster.desk import Call, Client, Desk
from ringfa3_launch.cluster.faults import Overloaded, SessionLost, blame
from ringfa3_launch.cluster.roll import Roll
from ringfa3_launch.cluster.settings import Settings

FEW_ROWS = 16  # what `decode` takes; more rows are dealt to the ranks
SEQUENCE = 0  # the only one of a session's pages

Answer = tuple[dict[str, Any], dict[str, Tensor]]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Work:
    """A prepared call: what to do, or how to take back what was prepared."""

    run: Callable[[], Answer]
    undo: Callable[[], None] = _nothing


@dataclass(frozen=True, eq=False)
class Held:
    """A session's share on this rank."""

    pages: Pages
    cache: PagedCache
    heads: int
    client: Client | None  # who opened it, as this rank sees that; the leader closes it when this goes


class Calls:
    """The calls of one rank.

    Args:
        settings: limits.
        device: of this rank.
        roll: of all ranks.
        desk: where calls wait.
    """

    def __init__(self, settings: Settings, device: torch.device, roll: Roll, desk: Desk) -> None:
        self._settings, self._device, self._roll, self._desk = settings, device, roll, desk
        self._ranks = Ranks.of()
        self._sessions: dict[str, Held] = {}
        self._prepare: dict[str, Callable[[dict[str, Any], Call], Work]] = {
            "attention": self._attention, "open": self._open, "append": self._append, "attend": self._attend,
            "close": self._close,
        }  # fmt: skip

    @property
    def session_bytes(self) -> int:
        """Bytes of the sessions' keys and values on this rank."""
        return sum(held.cache.nbytes for held in self._sessions.values())

    def sessions_of(self, client: Client) -> list[str]:
        """The sessions that this client opened."""
        return [name for name, held in list(self._sessions.items()) if held.client is client]

    def forget(self, name: str) -> None:
        """Close a session whose client has gone; the leader has announced it."""
        self._sessions.pop(name, None)

    def execute(self, header: dict[str, Any]) -> None:
        """Carry out the call that the leader announced: prepare, ask the others, do it, answer.

        Args:
            header: the leader's; this rank's own part waits at its desk.

        Raises:
            Exception: it failed in the middle.
        """
        call = self._desk.take(header["id"])
        work: Work | None = None
        kind, problem = "skipped", "another rank could not"
        if call is not None:
            try:
                work = self._prepare[header["do"]](header, call)
            except Exception as error:
                kind, problem = _kind(error), str(error) or type(error).__name__
        if not self._roll.all_can(work is not None):
            if work is not None:
                work.undo()
            if call is not None:
                call.refuse(kind, problem)
            return
        assert call is not None
        assert work is not None
        try:
            answer, tensors = work.run()
            if self._device.type == "cuda":
                tensors = {name: x.cpu() for name, x in tensors.items()}  # waits; what went wrong is raised here
        except (ValueError, Unsupported) as error:  # all ranks raise it, at the door, before anything is sent
            call.refuse("wrong", str(error))
            return
        except Exception as error:
            call.break_off(blame(error, self._ranks.rank))
            raise
        call.reply(answer, tensors)

    def _attention(self, header: dict[str, Any], call: Call) -> Work:
        q, k, v = (self._tensor(call, name) for name in ("q", "k", "v"))
        if [len(x.shape) for x in (q, k, v)] != [4] * 3 or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
            raise ValueError(f"q, k, v: wanted shards [B, n, H, D], got {[list(x.shape) for x in (q, k, v)]}")
        mask, seqlen = _mask(header), _integer(header, "seqlen", 1)
        scale, softcap = _number(header, "scale"), _number(header, "softcap") or 0.0
        lse = bool(header.get("lse"))
        lengths = deal(resolve("zigzag"), seqlen, self._ranks.world).lengths
        if q.shape[1] != lengths[self._ranks.rank]:
            raise ValueError(f"q: wanted {lengths[self._ranks.rank]} rows of {seqlen} here, got {q.shape[1]}")
        q, k, v = (x.to(self._device) for x in (q, k, v))

        def run() -> Answer:
            out, sums = ring_attention(
                q, k, v, mask=mask, softcap=softcap, scale=scale, layout="zigzag", return_lse=True
            )
            return {}, {"out": out, "lse": sums} if lse else {"out": out}

        return Work(run)

    def _open(self, header: dict[str, Any], call: Call) -> Work:
        name, page = str(header["session"]), self._settings.page_size
        heads, kv_heads, head_dim, tokens = (
            _integer(header, field, 1) for field in ("heads", "kv_heads", "head_dim", "max_tokens")
        )
        if header.get("dtype") not in CODES:
            raise ValueError(f"dtype: wanted one of {', '.join(CODES)}, got {header.get('dtype')!r}")
        dtype = getattr(torch, header["dtype"])
        if heads % kv_heads or head_dim % 8 or head_dim > 256:
            raise ValueError(f"heads: wanted groups of heads and head_dim 8, 16, ..., 256, got {header}")
        pages = pages_for(tokens, self._ranks.world, page)
        nbytes = 2 * (pages + 1) * page * kv_heads * head_dim * dtype.itemsize
        if nbytes > self._settings.session_memory:  # for ever: not a matter of coming back
            raise ValueError(
                f"max_tokens: wanted a session of at most {self._settings.session_memory} bytes on a rank, "
                f"got {tokens} tokens, {nbytes} bytes"
            )
        if self.session_bytes + nbytes > self._settings.session_memory:
            raise Overloaded(
                f"sessions: wanted at most {self._settings.session_memory} bytes on a rank, got {self.session_bytes} "
                f"and {nbytes} more"
            )
        cache = PagedCache(
            layers=1, kv_heads=kv_heads, head_dim=head_dim, pages=pages, page_size=page, dtype=dtype,
            device=self._device,
        )  # fmt: skip

        def run() -> Answer:
            held = Held(Pages(self._ranks.world, pages, page), cache, heads, call.client)
            held.pages.create(SEQUENCE)
            self._sessions[name] = held
            return {"pages": pages, "page_size": page}, {}

        return Work(run)

    def _append(self, header: dict[str, Any], call: Call) -> Work:
        held, rank = self._held(header), self._ranks.rank
        count, start = _integer(header, "count", 1), _integer(header, "start", 0)
        length = held.pages.length(SEQUENCE)
        if start != length:
            raise SessionLost(f"session: wanted an append at its end {length}, got one at {start}: a call was given up")
        k, v = (self._tensor(call, name).to(self._device) for name in ("k", "v"))
        placed = held.pages.append(SEQUENCE, count)
        shape = (1, placed.positions[rank].size, held.cache.kv_heads, held.cache.head_dim)
        if k.shape != shape or v.shape != shape or k.dtype != held.cache.k.dtype or v.dtype != k.dtype:
            held.pages.truncate(SEQUENCE, start)
            raise ValueError(
                f"k, v: wanted {held.cache.k.dtype} {list(shape)} here, "
                f"got {k.dtype} {list(k.shape)}, {v.dtype} {list(v.shape)}"
            )

        def run() -> Answer:
            held.cache.write(0, torch.from_numpy(placed.slots[rank]).to(self._device), k[0], v[0])
            return {"length": start + count}, {}

        return Work(run, lambda: held.pages.truncate(SEQUENCE, start))

    def _attend(self, header: dict[str, Any], call: Call) -> Work:
        held, mask = self._held(header), _mask(header)
        rows, length = _integer(header, "rows", 1), held.pages.length(SEQUENCE)
        scale, softcap = _number(header, "scale"), _number(header, "softcap") or 0.0
        if header.get("length") != length:
            raise SessionLost(f"session: wanted its length {length}, got {header.get('length')}: a call was given up")
        if rows > length:
            raise ValueError(f"q: wanted at most the session's {length} rows, got {rows}")
        q = self._tensor(call, "q").to(self._device)
        placed = asked(rows, length, self._ranks.world)
        mine = rows if rows <= FEW_ROWS else placed.positions[self._ranks.rank].size
        shape = (1, mine, held.heads, held.cache.head_dim)
        if q.shape != shape or q.dtype != held.cache.k.dtype:
            raise ValueError(f"q: wanted {held.cache.k.dtype} {list(shape)} here, got {q.dtype} {list(q.shape)}")
        if rows <= FEW_ROWS:
            few = Decode(held.cache, self._ranks, self._newest(held.pages, rows, mask))
            first = self._ranks.rank == 0  # all ranks have the same answer

            def run() -> Answer:
                out = few.attend(0, q, mask, scale=scale, softcap=softcap, sinks=None)
                return {}, {"out": out} if first else {}

            return Work(run)
        step = Prefill(held.cache, held.pages, SEQUENCE, placed, self._ranks, way=self._settings.prefill)
        return Work(lambda: ({}, {"out": step.attend(0, q, mask, scale=scale, softcap=softcap, sinks=None)}))

    def _newest(self, pages: Pages, rows: int, mask: Mask) -> Sent:
        """A session's last positions, as a decode step sees them; they are in the cache already."""
        length, rank = pages.length(SEQUENCE), self._ranks.rank
        bounds = [pages.below(rank, SEQUENCE, x) for x in mask.bounds(np.arange(length - rows, length), length)]
        table = pages.block_tables(rank, [SEQUENCE])
        if not table.size:
            table = np.full((1, 1), -1, np.int32)
        lo, hi = (torch.from_numpy(x[None]).to(self._device) for x in bounds)
        none = torch.zeros(1, rows, dtype=torch.int32, device=self._device)
        return Sent(none, none, none, torch.from_numpy(table).to(self._device), {mask: Visible(lo, hi)})

    def _close(self, header: dict[str, Any], call: Call) -> Work:
        self._held(header)

        def run() -> Answer:
            self.forget(str(header["session"]))
            return {}, {}

        return Work(run)

    def _held(self, header: dict[str, Any]) -> Held:
        held = self._sessions.get(str(header.get("session")))
        if held is None:
            raise SessionLost("session: wanted one that is open, got one that these ranks do not hold")
        return held

    def _tensor(self, call: Call, name: str) -> Tensor:
        if name not in call.tensors:
            raise ValueError(f"{name}: wanted a tensor of that name, got {sorted(call.tensors)}")
        return call.tensors[name].torch()


def pages_for(tokens: int, world: int, page_size: int) -> int:
    """Pages a rank that hold its share of so many tokens, and an eighth more: appends are not dealt to the row."""
    share = math.ceil(tokens / world)
    return math.ceil((share + share // 8) / page_size) + 1


def asked(rows: int, length: int, world: int) -> Placed:
    """The last rows of a session as queries, dealt to the ranks (zigzag); they go nowhere."""
    dealing, start = deal(resolve("zigzag"), rows, world), length - rows
    positions = tuple(dealing.positions(rank).astype(np.int64) + start for rank in range(world))
    nowhere = (np.zeros(0, np.int64),) * world
    return Placed(start, rows, positions, nowhere, ((),) * world)


def _kind(error: Exception) -> str:
    """How a caller is to take it; see `Client.refuse`."""
    if isinstance(error, SessionLost):
        return "gone"
    if isinstance(error, Overloaded | CacheFull | MemoryError | torch.OutOfMemoryError):
        return "overloaded"
    if isinstance(error, ValueError | TypeError | KeyError | AttributeError | Unsupported):
        return "wrong"
    # torch on CPUs says so in a RuntimeError
    return "overloaded" if "can't allocate memory" in str(error) else "failed"


def _mask(header: dict[str, Any]) -> Mask:
    window = header.get("window")
    return Mask(causal=header.get("causal", True), window=None if window is None else tuple(window))


def _integer(header: dict[str, Any], name: str, low: int) -> int:
    value = header.get(name)
    if type(value) is not int or not low <= value < 1 << 31:
        raise ValueError(f"{name}: wanted an integer, {low} or more, got {value!r}")
    return value


def _number(header: dict[str, Any], name: str) -> float | None:
    value = header.get(name)
    if value is not None and (type(value) not in (int, float) or not abs(value) < 1e300):  # a float cannot hold more
        raise ValueError(f"{name}: wanted a finite number, got {value!r}")
    return value
