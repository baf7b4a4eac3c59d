"""A rank that dies or stalls in the middle of a call on GPUs: RankFailed within seconds, and no blocked synchronise.

Every test has ranks of its own, and a time limit: a hang is a failure.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringfa3
from ringfa3 import Agreement, RankFailed, attention

pytestmark = [pytest.mark.multigpu(2), pytest.mark.xdist_group("ranks, faults")]

SOON = 5.0  # seconds, of issue 4
LIMIT = 60.0  # seconds for a whole test, ranks' start included
PATIENCE = 2.0  # seconds of the agreement, where a stall is to be found
TRANSPORTS = ("ring", "pull")


def shards(rank: int) -> list[torch.Tensor]:
    """q, k, v of 4096 rows: a message takes a while to send, a kernel hardly any time."""
    g = torch.Generator().manual_seed(rank)
    made = (torch.randn(1, 4096, h, 128, generator=g) for h in (8, 2, 2))
    return [x.to(torch.device("cuda", rank), torch.bfloat16).requires_grad_() for x in made]


def instead(name: str, deed: Callable[[], None]) -> None:
    """Do the deed first, where this rank comes to the hops of a pass; all ranks have agreed on the call by then."""
    hops = getattr(attention.Task, name)

    def struck(*args: Any, **options: Any) -> Any:
        deed()
        return hops(*args, **options)

    setattr(attention.Task, name, struck)


def dies_soon() -> None:
    """One second from now, with the messages that are posted meanwhile held up on the device."""
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
    torch.cuda._sleep(20_000_000_000)


def fails() -> None:
    raise MemoryError("no room")


def seconds_to_failure(
    rank: int, transport: str, name: str, deed: Callable[[], None], timeout: float, async_op: bool, warm: bool
) -> tuple[float, int, str]:
    """Until a blocked synchronise returned and an error was raised; the rank blamed, and what for."""
    agreement = Agreement(dist.group.WORLD, timeout=timeout)
    qkv = shards(rank)

    def call() -> torch.Tensor:
        out = ringfa3.ring_attention(*qkv, causal=False, transport=transport, agree=agreement, async_op=async_op)
        if async_op:
            torch.cuda.synchronize()
            out = out.wait()
        return out

    if warm:
        call().sum().backward()
        torch.cuda.synchronize()
    if rank == 1:
        instead(name, deed)
    start = time.monotonic()

    def until_it_is_raised() -> None:
        out = call()
        torch.cuda.synchronize()
        out.sum().backward()
        torch.cuda.synchronize()
        call()

    with pytest.raises((RankFailed, MemoryError)):
        until_it_is_raised()
    took = time.monotonic() - start
    with pytest.raises(RankFailed) as failed:
        call()
    torch.cuda.synchronize()  # the device goes on
    return took, failed.value.rank, failed.value.message


def killed(rank: int, size: int, transport: str, name: str, async_op: bool) -> tuple[float, int, str]:
    return seconds_to_failure(rank, transport, name, dies_soon, 60.0, async_op, True)


def stalled(rank: int, size: int, transport: str, warm: bool) -> tuple[float, int, str]:
    return seconds_to_failure(rank, transport, "_forward", lambda: time.sleep(8.0), PATIENCE, False, warm)


def failed(rank: int, size: int, transport: str) -> tuple[float, int, str]:
    return seconds_to_failure(rank, transport, "_forward", fails, 60.0, False, True)


def killed_and_destroyed(rank: int, size: int) -> float:
    """Seconds that the survivor takes to leave the group."""
    killed(rank, size, "ring", "_forward", False)
    start = time.monotonic()
    dist.destroy_process_group()
    return time.monotonic() - start


def run(gpu_world: Any, fn: Callable[..., Any], *args: Any, dying: tuple[int, ...] = ()) -> list[Any]:
    """The ranks' results; they are new ones, and are ended at once."""
    world = type(gpu_world(2))(2, "nccl")
    try:
        return world(fn, *args, timeout=LIMIT / 2, dying=dying)
    finally:
        world.close(patient=False)


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("name", "async_op"), [("_forward", False), ("_backward", True)], ids=["forward", "backward-async"]
)
def test_a_rank_is_killed(gpu_world: Any, transport: str, name: str, async_op: bool) -> None:
    took, rank, message = run(gpu_world, killed, transport, name, async_op, dying=(1,))[0]
    assert (rank, message) == (1, "its process has ended")
    assert took < 1 + SOON


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "first"])  # the first message of a pair blocks the host
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_stalls(gpu_world: Any, transport: str, warm: bool) -> None:
    told = run(gpu_world, stalled, transport, warm)
    assert [rank for _, rank, _ in told] == [1, 1]
    assert told[0][2] == told[1][2] == f"no message of it within {PATIENCE:g} s"
    assert told[0][0] < PATIENCE + SOON


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_call_that_ends_in_the_middle(gpu_world: Any, transport: str) -> None:
    told = run(gpu_world, failed, transport)
    assert [rank for _, rank, _ in told] == [1, 1]
    assert told[0][2] == told[1][2] == "a call of it ended in the middle"
    assert told[0][0] < SOON


@pytest.mark.timeout(LIMIT)
def test_the_survivor_leaves_the_group(gpu_world: Any) -> None:
    assert run(gpu_world, killed_and_destroyed, dying=(1,))[0] < SOON
