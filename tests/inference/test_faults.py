"""A rank whose forward pass fails while it lives, and one that dies: the others hear of it within seconds."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ringfa3 import RankFailed
from ringfa3.agree import Agreement
from ringfa3.gang import Gang
from ringfa3.inference.runner import Runner
from tests.inference.families import build

PATIENCE = timedelta(minutes=9)  # of the process groups: how long a collective would wait
SOON = 120.0  # seconds; it takes one or two, but tests share their machine


def fails(*_: Any, **__: Any) -> None:
    raise MemoryError("no room on this rank")


def dies(*_: Any, **__: Any) -> None:
    os._exit(0)


def unlucky(rank: int, size: int, shape: tuple[int, int], call: str, ending: str) -> tuple[float, int, str]:
    """The last rank fails within a layer. On the others: seconds until they hear of it, whom they blame, and for what.

    Notes go through the store, as between hosts: no rank sees more of another one than a host does of the next.
    """
    Gang.of(None)._agreement = Agreement(dist.group.WORLD, shared_memory=False)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("cp", "tp"))
    for group in (dist.group.WORLD, *mesh.get_all_groups()):
        dist.distributed_c10d._set_pg_timeout(PATIENCE, group)
    runner = Runner(build("llama"), group=mesh, pages=16, page_size=4, prefill="pass-q")
    runner.create(0)
    runner.prefill(0, list(range(1, 20)))
    last = rank == size - 1
    if last:
        runner._model._model.model.layers[1].forward = dies if ending == "dies" else fails
    begun = time.monotonic()
    with pytest.raises(MemoryError if last else RankFailed) as caught:
        runner.decode([0], [[4]]) if call == "decode" else runner.prefill(0, [4] * 20)
    seconds = time.monotonic() - begun
    with pytest.raises(RankFailed):
        runner.decode([0], [[5]])
    store = dist.distributed_c10d._get_default_store()
    store.set(f"faults/{rank}", "heard")
    if last:  # it lives until all have heard of its failure
        store.wait([f"faults/{other}" for other in range(size)])
        os._exit(0)
    return seconds, caught.value.rank, str(caught.value)


@pytest.mark.parametrize(
    ("shape", "call", "ending"),
    [
        ((2, 1), "decode", "fails"),
        ((2, 1), "decode", "dies"),
        ((2, 1), "pass-q", "fails"),
        ((2, 2), "decode", "fails"),
    ],
)
def test_the_others_hear_of_it(world: Any, shape: tuple[int, int], call: str, ending: str) -> None:
    size = shape[0] * shape[1]
    heard = world(size)(unlucky, shape, call, ending, dying=(size - 1,), timeout=300.0)
    for seconds, rank, message in heard[:-1]:
        assert rank == size - 1, message
        assert seconds < SOON, message
