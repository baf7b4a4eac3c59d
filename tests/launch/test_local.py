"""local(): results of every rank, failures that arrive, and no process left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ringfa3_launch import local
from ringfa3_launch.local import _packed, cores
from tests.patience import patience

pytestmark = pytest.mark.usefixtures("_ranks_importable")


def children() -> set[int]:
    """This process's children, zombies included (resource trackers apart)."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and "resource_tracker" not in command:
            found.add(int(stat.parent.name))
    return found


def test_results_of_every_rank() -> None:
    import ranks

    before = children()
    results = local(2, ranks.total, torch.tensor([1.0, 2.0]), device="cpu")
    assert [result["rank"] for result in results] == [0, 1]
    assert all(torch.equal(result["sum"], torch.tensor([3.0, 6.0])) for result in results)
    assert len({result["pid"] for result in results} | {os.getpid()}) == 3
    assert all(result["threads"] == max(1, cores() // 2) for result in results)
    assert all(result["backend"] == "gloo" for result in results)
    assert all(result["multicast"] == ["0", "1", "1"] for result in results)
    assert children() == before


def test_a_function_may_destroy_its_group() -> None:
    import ranks

    assert local(2, ranks.leaves_in_order, device="cpu") == [0, 1]


def test_exception_arrives_with_its_traceback_and_ends_the_others() -> None:
    import ranks

    before, begin = children(), time.monotonic()
    with pytest.raises(KeyError, match="what rank 1 lacks") as caught:
        local(2, ranks.fail_on_one, device="cpu")
    assert time.monotonic() - begin < 60  # rank 0 was in a barrier of 600 s
    [note] = caught.value.__notes__
    assert "on rank 1 of 2" in note
    assert "fail_on_one" in note
    assert children() == before


def test_exception_that_cannot_travel_is_quoted() -> None:
    class Unpicklable(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("no")

    try:
        raise Unpicklable("far away")
    except Unpicklable as error:
        failure = pickle.loads(_packed(error))
    assert isinstance(failure.error, RuntimeError)
    assert str(failure.error) == "Unpicklable: far away"
    assert "test_exception_that_cannot_travel" in failure.trace


def test_death_is_named() -> None:
    import ranks

    before = children()
    with pytest.raises(ChildProcessError, match="rank 1 ended by signal SIGKILL"):
        local(2, ranks.die_on_one, device="cpu")
    assert children() == before


def test_timeout_names_the_ranks(tmp_path: Path) -> None:
    import ranks

    before = children()
    with pytest.raises(TimeoutError, match=r"rank 0 of 1: wanted a result within 0\.5 s, got none"):
        local(1, ranks.sleep, str(tmp_path), device="cpu", timeout=0.5)
    assert children() == before


def test_n_must_be_positive() -> None:
    with pytest.raises(ValueError, match="n: wanted 1 rank or more, got 0"):
        local(0, print)


@pytest.mark.parametrize(
    ("how", "world"), [(signal.SIGINT, 2), (signal.SIGKILL, 1), (signal.SIGTERM, 1), (signal.SIGHUP, 1)]
)
def test_interrupt_or_death_of_the_caller_ends_the_ranks(
    how: signal.Signals, world: int, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Ctrl-C, which a terminal sends to every process of the group; and a caller that is killed."""
    program = f"""
if __name__ == "__main__":
    import ranks
    from ringfa3_launch import local
    try:
        local({world}, ranks.sleep, {str(tmp_path)!r}, device="cpu")
    except KeyboardInterrupt:
        raise SystemExit(130)
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    (tmp_path / "temporary").mkdir()
    environment["TMPDIR"] = str(tmp_path / "temporary")
    caller = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(_written(tmp_path / str(rank))) for rank in range(world)]
    if how == signal.SIGINT:
        os.killpg(caller.pid, how)
    else:
        caller.send_signal(how)
    _, err = caller.communicate(timeout=30)
    assert caller.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 128 + how)
    if how != signal.SIGKILL:
        assert not list((tmp_path / "temporary").glob("ringfa3-*")), "the ranks' folder was left behind"
    assert "Traceback" not in err, err
    assert "leaked semaphore" not in err, err
    deadline = time.monotonic() + patience(30)
    while any(_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its caller"
        time.sleep(0.05)


def test_no_semaphore_outlives_a_failure(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "program.py"
    script.write_text("""
if __name__ == "__main__":
    import ranks
    from ringfa3_launch import local
    local(2, ranks.fail_on_one, device="cpu")
""")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert "KeyError: 'what rank 1 lacks'" in done.stderr
    assert "leaked semaphore" not in done.stderr


def _written(path: Path) -> str:
    deadline = time.monotonic() + patience(60)
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)
    return path.read_text()


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # an orphan that init has not collected yet
