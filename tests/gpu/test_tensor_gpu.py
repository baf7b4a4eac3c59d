"""Weights shared by two GPUs, decode with and without CUDA graphs, against one GPU alone; a rank that fails is named.

What fails has ranks of its own: they are not fit for another test.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ringfa3 import RankFailed
from ringfa3.agree import Agreement
from ringfa3.gang import Gang
from ringfa3.inference.runner import Runner
from tests.gpu.test_runner_gpu import CONFIGS, build, ids, judge

pytestmark = [pytest.mark.multigpu(2), pytest.mark.xdist_group("ranks, tensor")]

SOON = 20.0  # seconds; the process group's timeout is 60
_meshes: dict[tuple[int, int], DeviceMesh] = {}  # of this process: communicators are not made again for every test


def mesh_of(cp: int, tp: int) -> DeviceMesh:
    if (cp, tp) not in _meshes:
        _meshes[cp, tp] = init_device_mesh("cuda", (cp, tp), mesh_dim_names=("cp", "tp"))
    return _meshes[cp, tp]


def play(rank: int, size: int, name: str, shape: tuple[int, int], graphs: bool) -> list[tuple[list[int], Tensor]]:
    """Two turns of a sequence, and decode steps beside a fork of it."""
    runner = Runner(build(name), group=mesh_of(*shape), memory=32 << 20, graphs=graphs)
    assert runner.cache.kv_heads == 2 // shape[1]
    runner.create(0)
    held: dict[int, list[int]] = {0: []}
    said: list[tuple[list[int], Tensor]] = []
    for turn, (count, chunk) in enumerate(((1500, 611), (40, 40))):
        new = ids(turn, count)
        for start in range(0, count, chunk):
            logits = runner.prefill(0, new[start : start + chunk])
        held[0] = held[0] + new
        said.append((held[0], logits[None].cpu()))
    runner.fork(0, 1)
    held[1] = held[0]
    for step in range(5):
        new = [ids(100 + 10 * s + step, 2) for s in (0, 1)]
        logits = runner.decode([0, 1], new).cpu()
        for s, more in enumerate(new):
            held[s] = held[s] + more
            said.append((held[s], logits[s]))
    return said


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_gpus_share_the_weights(gpu_world: Any, name: str, graphs: bool) -> None:
    first, second = gpu_world(2)(play, name, (1, 2), graphs)
    judge(name, first)
    for (_, ours), (_, theirs) in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.multigpu(4)
def test_a_mesh_of_four(gpu_world: Any) -> None:
    first, *others = gpu_world(4)(play, "llama", (2, 2), True)
    judge("llama", first)
    for other in others:
        for (_, ours), (_, theirs) in zip(first, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def fails(*_: Any, **__: Any) -> None:
    raise MemoryError("no room on this rank")


def unlucky(rank: int, size: int, shape: tuple[int, int], graphs: bool) -> tuple[float, int, str]:
    """Rank 1 fails within a decode step, and lives; notes go through the store, as between hosts."""
    Gang.of(None)._agreement = Agreement(dist.group.WORLD, shared_memory=False)
    runner = Runner(build("llama"), group=mesh_of(*shape), memory=32 << 20, prefill="pass-q", graphs=graphs)
    runner.create(0)
    runner.prefill(0, ids(0, 100))
    runner.decode([0], [[3]])
    torch.cuda.synchronize()
    if rank == 1 and graphs:
        runner._graphs = fails  # type: ignore[assignment]
    elif rank == 1:
        runner._model._model.model.layers[1].forward = fails
    begun = time.monotonic()

    def until_it_is_raised() -> None:
        runner.decode([0], [[4]]).cpu()
        runner.decode([0], [[5]]).cpu()

    with pytest.raises((RankFailed, MemoryError)):
        until_it_is_raised()
    took = time.monotonic() - begun
    with pytest.raises(RankFailed) as caught:
        runner.decode([0], [[5]])
    torch.cuda.synchronize()  # the device goes on
    return took, caught.value.rank, str(caught.value)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_the_others_hear_of_a_failure(shape: tuple[int, int], graphs: bool) -> None:
    from tests.conftest import World

    world = World(2, "nccl")
    try:
        for took, rank, message in world(unlucky, shape, graphs, timeout=150.0):
            assert rank == 1, message
            assert took < SOON, message
    finally:
        world.close(patient=False)
