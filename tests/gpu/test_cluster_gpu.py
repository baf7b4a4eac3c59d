"""RingCluster on GPUs over NCCL: right answers, and a rank killed in the middle of attention."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from ringfa3 import RankFailed
from ringfa3_launch.cluster import RingCluster
from ringfa3_launch.cluster.faults import NotReady
from tests.launch.test_cluster import check

pytestmark = [pytest.mark.multigpu(2), pytest.mark.xdist_group("ranks, engine")]

SOON = 5.0  # seconds within which callers hear of a death
AGAIN = 60.0  # seconds until ranks on GPUs serve again: NCCL and CUDA start anew


@pytest.fixture(scope="module")
def cluster() -> Iterator[RingCluster]:
    with RingCluster.local(2, device="cuda") as cluster:
        yield cluster


def inputs(seqlen: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(1, seqlen, heads, 64).to(dtype) for heads in (8, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention(cluster: RingCluster, dtype: torch.dtype) -> None:
    for seqlen in (1, 3, 777):
        qkv = inputs(seqlen, dtype)
        out, lse = cluster.attention(*qkv, return_lse=True)
        check(out, lse, qkv)
        on_gpu = cluster.attention(*(x.cuda(1) for x in qkv))
        assert on_gpu.device == torch.device("cuda", 1)
        assert torch.equal(on_gpu.cpu(), out)


def test_a_session(cluster: RingCluster) -> None:
    q, k, v = inputs(700)
    with cluster.session(heads=8, kv_heads=2, head_dim=64, dtype="bfloat16", max_tokens=700) as session:
        for count in (1, 300, 2, 397):
            n = session.length + count
            session.append(k[:, n - count : n], v[:, n - count : n])
            for rows in {1, min(n, 16), min(n, 200)}:
                check(session.attend(q[:, n - rows : n]), None, [q[:, n - rows : n], k[:, :n], v[:, :n]])


def test_a_rank_killed_in_the_middle_of_attention(cluster: RingCluster) -> None:
    large = inputs(65536)
    heard: list[tuple[BaseException, float]] = []

    def call() -> None:
        try:
            while True:
                cluster.attention(*large)
        except BaseException as error:
            heard.append((error, time.monotonic()))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    while not all(health.state == "busy" for health in cluster.health()):
        time.sleep(0.01)
    since = time.monotonic()
    os.kill(cluster.health()[1].pid, signal.SIGKILL)
    for caller in callers:
        caller.join(SOON + 10)
    assert len(heard) == 3
    for error, at in heard:  # those that had just been answered ask again, and hear that there are no ranks
        assert isinstance(error, RankFailed | NotReady), error
        assert "rank 1" in str(error)
        assert "SIGKILL" in str(error)
        assert at - since < SOON
    assert sum(isinstance(error, RankFailed) and error.rank == 1 for error, _ in heard) >= 1
    cluster.wait(AGAIN)
    qkv = inputs(500)
    check(cluster.attention(*qkv), None, qkv)
