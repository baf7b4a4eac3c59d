"""Attention over keys that lie in the ranks' pages: of a chunk of a prompt, and of the newest tokens of many sequences.

A model's forward pass is given a step, `Prefill` or `Decode`. Every layer first writes its new keys and values into the
pages (`write`), then its queries attend to all that is cached on all ranks (`attend`); both are exact.

Prefill. The chunk's rows are dealt to the ranks. Either keys and values travel (pass-KV: the ring, whose plan has the
chunk's positions for rows and each rank's cached positions for keys), or queries do (pass-Q: all ranks get all rows,
attend to their own keys, and send each row's Partial to its owner). What travels decides, after arXiv 2411.01783; see
`ringfa3.inference.chunk.cheaper`.

Decode. Queries are the same on every rank; each attends to its own pages, and all join the ranks' Partials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ringfa3 import shards
from ringfa3.attention import ring_attention
from ringfa3.cost.machine import Machine
from ringfa3.errors import RankFailed
from ringfa3.inference.cache import PagedCache
from ringfa3.inference.chunk import WAYS, Chunk, Way, cheaper
from ringfa3.inference.newest import Sent
from ringfa3.inference.pages import Pages, Placed
from ringfa3.inference.ranks import Ranks
from ringfa3.layout import Dealing
from ringfa3.mask import Mask
from ringfa3.plan import Plan
from ringfa3_kernels import Partial, Visible, attend, decode


class Step(Protocol):
    """What a forward pass is for: where its keys and values go, and what its queries see."""

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep this pass's keys and values [B, n, Hkv, D] of a layer."""
        ...

    def attend(
        self, layer: int, q: Tensor, mask: Mask, *, scale: float | None, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """Attention of q [B, n, Hq, D] over everything cached that the mask shows: [B, n, Hq, D] in q's dtype."""
        ...


class Prefill:
    """The step of one chunk of one sequence. This rank's rows of the pass are the first of `rows`; others are ignored.

    Args:
        cache, pages: where keys and values lie; `placed` is what pages has just appended to the sequence, and the pages
            that it says to copy have been copied.
        ranks: who shares the cache.
        way: "pass-kv", "pass-q" or "auto": the cheaper one.
        machine: by whose speeds; see `cheaper`.
        impl: of the kernels; see `ringfa3_kernels.attend`.
    """

    def __init__(
        self,
        cache: PagedCache,
        pages: Pages,
        sequence: int,
        placed: Placed,
        ranks: Ranks,
        *,
        way: str = "auto",
        machine: Machine | None = None,
        impl: str = "auto",
    ) -> None:
        if way not in WAYS:
            raise ValueError(f"way: wanted one of {', '.join(map(repr, WAYS))}, got {way!r}")
        self._cache, self._pages, self._sequence, self._placed, self._ranks = cache, pages, sequence, placed, ranks
        self._way, self._machine, self._impl = way, machine or Machine.h200(), impl
        self.rows = placed.positions[ranks.rank].size
        self._device = cache.k.device
        self._slots = torch.tensor(placed.slots[ranks.rank], device=self._device)
        self._table = torch.tensor(pages.table(ranks.rank, sequence), dtype=torch.int32, device=self._device)
        self._chunks: dict[Mask, Chunk] = {}
        self._plans: dict[Mask, Plan] = {}
        self._exchanges: dict[Mask, _Exchange] = {}
        self._ways: dict[tuple[Mask, int], Way] = {}

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """See `Step.write`; k, v [1, n, Hkv, D]."""
        self._cache.write(layer, self._slots, k[0, : self.rows], v[0, : self.rows])

    def attend(
        self, layer: int, q: Tensor, mask: Mask, *, scale: float | None, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """See `Step.attend`; collective."""
        mine = q[:, : self.rows]
        if self.way(mask, q.shape[2]) == "pass-kv":
            out = self._pass_kv(layer, mine, mask, scale, softcap, sinks)
        else:
            out = self._pass_q(layer, mine, mask, scale, softcap, sinks)
        if self.rows == q.shape[1]:
            return out
        padded = torch.zeros_like(q)
        padded[:, : self.rows] = out
        return padded

    def way(self, mask: Mask, heads: int) -> Way:
        """What travels in layers of this mask and so many query heads; the same on every rank."""
        if self._ranks.world == 1:
            return "pass-kv"  # nothing does
        if self._way != "auto":
            return self._way  # type: ignore[return-value]  # checked
        found = self._ways.get((mask, heads))
        if found is None:
            cache = self._cache
            found = self._ways[mask, heads] = cheaper(
                self._chunk(mask), heads=heads, kv_heads=cache.kv_heads, head_dim=cache.head_dim,
                itemsize=cache.k.element_size(), machine=self._machine,
            )  # fmt: skip
        return found

    def _pass_kv(
        self, layer: int, q: Tensor, mask: Mask, scale: float | None, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        plan = self._plans.get(mask)
        if plan is None:
            plan = self._plans[mask] = self._chunk(mask).plan(self._ranks, self._device)
        k, v = self._keys(layer, mask)
        try:
            out: Tensor = ring_attention(
                q, k, v, plan=plan, group=self._ranks.group, scale=scale, softcap=softcap, sink_logits=sinks,
                impl=self._impl,
            )  # fmt: skip
        except RankFailed as failed:
            raise self._ranks.failed(failed) from failed
        return out

    def _pass_q(
        self, layer: int, q: Tensor, mask: Mask, scale: float | None, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        chunk = self._chunk(mask)
        exchange = self._exchanges.get(mask)
        if exchange is None:
            exchange = self._exchanges[mask] = _Exchange.of(chunk, self._ranks, self._device)
        rows = self._whole(q, chunk.part)
        if exchange.local is None:
            partial = Partial.empty(rows)
        else:
            keys, visible = exchange.local
            k, v = (x[:, keys] for x in self._keys(layer, mask))
            partial = attend(rows, k, v, visible, scale=scale, softcap=softcap, impl=self._impl)
        home = exchange.home(partial, self._ranks)
        return joined(home, sinks)[None].to(q.dtype) if home.shape[0] else torch.zeros_like(q)

    def _whole(self, q: Tensor, part: Dealing) -> Tensor:
        """The chunk's queries, in the order of positions. They travel padded: shards differ in length."""
        ranks = self._ranks
        mine = q.new_zeros(max(part.lengths), *q.shape[2:])
        mine[: q.shape[1]] = q[0]
        parts = q.new_empty(ranks.world, *mine.shape)
        ranks.all_gather(parts, mine)
        return shards.join([each[:length] for each, length in zip(parts, part.lengths, strict=True)], part, 0)[None]

    def _keys(self, layer: int, mask: Mask) -> tuple[Tensor, Tensor]:
        """This rank's cached keys and values [1, n, Hkv, D], those left out that the chunk skips."""
        chunk, rank = self._chunk(mask), self._ranks.rank
        table = self._table[chunk.skipped[rank] // self._cache.page_size :]
        return self._cache.read(layer, table, chunk.keys.lengths[rank])

    def _chunk(self, mask: Mask) -> Chunk:
        chunk = self._chunks.get(mask)
        if chunk is None:
            chunk = self._chunks[mask] = Chunk.of(self._pages, self._sequence, self._placed, mask)
        return chunk


class Decode:
    """The step of the newest tokens, 1 to 16 a sequence; q, k and v of the pass are the same on every rank.

    Args:
        cache: this rank's pages.
        ranks: who shares the cache.
        sent: where the tokens go and what they see.
        impl: of the kernel; see `ringfa3_kernels.decode`.
    """

    def __init__(self, cache: PagedCache, ranks: Ranks, sent: Sent, *, impl: str = "auto") -> None:
        self._cache, self._ranks, self._sent, self._impl = cache, ranks, sent, impl
        self._slots = sent.slots.flatten().long()

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """See `Step.write`. Every rank writes all tokens, those that it does not keep into the scratch."""
        self._cache.write(layer, self._slots, k.flatten(0, 1), v.flatten(0, 1))

    def attend(
        self, layer: int, q: Tensor, mask: Mask, *, scale: float | None, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """See `Step.attend`; collective. Bitwise equal on all ranks, which join the same Partials in the same order."""
        sent, k, v = self._sent, self._cache.k[layer], self._cache.v[layer]
        mine = decode(q, k, v, sent.tables, sent.visible[mask], scale=scale, softcap=softcap, impl=self._impl)
        if self._ranks.world == 1 and sinks is None:
            return mine.out.to(q.dtype)
        packed = _packed(mine)[None]
        if self._ranks.world > 1:
            packed, own = packed.new_empty(self._ranks.world, *packed.shape[1:]), packed
            self._ranks.all_gather(packed, own)
        return joined(packed, sinks).to(q.dtype)


def joined(partials: Tensor, sinks: Tensor | None) -> Tensor:
    """The attention of some rows over the keys of several Partials.

    Args:
        partials: fp32 [W, ..., Hq, D + 1], out and lse together.
        sinks: [Hq] or None: every row's softmax has one more score, of this size, whose value is 0.

    Returns:
        fp32 [..., Hq, D]; 0 where no Partial has seen a key.
    """
    lse = partials[..., -1]
    if sinks is not None:
        lse = torch.cat([lse, sinks.to(lse.dtype).expand_as(lse[:1])])
    # a floor, so that rows that saw nothing on any rank get shares of zeros instead of NaN
    share = lse.clamp(min=-1e30).softmax(0)[: partials.shape[0], ..., None]
    return (partials[..., :-1] * share).sum(0)


def _packed(partial: Partial) -> Tensor:
    """[B, n, Hq, D + 1]: out and lse together, to travel in one message."""
    return torch.cat([partial.out, partial.lse.transpose(1, 2).unsqueeze(-1)], -1)


@dataclass(frozen=True, eq=False)
class _Exchange:
    """Pass-Q's way of Partials back to the rows' owners.

    Args:
        local: what the chunk's rows see of this rank's keys; see `Chunk.local`.
        order: int64, the rows that are sent, rank 0's first.
        sent, received: rows to and from each rank; none where the receiver sees none of the sender's keys.
    """

    local: tuple[slice, Visible] | None
    order: Tensor
    sent: list[int]
    received: list[int]

    @classmethod
    def of(cls, chunk: Chunk, ranks: Ranks, device: torch.device) -> _Exchange:
        rank, lengths = ranks.rank, chunk.part.lengths
        readers = [r for r in range(ranks.world) if chunk.needs[r][rank] is not None]
        order = np.concatenate([np.zeros(0, np.int32), *(chunk.part.positions(r) for r in readers)])
        sent = [lengths[r] if r in readers else 0 for r in range(ranks.world)]
        received = [lengths[rank] if hull is not None else 0 for hull in chunk.needs[rank]]
        return cls(chunk.local(rank, device), torch.from_numpy(order).long().to(device), sent, received)

    def home(self, partial: Partial, ranks: Ranks) -> Tensor:
        """The Partials of this rank's rows, of all ranks whose keys they see, in rank order: [W, n, Hq, D + 1]."""
        packed = _packed(partial)[0, self.order]
        arrived = packed.new_empty(sum(self.received), *packed.shape[1:])
        ranks.all_to_all(arrived, packed, self.received, self.sent)
        senders = sum(rows > 0 for rows in self.received)
        return arrived.view(senders, max(self.received), *arrived.shape[1:])
