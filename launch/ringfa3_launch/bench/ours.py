"""Our own entries: over which group, or mesh, a transport's name goes, and how ring_attention is called there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringfa3.attention import ring_attention
from ringfa3.mesh import RING, ULYSSES
from ringfa3_launch.bench.match import Entry
from ringfa3_launch.bench.peers import Missing
from ringfa3_launch.bench.shard import Place, Shard

Meshes = Mapping[tuple[int, int], DeviceMesh]


def parse_mesh(transport: str) -> tuple[int, int, str] | None:
    """ "mesh:2x4" -> (2, 4, "auto"), "mesh:2x4:ring" -> (2, 4, "ring"): ulysses, ring, transport along the ring.

    None for what does not begin with "mesh".

    Raises:
        ValueError: a mesh that is not written so.
    """
    if not transport.startswith("mesh"):
        return None
    match = re.fullmatch(r"mesh:(\d+)x(\d+)(?::([\w:]+))?", transport)
    if match is None or 0 in (int(match[1]), int(match[2])):
        raise ValueError(f"--transports: wanted mesh:UxR or mesh:UxR:TRANSPORT, such as mesh:2x4, got {transport!r}")
    return int(match[1]), int(match[2]), match[3] or "auto"


def make_meshes(transports: list[str], device: torch.device) -> Meshes:
    """The meshes over all ranks that these transports name. Every rank of the job must call."""
    shapes = {mesh[:2] for name in transports if (mesh := parse_mesh(name)) is not None}
    return {
        shape: DeviceMesh(device.type, torch.arange(shape[0] * shape[1]).view(shape), mesh_dim_names=(ULYSSES, RING))
        for shape in sorted(shapes)
        if shape[0] * shape[1] == dist.get_world_size()
    }


def group_of(entry: Entry, place: Place, meshes: Meshes) -> dist.ProcessGroup | DeviceMesh:
    """Over which ranks the entry's plan is made.

    Raises:
        Missing: there is no such mesh.
    """
    mesh = parse_mesh(entry.transport)
    if mesh is None:
        return place.group
    if mesh[:2] not in meshes:
        raise Missing(f"a mesh of {mesh[0]} x {mesh[1]} is not one of all {dist.get_world_size()} ranks")
    return meshes[mesh[:2]]


def attend_with(entry: Entry, shard: Shard) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """ring_attention as the entry calls it."""
    mesh = parse_mesh(entry.transport)
    transport = entry.transport if mesh is None else mesh[2]
    if shard.plan.world == 1:
        transport = "auto"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ring_attention(q, k, v, plan=shard.plan, group=shard.group, transport=transport, impl=entry.impl)
        return out

    return attend
