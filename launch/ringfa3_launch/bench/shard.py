"""Where a benchmark's rank stands (Place), and what it holds of a case's random tensors (Shard)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringfa3.plan import Plan, plan
from ringfa3_launch.bench.accuracy import Rows, Sample
from ringfa3_launch.bench.case import DTYPES, Case
from ringfa3_launch.bench.peers import Inputs

Keys = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Place:
    """This rank among those of a world."""

    rank: int
    group: dist.ProcessGroup
    device: torch.device

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    def largest(self, value: float) -> float:
        """The largest over the world's ranks."""
        if self.world == 1:
            return value
        x = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return float(x)


@dataclass(frozen=True)
class Shard:
    """This rank's part of a case's random tensors, in one layout, and sampled rows with their exact results.

    Args:
        plan: who holds and sees what.
        inputs: this rank's rows.
        sample: of those rows.
        keys: makes the whole k and v, in the order of positions.
        group: whom the plan deals the sequence to.
    """

    plan: Plan
    inputs: Inputs
    sample: Sample
    keys: Keys
    group: dist.ProcessGroup | DeviceMesh

    @staticmethod
    def make(
        case: Case,
        layout: str,
        group: dist.ProcessGroup | DeviceMesh,
        device: torch.device,
        seed: int,
        at: Tensor | None = None,
    ) -> Shard:
        """The whole tensors are made from seeds, alike on every rank and in every layout, and cut.

        Args:
            at: int64, ascending: positions of this shard to sample; None: spread over all that it holds.
        """
        dealt = plan(case.visible, layout, case.seqlen, group, device=device)
        dtype = getattr(torch, DTYPES[case.dtype])

        def whole(index: int, heads: int) -> Tensor:
            generator = torch.Generator(device).manual_seed(4 * seed + index)
            shape = (1, case.seqlen, heads, case.D)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        def keys() -> tuple[Tensor, Tensor]:
            return whole(1, case.Hkv), whole(2, case.Hkv)

        backward = case.direction == "fwd+bwd"
        q, k, v = (dealt.shard(whole(i, h)) for i, h in enumerate((case.Hq, case.Hkv, case.Hkv)))
        dout = dealt.shard(whole(3, case.Hq)) if backward else q.new_empty(0)
        inputs = Inputs(q.requires_grad_(backward), k.requires_grad_(backward), v.requires_grad_(backward), dout)
        return Shard(dealt, inputs, Sample(case, dealt.positions, inputs, keys, at), keys, group)

    def error(self, taken: Rows, place: Place) -> float:
        """Relative error of sampled rows over all ranks of the place: the larger of out's and dq's."""
        sums = self.sample.squares(taken).to(place.device)
        if place.world > 1:
            dist.all_reduce(sums, group=place.group)
        return float((sums[:, 0] / sums[:, 1]).sqrt().max())


def free(device: torch.device) -> None:
    """Give back what nobody holds any longer."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
