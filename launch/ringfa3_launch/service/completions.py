"""POST /v1/completions and /v1/chat/completions, GET /v1/models: OpenAI's API over the gang's engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from ringfa3_launch.service.contract import Event
from ringfa3_launch.service.errors import GONE, Refusal
from ringfa3_launch.service.forms import ChatForm, Form, Ids, TextForm
from ringfa3_launch.service.prompts import Prompt, chat_prompt, sampling_of, text_prompt
from ringfa3_launch.service.schemas import (
    Asked,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Model,
    Models,
)
from ringfa3_launch.service.sse import DONE, WAITING, EventStream, event
from ringfa3_launch.service.state import Service, no_query, note
from ringfa3_launch.service.streams import Stream, departure

LOG = logging.getLogger("ringfa3.service")
KEEPALIVE_S = 15.0  # a comment is sent after so long without news: proxies close what is silent
STREAMED: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}


class FastJson(Request):
    """Its body is read by pydantic's parser: a prompt of 128K token ids takes half of the time that Python's takes."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError:  # what Python's takes beyond it, and the errors as FastAPI expects them
            return await super().json()


class FastRoute(APIRoute):
    """A route whose requests are `FastJson`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(FastJson(request.scope, request.receive))

        return handler


def routes(service: Service) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(prefix="/v1", tags=["completions"], dependencies=[Depends(no_query)], route_class=FastRoute)

    @router.get("/models")
    async def models() -> Models:
        """The model that is served, if any."""
        facts = await service.facts()
        name = service.cluster.model_name
        model = Model(
            id=name or "", object="model", created=facts.started, owned_by="ringfa3", context_tokens=facts.context
        )
        return Models(object="list", data=[model] if name else [])

    @router.get("/models/{model:path}")
    async def model(model: str) -> Model:
        """One model."""
        for each in (await models()).data:
            if each.id == model:
                return each
        raise unknown_model(model)

    @router.post("/completions", response_model=Completion, responses={200: {"content": STREAMED}})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text."""
        check_model(service, body.model)
        return await respond(service, body, lambda: text_prompt(service, body), TextForm.new(body.model), request)

    @router.post("/chat/completions", response_model=ChatCompletion, responses={200: {"content": STREAMED}})
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        check_model(service, body.model)
        return await respond(service, body, lambda: chat_prompt(service, body), ChatForm.new(body.model), request)

    return router


def unknown_model(name: str) -> Refusal:
    return Refusal(
        404, f"model: wanted one that /v1/models names, got {name[:128]!r}", param="model", code="model_not_found"
    )


def check_model(service: Service, name: str) -> None:
    if service.cluster.model_name is None:
        raise Refusal(
            404, "model: this server has none: it serves attention only", param="model", code="model_not_found"
        )
    if name != service.cluster.model_name:
        raise unknown_model(name)


async def respond(
    service: Service, asked: Asked, read: Callable[[], Coroutine[Any, Any, Prompt]], form: Form, request: Request
) -> Response:
    """The answer, whole or as a stream.

    Args:
        read: makes the prompt's token ids. They take time, too: within the deadline, and from a place inside.

    Raises:
        Refusal: before the first bytes of an answer.
        TimeoutError: the deadline passed before the prompt was read.
    """
    if asked.stream_options is not None and not asked.stream:
        raise Refusal.wrong("stream_options", "null without stream", "options")
    until = service.until(request)
    service.completions.enter()
    answer: Answer | None = None

    def ended() -> None:
        service.completions.leave()
        if answer is not None:
            service.streams.discard(answer.stream)

    try:
        async with asyncio.timeout(until - time.monotonic()):
            prompt = await read()
        sampling = sampling_of(service, asked, prompt)
        note(request, prompt=len(prompt.ids), max=prompt.max_tokens)
        if service.log_text:
            LOG.info("%s prompt ids %s", request.scope["state"]["id"], list(prompt.ids))
        if asked.session is not None:
            await service.converse(asked.session)
        try:
            stream = Stream(service.cluster, prompt.ids, sampling, session=asked.session, until=until, ended=ended)
        except RuntimeError as error:  # no thread is to be had
            raise Refusal.busy(str(error)) from error
    except BaseException:
        service.completions.leave()
        raise
    answer = Answer(service, stream, form, request, ids=bool(asked.return_token_ids))
    service.streams.add(stream)
    if not asked.stream:
        return await answer.whole()
    usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    return EventStream(await answer.begun(usage=usage), answer.end)


