"""A client of `ringfa3 serve`: completions, attention on numpy arrays or torch tensors, and sessions.

    with Client("http://127.0.0.1:8000") as client:
        print(client.complete("Once upon a time", max_tokens=32).text)
        out = client.attention(q, k, v, causal=True)
        with client.session(heads=8, kv_heads=2, head_dim=64, max_tokens=4096) as session:
            session.append(k, v)
            out = session.attend(q)

Whatever else speaks OpenAI's API is served too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from ringfa3_launch.cluster.tensors import Array, is_torch, pack, unpack

TENSORS = "application/octet-stream"
TOKEN = "RINGFA3_TOKEN"


class ServiceError(RuntimeError):
    """The service answered with an error.

    Args:
        status: HTTP status; 0 where the connection failed.
        message: of the service.
        code: of the service: which error it is.
        param: the field or tensor at fault.
        request_id: as the service's log has it.
        retry_after: seconds, where it makes sense to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message if not status else f"{status}: {message}")
        self.status, self.message, self.code, self.param = status, message, code, param
        self.request_id, self.retry_after = request_id, retry_after


class Refused(ServiceError):
    """The request is not as it should be, or too large: the same one will be refused again."""


class Unauthorized(ServiceError):
    """The token is missing or another."""


class SessionGone(ServiceError):
    """The session was closed, or lost with the ranks that held it."""


class Busy(ServiceError):
    """Too much at once; try again after `retry_after` seconds."""


class Unavailable(ServiceError):
    """A rank failed, or the service is starting or ending; it may be tried again. Also: it does not answer at all."""


class DeadlineExceeded(ServiceError):
    """The deadline has passed."""


KINDS: Mapping[int, type[ServiceError]] = {
    401: Unauthorized,
    403: Unauthorized,
    410: SessionGone,
    429: Busy,
    503: Unavailable,
    504: DeadlineExceeded,
}


@dataclass(frozen=True)
class Completed:
    """An answer.

    Args:
        text: of the model.
        finish: "stop" or "length".
        usage: tokens, as OpenAI's API has them.
    """

    text: str
    finish: str
    usage: dict[str, Any]


