"""A gang for the service's tests: attention in fp64, and a toy model whose every token follows from those before."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn

from ringfa3 import RankFailed
from ringfa3_kernels import Visible, attend
from ringfa3_launch.cluster.faults import SessionLost
from ringfa3_launch.service import Access, Limits, create_app
from ringfa3_launch.service.server import Server, bind

EOS = 0


class Busy(RuntimeError):
    """As the engine's."""


@dataclass(frozen=True)
class Event:
    """As the engine's."""

    request: int
    token: int | None
    text: str
    finish: str | None
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass
class Health:
    """As the cluster's."""

    rank: int
    host: str = "here"
    pid: int = 1
    device: str = "cpu"
    alive: bool = True
    last_collective_age_s: float | None = 0.1
    cache_used: int = 3
    cache_pages: int = 8
    state: str = "idle"


class Tokenizer:
    """Bytes are tokens."""

    chat_template = "yes"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> list[int]:
        if turns[-1]["role"] != "user":
            raise RuntimeError("the user has the last word")
        return list("".join(f"<{turn['role']}>{turn['content']}" for turn in turns).encode())


def follows(ids: Sequence[int], seed: int | None) -> int:
    """The token after these: a letter or a space; sometimes the end."""
    x = seed or 0
    for each in ids[-16:]:
        x = (x * 6364136223846793005 + each + 1442695040888963407) % (1 << 64)
    x = (x >> 33) % 400
    return EOS if x == 0 else ord("abcdefghijklmnopqrstuvwxyz "[x % 27])


def answer(prompt: str, most: int, seed: int | None = None) -> str:
    """What the toy model says alone."""
    ids, count = list(prompt.encode()), len(prompt.encode())
    while len(ids) - count < most and (token := follows(ids, seed)) != EOS:
        ids.append(token)
    return bytes(ids[count:]).decode()


@dataclass
class Running:
    """A request of the toy engine."""

    number: int
    ids: list[int]
    prompt: int
    sampling: Any
    news: queue.SimpleQueue[Event | Exception] = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self.news.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.finish:
                return

    def cancel(self) -> None:
        self.cancelled = True


class ToySession:
    """Keys and values of one session."""

    def __init__(self, gang: ToyGang) -> None:
        self.gang, self.keys, self.values = gang, [], []  # type: ignore[var-annotated]
        self.closed = False

    @property
    def length(self) -> int:
        return sum(k.shape[1] for k in self.keys)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.gang.check()
        if self.gang.sessions_lost:
            raise SessionLost("the gang was rebuilt")
        self.keys.append(k)
        self.values.append(v)

    def attend(self, q: torch.Tensor, **options: Any) -> torch.Tensor:
        self.gang.check()
        return plain(q, torch.cat(self.keys, 1), torch.cat(self.values, 1), **options)[0]

    def close(self) -> None:
        self.closed = True


