"""ring_attention of DTensors: what they say about group and layout is used, or has to agree with what is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ringfa3.mesh import RING, ULYSSES
from ringfa3.plan import Plan
from ringfa3.shards import Group


def call(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    plan: Plan | None = None,
    layout: Any = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    async_op: bool = False,
    **options: Any,
) -> Any:
    """`ring_attention` of the local tensors; out is a DTensor as q is, lse [B, Hq, S] one sharded on dim 2.

    Raises:
        ValueError: a placement or mesh is another one than `ring_attention` says.
    """
    mesh, shards = _opened(q, k, v)
    if async_op:
        raise ValueError("async_op: wanted False for DTensors, got True")
    _check_group(plan.group if group is None and plan is not None else group, mesh)
    if isinstance(options.get("alibi_slopes"), DTensor):
        raise ValueError("alibi_slopes: wanted a Tensor, the same on every rank, got a DTensor")
    if plan is None and layout is None:
        layout = "contiguous"  # as DTensors lie
        if mesh.ndim == 2 and mesh.mesh_dim_names != (RING, ULYSSES):
            raise ValueError(
                f"layout: wanted it or a plan, or a mesh with the axes ({RING!r}, {ULYSSES!r}), as DTensors shard the "
                f"first axis first, got one with the axes {mesh.mesh_dim_names}"
            )
    out, lse = function(
        *shards, group=mesh if group is None and plan is None else group, plan=plan,
        layout=layout, sink_logits=_sinks(sink_logits, mesh), return_lse=True, **options,
    )  # fmt: skip
    out = _like(out, q, Shard(1), (*q.shape[:2], *out.shape[2:]))
    return (out, _like(lse, q, Shard(2), (q.shape[0], lse.shape[1], q.shape[1]))) if return_lse else out


def _opened(q: Tensor, k: Tensor, v: Tensor) -> tuple[DeviceMesh, list[Tensor]]:
    """The mesh that all are sharded over, along their sequence, and this rank's shards."""
    meshes: list[DeviceMesh] = []
    shards: list[Tensor] = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise ValueError(f"{name}: wanted a DTensor, as others of q, k and v are, got {type(x).__name__}")
        for axis, placement in enumerate(x.placements):
            if placement != Shard(1):
                names = x.device_mesh.mesh_dim_names
                raise ValueError(
                    f"{name}: wanted a DTensor sharded on dim 1, the sequence, over every axis of its mesh, "
                    f"got {placement} over axis {names[axis] if names else axis} (give a submesh: mesh['name'])"
                )
        meshes.append(x.device_mesh)
        shards.append(x.to_local())
        if x.device_mesh != meshes[0]:
            raise ValueError(f"{name}: wanted q's mesh {meshes[0]}, got {x.device_mesh}")
    return meshes[0], shards


def _check_group(group: Group, mesh: DeviceMesh) -> None:
    """Raise ValueError unless this is no group, or that of the mesh."""
    same = group is None or group == mesh
    if isinstance(group, dist.ProcessGroup):
        same = mesh.ndim == 1 and mesh.get_group() == group
    if not same:
        raise ValueError(f"group: wanted that of the DTensors' mesh {mesh}, or None, got {group}")


def _sinks(sinks: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
    """Every rank's copy of the logits; the gradients of a DTensor are summed over ranks by what made it."""
    if not isinstance(sinks, DTensor):
        return sinks
    for placement in sinks.placements:
        if placement != Replicate():
            raise ValueError(f"sink_logits: wanted a DTensor replicated over its mesh, got {placement}")
    if sinks.device_mesh != mesh:
        raise ValueError(f"sink_logits: wanted a DTensor on q's mesh {mesh}, got one on {sinks.device_mesh}")
    return sinks.to_local(grad_placements=[Partial()] * mesh.ndim)


def _like(local: Tensor, q: Tensor, placement: Placement, shape: tuple[int, ...]) -> DTensor:
    """This rank's part of a DTensor on q's mesh, of that global shape."""
    assert isinstance(q, DTensor)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    mesh = q.device_mesh
    return DTensor.from_local(
        local, mesh, [placement] * mesh.ndim, run_check=False, shape=torch.Size(shape), stride=tuple(reversed(strides))
    )
