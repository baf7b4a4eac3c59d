"""The door of the service: every request passes it before anything of it is read or any work begins."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from contextlib import nullcontext
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringfa3_launch.service.errors import GONE, Refusal, refusal
from ringfa3_launch.service.limits import Gate, Limits
from ringfa3_launch.service.metrics import Metrics

LOG = logging.getLogger("ringfa3.service")
OPEN = ("/live", "/ready", "/", "/page/")  # no token: probes, and a page that holds no secret; a last / means below it
ALWAYS = ("/live", "/ready", "/metrics")  # answered while the service drains
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
TENSORS, JSON = "application/octet-stream", "application/json"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


@dataclass(frozen=True)
class Access:
    """Who may come in.

    Args:
        token: the bearer token that is asked for; None: none, which only a loopback address may do.
        hosts: names that the Host header may have, without port; None: any. A page of another site that has its name
            point to 127.0.0.1 (DNS rebinding) is a stranger by this.
    """

    token: str | None = None
    hosts: frozenset[str] | None = LOOPBACK


class Draining:
    """Whether the service is about to end: set once, read by every request."""

    def __init__(self) -> None:
        self.on = False


class Guard:
    """ASGI middleware: identity, host, origin, token, sizes, deadline of the upload, one line of log a request."""

    def __init__(self, app: ASGIApp, *, access: Access, limits: Limits, metrics: Metrics, draining: Draining) -> None:
        self.app, self.access, self.limits, self.metrics, self.draining = app, access, limits, metrics, draining
        self.json = Gate("bytes of JSON in memory", limits.json_bytes_together)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":  # there is none here: refused before the handshake
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        visit = Visit(scope)
        reply = visit.replying(send)
        try:
            self.check(scope, visit)
            upload = _Upload(receive, visit.length, self.limits.upload_s)
            with self.json.held(visit.length) if visit.kind == JSON else nullcontext():
                await self.app(scope, upload.receive, reply)
        except ClientDisconnect:  # in the middle of its body
            pass
        except asyncio.CancelledError:
            if not self.draining.on:
                raise
            if visit.status is None:  # the server ends, and waits no more
                await _ending().answer()(scope, receive, reply)
        except Exception as error:  # a refusal, or what nobody expected: answered, counted and logged like all else
            if visit.status is None:
                await refusal(error).answer()(scope, receive, reply)
            elif not isinstance(error, Refusal):
                raise
        finally:
            self.log(scope, visit)

    def check(self, scope: Scope, visit: Visit) -> None:
        """Everything that can be known before the body is read.

        Raises:
            Refusal: it may not come in.
        """
        headers, path, method = visit.headers, scope["path"], scope["method"]
        self._check_origin(headers, method)
        scope["state"]["known"] = known = self._knows_token(headers)
        if not known and not any(
            path == each or (len(each) > 1 and each[-1] == "/" and path.startswith(each)) for each in OPEN
        ):
            raise Refusal(401, "Authorization: wanted Bearer and this server's token, got another", code="wrong_token")
        if self.draining.on and path not in ALWAYS:
            raise _ending()
        if method in ("POST", "PUT", "PATCH"):
            self._check_body(headers, visit)
        elif visit.length or "transfer-encoding" in headers:
            raise Refusal(400, f"{method}: wanted no body, got one", code="invalid_request")

    def _check_origin(self, headers: Headers, method: str) -> None:
        """The request is meant for this server, and does not come from another site's page."""
        hosts = headers.getlist("host")
        name = hosts[0].rsplit(":", 1)[0] if len(hosts) == 1 and not hosts[0].endswith("]") else "".join(hosts)
        if len(hosts) != 1 or (self.access.hosts is not None and name.lower() not in self.access.hosts):
            raise Refusal(421, "Host: wanted a name of this server, got another", param="Host", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
            raise Refusal(403, "Origin: wanted this server's own pages, got another's", param="Origin", code="origin")
        if method != "GET" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Refusal(403, "Sec-Fetch-Site: wanted same-origin, got another site", code="origin")

    def _knows_token(self, headers: Headers) -> bool:
        if self.access.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.access.token.encode())
        return same and scheme.lower() == "bearer"

    def _check_body(self, headers: Headers, visit: Visit) -> None:
        if "transfer-encoding" in headers or "content-length" not in headers:
            raise Refusal(411, "Content-Length: wanted the body's length, got none", code="length_required")
        kind = visit.kind
        if kind not in (JSON, TENSORS) and visit.length:
            wanted = f"{JSON}, or {TENSORS} for safetensors"
            raise Refusal(415, f"Content-Type: wanted {wanted}, got another", param="Content-Type", code="content_type")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "Content-Encoding: wanted none, got one", param="Content-Encoding", code="content_type")
        most = self.limits.json_bytes if kind == JSON else self.limits.tensor_bytes
        if visit.length > most:
            raise Refusal(413, f"body: wanted at most {most} bytes, got {visit.length} declared", code="body_too_large")

    def log(self, scope: Scope, visit: Visit) -> None:
        route = getattr(scope.get("route"), "path", "-")  # the pattern: a path may hold a session's id
        seconds = time.monotonic() - visit.began
        status = visit.status or GONE
        self.metrics.answered(route, status, seconds)
        notes = "".join(f" {name}={value}" for name, value in scope.get("state", {}).get("notes", {}).items())
        quiet = route in ALWAYS and status < 500
        LOG.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %s %d %.1fms%s", visit.id, scope["method"], route, status, 1e3 * seconds, notes,
        )  # fmt: skip


class Visit:
    """One request as the door sees it."""

    def __init__(self, scope: Scope) -> None:
        self.headers = Headers(scope=scope)
        self.began = time.monotonic()
        self.status: int | None = None
        given = self.headers.get("x-request-id", "")
        self.id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {}).update(id=self.id, notes={}, began=self.began)

    @property
    def length(self) -> int:
        """The declared length of the body.

        Raises:
            Refusal: it is no number.
        """
        given = self.headers.getlist("content-length") or ["0"]
        if len(given) != 1 or not given[0].isascii() or not given[0].isdigit() or len(given[0]) > 18:
            raise Refusal(400, "Content-Length: wanted one number, got something else", code="invalid_request")
        return int(given[0])

    @property
    def kind(self) -> str:
        """The body's media type, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def replying(self, send: Send) -> Send:
        """send, with the headers that every answer has."""

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = self.id
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        return reply


def _ending() -> Refusal:
    """A new one for each: a raised one keeps the frames it passed."""
    return Refusal(503, "the server is shutting down", code="shutting_down", retry_after=5)


class _Upload:
    """The body as it arrives: not longer than declared, not slower than allowed."""

    def __init__(self, receive: Receive, length: int, seconds: float) -> None:
        self.inner, self.left = receive, length
        self.until = time.monotonic() + seconds
        self.done = length == 0

    async def receive(self) -> Message:
        if self.done:  # what comes now is the client's leaving, for which nobody sets a time
            return await self.inner()
        try:
            async with asyncio.timeout(self.until - time.monotonic()):
                message = await self.inner()
        except TimeoutError:
            raise Refusal(408, "body: wanted all of it in time, got a part", code="upload_too_slow") from None
        if message["type"] == "http.request":
            self.left -= len(message.get("body", b""))
            self.done = not message.get("more_body", False)
            if self.left < 0 or (self.done and self.left > 0):
                raise Refusal(400, "body: wanted its declared length, got another", code="invalid_request")
        return message
