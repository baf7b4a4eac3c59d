"""Who takes part in a context-parallel pass: the ranks that share a sequence, and those that have others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringfa3.mesh import RING, ULYSSES
from ringfa3.shards import Group, members

CP = "cp"
DATA = ("dp", "dp_replicate", "dp_shard")  # axes along which sequences differ
FINGERPRINT = 6  # numbers of what a rank was given
FAILED = -1  # in their place


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a mesh.

    Args:
        sequence: the group (or mesh ulysses x ring) that shares a sequence; what plans are made for.
        data: groups of this rank's peers along each axis where sequences differ.
        size: all ranks of the mesh.
    """

    sequence: Group
    data: tuple[dist.ProcessGroup, ...]
    size: int

    def compare(self, fingerprint: Tensor | None, error: Exception | None, device: torch.device) -> None:
        """Return where all ranks of the mesh have said what their sequence's other ranks say; the host waits for it.

        Args:
            fingerprint: int64 [FINGERPRINT], each at least 0, of what this rank was given; the last two are of labels
                and num_items_in_batch, 0 where there are none.
            error: what is wrong with it, if something is; the caller raises it where this returns.

        Raises:
            ValueError: ranks were given different arguments, or some rows of the mesh alone have labels or
                num_items_in_batch (all would wait for their sums), or another rank has an error.
        """
        if self.size == 1:
            return
        if fingerprint is None or error is not None:
            fingerprint = torch.full((FINGERPRINT,), FAILED, dtype=torch.int64, device=device)
        both = torch.cat([fingerprint, -fingerprint])  # the largest, and the smallest
        group, world, _ = members(self.sequence)
        if world > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        largest, smallest = both.chunk(2)
        differ = (largest != -smallest).any()
        failed = (smallest == -FAILED).any()
        given = largest[-2:] > 0
        found = torch.cat([torch.stack([differ & ~failed, failed]), given, ~given]).long()
        for peers in self.data:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=peers)
        different, wrong, labels, num_items, no_labels, no_num_items = found.tolist()
        if error is not None:
            return
        if wrong:
            raise ValueError("model: wanted arguments that are right on every rank, got an error on another rank")
        if different:
            raise ValueError(
                "input_ids, labels, position_ids, documents, num_items_in_batch: wanted the same whole sequence on "
                "every rank of the cp axis (a sampler that deals to dp ranks alone), got different ones on some"
            )
        for name, some, none in (("labels", labels, no_labels), ("num_items_in_batch", num_items, no_num_items)):
            if some and none:
                raise ValueError(f"{name}: wanted them on all dp ranks or on none, got them on some")

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks of the mesh, in fp32 at least."""
        total = x.to(torch.promote_types(x.dtype, torch.float32)).clone()
        group, world, _ = members(self.sequence)
        if world > 1:
            dist.all_reduce(total, group=group)
        return self.data_total(total)

    def data_total(self, x: Tensor) -> Tensor:
        """The sum over ranks with other sequences of what all ranks that share this one have alike."""
        for peers in self.data:
            dist.all_reduce(x, group=peers)
        return x


def ranks_of(mesh: Group) -> Ranks:
    """The ranks of a mesh, a group, or (None) all there are.

    Raises:
        ValueError: axes that are not known, or none that shares a sequence.
    """
    if not isinstance(mesh, DeviceMesh):
        return Ranks(mesh, (), members(mesh)[1])
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1 and not set(names) & set(DATA):
        return Ranks(mesh, (), mesh.size())
    sequence = tuple(name for name in names if name in (CP, ULYSSES, RING))
    data = tuple(name for name in names if name in DATA)
    if set(sequence) not in ({CP}, {ULYSSES, RING}, {ULYSSES}, {RING}) or len(sequence) + len(data) != mesh.ndim:
        raise ValueError(
            f"mesh: wanted an axis 'cp' (or 'ulysses' and 'ring'), and others of {', '.join(map(repr, DATA))} alone, "
            f"got {list(names or mesh.mesh.shape)}"
        )
    shared = mesh if not data else mesh[sequence[0] if len(sequence) == 1 else sequence]
    return Ranks(shared, tuple(mesh.get_group(name) for name in data), mesh.size())