class ToyGang:
    """As RingCluster, in this process. step: seconds that a token of all running requests takes."""

    model_name: str | None = "toy"

    def __init__(self, *, step: float = 0.0, context: int = 4096, capacity: int = 10_000) -> None:
        self.step, self.context, self.capacity = step, context, capacity
        self.tokenizer: Any = Tokenizer()
        self.ranks = [Health(0), Health(1)]
        self.restarts = 0
        self.failure: Exception | None = None
        self.sessions_lost = False
        self.steps: dict[int, int] = {}  # tokens computed, by request
        self.opened: list[ToySession] = []
        self.forgotten: list[str] = []
        self.attending = threading.Event()
        self.attending.set()
        self._numbers = itertools.count(1)
        self._running: dict[int, Running] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        self.check()
        self.attending.wait(30)
        lse = options.pop("return_lse", False)
        done = plain(q, k, v, **options)
        return done if lse else done[0]

    def session(self, *, heads: int, kv_heads: int, head_dim: int, dtype: str, max_tokens: int) -> ToySession:
        self.check()
        self.opened.append(ToySession(self))
        return self.opened[-1]

    def complete(self, prompt: Sequence[int], sampling: Any, *, session: str | None = None) -> Running:
        self.check()
        with self._lock:
            if len(self._running) >= self.capacity:
                raise Busy("the queue is full")
            request = Running(next(self._numbers), list(prompt), len(prompt), sampling)
            self._running[request.number] = request
        return request

    def close_session(self, name: str) -> None:
        self.forgotten.append(name)

    def health(self) -> list[Health]:
        return self.ranks

    def ready(self) -> bool:
        return all(rank.alive for rank in self.ranks)

    def info(self) -> dict[str, Any]:
        return {"max_length": self.context, "vocab": 256, "engine": {"running": self.running, "waiting": 0}}

    @property
    def running(self) -> int:
        return len(self._running)

    def fail(self, rank: int) -> None:
        """A rank dies: everybody hears of it."""
        self.failure = RankFailed(rank, "here", None, "died (SIGKILL)")
        self.ranks[rank].alive, self.ranks[rank].state = False, "dead"

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            time.sleep(self.step or 0.0005)
            with self._lock:
                running = list(self._running.values())
            for request in running:
                event = self.failure or self._event(request)
                if isinstance(event, Exception) or event.finish:
                    with self._lock:
                        del self._running[request.number]
                request.news.put(event)

    def _event(self, request: Running) -> Event:
        sampling, count = request.sampling, len(request.ids) - request.prompt
        numbers = (request.prompt, count)
        if request.cancelled:
            return Event(request.number, None, "", "cancelled", None, *numbers)
        token = follows(request.ids, sampling.seed)
        self.steps[request.number] = count + 1
        numbers = (request.prompt, count + 1)
        if token == EOS and not sampling.ignore_eos:
            return Event(request.number, token, "", "stop", None, *numbers)
        request.ids.append(token)
        text = bytes(request.ids[request.prompt :]).decode()
        for stop in sampling.stop:  # toy: of one character, so nothing has to be withheld
            if text.endswith(stop):
                return Event(request.number, token, "", "stop", None, *numbers)
        finish = "length" if count + 1 >= sampling.max_tokens else None
        return Event(request.number, token, chr(token), finish, None, *numbers)


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in fp64 by the reference; q's rows are the last positions."""
    Sq, Sk = q.shape[1], k.shape[1]
    at = torch.arange(Sk - Sq, Sk)
    left, right = window or (-1, -1)
    lo = torch.zeros(Sq) if left < 0 else (at - left).clamp(min=0)
    hi = torch.full((Sq,), Sk) if right < 0 else (at + right + 1).clamp(max=Sk)
    hi = torch.minimum(hi, at + 1) if causal else hi
    visible = Visible(lo.to(torch.int32), hi.to(torch.int32))
    done = attend(q.double(), k.double(), v.double(), visible, softcap=softcap, scale=scale, impl="reference")
    return done.out.to(q.dtype), done.lse.float()


@contextmanager
def serving(gang: Any, *, access: Access | None = None, limits: Limits | None = None) -> Iterator[tuple[str, Server]]:
    """The app over real HTTP on a free port of this machine, in a thread; its URL and server."""
    limits = limits or Limits()
    app = create_app(gang, access=access, limits=limits)
    server = Server(app, drain_s=limits.drain_s)
    address = bind("127.0.0.1", 0)
    thread = threading.Thread(target=uvicorn.Server.run, args=(server, [address]))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield f"http://127.0.0.1:{address.getsockname()[1]}", server
    finally:
        server.handle_exit(15)
        thread.join(30)
        assert not thread.is_alive()


def main() -> None:
    """The service in a process of its own, until SIGTERM; prints its URL."""
    app = create_app(ToyGang(step=0.002), limits=Limits(completions=120, drain_s=5.0))
    address = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{address.getsockname()[1]}"
    Server(app, drain_s=5.0, listening=lambda: print(url, flush=True)).run([address])


if __name__ == "__main__":
    main()
