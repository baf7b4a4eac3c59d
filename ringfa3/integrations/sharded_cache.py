"""ShardedCache: each rank keeps the keys and values of its own positions, and new tokens attend to all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from ringfa3 import shards
from ringfa3.mask import Mask
from ringfa3.plan import Plan
from ringfa3_kernels import Partial, Visible, attend, merge


class ShardedCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    """A transformers cache of which every rank holds its own part.

    The prefill leaves each rank the keys and values of its shard. Tokens after it are seen by every rank; their keys
    and values are kept by one, the ranks taking turns, so that the shards stay equally long. Every layer keeps all its
    positions, also under a sliding window: what a new token sees of them is decided when it attends.

    Args:
        plan: how the prefill is sharded.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.documents: Any = None  # of the prefill, as Mask has them; padding counts as one
        self.positions_given = False  # whether the caller gives position_ids
        self.positions: NDArray[np.int64] = np.zeros(0, np.int64)  # of the local keys, ascending
        self.seen = 0  # positions on all ranks together
        self.broken = False  # whether a pass failed, and left some layers without its keys
        self.keeps = True  # whether this rank keeps what the current forward pass computes

    def begin(self, tokens: int, documents: Any = None, positions_given: bool = False) -> None:
        """Announce a forward pass: the prefill, or `tokens` further positions that every rank is given alike."""
        if self.seen == 0:
            self.documents, self.positions_given = documents, positions_given
            self.positions = self.plan.dealing.positions(self.plan.rank).astype(np.int64)
            self.seen = self.plan.seqlen
            return
        self.keeps = (self.seen - self.plan.seqlen) % self.plan.world == self.plan.rank
        new = np.arange(self.seen, self.seen + tokens, dtype=np.int64)
        self.seen += tokens
        if self.keeps:
            self.positions = np.concatenate([self.positions, new])

    def visible(self, mask: Mask, tokens: int, device: torch.device) -> Visible:
        """What the last `tokens` positions see of this rank's keys, under the mask of the prefill, continued."""
        mask = Mask(mask.causal, mask.window, self.continued(mask.documents, self.seen), None, mask.chunk)
        lo, hi = mask.bounds(np.arange(self.seen - tokens, self.seen), self.seen)
        begin, end = (torch.from_numpy(np.searchsorted(self.positions, x).astype(np.int32)) for x in (lo, hi))
        return Visible(begin.to(device), end.to(device))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the keys and values [B, H, S, D] of a layer if this rank is to; all that it holds of that layer."""
        if self.keeps:
            kept: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return kept
        layer = self.layers[layer_idx]
        return layer.keys, layer.values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions on all ranks together."""
        return self.seen

    def continued(self, documents: Any, seqlen: int) -> Any:
        """The prefill's documents, the last one of every batch row reaching to the end of seqlen positions."""
        new = seqlen - self.plan.seqlen
        if documents is None:
            return None
        if isinstance(documents[0], tuple):
            return tuple((*row[:-1], row[-1] + new) for row in documents)
        return (*documents[:-1], documents[-1] + new)


def attend_sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    plan: Plan,
    *,
    scale: float | None,
    softcap: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of the same queries on every rank over the keys of all of them: one local pass, one merge.

    Args:
        q: [B, Sq, Hq, D], equal on all ranks.
        k, v: [B, Sk, Hkv, D], this rank's; Sk may be 0.
        visible: what each query sees of k.
        sink_logits: [Hq] or None.

    Returns:
        [B, Sq, Hq, D] in q's dtype, bitwise equal on all ranks: they merge the same Partials in the same order.
    """
    mine = attend(q, k, v, visible, scale=scale, softcap=softcap)
    partial = mine
    if plan.world > 1:
        group = shards.members(plan.group)[0]
        packed = torch.cat([mine.out, mine.lse.transpose(1, 2).unsqueeze(-1)], -1)
        parts = [torch.empty_like(packed) for _ in range(plan.world)]
        dist.all_gather(parts, packed, group=group)
        partials = [Partial(part[..., :-1], part[..., -1].transpose(1, 2)) for part in parts]
        partial = partials[0]
        for other in partials[1:]:
            partial = merge(partial, other)
    out = partial.out
    if sink_logits is not None:  # a key with this score and value 0
        out = out * torch.sigmoid(partial.lse - sink_logits.to(out.dtype)[:, None]).transpose(1, 2).unsqueeze(-1)
    return out.to(q.dtype)
