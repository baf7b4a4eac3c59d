"""POST /v1/attention and the sessions: attention itself over HTTP, tensors as safetensors bodies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext, suppress
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from ringfa3_launch.cluster.tensors import pack
from ringfa3_launch.service.bodies import NAMES, Described, check_finite, read_tensors
from ringfa3_launch.service.errors import Refusal
from ringfa3_launch.service.guard import TENSORS
from ringfa3_launch.service.limits import Gate, check_work
from ringfa3_launch.service.schemas import Strict
from ringfa3_launch.service.sessions import Held, Sessions
from ringfa3_launch.service.state import Service, no_query, note

ROWS, KEYS = ("q",), ("k", "v")
BATCH = 4096  # sequences of a call: each costs the ranks time of its own, however short it is
PIECE = 1 << 20  # bytes of an answer that are handed on together
BINARY: dict[str, Any] = {TENSORS: {"schema": {"type": "string", "format": "binary"}}}
WINDOW = r"^(-1|\d{1,9}),(-1|\d{1,9})$"


class Seeing(BaseModel):
    """How q attends, as query parameters."""

    model_config = ConfigDict(extra="forbid")

    causal: bool = Field(True, description="a row sees no key after its own position")
    window: str | None = Field(None, pattern=WINDOW, description="keys to the left,right of a row; -1: all")

    softcap: float = Field(0.0, ge=0, le=1e6, allow_inf_nan=False, description="0: none")
    scale: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False, description="default 1/sqrt(D)")

    @property
    def chosen(self) -> dict[str, Any]:
        """As the cluster's options."""
        window = None if self.window is None else tuple(int(side) for side in self.window.split(","))
        return self.model_dump() | {"window": window}


class Options(Seeing):
    """Of a call with q, k and v."""

    return_lse: bool = Field(False, description="also lse, float32 [B, Hq, Sq]")


class Opened(Strict):
    """POST /v1/sessions."""

    heads: int = Field(ge=1, le=4096, description="query heads, a multiple of kv_heads")
    kv_heads: int = Field(ge=1, le=4096)
    head_dim: int = Field(ge=8, le=256, multiple_of=8)
    dtype: str = Field("float32", pattern=f"^({'|'.join(NAMES)})$")
    max_tokens: int = Field(ge=1, lt=1 << 31)


class SessionState(BaseModel):
    """A session as it is."""

    id: str
    length: int
    max_tokens: int


class Deleted(BaseModel):
    """Answer of DELETE /v1/sessions/{id}."""

    id: str
    deleted: bool


