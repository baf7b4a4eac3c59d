"""Measuring a service: pairs beside the bare engine at concurrency 1, levels of many clients, then the long prompt."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ringfa3_launch.bench.case import format_size
from ringfa3_launch.bench.service_case import Level, Overhead, Pair, Played, Program, Service
from ringfa3_launch.bench.service_load import Answer, Clients, Request

Tell = Callable[[str, int], None]

STARTING_S = 30.0  # for the server to listen, and to end


@contextmanager
def serving(cluster: Any, *, completions: int) -> Iterator[str]:
    """The app of `ringfa3 serve` over this cluster, on a free port of this machine, in a thread; its URL.

    Raises:
        RuntimeError: it does not come up, or does not end.
    """
    from ringfa3_launch.service import Limits, create_app
    from ringfa3_launch.service.server import Server, bind

    listening = threading.Event()
    server = Server(create_app(cluster, limits=Limits(completions=completions)), drain_s=1.0, listening=listening.set)
    address = bind("127.0.0.1", 0)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[address])), name="server", daemon=True
    )  # as `ringfa3 serve` does, but for the signals
    thread.start()
    if not listening.wait(STARTING_S):
        raise RuntimeError(f"the server: wanted it to listen within {STARTING_S:g} s, got nothing")
    try:
        yield f"http://127.0.0.1:{address.getsockname()[1]}"
    finally:
        server.handle_exit(15)
        thread.join(STARTING_S)


def play(
    program: Program, service: Service, clients: Clients, cluster: Any, prompts: Callable[[int, int], list[list[int]]],
    *, until: float | None, tell: Tell,
) -> Played:  # fmt: skip
    """Everything that is measured.

    Args:
        cluster: whose ranks the service has, a RingCluster; None: it runs elsewhere, and nothing is compared.
        prompts: so many, of so many tokens each.
        until: by the machine's monotonic clock, when nothing more is begun; None: no limit.
        tell: what was done, and steps.
    """
    played = Played(service, prompts=prompts(program.prompts, program.length))
    try:
        _measure(program, played, clients, cluster, prompts, until, tell)
    except Exception as error:  # a rank failed, most often: what was measured before is told, and this
        played.wrong.append(f"broke off: {type(error).__name__}: {error}"[:300])
    return played


def _measure(
    program: Program, played: Played, clients: Clients, cluster: Any, prompts: Callable[[int, int], list[list[int]]],
    until: float | None, tell: Tell,
) -> None:  # fmt: skip
    requests = [Request(i, ids, program.tokens) for i, ids in enumerate(played.prompts)]
    _one_by_one(program, played, clients, cluster, requests, tell)
    for concurrency in program.concurrency:
        if concurrency == 1:
            continue
        if _late(until):
            played.missing.append(f"concurrency {concurrency}: no time left")
            continue
        many = [requests[i % len(requests)] for i in range(program.asked(concurrency))]
        answers, seconds = clients.ask(many, concurrency)
        level = Level(concurrency, seconds, tuple(answers))
        played.levels.append(level)
        if any(answer.cached for answer in answers):
            played.missing.append(f"concurrency {concurrency}: prompts came from the cache: no cold prefill")
        tell(f"{concurrency} clients: {level.requests_s:.3g} requests/s, {level.errors} errors", 1)
    if program.long is not None:
        where = f"a prompt of {format_size(program.long)} tokens"
        if _late(until):
            played.missing.append(f"{where}: no time left")
        else:
            _long(program, played, clients, cluster, prompts(program.rounds + 1, program.long), tell)


def bare(cluster: Any, request: Request) -> Answer:
    """The same request to the engine, from this process; its times are those of events, as a caller gets them."""
    from ringfa3.inference.sampling import Sampling

    sampling = Sampling(temperature=0.0, max_tokens=request.tokens, ignore_eos=True)
    texts: list[str] = []
    ids: list[int] = []
    first = last = 0.0
    event = None
    begun = time.perf_counter()
    for event in cluster.complete(request.ids, sampling):
        last = time.perf_counter()
        if event.text:
            first = first or last
            texts.append(event.text)
        if event.token is not None:
            ids.append(event.token)
    answer = Answer(request.prompt, ids=tuple(ids))
    if event is None or event.finish != "length" or not texts:
        return replace(answer, error=f"the engine finished by {event and (event.error or event.finish)!r}")
    return replace(
        answer, text="".join(texts), first=first - begun, total=last - begun, tokens=len(ids),
        cached=event.cached_tokens,
    )  # fmt: skip


def _one_by_one(
    program: Program, played: Played, clients: Clients, cluster: Any, requests: Sequence[Request], tell: Tell
) -> None:
    """Every prompt alone: over HTTP, and where there is a cluster by the bare engine. They are the lone answers."""
    pairs = list(_pairs(clients, cluster, _warmed(requests), f"S{format_size(program.length)}", tell))[1:]
    served = tuple(pair.served for pair in pairs)
    played.levels.append(Level(1, sum(answer.total for answer in served), served))
    if cluster is not None:
        _keep(played, program.length, pairs)
    for pair in pairs:
        best = pair.bare if cluster is not None else pair.served
        if not best.error:
            played.lone[best.prompt] = best


def _long(
    program: Program, played: Played, clients: Clients, cluster: Any, prompts: list[list[int]], tell: Tell
) -> None:
    """The long prompt, alone; a first round is not counted."""
    assert program.long is not None
    requests = [Request(i, ids, program.tokens) for i, ids in enumerate(prompts, len(played.prompts))]
    played.prompts += prompts
    where = f"S{format_size(program.long)}"
    try:
        pairs = list(_pairs(clients, cluster, requests, where, tell))[1:]
    except Exception as error:  # too long for the model or the cache: the table has to say so
        played.missing.append(f"{where}: {type(error).__name__}: {error}"[:300])
        return
    if cluster is not None:
        _keep(played, program.long, pairs)
        played.lone |= {pair.bare.prompt: pair.bare for pair in pairs if not pair.bare.error}
    else:
        played.overheads.append(Overhead(program.long, tuple(pair for pair in pairs if not pair.served.error)))
        played.missing += [f"{where}: {pair.served.error}" for pair in pairs if pair.served.error]


def _keep(played: Played, length: int, pairs: Sequence[Pair]) -> None:
    where = f"S{format_size(length)}"
    good = tuple(pair for pair in pairs if not pair.bare.error and not pair.served.error)
    failed = [pair.bare.error or pair.served.error for pair in pairs if pair not in good]
    played.missing += [f"{where}: {why}" for why in dict.fromkeys(failed)]
    if good:
        played.overheads.append(Overhead(length, good))
    for pair in good:
        if pair.bare.cached or pair.served.cached:
            played.missing.append(f"{where}: {pair.served.cached} prompt tokens came from the cache: no cold prefill")


def _pairs(clients: Clients, cluster: Any, requests: Sequence[Request], where: str, tell: Tell) -> Iterator[Pair]:
    """Bare and served answers to each, who is first taking turns."""
    for turn, request in enumerate(requests):
        ways: list[tuple[str, Callable[[Request], Answer]]] = [("served", lambda r: clients.ask([r], 1)[0][0])]
        if cluster is not None:
            ways.append(("bare", lambda r: bare(cluster, r)))
        done = {name: ask(request) for name, ask in (ways if turn % 2 else ways[::-1])}
        nothing = Answer(request.prompt, error="not asked")
        pair = Pair(done.get("bare", nothing), done["served"])
        yield pair
        tell(f"{where}: {pair.served.first:.3g} s to the first token, bare {pair.bare.first:.3g} s", 1)


def _warmed(requests: Sequence[Request]) -> list[Request]:
    """With one before them that is not counted."""
    return [requests[-1], *requests]


def _late(until: float | None) -> bool:
    return until is not None and time.monotonic() > until
