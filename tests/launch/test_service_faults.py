"""Faults of ranks as a client over HTTP meets them: killed, stopped or out of memory in the middle of its request."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ringfa3_launch.cluster import RingCluster
from ringfa3_launch.cluster.tensors import pack
from ringfa3_launch.service import Limits
from ringfa3_launch.service.guard import TENSORS
from tests.launch.toy_gang import serving
from tests.patience import patience

TOLD = 5.0  # seconds within which who asked hears that a rank was killed
UNREADY = 2.0
TIMEOUT = 3.0  # of silence
CHUNK = 4096  # tokens: half of them on each rank,
WIDTH = 4352  # each of whose activations has 34 MiB, more than an allocator keeps
SHORT = list(range(100))
LONG = [[(i * step) % 128 for i in range(30000)] for step in (1, 3)]  # seconds of work each; nothing to share


class Served:
    """Two ranks with a Llama of random weights and no tokenizer, and the service over them."""

    def __init__(self, cluster: Any, url: str, started: float) -> None:
        self.cluster, self.started = cluster, started  # seconds that ranks take to start here and now
        self.http = httpx.Client(base_url=url, timeout=300)
        self.name = cluster.model_name
        self.tokens = self.answer()

    def ask(self, prompt: list[int], **more: Any) -> httpx.Response:
        body = {"model": self.name, "prompt": prompt, "temperature": 0, "return_token_ids": True}
        return self.http.post("/v1/completions", json=body | more)

    def answer(self) -> list[int]:
        reply = self.ask(SHORT, max_tokens=12)
        assert reply.status_code == 200, reply.text
        tokens: list[int] = reply.json()["choices"][0]["token_ids"]
        return tokens

    def ready(self) -> bool:
        return self.http.get("/ready").status_code == 200

    def engine(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/v1/info").json()["gang"].get("engine", {})
        return found

    def pid(self, rank: int) -> int:
        pid: int = self.http.get("/v1/info").json()["ranks"][rank]["pid"]
        return pid

    def recovers(self, restarts: int) -> None:
        """Wait for new ranks, and see that they answer as the first ones did."""
        within(max(30.0, 3 * self.started), self.ready)
        assert self.cluster.restarts == restarts + 1
        assert self.answer() == self.tokens


class Call(threading.Thread):
    """A request in a thread of its own; what came of it, and when."""

    def __init__(self, ask: Callable[[], httpx.Response]) -> None:
        super().__init__(daemon=True)
        self._ask, self.at = ask, 0.0
        self.reply: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.reply = self._ask()
        self.at = time.monotonic()

    def error(self) -> dict[str, Any]:
        """The error that was answered, by a status or as a stream's last event."""
        self.join(patience(60))
        assert self.reply is not None
        if self.reply.headers["content-type"].startswith("text/event-stream"):
            *_, last = [line[6:] for line in self.reply.text.splitlines() if line.startswith("data: ")]
        else:
            assert self.reply.status_code == 503, self.reply.text
            assert self.reply.headers["retry-after"]
            last = self.reply.text
        error: dict[str, Any] = json.loads(last)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "server_error"
        return error


def within(seconds: float, fine: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not fine():
        assert time.monotonic() - begun < patience(seconds)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    begun = time.monotonic()
    cluster = RingCluster.local(2, device="cpu", model=folder, memory=64 << 20, chunk=CHUNK, timeout=TIMEOUT)
    try:
        with serving(cluster, limits=Limits(attention_flops=1e15, drain_s=1.0)) as (url, _):
            served = Served(cluster, url, time.monotonic() - begun)
            yield served
            served.http.close()
    finally:
        cluster.close()


@pytest.fixture
def served(started: Served) -> Served:
    """With ranks that serve, whatever the test before this one left."""
    within(max(30.0, 3 * started.started), started.ready)
    return started


def prefilling(served: Served) -> list[Call]:
    """Two calls in the middle of whose prompts the ranks are."""
    before = served.engine()["prefilled_tokens"]
    calls = [
        Call(lambda prompt=prompt, stream=stream: served.ask(prompt, max_tokens=4, stream=stream))
        for prompt, stream in zip(LONG, (False, True), strict=True)
    ]
    within(60, lambda: served.engine().get("prefilled_tokens", 0) > before)
    return calls


def decoding(served: Served) -> list[Call]:
    """Two calls that have been answered something."""
    before = served.engine()["completion_tokens"]
    more = {"max_tokens": 20000, "ignore_eos": True}
    calls = [Call(lambda stream=stream: served.ask(SHORT, stream=stream, **more)) for stream in (False, True)]
    within(60, lambda: served.engine().get("completion_tokens", 0) > before + 20)
    return calls


def all_hear(calls: list[Call], rank: int, cause: str, since: float, seconds: float) -> None:
    for call in calls:
        error = call.error()
        assert error["code"] == "rank_failed"
        assert f"rank {rank} on {os.uname().nodename}" in error["message"], error
        assert cause in error["message"], error
        assert call.at - since < patience(seconds), f"heard after {call.at - since:.2f} s"


@pytest.mark.parametrize(("busy", "rank"), [(prefilling, 1), (decoding, 0)])
def test_a_rank_is_killed(served: Served, busy: Callable[[Served], list[Call]], rank: int) -> None:
    restarts, dead = served.cluster.restarts, served.pid(rank)
    calls = busy(served)
    since = time.monotonic()
    os.kill(dead, signal.SIGKILL)
    within(UNREADY, lambda: not served.ready())
    all_hear(calls, rank, "signal SIGKILL", since, TOLD)
    served.recovers(restarts)


def test_a_rank_stands_still_in_the_middle_of_a_prompt(served: Served) -> None:
    restarts, stopped = served.cluster.restarts, served.pid(1)
    calls = prefilling(served)
    since = time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    within(UNREADY + 0.5, lambda: not served.ready())
    all_hear(calls, 1, f"no sign of life for {TIMEOUT:g} s", since, TIMEOUT + 2)
    served.recovers(restarts)


def test_a_rank_without_memory_for_a_prompt(served: Served) -> None:
    """The request in whose middle it was is answered so, and the next is right."""
    restarts = served.cluster.restarts
    limited(served.pid(1), 16 << 20)
    error = Call(lambda: served.ask(LONG[0][: 2 * CHUNK], max_tokens=4)).error()
    assert error["code"] == "rank_failed"
    assert f"rank 1 on {os.uname().nodename}" in error["message"]
    assert "memory" in error["message"]
    served.recovers(restarts)


def test_a_rank_without_memory_for_what_attention_brings(served: Served) -> None:
    """Nothing was begun: that call is told to come back, and the next is right, by the same ranks."""
    restarts, pid = served.cluster.restarts, served.pid(1)
    headers = {"Content-Type": TENSORS}

    def attend(rows: int) -> httpx.Response:
        body = b"".join(pack({name: torch.ones(1, rows, 1, 32) for name in "qkv"}))
        return served.http.post("/v1/attention", content=body, headers=headers)

    limited(pid, 16 << 20)
    refused = attend(3 << 17)  # 72 MiB for each rank: more than an allocator's arena may have in reserve
    assert refused.status_code == 429, refused.text
    assert refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "busy"
    assert "rank 1: no memory for" in refused.json()["error"]["message"]
    assert attend(50).status_code == 200
    assert served.answer() == served.tokens
    resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert served.cluster.restarts == restarts


def limited(pid: int, more: int) -> None:
    """Let this process have so many bytes more than it has now."""
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pid, resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))
