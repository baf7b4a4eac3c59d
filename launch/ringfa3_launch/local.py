"""Ranks of one machine without torchrun: `local(n, fn, ...)` runs fn in n fresh processes and returns their results."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process, util
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ringfa3_launch.rank import SAFE_ENVIRONMENT, RankInfo, init, pick_device

T = TypeVar("T")

LEAVING = 2.0  # seconds that ranks get to end by themselves: killed, they would leave semaphores


def local(n: int, fn: Callable[..., T], *args: Any, device: str = "auto", timeout: float | None = None) -> list[T]:
    """What fn(info, *args) returned on ranks 0..n-1, each its own process of this machine.

    When fn runs, the default process group is up (gloo on CPUs, NCCL on GPUs) and the rank's GPU is current; the
    ranks meet through a file, so no port is needed. CPU cores are divided among the ranks. If a rank fails, the
    others are killed. No process outlives this call, nor the caller if that is killed. SIGTERM and SIGHUP, where the
    caller's main thread calls and does not handle them, become SystemExit(128 + signal), after the cleaning up.

    Args:
        n: number of ranks.
        fn: a function of a module's top level (it is pickled, as args and results are); called as fn(info, *args) with
            the rank's RankInfo.
        device: "cpu", "cuda" or "auto", as in `init`.
        timeout: seconds for everything, starting the processes included; None: no limit.

    Raises:
        ValueError: n < 1, or fewer GPUs than ranks.
        TimeoutError: some ranks have not returned in time; names them.
        ChildProcessError: a rank died without a Python exception; names it and the signal.
        Exception: what fn raised, on the rank that raised first; that rank's traceback is attached as a note.
    """
    if n < 1:
        raise ValueError(f"n: wanted 1 rank or more, got {n}")
    place = pick_device(0, n, device).type
    deadline = None if timeout is None else time.monotonic() + timeout
    with _ended_in_order(), tempfile.TemporaryDirectory(prefix="ringfa3-") as folder:
        infos = [RankInfo(rank, n, rank, n, file=str(Path(folder, "rendezvous"))) for rank in range(n)]
        ranks: list[_Rank] = []
        try:
            for info in infos:
                ranks.append(_start(info, fn, args, place))
            results = _gather(ranks, deadline, timeout)
            for rank in ranks:
                rank.process.join(LEAVING)
            return results
        finally:
            for rank in ranks:
                rank.inbox.close()  # tells it
            told = time.monotonic()
            for rank in ranks:
                rank.process.join(max(0.0, told + LEAVING - time.monotonic()))
                rank.end()


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Whoever ends this process in the block lets it clean up: what ends it by default raises SystemExit, once."""
    if threading.current_thread() is not threading.main_thread():  # others may not set handlers
        yield
        return
    ours = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]

    def end(number: int, frame: object) -> NoReturn:
        for s in ours:
            signal.signal(s, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for s in ours:
        signal.signal(s, end)
    try:
        yield
    finally:
        for s in ours:
            signal.signal(s, signal.SIG_DFL)


@dataclass
class _Rank:
    """A running rank, seen from the process that started it."""

    info: RankInfo
    process: SpawnProcess
    inbox: connection.Connection

    def end(self) -> None:
        """Leave no process and no zombie."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()


@dataclass(frozen=True)
class _Failure:
    """What a rank says before it dies: when (seconds, the machine's monotonic clock), the exception, its traceback."""

    at: float
    error: BaseException
    trace: str


def _start(info: RankInfo, fn: Callable[..., Any], args: tuple[Any, ...], place: str) -> _Rank:
    context = get_context("spawn")  # fork would copy CUDA's and OpenMP's state, which neither survives
    inbox, outbox = context.Pipe()  # both ways: the rank hears it close
    process = context.Process(target=_serve, args=(info, fn, args, place, outbox), name=f"rank {info.rank}")
    with _interrupts_held():
        process.start()
    outbox.close()  # so that the rank's death ends the pipe
    return _Rank(info, process, inbox)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal: ranks inherit this mask and leave it to the caller to stop them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _gather(ranks: list[_Rank], deadline: float | None, timeout: float | None) -> list[Any]:
    waiting = {rank.inbox: rank for rank in ranks}
    results: dict[int, Any] = {}
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = connection.wait(list(waiting), left)
        if not ready:
            late = ", ".join(str(rank.info.rank) for rank in waiting.values())
            raise TimeoutError(f"rank {late} of {len(ranks)}: wanted a result within {timeout} s, got none")
        failures: list[tuple[_Rank, _Failure]] = []
        for inbox in ready:
            assert isinstance(inbox, connection.Connection)
            rank = waiting.pop(inbox)
            answer = _receive(rank)
            if isinstance(answer, _Failure):
                failures.append((rank, answer))
            else:
                results[rank.info.rank] = answer
        if failures:
            _raise_first(failures, list(waiting.values()), len(ranks))
    return [results[rank] for rank in range(len(ranks))]


def _receive(rank: _Rank) -> Any:
    """The rank's result, or a _Failure."""
    try:
        return pickle.loads(rank.inbox.recv_bytes())
    except (EOFError, ConnectionResetError):
        rank.process.join()
        code = rank.process.exitcode or 0
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (out of memory?)"
        # at 0: nobody else's failure kills a process, so this one came first
        return _Failure(0.0, ChildProcessError(f"rank {rank.info.rank} ended by {how} before it returned"), "")


def _raise_first(failures: list[tuple[_Rank, _Failure]], others: list[_Rank], world: int) -> None:
    """Raise what went wrong first: a rank's failure makes its peers fail in their collectives a moment later."""
    for rank in others:
        if rank.inbox.poll(0.1):
            answer = _receive(rank)
            if isinstance(answer, _Failure):
                failures.append((rank, answer))
    rank, first = min(failures, key=lambda failure: failure[1].at)
    if first.trace:
        first.error.add_note(f"on rank {rank.info.rank} of {world}:\n{first.trace}")
    raise first.error


def _serve(
    info: RankInfo, fn: Callable[..., Any], args: tuple[Any, ...], place: str, outbox: connection.Connection
) -> None:
    """The life of a rank: join, call fn, send its result or its failure."""
    threading.Thread(target=_die_with_parent, args=(outbox,), daemon=True).start()
    for name, value in SAFE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve, and need not
    try:
        import torch

        torch.set_num_threads(max(1, cores() // info.local_world))
        with init(info, device=place):
            try:
                result = fn(info, *args)
            except BaseException as error:
                _fail(outbox, error)  # at once: leaving the group would make the peers fail before us
        answer = pickle.dumps(result)
    except BaseException as error:
        _fail(outbox, error)
    outbox.send_bytes(answer)


def _fail(outbox: connection.Connection, error: BaseException) -> NoReturn:
    outbox.send_bytes(_packed(error))
    sys.stdout.flush()
    sys.stderr.flush()
    _leave()


def _packed(error: BaseException) -> bytes:
    """A pickled _Failure; an exception that cannot travel is replaced by a RuntimeError that quotes it."""
    at, trace = time.monotonic(), traceback.format_exc()
    try:
        data = pickle.dumps(_Failure(at, error.with_traceback(None), trace))
        pickle.loads(data)
    except Exception:
        return pickle.dumps(_Failure(at, RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return data


def _die_with_parent(outbox: connection.Connection) -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel, outbox])
    _leave()


def _leave() -> NoReturn:
    """No orderly exit: destructors may wait for peers that will never answer. But semaphores are unlinked."""
    with suppress(Exception):
        util._run_finalizers(0)  # type: ignore[attr-defined]
    os._exit(1)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
