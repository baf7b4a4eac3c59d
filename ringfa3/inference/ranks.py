"""The ranks of one group and what they do together, as the group's watch can see it and end it; the axes of a mesh.

Point-to-point messages are the ring's (ringfa3.transport.wire). These are the collectives of a model's forward pass.
Nobody can be told anything who is blocked inside of one, so the watch is shown that it is under way, and can break it
off: over gloo by a message that nobody sends, whose timeout closes the group's connections; over NCCL by an abort.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringfa3 import shards
from ringfa3.errors import RankFailed
from ringfa3.gang import Gang
from ringfa3.transport.wire import Awaited, Wire

CACHE, TENSOR = "cp", "tp"  # axes of a mesh: who shares a cache (context parallel), who shares the weights
TAG = 0x726A  # of a message that is never sent


class Ranks:
    """The ranks of a group, as one of them sees them.

    Args:
        group: their process group; None: the default one, or none at all (world 1).
        world: how many they are.
        rank: this one.
        numbers: of each of them its rank among all that work together; None: these are all.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, world: int, rank: int, numbers: Sequence[int] | None = None
    ) -> None:
        self.group, self.world, self.rank = group, world, rank
        self.numbers = tuple(range(world) if numbers is None else numbers)
        # what a watch asks of a Wire
        self.rounds = 0
        self.released = False
        self.captured = False
        self.patience = math.inf
        self._device = torch.device("cpu")
        self._blocked: Awaited | None = None  # what a thread of the host waits for
        self._step: torch.cuda.Event | None = None  # the end of what the device was given

    @classmethod
    def of(cls, group: shards.Group = None) -> Ranks:
        """All ranks of the group; alone without torch.distributed."""
        return cls(*shards.members(group))

    def all_reduce(self, x: Tensor) -> None:
        """Sum of all ranks' x, in its place; bitwise the same on every rank."""
        self._do(dist.all_reduce, x)

    def all_gather(self, into: Tensor, x: Tensor) -> None:
        """All ranks' x, one after the other, into one contiguous tensor. As bytes: gloo knows few dtypes."""
        self._do(shards.all_gather, *(each.view(-1).view(torch.uint8) for each in (into, x)))

    def all_to_all(self, into: Tensor, x: Tensor, received: list[int], sent: list[int]) -> None:
        """Rows of x to each rank, and from each rank rows of `into`."""
        self._do(dist.all_to_all_single, into, x, received, sent)

    def broadcast(self, x: Tensor, owner: int) -> None:
        """One rank's x, into everybody's."""
        self._do(dist.broadcast, x, group_src=owner)

    @contextlib.contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """A forward pass: on a GPU, until the device is through with it, the watch counts the others as awaited.

        In eager mode and in CUDA graphs alike nobody sees there which collective the device is in.
        """
        self._device = device
        if self.world == 1 or device.type == "cpu":
            yield
            return
        self.rounds += 1
        self._blocked = self._awaited()
        try:
            yield
            with torch.cuda.device(device):
                self._step = torch.cuda.current_stream(device).record_event()
        finally:
            self._blocked = None

    def failed(self, error: RankFailed) -> RankFailed:
        """The error of one of these ranks, by its number among all."""
        if self.numbers == tuple(range(self.world)):
            return error
        return RankFailed(self.numbers[error.rank], error.host, error.hop, error.message)

    def alive(self) -> bool:
        """Whether the group still is one."""
        try:
            return self.world > 1 and bool(dist.get_process_group_ranks(self.group))
        except (KeyError, ValueError):
            return False

    def wires(self) -> Sequence[Wire]:
        """Themselves: all that a watch asks of a wire."""
        return (cast(Wire, self),)

    def pools(self) -> Sequence[Any]:
        """None: nothing is pulled."""
        return ()

    def waiting(self) -> Awaited | None:
        """What is waited for; from any thread. Who holds a collective up is not known: the next rank stands for all."""
        if self._blocked is not None:
            return self._blocked
        step = self._step
        if step is None:
            return None
        with torch.cuda.device(self._device):
            return None if step.query() else self._awaited()

    def computing(self) -> bool:
        """Whether kernels of our own hold the others up: cannot be told apart from a wait."""
        return False

    def release(self) -> None:
        """End what is under way, and refuse more; from any thread."""
        self.released = True
        if not self.alive():
            return
        if self._device.type != "cpu":
            if not Gang.of(self.group).wires():  # whose own release aborts the same communicator
                group = self.group or dist.distributed_c10d._get_default_group()
                group._get_backend(self._device).abort()
            return
        with contextlib.suppress(RuntimeError):
            never = dist.irecv(torch.empty(1), group=self.group, group_src=(self.rank + 1) % self.world, tag=TAG)
            if never is not None:
                never.wait(timedelta(milliseconds=1))

    def _do(self, collective: Callable[..., Any], x: Tensor, *args: Any, **options: Any) -> None:
        """A collective, that is waited for: by the host on CPU, by the compute stream on CUDA."""
        if self.released:
            raise RuntimeError("the group's collectives were ended")
        if x.device.type != "cpu":
            collective(x, *args, group=self.group, **options)
            return
        self.rounds += 1
        work = collective(x, *args, group=self.group, async_op=True, **options)
        self._blocked = self._awaited()
        try:
            work.wait()
        finally:
            self._blocked = None

    def _awaited(self) -> Awaited:
        return Awaited((self.rank + 1) % self.world, 0, self.rounds)


@dataclass(frozen=True, eq=False)
class Axes:
    """How the ranks of a runner work together.

    Args:
        all: everybody.
        cache: those who hold the same part of the weights, and share the cache of its key/value heads by position.
        tensor: those who hold the same positions, and share the weights.
    """

    all: Ranks
    cache: Ranks
    tensor: Ranks

    @classmethod
    def of(cls, group: shards.Group = None) -> Axes:
        """Of a mesh with the axes cp and tp; of any other group, all share the cache and nobody the weights.

        Raises:
            ValueError: not a group, a mesh of other axes, or one that this rank is not in.
        """
        if not isinstance(group, DeviceMesh) or group.ndim != 2 or set(group.mesh_dim_names or ()) != {CACHE, TENSOR}:
            ranks = Ranks.of(group)
            return cls(ranks, ranks, Ranks(None, 1, 0))
        if group.get_coordinate() is None:
            raise ValueError("group: wanted a DeviceMesh that this rank is in, got one that it is not in")
        covers = group.size() == dist.get_world_size() and dist.group.WORLD is not None
        everyone = Ranks.of(dist.group.WORLD if covers else group._flatten().get_group())
        return cls(everyone, *(_along(group, axis, everyone) for axis in (CACHE, TENSOR)))


def _along(mesh: DeviceMesh, axis: str, everyone: Ranks) -> Ranks:
    """This rank's neighbours along an axis."""
    group = mesh.get_group(axis)
    members = dist.get_process_group_ranks(group)
    whole = everyone.group or dist.distributed_c10d._get_default_group()
    numbers = [dist.get_group_rank(whole, rank) for rank in members]
    return Ranks(group, len(members), dist.get_rank(group), numbers)
