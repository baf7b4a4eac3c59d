"""Beside NCCL and on a device: orders are heard as on the CPU, and the same tokens are chosen."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from ringfa3.inference.announce import Announcer
from ringfa3.inference.sampling import Sampling, choose

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, seed=1),
    Sampling(temperature=1.0, top_k=50, seed=2),
    Sampling(temperature=1.3, top_p=0.9, seed=3),
    Sampling(temperature=1.0, top_k=400, top_p=0.7, seed=4),
]


@pytest.mark.gpu
def test_the_device_chooses_as_the_cpu_does():
    generator = torch.Generator().manual_seed(random.SystemRandom().randrange(2**32))
    for vocab in (100, 32_000, 151_936):
        logits = torch.randn(len(SAMPLINGS), vocab, generator=generator) * 3
        here, there = (
            [choose(x, SAMPLINGS, [each.generator() for each in SAMPLINGS]) for x in (logits, logits.roll(1, 0))]
            for logits in (logits, logits.cuda())
        )
        same = sum(a == b for ours, theirs in zip(here, there, strict=True) for a, b in zip(ours, theirs, strict=True))
        assert same >= 2 * len(SAMPLINGS) - 1  # a chance may fall onto an edge between two tokens
        assert (here[0][0], here[1][0]) == (there[0][0], there[1][0])
    logits[2, 7] = float("nan")
    assert choose(logits.cuda(), SAMPLINGS, [each.generator() for each in SAMPLINGS])[2] is None


def say_while_nccl_works(rank: int, size: int) -> None:
    """Orders between collectives that are under way on the device."""
    announcer = Announcer()
    x = torch.ones(1 << 20, device="cuda")
    for number in range(50):
        work = dist.all_reduce(x, async_op=True)
        if rank == 0:
            announcer.say({"number": number, "ids": [number] * 5000})
        else:
            assert announcer.hear() == {"number": number, "ids": [number] * 5000}
        work.wait()
        x /= size
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.multigpu(2)
def test_orders_beside_nccl(gpu_world):
    gpu_world(2)(say_while_nccl_works)
