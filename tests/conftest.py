"""What every test may use: persistent worlds of ranks (a 4-rank test costs milliseconds), and skips by device."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import inspect
import os
import pickle
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

# A suite in the background (nohup, &) has these ignored, and so would the programs that it interrupts
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)

hypothesis.settings.register_profile("ringfa3", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ringfa3")

# What a rank would import for seconds: imported once, and then forked
PRELOADED = ["torch.distributed", "ringfa3.inference.runner", "transformers.models.llama.modeling_llama"]
GRACE = 10.0  # seconds that the other ranks get to report, once one has failed


class Rank:
    """How a test module's function reaches a rank, where that module is not importable: by its file and name."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        if "<locals>" in fn.__qualname__ or "<lambda>" in fn.__qualname__:
            raise ValueError(f"fn: wanted a top-level function of a test module, got {fn.__qualname__}")
        self.path, self.name = inspect.getfile(fn), fn.__qualname__

    def load(self) -> Callable[..., Any]:
        """The function, in a rank's process."""
        name = "rank_side_" + Path(self.path).stem
        module = sys.modules.get(name)
        if module is None or module.__file__ != self.path:
            spec = importlib.util.spec_from_file_location(name, self.path)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return reduce(getattr, self.name.split("."), module)  # type: ignore[arg-type]


def _serve(rank: int, size: int, backend: str, meeting: str, path: list[str], inbox: Any, outbox: Any) -> None:
    """A rank's life: do what comes in, report how it went."""
    faulthandler.enable()
    sys.path[:] = path
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    outbox.put((rank, 0, None))
    for number, fn, args in iter(inbox.get, None):
        try:
            result = pickle.dumps(fn.load()(rank, size, *args))
            outbox.put((rank, number, (result, None)))
        except BaseException:
            outbox.put((rank, number, (None, traceback.format_exc())))
    dist.destroy_process_group()


class World:
    """Ranks in processes of their own; `world(fn, *args)` runs fn(rank, size, *args) on each and returns the results.

    fn is a top-level function of a test module. After a failure the ranks are replaced: nobody knows what state the
    others were left in.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size, self.backend = size, backend
        self._ranks: list[Any] = []
        self._calls = 0

    def __call__(
        self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, dying: tuple[int, ...] = ()
    ) -> list[Any]:
        """Results by rank. Raises AssertionError with the tracebacks of the ranks that failed, or did not come back.

        dying: ranks that end their process in the call, as the test wants them to; their result is None.
        """
        if not self._ranks or not all(rank.is_alive() for rank in self._ranks):
            self.close(patient=False)
            self._open()
        self._calls += 1
        for box in self._inboxes:
            box.put((self._calls, Rank(fn), args))
        answers = self._collect(self._calls, timeout, set(range(self.size)) - set(dying))
        errors = [error for _, error in answers.values() if error is not None]
        silent = [rank for rank in range(self.size) if rank not in answers and rank not in dying]
        if errors or silent:
            self.close(patient=False)
            lines = [f"rank {rank} of {self.size}: no answer" for rank in silent]
            lines += [f"rank {rank} of {self.size}:\n{error}" for rank, (_, error) in answers.items() if error]
            raise AssertionError("\n".join(lines))
        if dying:
            self.close(patient=False)
        return [pickle.loads(answers[rank][0]) if rank in answers else None for rank in range(self.size)]

    def close(self, *, patient: bool = True) -> None:
        """End the ranks: politely, or at once."""
        if patient:
            for box in self._inboxes if self._ranks else ():
                box.put(None)
            for rank in self._ranks:
                rank.join(10)
        for rank in self._ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
        if self._ranks:
            self._folder.cleanup()
        self._ranks = []

    def _open(self) -> None:
        context = mp.get_context("spawn" if self.backend == "nccl" else "forkserver")  # CUDA does not survive a fork
        context.set_forkserver_preload(PRELOADED)
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(self.size)]
        self._folder = tempfile.TemporaryDirectory(prefix="ringfa3-world-")
        self._ranks = [
            context.Process(
                target=_serve,
                args=(rank, self.size, self.backend, f"{self._folder.name}/meeting", sys.path, box, self._outbox),
                daemon=True,
            )
            for rank, box in enumerate(self._inboxes)
        ]
        for rank in self._ranks:
            rank.start()
        met = self._collect(0, 300, set(range(self.size)))
        if len(met) < self.size:
            self.close(patient=False)
            raise AssertionError(f"only ranks {sorted(met)} of {self.size} came up")

    def _collect(self, number: int, timeout: float, awaited: set[int]) -> dict[int, Any]:
        """What the awaited ranks answered to a call; those who have not by the time, or died, are missing."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while not awaited <= answers.keys() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                rank, answered, answer = self._outbox.get(timeout=0.2)
                if answered == number:
                    answers[rank] = answer
                    if answer is not None and answer[1] is not None:  # the others may wait for this one for ever
                        deadline = min(deadline, time.monotonic() + GRACE)
                continue
            if any(not self._ranks[rank].is_alive() for rank in awaited - answers.keys()):
                deadline = min(deadline, time.monotonic() + GRACE)
        return answers


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """world(n): n persistent gloo ranks on the CPU, started on first use."""
    worlds: dict[int, World] = {}
    yield lambda size: worlds.setdefault(size, World(size))
    for each in worlds.values():
        each.close(patient=False)


@pytest.fixture(scope="session")
def gpu_world() -> Iterator[Callable[[int], World]]:
    """gpu_world(n): n persistent NCCL ranks, one a GPU. Mark the test multigpu(n)."""
    worlds: dict[int, World] = {}
    yield lambda size: worlds.setdefault(size, World(size, "nccl"))
    for each in worlds.values():
        each.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs devices that this machine lacks, saying so."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        needed = max(
            [1 for _ in item.iter_markers("gpu")] + [m.args[0] for m in item.iter_markers("multigpu")], default=0
        )
        if needed > devices:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, this machine has {devices}"))