class Client:
    """One service.

    Args:
        url: as `ringfa3 serve` prints it.
        token: of a service that asks for one; default: RINGFA3_TOKEN of the environment.
        timeout: seconds that a call may take; the service is told, and stops work for it then.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout: float = 600.0) -> None:
        token = token or os.environ.get(TOKEN)
        headers = {"X-Deadline-S": f"{timeout:g}"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(timeout, connect=10.0))
        self._model: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def complete(self, prompt: str | list[int], **options: Any) -> Completed:
        """The model's continuation of a text.

        Args:
            prompt: text, or token ids.
            options: of /v1/completions: max_tokens, temperature, top_p, top_k, seed, stop, session, ...

        Raises:
            ServiceError: the service refused or failed; the subclass says how.
        """
        answer = self._json("POST", "/v1/completions", {"model": self.model, "prompt": prompt} | options)
        return Completed(answer["choices"][0]["text"], answer["choices"][0]["finish_reason"], answer["usage"])

    def chat(self, messages: Iterable[Mapping[str, str]], **options: Any) -> Completed:
        """The model's answer to a conversation; options are those of /v1/chat/completions."""
        body = {"model": self.model, "messages": [dict(message) for message in messages]} | options
        answer = self._json("POST", "/v1/chat/completions", body)
        choice = answer["choices"][0]
        return Completed(choice["message"]["content"], choice["finish_reason"], answer["usage"])

    def stream(self, prompt: str | list[int], **options: Any) -> Iterator[str]:
        """As `complete`, the text as it comes into being. Leaving the loop early stops the work."""
        body = {"model": self.model, "prompt": prompt, "stream": True} | options
        for part in self._events("/v1/completions", body):
            if part["choices"] and part["choices"][0]["text"]:
                yield part["choices"][0]["text"]

    def stream_chat(self, messages: Iterable[Mapping[str, str]], **options: Any) -> Iterator[str]:
        """As `chat`, the text as it comes into being. Leaving the loop early stops the work."""
        body = {"model": self.model, "messages": [dict(message) for message in messages], "stream": True} | options
        for part in self._events("/v1/chat/completions", body):
            if part["choices"] and part["choices"][0]["delta"].get("content"):
                yield part["choices"][0]["delta"]["content"]

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Exact attention over sequences that the service's ranks share.

        Args:
            q: [B, Sq, Hq, D] numpy or torch; float32, float16 or (torch) bfloat16.
            k, v: [B, Sk, Hkv, D] of the same kind.
            causal, window, softcap, scale: as `ringfa3.ring_attention`'s.
            return_lse: also lse, float32 [B, Hq, Sq].

        Returns:
            out [B, Sq, Hq, D], numpy or torch as q is; or (out, lse).
        """
        query = _query(causal=causal, window=window, softcap=softcap, scale=scale)
        query["return_lse"] = json.dumps(return_lse)
        done = self._tensors("/v1/attention", {"q": q, "k": k, "v": v}, query)
        return (_as(q, done["out"]), _as(q, done["lse"])) if return_lse else _as(q, done["out"])

    @contextmanager
    def session(
        self, *, heads: int, kv_heads: int, head_dim: int, max_tokens: int, dtype: str = "float32"
    ) -> Iterator[Session]:
        """A session, closed in the end: keys and values that stay on the ranks between calls."""
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "max_tokens": max_tokens, "dtype": dtype}
        session = Session(self, self._json("POST", "/v1/sessions", sizes)["id"])
        try:
            yield session
        finally:
            with suppress(SessionGone, Unavailable):
                session.close()

    @property
    def model(self) -> str:
        """The name of the model that is served.

        Raises:
            Refused: there is none.
        """
        if self._model is None:
            models = self._json("GET", "/v1/models")["data"]
            if not models:
                raise Refused(404, "this service has no model: it serves attention only", code="model_not_found")
            self._model = str(models[0]["id"])
        return self._model

    def ready(self) -> bool:
        """Whether the ranks would serve a request now."""
        try:
            self._json("GET", "/ready")
        except Unavailable:
            return False
        return True

    def info(self) -> dict[str, Any]:
        """What is served, and how the ranks are."""
        return self._json("GET", "/v1/info")

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with _failures():
            reply = self._http.request(method, path, json=body)
        _check(reply)
        answer: dict[str, Any] = reply.json()
        return answer

    def _tensors(self, path: str, tensors: Mapping[str, Array], query: Mapping[str, str]) -> dict[str, Any]:
        body = b"".join(pack(tensors))
        with _failures():
            reply = self._http.post(path, content=body, params=query, headers={"Content-Type": TENSORS})
        _check(reply)
        if reply.headers["content-type"] != TENSORS:
            return {}
        return unpack(bytearray(reply.content))  # writable, as torch wants what its tensors lie on

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with _failures(), self._http.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                _check(reply)
            for line in reply.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return
                part = json.loads(line.removeprefix("data: "))
                if "error" in part:
                    raise _error(_status(part["error"]), part["error"], reply)
                yield part
            raise Unavailable(0, "the stream ended before its answer did")


class Session:
    """Keys and values on the service's ranks; made by `Client.session`."""

    def __init__(self, client: Client, id: str) -> None:
        self._client, self.id = client, id

    @property
    def length(self) -> int:
        """Tokens that it holds."""
        return int(self._client._json("GET", f"/v1/sessions/{self.id}")["length"])

    def append(self, k: Array, v: Array) -> None:
        """Add keys and values, [1, S, Hkv, D], at the end."""
        self._client._tensors(f"/v1/sessions/{self.id}/append", {"k": k, "v": v}, {})

    def attend(
        self,
        q: Array,
        *,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
    ) -> Any:
        """Attention of q [1, Sq, Hq, D], the session's last Sq positions, over all that it holds; out as q is."""
        query = _query(causal=causal, window=window, softcap=softcap, scale=scale)
        done = self._client._tensors(f"/v1/sessions/{self.id}/attend", {"q": q}, query)
        return _as(q, done["out"])

    def close(self) -> None:
        """Free what it holds."""
        self._client._json("DELETE", f"/v1/sessions/{self.id}")


def _query(*, causal: bool, window: tuple[int, int] | None, softcap: float, scale: float | None) -> dict[str, str]:
    query = {"causal": json.dumps(causal), "softcap": repr(float(softcap))}
    if window is not None:
        query["window"] = f"{window[0]},{window[1]}"
    return query if scale is None else query | {"scale": repr(float(scale))}


def _as(like: Array, raw: Any) -> Any:
    return raw.torch() if is_torch(like) else raw.numpy()


@contextmanager
def _failures() -> Iterator[None]:
    """What httpx raises, as ours."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise DeadlineExceeded(0, f"no answer in time ({type(error).__name__})") from error
    except httpx.HTTPError as error:
        raise Unavailable(0, f"{type(error).__name__}: {error}") from error


def _check(reply: httpx.Response) -> None:
    """Raises what the service refused with."""
    if reply.is_success:
        return
    try:
        error = reply.json()["error"]
        error["message"]
    except (ValueError, KeyError, TypeError):  # somebody between us and the service
        error = {"message": f"{reply.reason_phrase}: {reply.text[:200]}"}
    raise _error(reply.status_code, error, reply)


def _error(status: int, error: Mapping[str, Any], reply: httpx.Response) -> ServiceError:
    after = reply.headers.get("retry-after")
    return KINDS.get(status, Refused if 400 <= status < 500 else ServiceError)(
        status,
        error["message"],
        code=error.get("code"),
        param=error.get("param"),
        request_id=reply.headers.get("x-request-id"),
        retry_after=float(after) if after and after.isdigit() else None,
    )


def _status(error: Mapping[str, Any]) -> int:
    """The status that an error within a stream would have had."""
    by_code = {"deadline_exceeded": 504, "rank_failed": 503, "shutting_down": 503, "not_ready": 503, "cancelled": 503}
    return by_code.get(error.get("code") or "", 410 if error.get("code") == "session_lost" else 500)
