"""Texts: the language model of one rank, and on the leader the callers of its engine."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.utils.logging import disable_progress_bar

from ringfa3.inference.announce import Announcer
from ringfa3.inference.engine import Busy, Engine
from ringfa3.inference.events import Event
from ringfa3.inference.model import load
from ringfa3.inference.runner import Runner
from ringfa3.inference.sampling import Sampling
from ringfa3.profiling import Stopwatch, timed
from ringfa3_launch.cluster.desk import Client
from ringfa3_launch.cluster.settings import GIB, Settings
from ringfa3_launch.options import reading

MOST_HOPS = 1024  # of a prefill that are told of
HOP = re.compile(r"keys of rank (\d+)$")
OF_FREE = 0.8  # of a GPU's memory that is left beside the weights: activations need some, too, and graphs
WARM = 64  # requests that decode together, whose graphs are captured before the ranks serve: 7 graphs at most


class Texts:
    """A model, loaded. Making it and `execute` are collective.

    Args:
        settings: which model, and how much cache.
        device: of this rank.
        announcer: of all ranks.
        wake: called, from any thread, when there is something new to plan.
    """

    def __init__(
        self, settings: Settings, device: torch.device, announcer: Announcer, *, wake: Callable[[], None]
    ) -> None:
        assert settings.model is not None
        dtype = settings.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        disable_progress_bar()
        mesh = _mesh(settings.tp, announcer.world, device)
        with reading(Path(settings.model).name):
            model, self._tokenizer = load(settings.model, device=device, dtype=getattr(torch, dtype), group=mesh)
        memory = settings.memory
        if memory is None and settings.pages is None:
            memory = _room(device)
        graphs = settings.graphs and device.type == "cuda"
        self._runner = Runner(
            model, group=mesh, memory=memory, pages=settings.pages, page_size=settings.page_size,
            prefill=settings.prefill, graphs=graphs,
        )  # fmt: skip
        if graphs:  # else the first requests would wait for them, and for the decode kernels' compilation
            self._runner.warm(min(settings.max_running, WARM))
        self._engine = Engine(
            self._runner, self._tokenizer, chunk=settings.chunk, max_running=settings.max_running,
            max_waiting=settings.max_waiting, announcer=announcer,
        )  # fmt: skip
        self._place, self._wake = announcer.rank // settings.tp, wake  # among those who share the cache
        self._lock = threading.Lock()  # of what follows
        self._encoding = threading.Lock()
        self._owners: dict[int, Client] = {}  # of requests that are not over
        self._prefill: tuple[int, int, Stopwatch | None] = (0, 0, None)  # the last one: its number, tokens and hops
        self._executing = False
        self._happened: list[tuple[str, Client, Event]] = []  # in the step that is being executed

    @property
    def cache(self) -> tuple[int, int]:
        """Pages in use, and all, on this rank."""
        return self._runner.pages.used(self._place), self._runner.pages.pages

    @property
    def busy(self) -> bool:
        """Leader: whether some request runs or waits."""
        return bool(self._owners)

    def plan(self) -> dict[str, Any] | None:
        """Leader: the next step for all ranks, if any."""
        return self._engine.plan()

    def execute(self, step: dict[str, Any]) -> None:
        """Carry a step out, together with the other ranks.

        Raises:
            Exception: it failed in the middle. The callers are not told: they will hear from the cluster which rank
                failed, while this one may only know that something did.
        """
        self._executing = True
        with timed() if "prefill" in step else nullcontext() as watch:
            self._engine.execute(step)
        if watch is not None:
            self._prefill = (self._prefill[0] + 1, len(step["prefill"][1]), watch)
        self._executing = False
        happened, self._happened = self._happened, []
        for number, client, event in happened:
            self._tell(number, client, event)

    def handle(self, header: dict[str, Any], client: Client) -> None:
        """Leader, any thread: "complete" (whose events go to the client), "cancel" or "close_session"."""
        if header["do"] == "complete":
            self._submit(header, client)
        elif header["do"] == "close_session":
            self._engine.close_session(str(header.get("session")))
        else:
            self._cancel(header.get("request"), client)
        self._wake()

    def left(self, client: Client) -> None:
        """Leader, any thread: the client has gone; so have its requests, at the next step."""
        with self._lock:
            requests = [request for request, owner in self._owners.items() if owner is client]
        for request in requests:
            self._engine.cancel(request)
        self._wake()

    def info(self) -> dict[str, Any]:
        """What the model is, and how the engine does."""
        return {"vocab": self._runner.vocab, "max_length": self._engine.longest, "engine": self._engine.stats()}

    def hops(self) -> dict[str, Any]:
        """The last prefill of this rank, hop by hop; none where keys and values did not travel.

        Returns:
            number and tokens of the prefill; hops: source (whose keys), start_s and stop_s (since its step began).
        """
        number, tokens, watch = self._prefill
        ranges = (watch.ranges() if watch is not None else None) or []
        hops = [
            {"source": int(found[1]), "start_s": round(begin, 7), "stop_s": round(end, 7)}
            for name, begin, end in ranges[:MOST_HOPS]
            if (found := HOP.search(name))
        ]
        return {"number": number, "tokens": tokens, "hops": hops}

    def _submit(self, header: dict[str, Any], client: Client) -> None:
        number = str(header["id"])
        try:
            ids = header.get("ids")
            if ids is None:
                if self._tokenizer is None:
                    raise ValueError("prompt: wanted token ids, as the model has no tokenizer, got a text")
                with self._encoding:
                    ids = list(self._tokenizer(str(header["text"]))["input_ids"])
            asked = header["sampling"]
            sampling = Sampling(**{**asked, "stop": tuple(asked["stop"]), "stop_ids": tuple(asked["stop_ids"])})
            hear = partial(self._hear, number, client)
            with self._lock:  # until the caller knows its number, no event goes out
                request = self._engine.submit(ids, sampling, session=header.get("session"), on_event=hear)
                self._owners[request] = client
                client.reply({"id": number, "request": request, "prompt_tokens": len(ids)})
        except Busy as error:
            client.refuse(number, "overloaded", str(error))
        except (ValueError, TypeError, KeyError) as error:
            client.refuse(number, "wrong", str(error))

    def _cancel(self, request: object, client: Client) -> None:
        with self._lock:
            owned = type(request) is int and self._owners.get(request) is client
        if owned and isinstance(request, int):
            self._engine.cancel(request)

    def _hear(self, number: str, client: Client, event: Event) -> None:
        """From the engine, in the loop's thread."""
        if self._executing:
            self._happened.append((number, client, event))
        else:
            self._tell(number, client, event)

    def _tell(self, number: str, client: Client, event: Event) -> None:
        with self._lock:
            if event.finish is not None:
                self._owners.pop(event.request, None)
            client.reply({"id": number, "event": vars(event)})  # not asdict: 7 us a token, in the loop's thread


def _mesh(tp: int, world: int, device: torch.device) -> DeviceMesh | None:
    """Neighbours share the weights; None: nobody does. Raises ValueError where the ranks cannot be dealt so."""
    if world % tp:
        raise ValueError(f"tp: wanted a divisor of the number of ranks, {world}, got {tp}")
    return None if tp == 1 else init_device_mesh(device.type, (world // tp, tp), mesh_dim_names=("cp", "tp"))


def _room(device: torch.device) -> int:
    """Bytes for keys and values, the same on every rank. Collective."""
    if device.type != "cuda":
        return GIB
    free = torch.tensor(torch.cuda.mem_get_info(device)[0] * OF_FREE, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return int(free)
