"""Errors as HTTP answers, all in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ringfa3.errors import RankFailed
from ringfa3_launch.cluster.faults import Closed, NotReady, Overloaded, SessionLost
from ringfa3_launch.options import refuses

LOG = logging.getLogger("ringfa3.service")
PART = re.compile(r"\w+", re.ASCII)
GONE = 499  # the client left; nobody reads the answer, but the log and the metrics have a name for it
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: Problem


class Refusal(HTTPException):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: names what was wanted and what came; goes to the client.
        param: the field or tensor that is at fault.
        code: for programs: says which error it is.
        retry_after: seconds, as the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.param, self.code, self.retry_after = param, code, retry_after

    @classmethod
    def busy(cls, message: str) -> Refusal:
        return cls(429, f"busy: {message}", code="busy", retry_after=1)

    @classmethod
    def wrong(cls, param: str, wanted: str, got: object, *, code: str = "invalid_value") -> Refusal:
        """A field that is not as it should be."""
        return cls(400, f"{param}: wanted {wanted}, got {got}", param=param, code=code)

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = KINDS.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def answer(self) -> Response:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status_code == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(json.dumps(self.body), self.status_code, headers, "application/json")


def refusal(error: BaseException) -> Refusal:
    """What a client is told of an exception that a cluster raised."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RankFailed):
        return Refusal(503, f"a rank failed: {error}; try again", code="rank_failed", retry_after=5)
    if isinstance(error, NotReady):
        return Refusal(503, f"the ranks are not ready: {error}", code="not_ready", retry_after=2)
    if isinstance(error, SessionLost):
        return Refusal(410, f"the session is lost: {error}", code="session_lost")
    names = {kind.__name__ for kind in type(error).__mro__}  # the engine's: a service without a model never loads it
    if isinstance(error, Overloaded) or names & {"Busy", "CacheFull"}:
        return Refusal.busy(str(error))
    if isinstance(error, Closed):
        return Refusal(503, "the server is shutting down", code="shutting_down", retry_after=5)
    if "Unsupported" in names or (isinstance(error, ValueError) and refuses(error)):
        text = str(error)
        param = text.partition(":")[0] if ": wanted" in text else None
        return Refusal(400, text, param=param, code="invalid_value")
    if isinstance(error, TimeoutError):
        return Refusal(504, "the deadline has passed", code="deadline_exceeded")
    LOG.error("unexpected %s", type(error).__name__, exc_info=error)
    return Refusal(500, f"internal error ({type(error).__name__}); the server's log has it", code="internal_error")


def install(app: FastAPI) -> None:
    """Make the app answer every exception so."""

    async def refused(request: Request, error: Exception) -> Response:
        return refusal(error).answer()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        answer = Refusal(error.status_code, str(error.detail), code=code).answer()
        answer.headers.update(error.headers or {})
        return answer

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).answer()

    for kind in (Refusal, RankFailed, NotReady, Closed, TimeoutError, Exception):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


def _invalid(error: RequestValidationError) -> Refusal:
    """The first fault by name. Never its value: that may be a prompt."""
    errors = error.errors()
    where, kind = _field(errors[0]["loc"]), errors[0]["type"]
    if kind == "json_invalid":
        return Refusal(400, "the body is not JSON", code="invalid_json")
    if kind == "extra_forbidden":
        return Refusal(400, f"{where}: not a field that this server knows", param=where, code="unknown_parameter")
    told = dict.fromkeys(each["msg"] for each in errors if _field(each["loc"]) == where)  # a union has several
    return Refusal(400, f"{where or 'body'}: {'; or: '.join(told)}", param=where or None, code="invalid_value")


def _field(place: Sequence[str | int]) -> str:
    """The field's name of a place that pydantic names: without what it is a part of, and without a union's branches."""
    parts = [str(part) for part in place]
    if parts[0] in ("body", "query", "path"):
        parts = parts[1:]
    branch = next((at for at, part in enumerate(parts) if part == "str" or not PART.fullmatch(part)), len(parts))
    return ".".join(parts[:branch] or parts[:1])[:64]
