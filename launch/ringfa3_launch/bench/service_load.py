"""The clients of `ringfa3 bench service`: a process of its own that asks over HTTP, so many at once, and keeps time.

It imports no torch: it is to be there soon, and small.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Any

import httpx

PATIENCE_S = 600.0  # without a byte
BEHIND_S = 120.0  # that the process may take to start, or to end


@dataclass(frozen=True)
class Request:
    """One that is to be made.

    Args:
        prompt: its number, which its answer has too.
        ids: its tokens.
        tokens: to be answered, greedily, whatever the model's end token.
    """

    prompt: int
    ids: Sequence[int]
    tokens: int


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    Args:
        prompt: which one.
        text: all of it.
        first: seconds to the first text.
        total: seconds to the last.
        tokens: how many there were; 0: it failed.
        cached: tokens of the prompt that the engine had already.
        refused: how often 429 came first. The clock begins anew with the attempt that is let in.
        error: what went wrong; "" nothing.
        ids: the tokens.
    """

    prompt: int
    text: str = ""
    first: float = 0.0
    total: float = 0.0
    tokens: int = 0
    cached: int = 0
    refused: int = 0
    error: str = ""
    ids: tuple[int, ...] = ()

    @property
    def each(self) -> float:
        """Seconds from a token to the next."""
        return (self.total - self.first) / max(1, self.tokens - 1)


class Clients:
    """The process, running; `clients` makes one."""

    def __init__(self, pipe: connection.Connection, process: Any) -> None:
        self._pipe, self._process = pipe, process

    def ask(self, requests: Sequence[Request], concurrency: int) -> tuple[list[Answer], float]:
        """The answers, in the requests' order, and seconds from the first request to the last answer.

        Raises:
            RuntimeError: the process ended, or could not go on.
        """
        try:
            self._pipe.send((list(requests), concurrency))
            answers, seconds = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(BEHIND_S)
            raise RuntimeError(f"the clients' process ended, exit status {self._process.exitcode}") from None
        if isinstance(answers, str):
            raise RuntimeError(f"the clients could not go on: {answers}")
        return answers, seconds


@contextmanager
def clients(url: str, model: str, token: str | None) -> Iterator[Clients]:
    """A process with clients of this service, for as long as the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, url, model, token), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Clients(ours, process)
    finally:
        ours.close()
        process.join(BEHIND_S)
        if process.is_alive():
            process.kill()


def serve(pipe: connection.Connection, url: str, model: str, token: str | None) -> None:
    """The process: perform what comes through the pipe, until it is closed."""
    asyncio.run(_serve(pipe, url, model, token))


async def _serve(pipe: connection.Connection, url: str, model: str, token: str | None) -> None:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=PATIENCE_S) as http:
        while True:
            try:
                requests, concurrency = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            try:
                pipe.send(await _level(http, model, requests, concurrency))
            except Exception as error:  # whatever it is, somebody waits in the other process
                pipe.send((f"{type(error).__name__}: {error}", 0.0))


async def _level(
    http: httpx.AsyncClient, model: str, requests: Sequence[Request], concurrency: int
) -> tuple[list[Answer], float]:
    """As `Clients.ask`: each client takes the next request as soon as it has its answer."""
    bodies = [_body(model, request) for request in requests]  # written before the clock starts
    answers: dict[int, Answer] = {}
    waiting = iter(range(len(requests)))

    async def client() -> None:
        for i in waiting:
            answers[i] = await _answer(http, bodies[i], Answer(requests[i].prompt))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - begun
    return [answers[i] for i in range(len(requests))], seconds


async def _answer(http: httpx.AsyncClient, body: bytes, nothing: Answer) -> Answer:
    """Ask until let in; an error of any kind is an answer too."""
    refused = 0
    while True:
        begun = time.perf_counter()
        try:
            async with http.stream("POST", "/v1/completions", content=body) as reply:
                if reply.status_code == 429:
                    refused += 1
                    wait = float(reply.headers.get("retry-after", 1))
                elif reply.status_code != 200:
                    said = (await reply.aread()).decode(errors="replace")
                    return replace(nothing, refused=refused, error=f"status {reply.status_code}: {said[:200]}")
                else:
                    return replace(await _streamed(reply, begun, nothing), refused=refused)
        except (httpx.HTTPError, ValueError, KeyError) as error:  # the last two: no events as they should be
            return replace(nothing, refused=refused, error=f"{type(error).__name__}: {error}")
        await asyncio.sleep(wait * random.uniform(0.2, 0.6))  # not all at once


async def _streamed(reply: httpx.Response, begun: float, nothing: Answer) -> Answer:
    """The events of one answer, with the times at which its text came."""
    texts: list[str] = []
    ids: list[int] = []
    first = last = 0.0
    usage: dict[str, Any] = {}
    finish, done = None, False
    async for line in reply.aiter_lines():
        if not line.startswith("data: "):
            continue
        now = time.perf_counter()
        done = line == "data: [DONE]"
        if done:
            break
        part = json.loads(line[6:])
        if "error" in part:
            return replace(nothing, error=f"in the stream: {part['error'].get('message')}"[:200])
        usage = part.get("usage") or usage
        for choice in part["choices"]:
            ids += choice["token_ids"]
            if choice["text"]:
                texts.append(choice["text"])
                first, last = first or now, now
            if choice["finish_reason"]:
                finish, last = choice["finish_reason"], now
    if not done or finish is None or not texts:
        return replace(nothing, error=f"a stream without its end (finish {finish}, {len(texts)} parts)")
    if len(ids) != usage["completion_tokens"]:
        return replace(nothing, error=f"a stream of {len(ids)} token ids for {usage['completion_tokens']} tokens")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return replace(
        nothing, text="".join(texts), first=first - begun, total=last - begun, tokens=usage["completion_tokens"],
        cached=cached, ids=tuple(ids),
    )  # fmt: skip


def _body(model: str, request: Request) -> bytes:
    asked = {
        "model": model, "prompt": list(request.ids), "max_tokens": request.tokens, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(asked, separators=(",", ":")).encode()
