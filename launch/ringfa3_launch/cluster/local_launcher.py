"""Ranks of this machine, as a `Launcher`: they meet through a file, so no port is needed that others could reach."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ringfa3_launch.cluster.processes import Forked, Processes, Spawned
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.rank import RankInfo, pick_device


class LocalLauncher:
    """Ranks of this machine: a `Launcher`.

    Args:
        n: how many.
        device: see `ringfa3_launch.init`.

    Raises:
        ValueError: n < 1, or fewer GPUs than ranks.
    """

    def __init__(self, n: int, *, device: str = "auto") -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n: wanted 1 rank or more, got {n!r}")
        self.world = n
        self._processes = Processes(device if device == "cpu" else pick_device(0, n, device).type)
        self._ranks: list[Spawned | Forked] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, settings: Settings, attempt: int) -> Sequence[Spawned | Forked]:
        """See `Launcher.start`."""
        self.kill()
        deadline = time.monotonic() + settings.start_timeout
        self._folder = tempfile.TemporaryDirectory(prefix="ringfa3-")
        meeting = str(Path(self._folder.name, "meeting"))
        try:
            for rank in range(self.world):
                self._ranks.append(
                    self._processes.start(RankInfo(rank, self.world, rank, self.world, file=meeting), settings)
                )
            for each in self._ranks:
                each.listen(deadline)
        except BaseException:
            self.kill()
            raise
        return list(self._ranks)

    def kill(self) -> None:
        """See `Launcher.kill`."""
        for rank in self._ranks:  # all at once: the others must not see one of them go, and say so
            if rank.ended() is None and rank.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.kill()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def close(self) -> None:
        """See `Launcher.close`."""
        self.kill()
        self._processes.close()
