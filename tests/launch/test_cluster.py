"""RingCluster: attention and sessions on real ranks equal attention in fp64; nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ringfa3_launch.cluster import RingCluster
from ringfa3_launch.cluster.faults import Closed, Overloaded, SessionLost
from tests.kernels.oracle import assert_close, plain
from tests.launch.test_local import children
from tests.patience import patience

Make = Callable[[int], RingCluster]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Make]:
    """cluster(n): n ranks on the CPU, started on first use."""
    made: dict[int, RingCluster] = {}
    before, files, threads = children(), len(os.listdir("/proc/self/fd")), set(threading.enumerate())

    def make(n: int) -> RingCluster:
        if n not in made:
            made[n] = RingCluster.local(n, device="cpu", session_memory=64 << 20, page_size=16)
        return made[n]

    yield make
    for each in made.values():
        each.close()
    assert children() == before
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # what torch opened for itself


def inputs(seqlen: int, heads: int, kv_heads: int, dtype: torch.dtype, *, batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, seqlen, h, 16).to(dtype) for h in (heads, kv_heads, kv_heads)]


def visible(rows: int, keys: int, causal: bool, window: tuple[int, int] | None) -> Tensor:
    """[1, rows, keys], rows being the last positions of the keys."""
    p, j = torch.arange(keys - rows, keys)[:, None], torch.arange(keys)[None]
    seen = (j <= p) if causal else torch.ones(rows, keys, dtype=torch.bool)
    if window is not None:
        left, right = window
        seen &= (j >= p - left) if left >= 0 else seen
        seen &= (j <= p + right) if right >= 0 and not causal else seen
    return seen[None]


def check(out: Any, lse: Any, qkv: list[Tensor], **options: Any) -> None:
    """The error rule, against attention as it is defined, in fp64."""
    q, k, v = qkv
    mask = visible(q.shape[1], k.shape[1], options.pop("causal", True), options.pop("window", None))
    mask = mask.expand(q.shape[0], -1, -1)
    rest = {"scale": options.pop("scale", None), "softcap": options.pop("softcap", 0.0)}
    assert not options
    zeros = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    truth, yard = (plain(q, k, v, torch.zeros_like(q), zeros, mask, dtype=d, **rest) for d in (torch.float64, q.dtype))
    if isinstance(out, np.ndarray):
        out, lse = torch.from_numpy(out), None if lse is None else torch.from_numpy(lse)
    assert out.dtype == q.dtype
    assert_close("out", out, truth.out, yard.out, q.dtype)
    if lse is not None:
        assert_close("lse", lse, truth.lse, yard.lse, q.dtype)


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": (9, 0)},
    "window both sides": {"causal": False, "window": (5, 11)},
    "softcap and scale": {"softcap": 4.0, "scale": 0.7},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_attention(cluster: Make, world: int, case: str) -> None:
    for seqlen in (1, 5, 61):
        qkv = inputs(seqlen, 4, 2, torch.float32, batch=2)
        out, lse = cluster(world).attention(*qkv, **CASES[case], return_lse=True)
        check(out, lse, qkv, **CASES[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_attention_of_every_dtype_numpy_and_torch(cluster: Make, dtype: torch.dtype) -> None:
    qkv = inputs(43, 6, 2, dtype)
    out, lse = cluster(2).attention(*qkv, return_lse=True)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(out, lse, qkv)
    if dtype != torch.bfloat16:
        arrays = [x.numpy() for x in qkv]
        theirs, sums = cluster(2).attention(*arrays, return_lse=True)
        assert isinstance(theirs, np.ndarray)
        assert theirs.dtype == arrays[0].dtype
        assert np.array_equal(theirs, out.numpy())
        assert np.array_equal(sums, lse.numpy())


def test_attention_of_numpys_bfloat16(cluster: Make) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    qkv = inputs(10, 2, 1, torch.bfloat16)
    arrays = [x.float().numpy().astype(ml_dtypes.bfloat16) for x in qkv]
    out = cluster(2).attention(*arrays)
    assert out.dtype == arrays[0].dtype
    assert np.array_equal(out.astype(np.float32), cluster(2).attention(*qkv).float().numpy())


def test_arrays_of_the_other_byte_order(cluster: Make) -> None:
    arrays = [x.numpy() for x in inputs(10, 2, 1, torch.float32)]
    out = cluster(2).attention(*[x.astype(x.dtype.newbyteorder()) for x in arrays])
    assert out.dtype == np.dtype(">f4")
    assert np.array_equal(out, cluster(2).attention(*arrays))


def test_inputs_of_any_strides_are_left_as_they_are(cluster: Make) -> None:
    q, k, v = (torch.randn(1, 2, 30, 16).transpose(1, 2) for _ in range(3))
    before = q.clone()
    check(cluster(2).attention(q, k, v), None, [q, k, v])
    assert torch.equal(q, before)


X = np.zeros((1, 4, 2, 16), np.float32)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a list": ({"q": [1.0]}, "q: wanted a numpy array or a torch tensor, got list"),
    "three dimensions": ({"q": X[0]}, r"q: wanted 4 dimensions .* got shape \[4, 2, 16\]"),
    "integers": ({"q": X.astype(np.int32)}, "q: wanted float64, .*, got int32"),
    "mixed dtypes": ({"k": X.astype(np.float16)}, "k: wanted what the first argument is"),
    "numpy and torch": ({"v": torch.zeros(1, 4, 2, 16)}, "v: wanted what the first argument is"),
    "another length": ({"k": X[:, :3], "v": X[:, :3]}, r"k, v: wanted \[1, 4, Hkv, 16\]"),
    "k unlike v": ({"v": X[:, :, :1]}, "k, v: wanted"),
    "heads that do not divide": ({"q": X[:, :, :1]}, "q: wanted a multiple of k's 2 heads"),
    "no rows": ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, "no size 0"),
    "NaN": ({"k": np.full_like(X, np.nan)}, "k: wanted finite numbers"),
    "a gradient": ({x: torch.zeros(1, 4, 2, 16, requires_grad=True) for x in "qkv"}, "q: wanted no requires_grad"),
    "a window of three": ({"window": (1, 2, 3)}, "window: wanted"),
    "a window that contradicts": ({"window": (1, 2)}, "window: wanted"),
    "causal of 1": ({"causal": 1}, "causal: wanted True or False, got 1"),
    "softcap of words": ({"softcap": "much"}, "softcap: wanted a number"),
    "a negative softcap": ({"softcap": -1.0}, "softcap: wanted"),
    "a head_dim of 12": ({x: X[..., :12] for x in "qkv"}, "head_dim"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named_and_harm_nothing(cluster: Make, name: str) -> None:
    changed, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        cluster(2).attention(**{"q": X, "k": X, "v": X} | changed)
    assert cluster(2).ready()
    assert cluster(2).restarts == 0


@pytest.mark.parametrize(("world", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "float32"), (3, "float64")])
def test_a_session(cluster: Make, world: int, dtype: str) -> None:
    """Appended in pieces of any size, attended to with few rows and with many, under every mask."""
    q, k, v = inputs(170, 4, 2, getattr(torch, dtype))
    rng = random.Random(world)
    with cluster(world).session(heads=4, kv_heads=2, head_dim=16, dtype=dtype, max_tokens=170) as session:
        with pytest.raises(ValueError, match="q: wanted 1 to 0 rows"):
            session.attend(q[:, :1])
        for count in (1, 2, 3, 40, 1, 33, 5, 64, 21):
            n = session.length
            assert session.append(k[:, n : n + count], v[:, n : n + count]) == n + count
            n += count
            for rows in {1, min(n, 16), min(n, 17), n}:
                options = CASES[rng.choice(list(CASES))]
                out = session.attend(q[:, n - rows : n], **options)
                check(out, None, [q[:, n - rows : n], k[:, :n], v[:, :n]], **options)
        assert session.length == 170
        with pytest.raises(Overloaded, match="max_tokens 170"):
            session.append(k[:, :1], v[:, :1])
    with pytest.raises(Closed, match="session"):
        session.attend(q[:, :1])


def test_a_session_of_numpy_arrays(cluster: Make) -> None:
    q, k, v = inputs(30, 2, 2, torch.float32)
    with cluster(2).session(heads=2, kv_heads=2, head_dim=16) as session:
        session.append(k.numpy(), v.numpy())
        out = session.attend(q.numpy())
        check(out, None, [q, k, v])


def test_what_a_session_refuses(cluster: Make) -> None:
    ask: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 16}
    for wrong, message in (
        ({"heads": 3}, "heads: wanted a multiple of kv_heads 2, got 3"),
        ({"head_dim": 12}, "head_dim: wanted a multiple of 8"),
        ({"dtype": "int8"}, "dtype: wanted one of"),
        ({"max_tokens": 0}, "max_tokens: wanted an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster(2).session(**ask | wrong)
    with pytest.raises(ValueError, match="max_tokens: wanted a session of at most"):
        cluster(2).session(**ask, max_tokens=1 << 20)
    with cluster(2).session(**ask) as session:
        x = np.zeros((1, 3, 2, 16), np.float32)
        for k, v, message in (
            (x, x[:, :2], "v: wanted k's shape"),
            (x[:, :, :1], x[:, :, :1], r"k: wanted \[1, n, 2, 16\]"),
            (x.astype(np.float64), x.astype(np.float64), "k: wanted the session's dtype float32"),
            (x, x + np.inf, "v: wanted finite numbers"),
        ):
            with pytest.raises(ValueError, match=message):
                session.append(k, v)
        assert session.length == 0
        session.append(x, x)
        with pytest.raises(ValueError, match="q: wanted 1 to 3 rows"):
            session.attend(np.zeros((1, 4, 4, 16), np.float32))


def test_closed_sessions_give_their_memory_back(cluster: Make) -> None:
    """Each takes a third of what there is: fifty of them only fit one after the other."""
    gang = cluster(2)._supervisor.gang()
    for i in range(50):
        with cluster(2).session(heads=1, kv_heads=1, head_dim=128, max_tokens=36000) as session:
            if i == 0:
                others = [cluster(2).session(heads=1, kv_heads=1, head_dim=128, max_tokens=36000) for _ in range(2)]
                with pytest.raises(Overloaded, match="sessions: wanted at most"):
                    cluster(2).session(heads=1, kv_heads=1, head_dim=128, max_tokens=36000)
                for other in others:
                    other.close()
                    other.close()
            session.append(np.ones((1, 5, 1, 128), np.float32), np.ones((1, 5, 1, 128), np.float32))
    for rank in range(2):
        assert gang.ask(rank, {"do": "health"}, timeout=10)["session_bytes"] == 0
        assert gang.ask(rank, {"do": "health"}, timeout=10)["waiting_bytes"] == 0


def test_two_hundred_calls_of_eight_threads(cluster: Make) -> None:
    """Attention and sessions of all shapes, all at once: every answer is its caller's."""
    c = cluster(2)
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
            held: list[Tensor] = [torch.empty(1, 0, 2, 16)] * 3
            with c.session(heads=2, kv_heads=2, head_dim=16, max_tokens=2000) as session:
                for _ in range(25):
                    n = rng.choice((1, 2, 7, 30, 64))
                    qkv = [torch.randn(1, n, 2, 16, generator=g) for _ in range(3)]
                    if rng.random() < 0.5:
                        check(c.attention(*qkv), None, qkv)
                    else:
                        held = [torch.cat(pair, 1) for pair in zip(held, qkv, strict=True)]
                        session.append(*qkv[1:])
                        rows = rng.randint(1, held[0].shape[1])
                        q = held[0][:, -rows:]
                        check(session.attend(q), None, [q, *held[1:]])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if problems:
        raise problems[0]
    assert not any(thread.is_alive() for thread in threads)
    assert c.ready()
    assert c.restarts == 0


