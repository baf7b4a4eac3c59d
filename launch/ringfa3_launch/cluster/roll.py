"""Roll: before the ranks begin a call together, each says whether it can; all or none begin."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist


class Roll:
    """A roll call over all ranks, on the host (gloo, also beside NCCL). Making it is collective.

    Args:
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, *, timeout: float) -> None:
        self._world = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if self._world > 1 else None
        self._at = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since all ranks last answered."""
        return time.monotonic() - self._at

    def all_can(self, can: bool) -> bool:
        """Whether every rank can. Collective.

        Raises:
            RuntimeError: a rank did not answer, or died.
        """
        if self._group is not None:
            answers = [torch.empty(1, dtype=torch.uint8) for _ in range(self._world)]
            dist.all_gather(answers, torch.tensor([can], dtype=torch.uint8), group=self._group)
            can = all(bool(answer) for answer in answers)
        self._at = time.monotonic()
        return can
