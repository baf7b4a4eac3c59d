"""Ranks in different numbers of groups, that have traded memory differently often, still share a pool on GPUs."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _SymmetricMemory
from torch.distributed.distributed_c10d import _get_process_group_store

import ringfa3
from ringfa3 import Mask
from ringfa3.transport.meeting import Meeting
from ringfa3.transport.party import Party

pytestmark = pytest.mark.xdist_group("ranks, pull")  # one world, so one process


def uneven(rank: int, size: int, transports: tuple[str, ...]) -> None:
    """Rank r is in r groups more, whose memory it has traded with itself."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # as CudaCommons has it; this here comes before the first one
    device = torch.device("cuda", rank)
    group = dist.new_group(range(size), timeout=timedelta(seconds=60))
    for number in range(rank):
        alone = dist.new_group([rank], backend="gloo", use_local_synchronization=True)
        party = Party(Meeting.of(group, f"alone/{number}", [rank], device), _get_process_group_store(alone))
        own = _SymmetricMemory.empty_strided_p2p((1 << 21,), (1,), torch.uint8, device)
        assert _SymmetricMemory.rendezvous(own, party.name).world_size == 1
    p = ringfa3.plan(Mask(), "zigzag", 8192, group, device=device)
    g = torch.Generator(device).manual_seed(rank)
    q, k, v = (torch.randn(2, p.lengths[rank], h, 128, generator=g, device=device).bfloat16() for h in (8, 2, 2))
    wanted = ringfa3.ring_attention(q, k, v, plan=p, transport="ring")
    for transport in transports:
        got = ringfa3.ring_attention(q, k, v, plan=p, transport=transport)
        torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)  # hops may come in another order


@pytest.mark.multigpu(2)
def test_two_ranks_share_a_pool(gpu_world):
    gpu_world(2)(uneven, ("pull",))


@pytest.mark.multigpu(4)
def test_pools_of_some_ranks_and_of_all(gpu_world):
    gpu_world(4)(uneven, ("hierarchical:2", "pull"))