def routes(service: Service, sessions: Sessions) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(prefix="/v1", tags=["attention"])
    out: dict[int | str, dict[str, Any]] = {200: {"content": BINARY, "description": "out (and lse)"}}

    @router.post("/attention", response_class=Response, responses=out, openapi_extra=_takes("q, k, v: [B, S, H, D]"))
    async def attention(options: Annotated[Options, Query()], request: Request) -> Response:
        """Exact attention of q over k and v, computed by all ranks together."""

        def check(header: Mapping[str, Described]) -> None:
            check_call(header, service.limits.attention_flops)

        def compute(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            done = service.cluster.attention(given["q"], given["k"], given["v"], **options.chosen)
            return dict(zip(("out", "lse"), done, strict=True)) if options.return_lse else {"out": done}

        return await _computed(service, request, ROWS + KEYS, check, compute, nullcontext())

    @router.post("/sessions", status_code=201, dependencies=[Depends(no_query)])
    async def open_session(body: Opened, request: Request) -> SessionState:
        """Open a session: keys and values that stay sharded on the ranks between calls."""
        held = await sessions.open(service.until(request), **body.model_dump())
        return _state(held)

    @router.get("/sessions/{id}", dependencies=[Depends(no_query)])
    async def show_session(id: str) -> SessionState:
        """A session's length."""
        return _state(sessions.get(id))

    takes = _takes("k, v: [B, S, Hkv, D], appended")

    @router.post("/sessions/{id}/append", dependencies=[Depends(no_query)], openapi_extra=takes)
    async def append(id: str, request: Request) -> SessionState:
        """Add keys and values at the end."""
        held = sessions.get(id)

        def check(header: Mapping[str, Described]) -> None:
            held.check_keys(header)

        def compute(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            held.check_room(given["k"].shape[1])  # again: another request may have appended meanwhile
            held.session.append(given["k"], given["v"])
            held.length += given["k"].shape[1]
            return {}

        await _computed(service, request, KEYS, check, compute, held.turn())
        return _state(held)

    takes = _takes("q: [B, Sq, Hq, D], the session's last Sq positions")

    @router.post("/sessions/{id}/attend", response_class=Response, responses=out, openapi_extra=takes)
    async def attend(id: str, options: Annotated[Seeing, Query()], request: Request) -> Response:
        """Attention of q over all that was appended."""
        held = sessions.get(id)

        def check(header: Mapping[str, Described]) -> None:
            held.check_rows(header, service.limits.attention_flops)

        def compute(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"out": held.session.attend(given["q"], **options.chosen)}

        return await _computed(service, request, ROWS, check, compute, held.turn())

    @router.delete("/sessions/{id}", dependencies=[Depends(no_query)])
    async def delete(id: str) -> Deleted:
        """Close a session and free what it holds."""
        await sessions.close(id)
        return Deleted(id=id, deleted=True)

    return router


def check_call(header: Mapping[str, Described], flops: float) -> None:
    """Shapes and dtypes that `ring_attention` takes, and not more work than is granted.

    Raises:
        Refusal: names the tensor.
    """
    q, k, v = header["q"], header["k"], header["v"]
    for name, each in header.items():
        if len(each.shape) != 4 or 0 in each.shape:
            raise Refusal.wrong(name, "[B, S, H, D], all more than 0", list(each.shape))
        if each.dtype != q.dtype:
            raise Refusal.wrong(name, f"q's dtype {q.dtype}", each.dtype)
    B, Sq, Hq, D = q.shape
    _, Sk, Hkv, _ = k.shape
    if v.shape != k.shape:
        raise Refusal.wrong("v", f"k's shape {list(k.shape)}", list(v.shape))
    if k.shape[0] != B or k.shape[3] != D or Hq % Hkv:
        raise Refusal.wrong("k", f"[{B}, S, H, {D}], H dividing {Hq}", list(k.shape))
    if B > BATCH:
        raise Refusal.wrong("q", f"at most {BATCH} sequences", B)
    if not 8 <= D <= 256 or D % 8:
        raise Refusal.wrong("q", "a head_dim of a multiple of 8 from 8 to 256", D)
    check_work(4.0 * B * Hq * Sq * Sk * D, flops)


async def _computed(
    service: Service,
    request: Request,
    names: tuple[str, ...],
    check: Callable[[Mapping[str, Described]], None],
    compute: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    turn: AbstractAsyncContextManager[None],
) -> Response:
    """Read the body, compute in a thread, answer.

    Once begun the ranks end it, whatever becomes of the client and the deadline: until then its place is taken.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != TENSORS:
        raise Refusal(415, f"Content-Type: wanted {TENSORS}, got another", param="Content-Type", code="content_type")
    until, length = service.until(request), int(request.headers["content-length"])
    with ExitStack() as place:
        service.attentions.check()  # so that nobody sends gigabytes in vain; a slow sender takes no place
        place.enter_context(service.bytes.held(length))
        given = await read_tensors(
            request.stream(), length, names=names, header_bytes=service.limits.header_bytes, check=check
        )
        place.enter_context(service.attentions.held())
        taken = place.pop_all()  # by the work, from here on

    async def work() -> bytes:
        with taken:
            async with turn:
                began = time.monotonic()
                body = await service.call(lambda: _work(given, compute))
                service.metrics.attention.labels("+".join(names)).observe(time.monotonic() - began)
                return body

    note(request, shape="x".join(map(str, given[names[0]].shape)))
    async with asyncio.timeout(until - time.monotonic()):
        body = await asyncio.shield(service.begin(work()))
    return _Answer(body, service.bytes, until)


class _Answer(Response):
    """Tensors on their way to a client, within its deadline: they count as memory until it took them.

    Args:
        body: safetensors.
        gate: of bytes.
        until: seconds of time.monotonic().
    """

    def __init__(self, body: bytes, gate: Gate, until: float) -> None:
        super().__init__(body, media_type=TENSORS)
        self.gate, self.until = gate, until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        late = suppress(TimeoutError)  # its status is sent: that it ends too early is all that can be said
        with self.gate.counted(len(self.body)), late:
            async with asyncio.timeout(self.until - time.monotonic()):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                for at in range(0, len(self.body), PIECE):  # in pieces, as a sender waits between them alone
                    piece = bytes(self.body[at : at + PIECE])
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def _work(given: dict[str, torch.Tensor], compute: Callable[[Any], dict[str, torch.Tensor]]) -> bytes:
    check_finite(given)
    return b"".join(pack(compute(given)))


def _state(held: Held) -> SessionState:
    return SessionState(id=held.id, length=held.length, max_tokens=held.max_tokens)


def _takes(what: str) -> dict[str, Any]:
    """A body of tensors, for the OpenAPI document."""
    schema = {"schema": {"type": "string", "format": "binary", "description": f"safetensors with {what}"}}
    return {"requestBody": {"required": True, "content": {TENSORS: schema}}}
