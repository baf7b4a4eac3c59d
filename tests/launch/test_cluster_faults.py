"""What happens when ranks die, stall or fail in the middle of something: who waits hears of it, and all serve again."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ringfa3 import RankFailed
from ringfa3.inference.sampling import Sampling
from ringfa3_launch.cluster import RingCluster, gang
from ringfa3_launch.cluster.channel import Message
from ringfa3_launch.cluster.faults import NotReady, Overloaded, SessionLost, blame
from ringfa3_launch.cluster.settings import Settings
from tests.launch.test_cluster import _running, check, inputs
from tests.launch.test_local import children
from tests.patience import patience

TOLD = 5.0  # seconds within which everybody hears that a rank was killed
UNREADY = 2.0
TIMEOUT = 3.0  # of silence
PROMPT = list(range(100))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


class Watched:
    """A cluster, and how long its ranks take to start here and now."""

    def __init__(self, model: Path) -> None:
        begin = time.monotonic()
        self.cluster = RingCluster.local(2, device="cpu", model=model, memory=64 << 20, chunk=512, timeout=TIMEOUT)
        self.patience = max(30.0, 3 * (time.monotonic() - begin))  # 30 s, where the machine has nothing else to do
        self.tokens = self.answer()

    def pid(self, rank: int) -> int:
        return self.cluster.health()[rank].pid

    def answer(self) -> list[int | None]:
        return [event.token for event in self.cluster.complete(PROMPT, Sampling(max_tokens=12))]

    def busy(self) -> None:
        """Wait until all ranks are at work."""
        deadline = time.monotonic() + 60
        while not all(each.state == "busy" for each in self.cluster.health()):
            assert time.monotonic() < deadline, self.cluster.health()
            time.sleep(0.01)

    def recovers(self, restarts: int) -> None:
        """Wait for new ranks, and see that they are right."""
        self.cluster.wait(self.patience)
        assert self.cluster.restarts == restarts + 1
        deadline = time.monotonic() + patience(30)
        while not self.cluster.ready():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        qkv = inputs(50, 4, 2, torch.float32)
        check(self.cluster.attention(*qkv), None, qkv)
        assert self.answer() == self.tokens


@pytest.fixture(scope="module")
def started(model: Path) -> Iterator[Watched]:
    before = children()
    watched = Watched(model)
    yield watched
    watched.cluster.close()
    assert children() == before


@pytest.fixture
def watched(started: Watched) -> Watched:
    """With ranks that serve, whatever the test before this one left."""
    started.cluster.wait(started.patience)
    return started


class Caller(threading.Thread):
    """Calls in a thread of its own; keeps what came of it, and when."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self._call, self.error, self.at = call, None, 0.0
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error: BaseException | None = error
        self.at = time.monotonic()


def all_hear(callers: list[Caller], rank: int, cause: str, since: float, within: float) -> None:
    """That every caller got RankFailed, with its rank, its host and the cause, in time."""
    for caller in callers:
        caller.join(patience(within + 20))
        assert isinstance(caller.error, RankFailed), caller.error
        assert caller.error.rank == rank, caller.error
        assert caller.error.host == os.uname().nodename
        assert cause in str(caller.error)
        assert caller.at - since < patience(within), f"heard after {caller.at - since:.2f} s"


def long_attention(cluster: RingCluster) -> Callable[[], Any]:
    """A call of seconds."""
    qkv = [np.random.default_rng(0).standard_normal((1, 8192, 8, 64), np.float32) for _ in range(3)]
    return lambda: cluster.attention(*qkv)


def test_a_rank_killed_in_the_middle_of_attention(watched: Watched) -> None:
    cluster, restarts = watched.cluster, watched.cluster.restarts
    session = cluster.session(heads=2, kv_heads=2, head_dim=16)
    call = long_attention(cluster)
    callers = [Caller(call) for _ in range(3)]  # one is under way, two wait
    watched.busy()
    dead = watched.pid(1)
    since = time.monotonic()
    os.kill(dead, signal.SIGKILL)
    while cluster.ready():
        assert time.monotonic() - since < patience(UNREADY)
        time.sleep(0.01)
    all_hear(callers, 1, "signal SIGKILL", since, TOLD)
    with pytest.raises(NotReady, match=r"restarted, because rank 1 on .* SIGKILL"):
        cluster.attention(*inputs(5, 2, 2, torch.float32))
    with pytest.raises(SessionLost, match="rank 1"):
        session.append(np.zeros((1, 1, 2, 16), np.float32), np.zeros((1, 1, 2, 16), np.float32))
    watched.recovers(restarts)
    with pytest.raises(SessionLost, match="rank 1"):
        session.attend(np.zeros((1, 1, 2, 16), np.float32))
    session.close()
    assert not _running(dead)


