"""The bench's groups: who breaks off a peer's call gets another group, whatever groups its ranks are in."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ringfa3_launch.bench.arena import Arena
from ringfa3_launch.bench.case import RING_PEERS, Case
from ringfa3_launch.bench.groups import among
from ringfa3_launch.bench.guard import Stuck
from ringfa3_launch.bench.match import OURS, Entry
from ringfa3_launch.bench.shard import Place
from tests.patience import patience

CPU = torch.device("cpu")
CASE = Case("fwd", "causal", 64, 2, 1, 1024, 2, "fp32")


def broken_off(rank: int, size: int, members: tuple[int, ...]) -> list[float]:
    """The sums that an arena's rivals make after each of two peers has hung; rank r is in r groups more."""
    timeout = timedelta(seconds=patience(20))
    own, rivals, control = (dist.new_group(members, backend="gloo", timeout=timeout) for _ in range(3))
    alone = [dist.new_group([rank], backend="gloo", use_local_synchronization=True) for _ in range(1 + rank)]
    sums = []
    if rank in members:
        by_itself = Place(0, alone[0], CPU)
        place = Place(members.index(rank), own, CPU)
        arena = Arena(place, by_itself, rivals, control, meshes={}, limit=patience(10), seed=0)
        arena.guard.abort = dist.destroy_process_group  # as NCCL's does; gloo's group would stay
        for peer in RING_PEERS[:2]:
            arena._break_off(Entry(peer, peer, CASE), "did not return")
            x = torch.tensor([float(rank)])
            assert arena.rivals is not None
            dist.all_reduce(x, group=arena.rivals)
            assert dist.get_process_group_ranks(arena.rivals) == list(members)
            sums.append(x.item())
        with pytest.raises(Stuck, match="ours: it hangs"):
            arena._break_off(Entry("ours", OURS, CASE), "it hangs")
    for each in alone:
        dist.destroy_process_group(each)
    return sums


@pytest.mark.parametrize(("size", "members"), [(3, (0, 1, 2)), (4, (0, 1)), (4, (1, 3))], ids=str)
def test_rivals_are_made_anew(world, size, members):
    for rank, sums in enumerate(world(size)(broken_off, members, timeout=patience(90))):
        assert sums == ([sum(members)] * 2 if rank in members else [])


def named(rank: int, size: int) -> None:
    """Of two groups of the same ranks each has its own messages."""
    options = {"backend": "gloo", "timeout": timedelta(seconds=patience(20))}
    one, two = (among(range(size), f"test {number}", **options) for number in range(2))
    for group, factor in ((one, 1), (two, 10)):
        x = torch.tensor([rank * factor])
        dist.all_reduce(x, group=group)
        assert x.item() == factor * sum(range(size))
        assert dist.get_rank(group) == rank
    for group in (one, two):
        dist.destroy_process_group(group)


def test_two_groups_of_the_same_ranks(world):
    world(3)(named, timeout=patience(60))
