"""Plan: what one rank holds, from whom it needs which keys, and which of them each of its rows sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import count, repeat
from weakref import WeakSet, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringfa3 import shards
from ringfa3.hops import Hop, Needs, checked_length, hops_of, needs_of, widened, widened_hop
from ringfa3.layout import Dealing, Layout, deal, resolve
from ringfa3.mask import Mask
from ringfa3.mesh import Axes, sliced
from ringfa3.shards import Group
from ringfa3_kernels.lasting import lasting

__all__ = ["Hop", "Plan", "plan"]


_keys = count(2)  # torch.compile takes 0 and 1 for constants, other numbers for variables: a new plan compiles nothing
_by_key: WeakValueDictionary[int, Plan] = WeakValueDictionary()
_groups: WeakSet[dist.ProcessGroup] = WeakSet()  # of the plans that are kept


@dataclass(frozen=True, eq=False)
class Plan:
    """How one rank computes its rows of a sharded attention; made by `plan` or `Plan.build`.

    Args:
        mask, layout, seqlen, world, rank: what it was made for.
        group: the process group that `unshard` and `loss_weight` talk over.
        kv_seqlen: length of the keys' sequence; seqlen but for cross attention.
        lengths: rows that each rank holds.
        kv_lengths: keys that each rank holds; lengths, but for cross attention.
        positions: int64 [n], this rank's positions, ascending, on the plan's device (for RoPE).
        hops: own shard first, then rank - 1, rank - 2, ... (mod world): those sources alone that needs[rank] names.
        needs: `needs[r][s]` is the slice of rank s's shard that rank r needs, None where it needs nothing. The same on
            every rank, so it says what to send; hops follow it exactly. The slice is the hull of what r's rows see.
            Where runs have step 1 it is exact; under striped it can be too wide, or hold no key that a row sees, where
            windows or documents are shorter than about `world` positions.
        dealing: all ranks' runs of positions.
        axes: of the mesh ulysses x ring that it was made for; None: a plain ring. On a mesh, world, rank, lengths and
            dealing count all ranks; hops and needs count those of the ring axis, and are of the whole shards there.
        ring: the plan of this rank on the ring axis, for the shard that its peers on the ulysses axis hold together;
            without a mesh the plan itself.
        key: its number in this process, by which compiled code finds it again (`by_key`).
    """

    mask: Mask
    layout: Layout
    seqlen: int
    kv_seqlen: int
    world: int
    rank: int
    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    positions: Tensor
    hops: tuple[Hop, ...]
    needs: Needs
    dealing: Dealing = field(repr=False)
    group: Group = None
    axes: Axes | None = None
    _ring: Plan | None = field(default=None, repr=False)
    _aligned: dict[int, Plan | None] = field(default_factory=dict, init=False, repr=False)  # None: as it is
    key: int = field(default_factory=lambda: next(_keys), init=False, repr=False)

    def __post_init__(self) -> None:
        _by_key[self.key] = self

    @staticmethod
    def by_key(key: int) -> Plan:
        """The living plan of this number.

        Raises:
            ValueError: it is gone.
        """
        found = _by_key.get(key)
        if found is None:
            raise ValueError(
                f"plan: wanted one that lives while compiled code uses it, got number {key}, which is gone"
            )
        return found

    @staticmethod
    def build(
        mask: Mask,
        layout: str | Layout,
        seqlen: int,
        world: int,
        rank: int,
        device: torch.device | str | None = None,
        *,
        kv_seqlen: int | None = None,
        group: Group = None,
        axes: Axes | None = None,
    ) -> Plan:
        """The plan of any rank of any world, without a process group: for tests and planning; see `plan`.

        Args:
            axes: of a mesh whose ranks are the world.

        Raises:
            ValueError: an argument is wrong; names it, what was wanted and what came.
        """
        seqlen, kv_seqlen = _check(mask, seqlen, world, rank, kv_seqlen)
        layout = resolve(layout, mask)
        if axes is not None:
            if world != len(axes.places):
                raise ValueError(f"axes: wanted those of a mesh of {world} ranks, got {axes}")
            ring = Plan.build(
                mask, layout, seqlen, axes.ring, axes.places[rank][1], device, kv_seqlen=_other(kv_seqlen, seqlen)
            )
            return ring._on(axes, rank, group)
        rows = deal(layout, seqlen, world)
        keys = deal(layout, kv_seqlen, world)
        needs = needs_of(mask, rows, keys)
        positions, hops = hops_of(mask, rows, keys, needs[rank], rank, torch.device(device or "cpu"))
        return Plan(
            mask,
            layout,
            seqlen,
            kv_seqlen,
            world,
            rank,
            rows.lengths,
            keys.lengths,
            positions,
            hops,
            needs,
            rows,
            group,
        )

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def ring(self) -> Plan:
        """See the class."""
        return self._ring or self

    def aligned(self, block: int) -> Plan:
        """The plan with slices of keys that begin and end at multiples of `block` keys of a shard, or end with it.

        Rows see the same keys. Kept; but not what is made while a CUDA graph is captured, which only replays compute.
        """
        assert self.ring is self  # of a mesh, its ring's plan has the hops
        if block not in self._aligned:
            needs = tuple(tuple(map(widened, row, repeat(block), self.kv_lengths)) for row in self.needs)
            hops = tuple(widened_hop(hop, needs[self.rank][hop.source]) for hop in self.hops)
            made = None if needs == self.needs else replace(self, needs=needs, hops=hops)
            if made is not None and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return made
            self._aligned[block] = made
        return self._aligned[block] or self

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's positions of a tensor that every rank holds whole, a copy; differentiable."""
        if x.shape[shards.checked_dim(x, dim)] != self.seqlen:
            raise ValueError(f"x: wanted {self.seqlen} positions in dim {dim}, got shape {list(x.shape)}")
        return shards.take(x, self.dealing.runs[self.rank], dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor from this rank's shard and the others', on every rank: an all-gather; differentiable.

        The gradient of a shard is the sum over ranks of what each rank's loss makes of it (so a loss that every rank
        computes alike counts once a rank).
        """
        return shards.gather(x, self.dealing, self.rank, dim, self.group)

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole tensor from all ranks' shards, where one process holds them all: `unshard` without a group."""
        if len(parts) != self.world:
            raise ValueError(f"parts: wanted a shard per rank, {self.world}, got {len(parts)}")
        return shards.join(parts, self.dealing, dim)

    def labels(self, y: Tensor, ignore_index: int = -100) -> Tensor:
        """This rank's next-token targets: y shifted by one before it is sharded, so that none is lost between ranks.

        Args:
            y: integers [B, S] or [S]: token ids, or labels not yet shifted, of the whole sequence.
            ignore_index: written where there is no token to predict: at the last position of every document, and where
                a prefix lets a position see its successor.

        Returns:
            [B, n] or [n]; compare with the logits at this rank's positions, without another shift.

        Raises:
            ValueError: y has another length or batch size, or the mask is not causal: every position sees its target.
        """
        if not self.mask.causal:
            raise ValueError("labels: wanted a plan with a causal mask, got one whose positions see their successors")
        batch = self.mask.batch
        if y.ndim not in (1, 2) or y.shape[-1] != self.seqlen or (batch is not None and y.shape[:-1] != (batch,)):
            wanted = f"[{'B' if batch is None else batch}, {self.seqlen}]"
            raise ValueError(f"y: wanted token ids {wanted}, got shape {list(y.shape)}")
        targets = self.shard(y.roll(-1, -1), -1)
        return targets.masked_fill_(self._no_target.to(y.device), ignore_index)

    def loss_weight(self, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """Factor for this rank's mean loss, such that the mean over ranks of the products is the mean over all tokens.

        That mean over ranks is what data-parallel gradient averaging computes. A rank without a valid token gets 0;
        its own mean is 0 / 0, so where that can happen use `loss_weights` instead.

        Args:
            labels: this rank's targets, from `labels`. Every rank of the group must call (an all-reduce).

        Returns:
            fp32 scalar: this rank's valid tokens * world / all ranks' valid tokens.
        """
        mine, total = self._valid(labels, ignore_index)
        return mine * self.world / total

    def loss_weights(self, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """Factors for this rank's losses per token: the mean over ranks of sum(loss * factor) is all tokens' mean.

        Returns:
            fp32, labels' shape: world / all ranks' valid tokens, and 0 at ignore_index. Every rank must call.
        """
        return (labels != ignore_index) * (self.world / self._valid(labels, ignore_index)[1])

    def describe(self) -> str:
        """Lines for people: who holds what, and how many pairs each hop computes. Synchronises the device."""
        runs = ", ".join(f"{a}:{b}" + (f":{c}" if c > 1 else "") for a, b, c in self.dealing.runs[self.rank])
        lines = [
            f"{self.mask} over {self.seqlen} positions, {self.layout.name}, rank {self.rank} of {self.world}",
            f"rows {self.lengths[self.rank]} (all ranks: {min(self.lengths)} to {max(self.lengths)}): {runs or 'none'}",
        ]
        total = 0
        if self.axes is not None:
            ring = self.ring
            lines.append(
                f"mesh of {self.axes.ulysses} ulysses x {self.axes.ring} ring: hops of its share of the heads, "
                f"as rank {ring.rank} of the ring's {ring.world}, for {ring.lengths[ring.rank]} rows"
            )
        for hop in self.hops:
            pairs = int((hop.visible.hi - hop.visible.lo).clamp(min=0).sum())
            total += pairs
            keys = f"keys {hop.keys.start}:{hop.keys.stop} of {self.ring.kv_lengths[hop.source]}"
            lines.append(f"  from rank {hop.source}: {keys}, {hop.visible.kind}, {pairs} pairs")
        return "\n".join([*lines, f"  {total} pairs in {len(self.hops)} hops"])

    def _on(self, axes: Axes, rank: int, group: Group) -> Plan:
        """The plan of a rank of a mesh, from its ring's."""
        world = len(axes.places)
        dealing = deal(sliced(self.layout, axes), self.seqlen, world)
        keys = deal(sliced(self.layout, axes), self.kv_seqlen, world)
        before = sum(dealing.lengths[peer] for peer in axes.peers(rank) if axes.places[peer] < axes.places[rank])
        positions = self.positions[before : before + dealing.lengths[rank]]
        return replace(
            self, world=world, rank=rank, lengths=dealing.lengths, kv_lengths=keys.lengths, positions=positions,
            dealing=dealing, group=group, axes=axes, _ring=self,
        )  # fmt: skip

    def _valid(self, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """This rank's number of valid labels and all ranks' (at least 1): fp32 scalars."""
        if labels.shape[-1:] != (self.lengths[self.rank],):
            raise ValueError(f"labels: wanted this rank's {self.lengths[self.rank]}, got shape {list(labels.shape)}")
        mine = (labels != ignore_index).sum()
        total = mine.clone()
        if self.world > 1:
            group, size, _ = shards.members(self.group)
            if size != self.world:
                raise ValueError(f"group: wanted the plan's {self.world} ranks, got {size}")
            dist.all_reduce(total, group=group)
        return mine.float(), total.clamp(min=1).float()

    @cached_property
    def _no_target(self) -> Tensor:
        """bool [n] or [B, n]: rows that have no next token to predict."""
        p = self.dealing.positions(self.rank)
        ignored = self.mask.last(self.seqlen)[..., p]
        if self.mask.prefix is not None:
            ignored = ignored | (self.mask.bounds(p, self.seqlen)[1] > p + 1)
        return lasting(lambda: torch.from_numpy(ignored).to(self.device), self.device)


def plan(
    mask: Mask,
    layout: str | Layout,
    seqlen: int,
    group: Group = None,
    *,
    device: torch.device | str | None = None,
    kv_seqlen: int | None = None,
    axes: Axes | None = None,
) -> Plan:
    """This rank's Plan; kept, so that asking again with equal arguments costs microseconds.

    Args:
        mask: who sees what, by global position.
        layout: "contiguous", "zigzag", "striped", "balanced" (balances this mask) or a Layout.
        seqlen: positions on all ranks together; any, also fewer than ranks.
        group: a ProcessGroup, a DeviceMesh, or None: all ranks (one, where torch.distributed is not initialised). On a
            2-D mesh, ulysses x ring, the layout deals positions over the ring axis, and ranks along the ulysses axis
            hold contiguous slices of the same shard.
        device: where positions and bounds go; None: torch's default device.
        kv_seqlen: for cross attention, with Mask(causal=False): length of the sequence that keys and values are from,
            dealt by the same layout (shard them with a plan of that length).
        axes: how the group's ranks stand on a mesh; None: as the group says.

    Raises:
        ValueError: an argument is wrong; names it, what was wanted and what came.
    """
    process_group, world, rank = shards.members(group)
    if not isinstance(device, torch.device):
        device = torch.device(device) if device is not None else torch.get_default_device()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not isinstance(mask, Mask):
        raise ValueError(f"mask: wanted a Mask, got {type(mask).__name__}")
    seqlen = checked_length("seqlen", seqlen)
    kv_seqlen = None if kv_seqlen is None else checked_length("kv_seqlen", kv_seqlen)
    axes = axes or shards.axes(group)
    mesh = group if isinstance(group, DeviceMesh) and group.ndim != 1 else None
    return _kept(mask, resolve(layout, mask), seqlen, world, rank, device, kv_seqlen, process_group, axes, mesh)


def on_axes(plan: Plan, axes: Axes) -> Plan:
    """The plan for the same sequence on a mesh that deals it alike; kept. Of its ranks no group is known."""
    kv_seqlen = _other(plan.kv_seqlen, plan.seqlen)
    return _kept(plan.mask, plan.layout, plan.seqlen, plan.world, plan.rank, plan.device, kv_seqlen, None, axes, None)


@lru_cache(maxsize=16)  # a plan holds 8 bytes a position on the device; packed training makes one a step
def _kept(
    mask: Mask,
    layout: Layout,
    seqlen: int,
    world: int,
    rank: int,
    device: torch.device,
    kv_seqlen: int | None,
    group: dist.ProcessGroup | None,
    axes: Axes | None,
    mesh: DeviceMesh | None,
) -> Plan:
    if not all(map(shards.lives, _groups)):
        _kept.cache_clear()  # plans keep their groups, and those the memory that their ranks share
        _groups.clear()
    if group is not None:
        _groups.add(group)
    return lasting(
        lambda: Plan.build(
            mask, layout, seqlen, world, rank, device, kv_seqlen=kv_seqlen, group=mesh or group, axes=axes
        ),
        device,
    )


def _other(kv_seqlen: int, seqlen: int) -> int | None:
    """What to give as kv_seqlen for keys of this length."""
    return None if kv_seqlen == seqlen else kv_seqlen


def _check(mask: Mask, seqlen: int, world: int, rank: int, kv_seqlen: int | None) -> tuple[int, int]:
    """seqlen and kv_seqlen as ints, after checking that the arguments go together."""
    if not isinstance(mask, Mask):
        raise ValueError(f"mask: wanted a Mask, got {type(mask).__name__}")
    seqlen = checked_length("seqlen", seqlen)
    keys = seqlen if kv_seqlen is None else checked_length("kv_seqlen", kv_seqlen)
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank: wanted one in [0, world), world at least 1, got rank {rank} of {world}")
    if kv_seqlen is not None and not mask.full:
        raise ValueError(f"kv_seqlen: wanted Mask(causal=False) alone for cross attention, got {mask}")
    mask.check(seqlen)
    return seqlen, keys
