"""What ranks do in the tests of this folder: importable from a fresh process, which a test module need not be."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from ringfa3_launch import RankInfo, init
from ringfa3_launch.rank import SAFE_ENVIRONMENT

HELD: list[Any] = []  # to the end of the process, as libraries hold theirs


def total(info: RankInfo, tensor: torch.Tensor) -> dict[str, Any]:
    """All ranks' sum of rank + 1 times the tensor, and what a rank sees of its surroundings."""
    scaled = tensor * (info.rank + 1)
    dist.all_reduce(scaled)
    return {
        "sum": scaled,
        "rank": info.rank,
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "backend": dist.get_backend(),
        "multicast": [os.environ[name] for name in SAFE_ENVIRONMENT],
    }


def leaves_in_order(info: RankInfo) -> int:
    """Ends as many training scripts do."""
    dist.destroy_process_group()
    return info.rank


def fail_on_one(info: RankInfo) -> None:
    """Rank 1 raises; rank 0 waits for it in a barrier. Both hold a semaphore."""
    HELD.append(multiprocessing.get_context("spawn").RLock())
    if info.rank == 1:
        raise KeyError("what rank 1 lacks")
    dist.barrier()


def die_on_one(info: RankInfo) -> None:
    """Rank 1 is killed; rank 0 waits for it in a barrier."""
    if info.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep(info: RankInfo, folder: str) -> None:
    """Say where we are, then never return; with a semaphore."""
    HELD.append(multiprocessing.get_context("spawn").RLock())
    with open(f"{folder}/{info.rank}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def main() -> None:
    """As a script: join the ranks that a launcher started on CPUs, sum, and print one line."""
    info = RankInfo.from_env()
    with init(info, device="cpu"):
        x = torch.ones(1) * (info.rank + 1)
        dist.all_reduce(x)
        nvls = os.environ["NCCL_NVLS_ENABLE"]
        line = f"rank {info.rank} of {info.world} sum {x.item():g} NVLS {nvls} args {sys.argv[1:]}\n"
        os.write(1, line.encode())  # one write: lines of several ranks do not mix


if __name__ == "__main__":
    main()