def test_the_leader_killed_in_the_middle_of_a_session(watched: Watched) -> None:
    cluster, restarts = watched.cluster, watched.cluster.restarts
    session = cluster.session(heads=8, kv_heads=8, head_dim=64, max_tokens=8192)
    x = np.random.default_rng(1).standard_normal((1, 8192, 8, 64), np.float32)
    session.append(x, x)
    callers = [Caller(lambda: session.attend(x))]
    watched.busy()
    since = time.monotonic()
    os.kill(watched.pid(0), signal.SIGKILL)
    all_hear(callers, 0, "signal SIGKILL", since, TOLD)
    with pytest.raises((SessionLost, NotReady)):
        session.attend(x[:, :1])
    watched.recovers(restarts)
    q, k, v = inputs(40, 2, 2, torch.float32)
    with cluster.session(heads=2, kv_heads=2, head_dim=16) as again:
        again.append(k, v)
        check(again.attend(q), None, [q, k, v])


def test_a_rank_that_stands_still_is_named(watched: Watched) -> None:
    cluster, restarts = watched.cluster, watched.cluster.restarts
    callers = [Caller(long_attention(cluster))]
    watched.busy()
    stopped = watched.pid(1)
    since = time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    while cluster.ready():
        assert time.monotonic() - since < patience(UNREADY + 0.5)
        time.sleep(0.01)
    all_hear(callers, 1, "no sign of life for 3 s", since, TIMEOUT + 2)
    watched.recovers(restarts)
    assert not _running(stopped)


def test_a_rank_without_memory_fails_the_call_and_the_next_is_right(watched: Watched) -> None:
    """Where there is none for what a call brings, only that call fails; in the middle of it, the gang."""
    cluster, restarts, pid = watched.cluster, watched.cluster.restarts, watched.pid(1)
    size = _address_space(pid)
    x = np.ones((1, 1 << 20, 1, 32), np.float32)  # 128 MiB, half of it and of two others on each rank
    resource.prlimit(pid, resource.RLIMIT_AS, (size + (100 << 20), resource.RLIM_INFINITY))
    with pytest.raises(Overloaded, match="rank 1: no memory for"):
        cluster.attention(x, x, x)
    small = inputs(50, 4, 2, torch.float32)
    check(cluster.attention(*small), None, small)
    assert cluster.restarts == restarts
    resource.prlimit(pid, resource.RLIMIT_AS, (_address_space(pid) + (260 << 20), resource.RLIM_INFINITY))
    since = time.monotonic()
    all_hear([Caller(lambda: cluster.attention(x, x, x))], 1, "memory", since, 60)
    watched.recovers(restarts)


