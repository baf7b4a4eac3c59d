"""The 2-D mesh ulysses x ring: which rank stands where on it, and which positions that rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringfa3.layout import Layout, Run

ULYSSES, RING = "ulysses", "ring"  # names of the axes; a mesh without names has them in this order


@dataclass(frozen=True)
class Axes:
    """The axes of a mesh, by the ranks of the group that holds all of it; a value.

    Args:
        ulysses: ranks that share a shard of the sequence and deal its heads to each other.
        ring: ranks that each stand for one shard.
        places: of each rank of the whole group its (rank on the ulysses axis, rank on the ring axis).
    """

    ulysses: int
    ring: int
    places: tuple[tuple[int, int], ...]

    @staticmethod
    def of(ulysses: int, ring: int, ranks: Sequence[Sequence[int]] | None = None) -> Axes:
        """The axes of a mesh.

        Args:
            ranks: [ulysses][ring], who stands where; None: row by row.

        Raises:
            ValueError: ranks do not ascend along both axes; process groups number theirs so.
        """
        ranks = ranks or [[u * ring + r for r in range(ring)] for u in range(ulysses)]
        if any(
            (u and ranks[u - 1][r] >= ranks[u][r]) or (r and ranks[u][r - 1] >= ranks[u][r])
            for u in range(ulysses)
            for r in range(ring)
        ):
            raise ValueError(f"group: wanted a mesh whose ranks ascend along both axes, got {ranks}")
        placed = sorted((ranks[u][r], u, r) for u in range(ulysses) for r in range(ring))
        return Axes(ulysses, ring, tuple((u, r) for _, u, r in placed))

    def peers(self, rank: int) -> tuple[int, ...]:
        """Those who share this rank's shard of the sequence, by their rank on the ulysses axis."""
        return tuple(peer for peer, place in enumerate(self.places) if place[1] == self.places[rank][1])

    def ring_peers(self, rank: int) -> tuple[int, ...]:
        """The ranks of the ring that this one is on, by their rank there."""
        return tuple(peer for peer, place in enumerate(self.places) if place[0] == self.places[rank][0])


@dataclass(frozen=True)
class Sliced(Layout):
    """What a layout deals over the ring axis, each shard cut into contiguous slices over the ulysses axis."""

    layout: Layout
    axes: Axes

    @property
    def name(self) -> str:  # type: ignore[override]  # of an instance, not of the class
        """In messages."""
        return f"{self.axes.ulysses} x {self.axes.ring} mesh's {self.layout.name}"

    def runs(self, seqlen: int, world: int, rank: int) -> list[Run]:
        """See `Layout.runs`."""
        if world != len(self.axes.places):
            raise ValueError(f"layout: wanted the mesh's {len(self.axes.places)} ranks, got a world of {world}")
        u, r = self.axes.places[rank]
        shard = self.layout.runs(seqlen, self.axes.ring, r)
        held = sum(len(range(*run)) for run in shard)
        begin, end = u * held // self.axes.ulysses, (u + 1) * held // self.axes.ulysses
        mine: list[Run] = []
        for run in shard:
            kept = range(*run)[max(0, begin) : max(0, end)]
            if kept:
                mine.append((kept.start, kept.stop, kept.step))
            begin, end = begin - len(range(*run)), end - len(range(*run))
        return mine


def sliced(layout: Layout, axes: Axes | None) -> Layout:
    """How a sequence lies on the ranks of a group: as the layout says, and on a mesh cut along the ulysses axis."""
    return layout if axes is None else Sliced(layout, axes)


def line(world: int) -> Axes:
    """Ulysses alone over a group of so many ranks."""
    return Axes.of(world, 1)


def axes_of(mesh: DeviceMesh) -> Axes:
    """The axes of a mesh.

    Raises:
        ValueError: other axes, ranks in another order than ascending, or this rank is not on it.
    """
    axes = _known.get(mesh)
    if axes is not None:
        return axes
    names = mesh.mesh_dim_names
    if mesh.ndim != 2 or (names and set(names) != {ULYSSES, RING}):
        raise ValueError(
            "group: wanted a ProcessGroup or a 1-D DeviceMesh, or a 2-D one with the axes 'ulysses' and 'ring', "
            f"got a mesh with the axes {list(names or mesh.mesh.shape)}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError("group: wanted a DeviceMesh that this rank is in, got one that it is not in")
    ranks = (mesh.mesh.T if _swapped(mesh) else mesh.mesh).tolist()
    _known[mesh] = axes = Axes.of(len(ranks), len(ranks[0]), ranks)
    return axes


def whole(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of the mesh. Where there is none yet it is made, which takes all of them.

    Raises:
        ValueError: it would have to be made, and the axes have no names.
    """
    axes = axes_of(mesh)
    if axes.ring == 1:
        return along(mesh, ULYSSES)
    if axes.ulysses == 1:
        return along(mesh, RING)
    if mesh.size() == dist.get_world_size() and dist.group.WORLD is not None:
        return dist.group.WORLD
    if not mesh.mesh_dim_names:
        raise ValueError("group: wanted names for the axes of a mesh of some of the ranks, got none")
    return mesh._flatten().get_group()  # the mesh it was cut from keeps it


def along(mesh: DeviceMesh, axis: str) -> dist.ProcessGroup:
    """The group of this rank and its peers along an axis."""
    return mesh.get_group(int(_swapped(mesh)) if axis == ULYSSES else int(not _swapped(mesh)))


def _swapped(mesh: DeviceMesh) -> bool:
    """Whether the ring axis comes first."""
    return mesh.mesh_dim_names == (RING, ULYSSES)


_known: WeakKeyDictionary[DeviceMesh, Axes] = WeakKeyDictionary()  # equal meshes have equal axes, not equal groups
