"""A whole tensor to the ranks' shards of it, and back: shard, unshard and what they ask of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from ringfa3.hops import checked_length
from ringfa3.layout import Dealing, Layout, Run, deal, resolve
from ringfa3.mesh import Axes, axes_of, sliced, whole

Group = dist.ProcessGroup | DeviceMesh | None

# torch 2.13 renamed both and deprecated the old names
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard(x: Tensor, dim: int = 1, *, layout: str | Layout = "zigzag", group: Group = None) -> Tensor:
    """This rank's positions of a tensor that every rank holds whole; differentiable.

    Args:
        x: any shape; dim is the sequence.
        layout: as `ring_attention`'s.
        group: a ProcessGroup, a DeviceMesh (1-D, or 2-D: ulysses x ring), or None: all ranks (one, without
            torch.distributed).

    Returns:
        A copy of x with this rank's positions only, ascending.

    Raises:
        ValueError: no such dim, layout or group.
    """
    _, world, rank = members(group)
    dealing = deal(sliced(resolve(layout), axes(group)), x.shape[checked_dim(x, dim)], world)
    return take(x, dealing.runs[rank], dim)


def unshard(x: Tensor, seqlen: int, dim: int = 1, *, layout: str | Layout = "zigzag", group: Group = None) -> Tensor:
    """The whole tensor of which every rank of the group holds its `shard`, on every rank; differentiable.

    The gradient of a rank's shard is the sum over ranks of what each rank's loss makes of it (so a loss that every
    rank computes alike counts once a rank).

    Args:
        x: this rank's shard, any shape.
        seqlen: positions on all ranks together.
        dim, layout, group: as `shard`'s.

    Raises:
        ValueError: x has not this rank's number of positions, or as `shard`.
    """
    _, world, rank = members(group)
    dealing = deal(sliced(resolve(layout), axes(group)), checked_length("seqlen", seqlen), world)
    return gather(x, dealing, rank, dim, group)


def members(group: Group) -> tuple[dist.ProcessGroup | None, int, int]:
    """The process group (None: the default one, or none at all), its size and this process's rank in it.

    Of a 2-D mesh: the group of all its ranks. The first time, they may have to make it: all must call.

    Raises:
        ValueError: not a group, a mesh of more axes, or a group that this process is not in.
    """
    if isinstance(group, DeviceMesh):
        group = group.get_group() if group.ndim == 1 else whole(group)
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return None, 1, 0
    not_of_it = "group: this rank is not a member of it"
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives those outside
        raise ValueError(not_of_it)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: wanted a ProcessGroup or a 1-D DeviceMesh (or 2-D: ulysses x ring), got {group!r}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(not_of_it)
    return group, dist.get_world_size(group), rank


def lives(group: dist.ProcessGroup) -> bool:
    """Whether it still is a group: it may be destroyed and yet be held on to."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


def axes(group: Group) -> Axes | None:
    """The axes of a 2-D mesh, None for every other group."""
    return axes_of(group) if isinstance(group, DeviceMesh) and group.ndim != 1 else None


def take(x: Tensor, runs: Sequence[Run], dim: int) -> Tensor:
    """A copy of the runs' positions of x along dim: concatenated slices, whose gradient needs no index arithmetic."""
    before = (slice(None),) * checked_dim(x, dim)
    return torch.cat([x[(*before, slice(*run))] for run in runs] or [x[(*before, slice(0))]], dim)


def join(parts: Sequence[Tensor], dealing: Dealing, dim: int) -> Tensor:
    """The whole tensor from all ranks' shards, rank 0's first."""
    dim = checked_dim(parts[0], dim)
    for rank, part in enumerate(parts):
        _check_length(part, dealing, rank, dim)
    shape = list(parts[0].shape)
    shape[dim] = dealing.seqlen
    whole = parts[0].new_empty(shape)
    before = (slice(None),) * dim
    for part, runs in zip(parts, dealing.runs, strict=True):
        sizes = [len(range(*run)) for run in runs]
        for run, piece in zip(runs, part.split(sizes, dim) if sizes else (), strict=True):
            whole[(*before, slice(*run))] = piece
    return whole


def gather(x: Tensor, dealing: Dealing, rank: int, dim: int, group: Group) -> Tensor:
    """All-gather of the ranks' shards of x, in the order of positions; its gradient is reduce-scattered."""
    dim = checked_dim(x, dim)
    world = len(dealing.lengths)
    process_group, size, _ = members(group)
    if size != world:
        raise ValueError(f"group: wanted {world} ranks, as the shards were dealt, got {size}")
    _check_length(x, dealing, rank, dim)
    if world == 1:
        return join([x], dealing, dim)
    whole: Tensor = _Gather.apply(x, dealing, rank, dim, process_group)
    return whole


def checked_dim(x: Tensor, dim: int) -> int:
    """dim, counted from the front; ValueError where x has no such dim."""
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: wanted one of x's {x.ndim} dimensions, got {dim}")
    return dim % x.ndim


def _check_length(x: Tensor, dealing: Dealing, rank: int, dim: int) -> None:
    length = dealing.lengths[rank]
    if x.shape[dim] != length:
        raise ValueError(f"x: wanted rank {rank}'s {length} positions in dim {dim}, got shape {list(x.shape)}")


class _Gather(torch.autograd.Function):
    """Shards differ in length, collectives want them equal: they travel padded to the longest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dealing: Dealing, rank: int, dim: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.dealing, ctx.rank, ctx.dim, ctx.group = dealing, rank, dim, group
        front = x.movedim(dim, 0)
        mine = front.new_zeros(max(dealing.lengths), *front.shape[1:])
        mine[: front.shape[0]] = front
        parts = front.new_empty(len(dealing.lengths), *mine.shape)
        # as bytes: gloo knows few dtypes, and a gather computes nothing
        all_gather(parts.view(-1).view(torch.uint8), mine.view(-1).view(torch.uint8), group=group)
        shards = [part[:length] for part, length in zip(parts, dealing.lengths, strict=True)]
        return join(shards, dealing, 0).movedim(0, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dealing: Dealing = ctx.dealing
        front = grad.movedim(ctx.dim, 0)
        wide = torch.promote_types(grad.dtype, torch.float32)  # a sum over ranks in 16 bits would round once a rank
        parts = front.new_zeros(len(dealing.lengths), max(dealing.lengths), *front.shape[1:], dtype=wide)
        for part, runs, length in zip(parts, dealing.runs, dealing.lengths, strict=True):
            part[:length] = take(front, runs, 0)
        mine = torch.empty_like(parts[0])
        _reduce_scatter(mine, parts.flatten(0, 1), group=ctx.group)
        mine = mine[: dealing.lengths[ctx.rank]].to(grad.dtype)
        return mine.movedim(0, ctx.dim), None, None, None, None