def _address_space(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_the_middle_of_a_prompt(watched: Watched, rank: int) -> None:
    cluster, restarts = watched.cluster, watched.cluster.restarts
    asked = [cluster.complete([i % 128 for i in range(20000)], Sampling(max_tokens=4)) for _ in range(2)]
    callers = [Caller(lambda each=each: list(each)) for each in asked]
    watched.busy()
    time.sleep(0.3)
    since = time.monotonic()
    os.kill(watched.pid(rank), signal.SIGKILL)
    all_hear(callers, rank, "signal SIGKILL", since, TOLD)
    watched.recovers(restarts)


def test_a_rank_killed_in_the_middle_of_an_answer(watched: Watched) -> None:
    cluster, restarts = watched.cluster, watched.cluster.restarts
    asked = [cluster.complete(PROMPT, Sampling(max_tokens=10000, ignore_eos=True)) for _ in range(3)]
    for each in asked:
        assert next(each).token == watched.tokens[0]
    callers = [Caller(lambda each=each: list(each)) for each in asked]
    since = time.monotonic()
    os.kill(watched.pid(1), signal.SIGKILL)
    all_hear(callers, 1, "signal SIGKILL", since, TOLD)
    for each in asked:
        cluster.cancel(each.request)  # of ranks that are no more: nothing
        assert list(each) == []
    watched.recovers(restarts)
    again = [cluster.complete(PROMPT, Sampling(max_tokens=12)) for _ in range(3)]
    assert {each.request for each in again}.isdisjoint({each.request for each in asked})
    for each in asked:
        cluster.cancel(each.request)  # nor of requests that came after them
    assert [[event.token for event in each] for each in again] == [watched.tokens] * 3


def test_completions_are_cancelled_and_give_their_pages_back(watched: Watched) -> None:
    cluster = watched.cluster
    long = Sampling(max_tokens=10000, ignore_eos=True)
    one, two, three = (cluster.complete(PROMPT, long) for _ in range(3))
    assert [next(each).finish for each in (one, two, three)] == [None] * 3
    assert sum(each.cache_used for each in cluster.health()) >= 0
    one.cancel()
    *_, last = one
    assert last.finish == "cancelled"
    assert last.request == one.request
    cluster.cancel(two.request)
    *_, last = two
    assert last.finish == "cancelled"
    with three:
        pass
    assert list(three) == []
    deadline = time.monotonic() + patience(30)
    while cluster.info()["engine"]["pages_used"] != [0, 0]:
        assert time.monotonic() < deadline, cluster.info()["engine"]
        time.sleep(0.05)
    with pytest.raises(ValueError, match="ids: wanted"):
        cluster.complete([])
    with pytest.raises(ValueError, match="prompt: wanted token ids, as the model has no tokenizer"):
        cluster.complete("text")
    with pytest.raises(ValueError, match="sampling: wanted a Sampling"):
        cluster.complete(PROMPT, {"max_tokens": 3})
    assert watched.answer() == watched.tokens


def test_who_is_to_blame() -> None:
    """A rank's own error counts; what it only met because another one broke off is hearsay."""
    own = MemoryError("no room")
    assert blame(own, 1) == {"rank": 1, "message": "MemoryError: no room", "sure": True}
    left = RankFailed(1, "host", 3, "a call of it ended in the middle")
    assert blame(left, 0) == {"rank": 1, "message": "a call of it ended in the middle", "sure": False}
    left.__cause__ = own  # as the rank itself raises it
    assert blame(left, 1) == blame(own, 1)
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    assert blame(gloo, 0) | {"message": ""} == {"rank": 0, "message": "", "sure": False}
    assert not blame(torch.distributed.DistBackendError("NCCL error"), 0)["sure"]


class Quiet:
    """A rank and the link to it, of which nothing comes; `how` it ended is known once it is set."""

    host, port, how = "here", 1, None

    def __init__(self, rank: int = 0, *_: object, **__: object) -> None:
        self.rank = rank

    def ended(self) -> str | None:
        return self.how

    def send(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("known", [True, False])
def test_how_a_process_ended_may_be_known_after_its_connection_is_lost(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(gang, "Link", Quiet)
    monkeypatch.setattr(gang, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ranks = [Quiet(0), Quiet(1)]
    one = gang.Gang(ranks, Settings(token="0123456789abcdef", device="cpu"), threading.Event())
    one.serving = True
    one._hear(0, Message({"failure": {"rank": 0, "message": "gloo: Connection closed by peer", "sure": False}}))
    one._lost(1, "it has ended")
    assert not one.ready()
    now[0] += 1.6
    assert one.look() is None
    if known:
        ranks[1].how = "signal SIGKILL"
    else:
        now[0] += 1.0
    failed = one.look()
    assert failed is not None
    assert failed.rank == 1
    assert ("signal SIGKILL" if known else "its connection is lost: it has ended") in str(failed)


PROGRAM = """
import json, os, signal, sys, time
import numpy as np
from ringfa3 import RankFailed
from ringfa3_launch.cluster import RingCluster
from ringfa3_launch.cluster.faults import SessionLost

begin = time.monotonic()
cluster = RingCluster.torchrun(device="cpu")
if cluster is None:
    print(json.dumps({"rank": os.environ["RANK"], "served": True}), flush=True)
    raise SystemExit
patience = max(30, 3 * (time.monotonic() - begin))
with cluster:
    x = np.random.default_rng(0).standard_normal((1, 300, 4, 16), np.float32)
    before = cluster.attention(x, x, x)
    session = cluster.session(heads=4, kv_heads=4, head_dim=16)
    session.append(x, x)
    assert np.abs(session.attend(x) - before).max() < 1e-5
    pids = [each.pid for each in cluster.health()]
    since = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    try:
        while True:
            cluster.attention(x, x, x)
    except RankFailed as error:
        heard = [error.rank, error.host, str(error), time.monotonic() - since]
    cluster.wait(patience)
    try:
        session.attend(x)
    except SessionLost as error:
        lost = str(error)
    after = cluster.attention(x, x, x)
    pids += [each.pid for each in cluster.health()]
    restarts = cluster.restarts
print(json.dumps({"rank": "0", "heard": heard, "lost": lost, "same": bool((after == before).all()),
                  "restarts": restarts, "pids": pids}), flush=True)
"""


def test_torchrun(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    said = {line["rank"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert said["1"]["served"]
    rank, host, message, seconds = said["0"]["heard"]
    assert (rank, host) == (1, os.uname().nodename)
    assert "signal SIGKILL" in message
    assert seconds < TOLD
    assert "rank 1" in said["0"]["lost"]
    assert said["0"]["same"]
    assert said["0"]["restarts"] == 1
    assert len(set(said["0"]["pids"])) == 4
    assert not any(_running(pid) for pid in said["0"]["pids"])
