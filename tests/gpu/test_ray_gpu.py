"""Ranks as Ray actors on GPUs, over NCCL: 128K tokens, and a rank that is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ringfa3 import RankFailed
from ringfa3_launch.cluster import RingCluster
from tests.kernels.oracle import assert_close

pytestmark = [
    pytest.mark.multigpu(2),
    pytest.mark.xdist_group("ranks, ray"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

SEQLEN = 128 << 10
AGAIN = 60.0  # seconds until ranks on GPUs serve again: NCCL and CUDA start anew


@pytest.fixture(scope="module")
def cluster() -> Iterator[RingCluster]:
    with RingCluster.ray(2, device="cuda", address="local") as cluster:
        yield cluster


def inputs(seqlen: int) -> list[torch.Tensor]:
    return [torch.randn(1, seqlen, heads, 128).bfloat16() for heads in (8, 2, 2)]


def check(cluster: RingCluster, seqlen: int) -> None:
    """Some rows, the last one with them, are as right as plain attention in bf16."""
    q, k, v = inputs(seqlen)
    out = cluster.attention(q, k, v)
    assert out.dtype == torch.bfloat16
    rows = [*torch.randint(seqlen, (15,)).tolist(), seqlen - 1]
    truth, plain = (
        torch.stack([attend(q[0, row], k[0, : row + 1], v[0, : row + 1], dtype) for row in rows])
        for dtype in (torch.double, q.dtype)
    )
    assert_close("out", out[0, rows], truth, plain, q.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[Hq, D]: one row over its keys, in this dtype."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.cuda().to(dtype).repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = (k @ q.cuda().to(dtype)[:, :, None])[..., 0] / q.shape[1] ** 0.5
    return (scores.softmax(1)[:, None] @ v)[:, 0].cpu()


def test_two_ranks_over_nccl(cluster: RingCluster) -> None:
    assert [(each.rank, each.device) for each in cluster.health()] == [(0, "cuda:0"), (1, "cuda:1")]
    for seqlen in (777, SEQLEN):
        check(cluster, seqlen)


def test_a_rank_is_killed(cluster: RingCluster) -> None:
    large = inputs(SEQLEN)
    with ThreadPoolExecutor(3) as callers:
        calls = [callers.submit(lambda: [cluster.attention(*large) for _ in range(1000)]) for _ in range(3)]
        while cluster.health()[1].state != "busy":
            time.sleep(0.01)
        os.kill(cluster.health()[1].pid, signal.SIGKILL)
        start = time.monotonic()
        for call in calls:
            error = call.exception(5.0 - (time.monotonic() - start))
            assert isinstance(error, RankFailed)
            assert error.rank == 1
    cluster.wait(AGAIN - (time.monotonic() - start))
    check(cluster, 777)
