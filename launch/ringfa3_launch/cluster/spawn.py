"""A rank as a process of this machine: started, asked how it ended, killed; and what such a process does.

A fresh interpreter runs this module and reads from its standard input who it is; it tells through a pipe where it
listens. When its standard input ends, so has whoever started it, and it goes, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.rank import SAFE_ENVIRONMENT, TORCHRUN, RankInfo

LOOPBACK = "127.0.0.1"


class Spawned:
    """A rank in a process of this machine: a `Member`.

    Args:
        info: which rank.
        settings: the cluster's.
        host: address that its worker is to listen on.
    """

    def __init__(self, info: RankInfo, settings: Settings, *, host: str = LOOPBACK) -> None:
        self.rank, self.host, self.port = info.rank, host, 0
        report, told = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ringfa3_launch.cluster.spawn", str(told)],
                stdin=subprocess.PIPE,
                stdout=2,  # a service's standard output is not the ranks'
                env=environment(alone=info.world == info.local_world),
                pass_fds=[told],
                process_group=0,  # Ctrl-C in a terminal reaches the caller alone, who ends the ranks
            )
        except BaseException:
            os.close(report)
            raise
        finally:
            os.close(told)
        self._report = report
        self._how: str | None = None
        assert self._process.stdin is not None
        told_it = {"info": dataclasses.asdict(info), "settings": dataclasses.asdict(settings), "host": host}
        with contextlib.suppress(BrokenPipeError):  # it died: `listen` says so
            self._process.stdin.write(json.dumps(told_it).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def listen(self, deadline: float) -> None:
        """Wait until it listens, at `port` from then on.

        Args:
            deadline: of the monotonic clock.

        Raises:
            ChildProcessError: it ended.
            TimeoutError: not by then.
        """
        poll, said = select.poll(), b""
        poll.register(self._report, select.POLLIN)
        while not said.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(f"rank {self.rank}: wanted it to listen in time, got nothing")
            got = os.read(self._report, 4096)
            if not got:
                self._process.wait()
                raise ChildProcessError(f"rank {self.rank} ended by {self.ended()} before it listened")
            said += got
        self.port = json.loads(said)["port"]

    def ended(self) -> str | None:
        """See `Member.ended`."""
        if self._how is None and (code := self._process.poll()) is not None:
            self._how = ended_by(code)
        return self._how

    def kill(self) -> None:
        """End it at once; leaves no zombie, no open file."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._report >= 0:
            os.close(self._report)
            self._report = -1
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


def main() -> None:
    """The life of a rank's process."""
    live(json.loads(sys.stdin.buffer.readline()), int(sys.argv[1]))


def live(told: dict[str, Any], report: int) -> NoReturn:
    """Be a rank, to the end of this process; it ends with its standard input.

    Args:
        told: info, settings and host; number: by which to report.
        report: file descriptor to tell the port, which is closed then.
    """
    info, settings = RankInfo(**told["info"]), Settings(**told["settings"])
    threading.Thread(target=_end_with_starter, args=(info,), name="ringfa3 starter", daemon=True).start()
    try:
        from ringfa3_launch.cluster.worker import Worker

        worker = Worker(info, settings, host=told["host"])
        say(report, number=told.get("number", 0), port=worker.port)
        os.close(report)
        worker.run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _leave(1)
    _leave(0)


def say(report: int, **what: Any) -> None:
    """Report a line, which is short enough not to mix with other processes'."""
    os.write(report, json.dumps(what).encode() + b"\n")


def _end_with_starter(info: RankInfo) -> None:
    while os.read(0, 4096):
        pass
    if info.file is not None:  # whose starter could not tidy up
        shutil.rmtree(Path(info.file).parent, ignore_errors=True)
    os._exit(1)


def _leave(code: int) -> NoReturn:
    """Not an orderly exit of the interpreter: destructors may wait for ranks that will never answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def environment(*, alone: bool) -> dict[str, str]:
    """Of a rank's process: it can import what we can; no launcher seems to have started it.

    Args:
        alone: all ranks are on this machine.
    """
    env = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    for name in [name for name in env if name.startswith(("TORCHELASTIC_", "SLURM_"))]:
        del env[name]
    env |= {name: value for name, value in SAFE_ENVIRONMENT.items() if name not in env}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path) or env.get("PYTHONPATH", "")
    if alone and sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve, and need not
    return env


def ended_by(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"signal {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


if __name__ == "__main__":
    main()
