"""Nursery: a process that has imported what a rank needs and forks ranks, each of which so starts within milliseconds.

For ranks on CPUs: a fresh interpreter spends seconds on importing torch, for every rank and every restart; forked ranks
share that, and its memory. (A process that has touched CUDA must not fork; ranks on GPUs are `Spawned`.) The nursery
itself computes nothing and has one thread.

It reads orders from its standard input, a line of JSON each, and reports by another pipe: {"ready"}, then for each rank
{"number", "pid"}, {"number", "port"} once that listens, and {"number", "code"} when it has ended. When its standard
input ends it goes, and so do its ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.cluster.spawn import LOOPBACK, ended_by, environment, live, say
from ringfa3_launch.rank import RankInfo

LOOK = 0.02  # seconds between looks at whether a rank has ended
GOING = 5.0  # seconds for a killed process to go

IMPORTS = ("torch.distributed", "ringfa3_launch.cluster.worker", "ringfa3_launch.cluster.calls")
IMPORTS_OF_MODELS = ("ringfa3_launch.cluster.texts",)


class Forked:
    """A rank forked by a nursery: a `Member`."""

    def __init__(self, nursery: Nursery, number: int, rank: int, host: str) -> None:
        self.rank, self.host = rank, host
        self._nursery, self._number = nursery, number

    @property
    def port(self) -> int:
        """Where it listens, once it has been waited for."""
        return int(self._nursery.said(self._number, "port") or 0)

    @property
    def pid(self) -> int:
        """Of its process."""
        return int(self._nursery.said(self._number, "pid") or 0)

    def listen(self, deadline: float) -> None:
        """See `Spawned.listen`."""
        if not self._nursery.wait(self._number, "port", deadline):
            raise TimeoutError(f"rank {self.rank}: wanted it to listen in time, got nothing")
        if (how := self.ended()) is not None:
            raise ChildProcessError(f"rank {self.rank} ended by {how} before it listened")

    def ended(self) -> str | None:
        """See `Member.ended`."""
        code = self._nursery.said(self._number, "code")
        if code is None and self._nursery.gone:
            return "the end of the process that started it"
        return None if code is None else ended_by(code)

    def kill(self) -> None:
        """End it at once, and wait for it."""
        self._nursery.wait(self._number, "pid", time.monotonic() + GOING)
        if self._nursery.said(self._number, "code") is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._nursery.wait(self._number, "code", time.monotonic() + GOING)


class Nursery:
    """A nursery, seen from the process that started it.

    Args:
        model: whether its ranks will load one.
        alone: all of the cluster's ranks are on this machine.
    """

    def __init__(self, *, model: bool, alone: bool = True) -> None:
        report, told = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ringfa3_launch.cluster.nursery", str(told), str(int(model))],
                stdin=subprocess.PIPE,
                stdout=2,  # a service's standard output is not the ranks'
                env=environment(alone=alone),
                pass_fds=[told],
                process_group=0,  # Ctrl-C in a terminal reaches the caller alone, who ends the ranks
            )
        except BaseException:
            os.close(report)
            raise
        finally:
            os.close(told)
        self.gone = False
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._said: dict[int, dict[str, Any]] = {}
        self._reader = threading.Thread(target=self._read, args=(report,), name="ringfa3 nursery", daemon=True)
        self._reader.start()

    def fork(self, info: RankInfo, settings: Settings, *, host: str = LOOPBACK) -> Forked:
        """A new rank; as `Spawned`'s."""
        number = next(self._numbers)
        order = {
            "number": number, "info": dataclasses.asdict(info), "settings": dataclasses.asdict(settings), "host": host,
        }  # fmt: skip
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has gone: `Forked.ended` says so
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        return Forked(self, number, info.rank, host)

    def said(self, number: int, what: str) -> Any:
        """What it reported of a rank; None: nothing yet."""
        return self._said.get(number, {}).get(what)

    def wait(self, number: int, what: str, deadline: float) -> bool:
        """Wait until it reports that, or that the rank has ended, or is gone itself. False: not by the deadline."""

        def over() -> bool:
            return self.gone or not self._said.get(number, {}).keys().isdisjoint((what, "code"))

        with self._changed:
            return self._changed.wait_for(over, max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """End it; its ranks, if there are any, go too."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GOING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read(self, report: int) -> None:
        with os.fdopen(report, "rb") as lines:
            for line in lines:
                said = json.loads(line)
                with self._changed:
                    self._said.setdefault(said.pop("number"), {}).update(said)
                    self._changed.notify_all()
        with self._changed:
            self.gone = True
            self._changed.notify_all()


def main() -> None:
    """The life of a nursery."""
    report = int(sys.argv[1])
    import torch

    torch.set_num_threads(1)  # a process whose OpenMP has threads must not fork
    for module in IMPORTS + (IMPORTS_OF_MODELS if int(sys.argv[2]) else ()):
        importlib.import_module(module)
    born: dict[int, int] = {}  # number of a living rank by its pid
    life, held = os.pipe()  # ranks read `life` to its end, which comes when nobody holds `held`
    orders = b""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    while True:
        if poll.poll(LOOK * 1000 if born else None):
            got = os.read(0, 1 << 16)
            if not got:
                os.close(held)
                _go(born)
            orders += got
        while b"\n" in orders:
            order, _, orders = orders.partition(b"\n")
            told = json.loads(order)
            pid = os.fork()
            if not pid:
                os.close(held)
                os.dup2(life, 0)
                os.close(life)
                live(told, report)
            born[pid] = told["number"]
            say(report, number=told["number"], pid=pid)
        for pid in list(born):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                say(report, number=born.pop(pid), code=os.waitstatus_to_exitcode(status))


def _go(born: dict[int, int]) -> NoReturn:
    """Leave no rank, not even one that is stopped."""
    deadline = time.monotonic() + 1.0  # they hear of it, and tidy up
    while born and time.monotonic() < deadline:
        for pid in list(born):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del born[pid]
        time.sleep(LOOK)
    for pid in born:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os._exit(0)


if __name__ == "__main__":
    main()
