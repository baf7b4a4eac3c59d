"""What a transport is: how the shards of keys and values come by, and how their gradients find home."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from ringfa3.plan import Hop, Plan
from ringfa3.transport.cargo import Cargo, Tensors

KV = tuple[Tensor, Tensor]  # k and v, or dk and dv, of one shard or of a slice of it: [B, n, Hkv, D] each
Shard = Tensors | Cargo  # k and v; or what else travels of a shard, such as k, v and scales


class Transport(Protocol):
    """Moves shards between the ranks of one group, which all call the same methods, with plans of one mask and layout.

    A transport may keep buffers between calls (pools); what it yields belongs to the caller until the next hop only.
    """

    def rotate(self, shard: Shard, plan: Plan) -> Iterator[tuple[Hop, Tensors]]:
        """Yield each of plan.hops, once, with the slice hop.keys of its source's tensors.

        In an order of the transport's own: plan.hops', but for the hierarchy, which ends with one host's shards before
        it goes on to the next, and for pull's backward pass, which takes the own shard last.

        Work that the caller queues on a hop's tensors before it asks for the next hop is waited for before they are
        overwritten; meanwhile the next shard is on its way. A rank without hops must still exhaust the iterator: it
        may have shards to pass on.

        Args:
            shard: this rank's keys and values, [B, plan.kv_lengths[rank], Hkv, D] each; or a Cargo, the same tensors
                on every rank but for their length.

        Raises:
            RankFailed: another rank died or stopped.
        """
        ...

    def rotate_backward(self, kv: KV, plan: Plan) -> Homing:
        """As `rotate`, for the backward pass: the hops come with buffers for the gradients."""
        ...


class Homing(Protocol):
    """One backward pass on its way round the ranks. Iterate to the end, then ask for `home`."""

    def __iter__(self) -> Iterator[tuple[Hop, Tensors, KV]]:
        """Yield (hop, (k, v), (dk, dv)): the caller puts its share of the shard's gradient into dk and dv.

        dk and dv are contiguous, of the state's dtype (fp32; fp64 for fp64 inputs; in a world of one k's dtype). On
        the first hop they hold anything and are to be stored into, on later ones they are zero.
        """
        ...

    def home(self) -> KV:
        """dk, dv of this rank's own shard, summed over all ranks; [B, plan.kv_lengths[rank], Hkv, D]."""
        ...
