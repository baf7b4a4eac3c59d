"""GET /live, /ready, /metrics and /v1/info: how the service and its ranks are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from ringfa3_launch.machine import version
from ringfa3_launch.service.contract import RankHealth
from ringfa3_launch.service.errors import ErrorBody, Refusal
from ringfa3_launch.service.metrics import TYPE
from ringfa3_launch.service.state import Service, no_query


class Alive(BaseModel):
    """The process answers."""

    live: bool


class Ready(BaseModel):
    """All ranks met a moment ago."""

    ready: bool


class RankState(BaseModel):
    """One rank."""

    rank: int
    host: str
    pid: int
    device: str
    alive: bool
    state: str
    last_collective_age_s: float | None
    cache_pages_used: int
    cache_pages: int


class Info(BaseModel):
    """What is served here, and how its ranks are. More fields may come with time."""

    model_config = ConfigDict(extra="allow")

    version: str
    model: str | None
    context_tokens: int | None
    ready: bool
    restarts: int
    ranks: list[RankState]
    completions_in_flight: int
    limits: dict[str, Any]
    gang: dict[str, Any]


def routes(service: Service) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(tags=["status"])

    @router.get("/live")
    async def live() -> Alive:
        """The process answers; says nothing of the ranks."""
        return Alive(live=True)

    @router.get("/ready", responses={503: {"model": ErrorBody}})
    async def ready(request: Request) -> Ready:
        """A collective over all ranks was a moment ago, and the service is not ending. Why not: with the token only."""
        why = await unready(service)
        if why is not None:
            known = request.scope["state"]["known"]
            raise Refusal(503, f"not ready: {why}" if known else "not ready", code="not_ready", retry_after=1)
        return Ready(ready=True)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        gang = await _gang(service)
        service.metrics.inside.labels("completion").set(service.completions.inside)
        service.metrics.inside.labels("attention").set(service.attentions.inside)
        service.metrics.prefilled(gang.get("last_prefill"))
        text = service.metrics.text(await service.ranks(), service.cluster.restarts, gang.get("engine", {}))
        return Response(text, headers={"Content-Type": TYPE})

    @router.get("/v1/info", response_model=Info, dependencies=[Depends(no_query)])
    async def info() -> Response:
        """What is served here, and how its ranks are."""
        ranks = [_state(rank) for rank in await service.ranks()]
        gang = await _gang(service)
        body = {
            "version": version("ringfa3") or "0",
            "model": service.cluster.model_name,
            "context_tokens": gang.get("max_length"),
            "ready": await unready(service) is None,
            "restarts": service.cluster.restarts,
            "ranks": ranks,
            "completions_in_flight": service.completions.inside,
            "limits": vars(service.limits),
            "gang": gang,
        }
        return JSONResponse(finite(body))

    return router


async def unready(service: Service) -> str | None:
    """Why no request would be served now; None: it would."""
    if service.draining.on:
        return "the server is shutting down"
    try:
        ranks: Sequence[RankHealth] = await service.look(service.cluster.health)
        fine = await service.look(service.cluster.ready)
    except TimeoutError:
        return "the ranks do not say how they are"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if fine and ranks:
        return None
    for rank in ranks:
        if not rank.alive:
            return f"rank {rank.rank}{f' on {rank.host}' if rank.host else ''} is {rank.state}"
    return "the ranks have not met lately"


async def _gang(service: Service) -> dict[str, Any]:
    """What the cluster says of itself; nothing where it does not answer."""
    try:
        return await service.look(service.cluster.info)
    except Exception:
        return {}


def _state(rank: RankHealth) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "host": rank.host,
        "pid": rank.pid,
        "device": rank.device,
        "alive": rank.alive,
        "state": rank.state,
        "last_collective_age_s": rank.last_collective_age_s,
        "cache_pages_used": rank.cache_used,
        "cache_pages": rank.cache_pages,
    }


def finite(value: Any) -> Any:
    """The value as JSON can say it: what is no finite number is null, what is nothing JSON knows is text."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