class Answer:
    """One completion on its way to a client. ids: its tokens' are told, too."""

    def __init__(self, service: Service, stream: Stream, form: Form, request: Request, *, ids: bool) -> None:
        self.service, self.stream, self.form, self.request, self.ids = service, stream, form, request, ids
        self.began: float = request.scope["state"]["began"]
        self.first: float | None = None  # when its first token came
        self.latest = 0.0  # and its latest
        self.last: Event | None = None
        self.failed = False

    async def whole(self) -> Response:
        """Wait for all of it; or for the client's leaving, which ends it."""
        collecting = asyncio.ensure_future(self._collect())
        leaving = asyncio.ensure_future(departure(self.request.receive))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=GONE)
            return JSONResponse(collecting.result())
        finally:
            for task in (collecting, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            self.end()

    async def begun(self, *, usage: bool) -> AsyncGenerator[bytes, None]:
        """The events for a client, once there is news or it took too long: an error until then is a status."""
        try:
            batch = await self._batch(self.service.limits.first_event_s)
        except BaseException:
            self.end()
            raise
        return self._parts(batch, usage=usage)

    async def _collect(self) -> dict[str, Any]:
        events: list[Event] = []
        while self.last is None or self.last.finish is None:
            events += await self._batch(KEEPALIVE_S)
        return self.form.whole("".join(each.text for each in events), self._tokens(events), self.last)

    def _tokens(self, events: list[Event]) -> Ids:
        return [each.token for each in events if each.token is not None] if self.ids else None

    async def _parts(self, batch: list[Event], *, usage: bool) -> AsyncGenerator[bytes, None]:
        """The first batch and all that follow, as server-sent events."""
        for opening in self.form.opening(usage=usage):
            yield event(opening)
        while True:
            text, ids = "".join(each.text for each in batch), self._tokens(batch)
            finish = batch[-1].finish if batch else None
            if text or ids or finish:
                yield event(self.form.part(text, ids, finish, usage=usage))
            elif not batch:
                yield WAITING
            if finish:
                break
            batch = await self._batch(KEEPALIVE_S)
        if usage and self.last is not None:
            yield event(self.form.ending(self.last))
        yield DONE

    async def _batch(self, patience: float) -> list[Event]:
        """News, counted.

        Raises:
            Refusal: the gang ended it with an error.
        """
        try:
            batch = await self.stream.batch(patience)
        except Refusal:
            self.failed = True
            raise
        if batch:
            self.last, self.latest = batch[-1], time.monotonic()
            if self.first is None and self.last.completion_tokens > 0:
                self.first = self.latest
                self.service.metrics.first.observe(self.first - self.began)
            if self.last.finish == "error":
                raise Refusal(500, f"a rank could not go on: {self.last.error}", code="failed")
            if self.last.finish == "cancelled":
                raise Refusal(503, "the completion was cancelled", code="cancelled", retry_after=1)
        return batch

    def end(self) -> None:
        """Have no more work done, count what was."""
        self.stream.cancel()
        metrics, last = self.service.metrics, self.last
        finish = (last.finish if last is not None else None) or ("failed" if self.failed else "abandoned")
        metrics.finished.labels(finish).inc()
        if last is None:
            return
        metrics.prompt.inc(last.prompt_tokens)
        metrics.cached.inc(last.cached_tokens)
        metrics.completion.inc(last.completion_tokens)
        if self.first is not None and last.completion_tokens > 1:
            metrics.token.observe((self.latest - self.first) / (last.completion_tokens - 1))
        note(self.request, tokens=last.completion_tokens, cached=last.cached_tokens, finish=finish)