def test_health(cluster: Make) -> None:
    c = cluster(2)
    time.sleep(1.5)
    health = c.health()
    assert [each.rank for each in health] == [0, 1]
    assert all(_running(each.pid) for each in health)
    assert len({each.pid for each in health} | {os.getpid()}) == 3
    for each in health:
        assert each.alive
        assert each.device == "cpu"
        assert each.state in ("idle", "busy")
        assert each.host == os.uname().nodename
        assert each.last_collective_age_s is not None
        assert 0 <= each.last_collective_age_s < 3
    assert c.ready()
    info = c.info()
    assert (info["world"], info["device"], info["model"], info["restarts"]) == (2, "cpu", None, 0)
    with pytest.raises(ValueError, match="model: wanted a cluster with a model"):
        c.complete([1, 2, 3])
    assert c.tokenizer is None


def test_a_deadline_passes_and_the_next_call_is_served(cluster: Make) -> None:
    qkv = inputs(6000, 4, 4, torch.float32)
    with pytest.raises(TimeoutError):
        cluster(2).attention(*qkv, timeout=0.05)
    small = inputs(20, 2, 2, torch.float32)
    check(cluster(2).attention(*small), None, small)
    assert cluster(2).restarts == 0


def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(ValueError, match="n: wanted 1 rank or more, got 0"):
        RingCluster.local(0)
    with pytest.raises(ValueError, match="device: wanted one of"):
        RingCluster.local(1, device="tpu")
    with pytest.raises(ValueError, match="model: wanted a folder"):
        RingCluster.local(1, device="cpu", model=tmp_path / "none")
    with pytest.raises(ValueError, match="timeout: wanted a positive number"):
        RingCluster.local(1, device="cpu", timeout=0)
    with pytest.raises(ValueError, match="memory: wanted either it or pages"):
        RingCluster.local(1, device="cpu", memory=1, pages=1)
    with pytest.raises(ValueError, match="environment: wanted torchrun's RANK"):
        RingCluster.torchrun()
    assert children() == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_their_caller(how: signal.Signals, tmp_path: Path, environment: dict[str, str]) -> None:
    """Ctrl-C in a terminal, which goes to the whole group; SIGTERM and SIGKILL, which go to the caller alone."""
    script = tmp_path / "program.py"  # without a guard on __main__: ranks do not import it
    script.write_text(
        "from ringfa3_launch.cluster import RingCluster\n"
        "import time\n"
        "with RingCluster.local(1, device='cpu') as cluster:\n"
        "    print(*[each.pid for each in cluster.health()], flush=True)\n"
        "    time.sleep(100)\n"
    )
    (tmp_path / "temporary").mkdir()
    environment["TMPDIR"] = str(tmp_path / "temporary")
    caller = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert caller.stdout is not None
    [pid] = map(int, caller.stdout.readline().split())
    os.killpg(caller.pid, how) if how == signal.SIGINT else caller.send_signal(how)
    _, err = caller.communicate(timeout=30)
    deadline = time.monotonic() + patience(30)
    while _running(pid):
        assert time.monotonic() < deadline, "a rank outlived its caller"
        time.sleep(0.05)
    assert not list((tmp_path / "temporary").glob("ringfa3-*")), "the ranks' folder was left behind"
    assert "RankFailed" not in err
    if how == signal.SIGINT:
        assert err.count("KeyboardInterrupt") == 1


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # an orphan that init has not collected yet


def test_close_ends_everything_and_says_so_to_who_waits() -> None:
    before = children()
    files, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    cluster = RingCluster.local(2, device="cpu")
    assert cluster.ready()
    session = cluster.session(heads=2, kv_heads=2, head_dim=16)
    heard: list[BaseException | None] = []

    def call() -> None:
        try:
            while True:
                cluster.attention(X, X, X)
        except BaseException as error:
            heard.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    begin = time.monotonic()
    cluster.close()
    assert time.monotonic() - begin < patience(8)
    cluster.close()
    thread.join(30)
    assert isinstance(heard[0], Closed)
    for refused in (lambda: cluster.attention(X, X, X), cluster.wait, lambda: session.append(X, X)):
        with pytest.raises(Closed, match="closed"):
            refused()
    assert not cluster.ready()
    assert [each.alive for each in cluster.health()] == [False, False]
    assert children() == before
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) <= files
    assert not isinstance(heard[0], SessionLost)
