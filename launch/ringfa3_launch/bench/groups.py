"""Process groups that some ranks make among themselves, under a name that they are told."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def among(ranks: Sequence[int], name: str, *, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """A group of these ranks, each of whom calls; nobody else does.

    Not new_group's: that makes a name from how many groups a rank is in, and ranks in which these differ wait for each
    other under different names. It would also give a group the name, and so the notes in the store, of a dead one.

    Args:
        ranks: of all, ascending.
        name: the same on each of them; never used before.
        backend: "gloo"; or "nccl", and all there are, where the default group is bound to a device: torch then splits
            its communicator, which takes all its ranks.
        timeout: of the group's operations.
    """
    make: Any = c10d._new_process_group_helper
    store: Any = c10d._get_default_store()
    made, _ = make(len(ranks), ranks.index(dist.get_rank()), list(ranks), backend, store, name, timeout=timeout)
    assert isinstance(made, dist.ProcessGroup)
    c10d._world.pg_group_ranks[made] = {rank: number for number, rank in enumerate(ranks)}
    return made
