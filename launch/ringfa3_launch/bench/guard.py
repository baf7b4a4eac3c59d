"""A call under a time limit: what fails or hangs on some rank becomes a reason that every rank knows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group


class Stuck(RuntimeError):
    """A call did not return and what it holds cannot be freed: this process can measure nothing more."""


@dataclass(frozen=True)
class Attempt:
    """How a call went, on all ranks alike: `result` is this rank's, `reason` why it failed on one of them ("": it did
    not), `hung` whether it has not returned somewhere."""

    result: Any
    reason: str
    hung: bool


class Guard:
    """Calls that all ranks of a world make together, each in a thread that may be left behind.

    Args:
        device: the rank's.
        control: a gloo group of these ranks, which works when the device does not; None on a rank alone.
        seconds: how long a call may take.
    """

    def __init__(self, device: torch.device, control: dist.ProcessGroup | None, seconds: float) -> None:
        self.device, self.control, self.seconds = device, control, seconds

    def attempt(self, call: Callable[[], Any], *, patience: float = 1.0) -> Attempt:
        """Call it, wait for the device, and hear how the other ranks fared.

        Args:
            patience: factor on the seconds.
        """
        seconds = self.seconds * patience
        done: list[tuple[Any, str]] = []
        thread = threading.Thread(target=lambda: done.append(self._called(call)), daemon=True)
        thread.start()
        thread.join(seconds)
        result, reason = done[0] if done else (None, f"did not return within {seconds:.0f} s")
        hung = not done
        if self.control is not None:
            told: list[Any] = [None] * dist.get_world_size(self.control)
            dist.all_gather_object(told, (reason, hung), group=self.control)
            errors = [(r, why) for r, (why, late) in enumerate(told) if why and not late] or [
                (r, why) for r, (why, _) in enumerate(told) if why
            ]
            hung = any(late for _, late in told)
            if errors:
                rank, why = errors[0]
                reason = why if all(w == why for w, _ in told) else f"{why} (on rank {rank})"
        return Attempt(None if reason else result, reason, hung)

    def abort(self, group: dist.ProcessGroup) -> None:
        """Break off what hangs in this group.

        Raises:
            Stuck: the device does not come free.
        """
        if self.device.type == "cuda":  # gloo's calls end by their group's timeout
            _abort_process_group(group)
            if self.attempt(lambda: None, patience=0.5).reason:
                raise Stuck("the device still waits for a message after its process group was aborted")

    def _called(self, call: Callable[[], Any]) -> tuple[Any, str]:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread begins on GPU 0
            result = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return result, ""
        except Exception as error:  # whatever stops a contestant is what the table has to say about it
            lines = str(error).strip().splitlines() or [""]
            return None, f"{type(error).__name__}: {lines[0]}"[:200]
