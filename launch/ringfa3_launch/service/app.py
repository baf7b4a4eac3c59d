"""The service as an ASGI app: completions in OpenAI's form, attention over safetensors, status, and a page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse

from ringfa3_launch.machine import version
from ringfa3_launch.service import attention, completions, errors, status
from ringfa3_launch.service.contract import Cluster
from ringfa3_launch.service.guard import Access, Draining, Guard
from ringfa3_launch.service.limits import Limits
from ringfa3_launch.service.metrics import Metrics
from ringfa3_launch.service.sessions import Sessions
from ringfa3_launch.service.state import Service

PAGE = Path(__file__).parent / "page"
FILES = {"page.css": "text/css", "page.js": "text/javascript"}
REFUSED = {
    400: "not as it should be; names the field",
    401: "no token, or another",
    403: "a page of another site",
    404: "no such model, session or path",
    405: "another method",
    408: "the body did not come in time",
    410: "the session is gone",
    411: "no Content-Length",
    413: "larger than the limits",
    415: "another Content-Type",
    421: "a Host that this server is not",
    429: "too much at once; Retry-After says when",
    500: "a fault of the server",
    503: "a rank failed, or the server is starting or ending",
    504: "the deadline has passed",
}


def create_app(
    cluster: Cluster, *, access: Access | None = None, limits: Limits | None = None, log_text: bool = False
) -> FastAPI:
    """The app over a gang of ranks.

    Args:
        cluster: a RingCluster; not closed by the app.
        access: who may come in; default: whoever calls a loopback name.
        limits: how much is taken on.
        log_text: whether prompts may be written to the log.

    Returns:
        The app; its Service is `app.state.service`.
    """
    limits = limits or Limits()
    draining, metrics = Draining(), Metrics()
    service = Service(cluster, limits, metrics, draining, log_text)
    sessions = Sessions(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.ensure_future(sessions.tidy())
        yield
        tidying.cancel()
        with suppress(asyncio.CancelledError):
            await tidying
        service.close()

    app = FastAPI(
        title="ringfa3",
        version=version("ringfa3") or "0",
        description=__doc__,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses={code: {"model": errors.ErrorBody, "description": text} for code, text in REFUSED.items()},
    )
    app.state.service = service
    errors.install(app)
    app.add_middleware(Guard, access=access or Access(), limits=limits, metrics=metrics, draining=draining)
    app.include_router(status.routes(service))
    app.include_router(completions.routes(service))
    app.include_router(attention.routes(service, sessions))
    _add_page(app)
    _describe(app, locked=access is not None and access.token is not None)
    return app


def _add_page(app: FastAPI) -> None:
    """The page at /, from files: three names, no paths of a request."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", media_type="text/html")

    def add(name: str, kind: str) -> None:
        @app.get(f"/page/{name}", include_in_schema=False)
        async def file() -> FileResponse:
            return FileResponse(PAGE / name, media_type=kind)

    for name, kind in FILES.items():
        add(name, kind)


def _describe(app: FastAPI, *, locked: bool) -> None:
    """The OpenAPI document, without the 422 that FastAPI believes in and with the token where one is asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for path, methods in made["paths"].items():
                for each in methods.values():
                    each["responses"].pop("422", None)
                    if locked and path not in ("/live", "/ready"):
                        each["security"] = [{"token": []}]
            for name in ("HTTPValidationError", "ValidationError"):
                made["components"]["schemas"].pop(name, None)
            if locked:
                made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation has it
