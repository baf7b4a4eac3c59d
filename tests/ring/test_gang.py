"""Who meets in a gang: neither the groups that a rank is in nor the pools that others have decide it."""

from __future__ import annotations

import gc
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, _resolve_process_group
from torch.distributed.distributed_c10d import _get_process_group_store

import ringfa3.gang
from ringfa3.gang import Gang
from ringfa3.transport.meeting import Meeting
from ringfa3.transport.party import Party
from tests.patience import patience

CPU = torch.device("cpu")


def brief(size: int) -> dist.ProcessGroup:
    """All ranks, with a timeout that ends a meeting which never happens."""
    group = dist.new_group(range(size), timeout=timedelta(seconds=patience(15)))
    assert isinstance(group, dist.ProcessGroup)
    return group


def partied(rank: int, size: int, hosts: tuple[int, ...]) -> list[Any]:
    """What this rank's parties tell: torch's number of trades, and the groups it is in, differ from rank to rank."""
    group = brief(size)
    alone = [dist.new_group([rank], backend="gloo", use_local_synchronization=True) for _ in range(rank)]
    members = [r for r in range(size) if hosts[r] == hosts[rank]]
    told = []
    for attempt in range(2):  # the second has its own name, and nothing of the first
        meeting = Meeting.of(group, f"test/{hosts[rank]}/{attempt}", members, CPU)
        party = Party(meeting, _get_process_group_store(group))
        found = _resolve_process_group(party.name)
        assert (found.rank(), found.size()) == (members.index(rank), len(members))
        store = PrefixStore("", found.get_group_store())  # C++ calls it, as symmetric memory does
        for trade in range(2):
            number = 10 * rank + trade  # torch's count of all that this process has traded
            store.set(f"CUDASymmetricMemory/{number}/{found.rank()}", f"{rank} {attempt} {trade}")
            keys = [f"CUDASymmetricMemory/{number}/{r}" for r in range(found.size())]
            store.wait(keys, timedelta(seconds=patience(15)))
            told.append([store.get(key).decode() for key in keys])
            assert store.multi_get(keys) == [text.encode() for text in told[-1]]
        name = party.name
        del party, found, store
        gc.collect()
        with pytest.raises(RuntimeError, match="Could not resolve"):
            _resolve_process_group(name)
    for each in alone:
        dist.destroy_process_group(each)
    return told


@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 1, 1, 0), (0, 0, 0, 1), (0, 0, 0), (0, 1, 0)], ids=str)
def test_ranks_in_different_numbers_of_groups_meet(world, hosts):
    """Each host's ranks hear of each other, and of nobody else."""
    for rank, told in enumerate(world(len(hosts))(partied, hosts, timeout=patience(60))):
        members = [r for r, host in enumerate(hosts) if host == hosts[rank]]
        assert told == [[f"{r} {attempt} {trade}" for r in members] for attempt in range(2) for trade in range(2)]


def pooled(rank: int, size: int) -> None:
    """Ranks 0 and 1 alone have made a pool when all of them make theirs."""
    gang = Gang.of(brief(size))
    gang.places(CPU)
    if rank < 2:
        assert gang.pool(CPU, (0, 1)).world == 2
    assert gang.pool(CPU, range(size)).world == size


def test_pools_that_only_some_ranks_have(world):
    world(3)(pooled, timeout=patience(60))


def tried_again(rank: int, size: int) -> None:
    """A pool whose making failed on all ranks is made anew, and not out of what was said in the first attempt."""
    gang = Gang.of(brief(size))

    def failing(meeting: Meeting, peers: Any) -> None:
        meeting.exchange("nothing that HostCommons could use")
        raise MemoryError("no room")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ringfa3.gang, "HostCommons", failing)
        with pytest.raises(MemoryError, match="no room"):
            gang.pool(CPU, range(size))
    if rank == 0:  # what it said before is still to be read, if anybody looks there
        time.sleep(0.3)
    assert gang.pool(CPU, range(size)).world == size


def test_a_second_attempt_is_another_meeting(world):
    world(2)(tried_again, timeout=patience(60))
