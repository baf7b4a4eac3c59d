"""Who is let in, how much is taken on, and that work ends with its request: over real HTTP, with the toy gang."""

from __future__ import annotations

import argparse
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from pydantic import ValidationError

from ringfa3_launch import client, serve
from ringfa3_launch.cluster.tensors import pack
from ringfa3_launch.service import Access, Limits
from ringfa3_launch.service.guard import LOOPBACK, TENSORS
from ringfa3_launch.service.schemas import ChatRequest, CompletionRequest
from ringfa3_launch.service.server import bind
from tests.launch.toy_gang import ToyGang, answer, serving

TOKEN = "a-token-of-this-server"
ASK = {"model": "toy", "prompt": "Once upon", "max_tokens": 5}
LONG = {"model": "toy", "prompt": "Once upon", "max_tokens": 4000, "ignore_eos": True}


@pytest.fixture
def gang() -> Iterator[ToyGang]:
    toy = ToyGang(step=0.01)
    yield toy
    toy.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    toy = ToyGang()
    with serving(toy, limits=Limits(upload_s=0.5)) as (url, _):
        yield url
    toy.close()


def rests(gang: ToyGang, seconds: float = 20.0) -> bool:
    """Whether the gang has nothing left to do, soon."""
    until = time.monotonic() + seconds
    while gang.running and time.monotonic() < until:
        time.sleep(0.01)
    return gang.running == 0


def raw(url: str, text: str) -> bytes:
    """The answer to these bytes; the connection is then left."""
    host, port = url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=30)) as connection:
        connection.sendall(text.replace("\n", "\r\n").encode())
        return connection.recv(65536)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]:80", "10.0.0.1"]
)
def test_names_of_others_are_refused(url: str, host: str) -> None:
    """A page of another site that points its name to 127.0.0.1 sends that name."""
    for path in ("/v1/models", "/", "/live"):
        reply = httpx.get(url + path, headers={"Host": host})
        assert (reply.status_code, reply.json()["error"]["code"]) == (421, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:80", "[::1]", "[::1]:8000"])
def test_names_of_this_machine(url: str, host: str) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200


def test_pages_of_other_sites_are_refused(url: str) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        reply = httpx.post(f"{url}/v1/completions", json=ASK, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin")
    assert httpx.post(f"{url}/v1/completions", json=ASK, headers={"Origin": url}).status_code == 200
    asked = httpx.options(f"{url}/v1/completions", headers={"Origin": url, "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405
    page = httpx.get(f"{url}/")
    for reply in (asked, page):
        assert not any(name.startswith("access-control") for name in reply.headers)
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert page.headers["x-content-type-options"] == "nosniff"


def test_the_token(gang: ToyGang) -> None:
    with serving(gang, access=Access(TOKEN, None)) as (url, _):
        for given in (None, "Bearer", "Bearer x", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN):
            for method, path in (("GET", "/v1/info"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/x")):
                headers = {"Authorization": given} if given else {}
                reply = httpx.request(method, url + path, headers=headers, json=ASK if method == "POST" else None)
                assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
                assert reply.json()["error"]["type"] == "authentication_error"
        odd = b"GET /v1/info HTTP/1.1\nHost: x\nAuthorization: Bearer \xff\xfe\n\n".replace(b"\n", b"\r\n")
        host, port = url.removeprefix("http://").split(":")
        with closing(socket.create_connection((host, int(port)), timeout=30)) as connection:
            connection.sendall(odd)
            assert b" 401 " in connection.recv(65536)
        for path in ("/live", "/ready", "/", "/page/page.js", "/page/page.css"):
            assert httpx.get(url + path).status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
            assert client.completions.create(**ASK).choices[0].text == answer("Once upon", 5)
        document = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"bearer {TOKEN}"}).json()
        assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
        stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Type: application/json\nContent-Length: 1000000000000", 413),
        ("Content-Type: application/octet-stream\nContent-Length: 268435457", 413),
        ("Content-Type: application/json\nContent-Length: 4194305\nExpect: 100-continue", 413),
        ("Content-Type: application/json\nTransfer-Encoding: chunked", 411),
        ("Content-Type: application/json", 411),
        ("Content-Type: text/plain\nContent-Length: 2", 415),
        ("Content-Type: application/x-www-form-urlencoded\nContent-Length: 2", 415),
        ("Content-Type: multipart/form-data; boundary=x\nContent-Length: 2", 415),
        ("Content-Type: application/x-pickle\nContent-Length: 2", 415),
        ("Content-Length: 2", 415),
        ("Content-Type: application/json\nContent-Encoding: gzip\nContent-Length: 2", 415),
        ("Content-Type: application/json\nContent-Length: -1", 400),
        ("Content-Type: application/json\nContent-Length: 1e3", 400),
        ("Content-Type: application/json\nContent-Length: " + "9" * 400, 400),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/attention", "/nowhere"])
def test_declared_lengths_and_types_are_enough(url: str, path: str, headers: str, status: int) -> None:
    """The answer comes before a byte of the body is sent."""
    reply = raw(url, f"POST {path} HTTP/1.1\nHost: localhost\n{headers}\n\n")
    assert reply.startswith(f"HTTP/1.1 {status} ".encode()), reply


def test_a_json_call_takes_no_tensors_and_the_other_way(url: str) -> None:
    assert httpx.post(f"{url}/v1/attention", json={}).status_code == 415
    binary = httpx.post(f"{url}/v1/completions", content=b"{}", headers={"Content-Type": "application/octet-stream"})
    assert binary.status_code == 400
    assert httpx.request("GET", f"{url}/v1/models", content=b"{}").status_code == 400
    assert httpx.request("DELETE", f"{url}/v1/sessions/x", content=b"{}").status_code == 400


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/attention"])
def test_a_body_that_does_not_come(url: str, path: str) -> None:
    kind = "application/json" if path == "/v1/completions" else "application/octet-stream"
    reply = raw(url, f'POST {path} HTTP/1.1\nHost: localhost\nContent-Type: {kind}\nContent-Length: 100\n\n{{"mod')
    assert reply.startswith(b"HTTP/1.1 408 "), reply


def test_a_head_without_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bytes, and of seconds."""
    for begun in ("GET /live HTTP/1.1\nHost: localhost\nX: ", "GET /live?"):
        assert raw(url, begun + "a" * (80 * 1024)).startswith(b"HTTP/1.1 431 ")
    many = "".join(f"X-{number}: {number}\n" for number in range(20_000))
    assert raw(url, f"GET /live HTTP/1.1\nHost: localhost\n{many}").startswith(b"HTTP/1.1 431 ")
    monkeypatch.setattr("ringfa3_launch.service.protocol.HEAD_S", 0.2)
    for begun in ("", "GET /live HTTP/1.1\nHost: localhost\n"):
        assert raw(url, begun).startswith(b"HTTP/1.1 408 ")
    with httpx.Client() as http:  # a connection that is used again is not one that says nothing
        for _ in range(3):
            assert http.get(f"{url}/live").status_code == 200
            time.sleep(0.3)


@pytest.mark.parametrize(
    ("first", "status", "then"),
    [
        ("GET /live HTTP/1.1\nHost: localhost\n\n", 200, b"\r\n"),
        ("POST /v1/attention HTTP/1.1\nHost: localhost\nContent-Length: 900000000000\n\n", 415, b"x"),
        ("POST /v1/completions HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\n\n", 411, b"1\r\nx\r\n"),
    ],
)
def test_nothing_goes_on_for_ever_after_an_answer(
    url: str, monkeypatch: pytest.MonkeyPatch, first: str, status: int, then: bytes
) -> None:
    """Blank lines begin no request, and the body of one that was refused need not end."""
    monkeypatch.setattr("ringfa3_launch.service.protocol.REST_S", 0.3)
    host, port = url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=30)) as connection:
        connection.sendall(first.replace("\n", "\r\n").encode())
        assert connection.recv(65536).startswith(f"HTTP/1.1 {status} ".encode())
        until = time.monotonic() + 30
        closed = False
        while not closed and time.monotonic() < until:
            time.sleep(0.05)
            try:
                connection.sendall(then)
            except ConnectionError:
                closed = True
        assert closed


@pytest.mark.parametrize(("take", "deadline"), [(0.3, 600), (600, None)])
def test_an_answer_that_nobody_takes(
    gang: ToyGang, monkeypatch: pytest.MonkeyPatch, take: float, deadline: float | None
) -> None:
    """It counts as memory, and not for ever: the deadline holds for it, too (None: one that leaves time to answer)."""
    monkeypatch.setattr("ringfa3_launch.service.protocol.TAKE_S", take)
    q, k = torch.zeros(1, 1, 512, 256).repeat(32, 1, 1, 1), torch.zeros(32, 1, 1, 256)
    body = b"".join(pack({"q": q, "k": k, "v": k}))
    head = f"POST /v1/attention HTTP/1.1\nHost: localhost\nContent-Type: {TENSORS}\nContent-Length: {len(body)}"
    with serving(gang) as (url, server):
        inside = server._app.state.service.bytes
        host, port = url.removeprefix("http://").split(":")
        if deadline is None:
            began = time.monotonic()
            assert httpx.post(
                f"{url}/v1/attention", content=body, headers={"Content-Type": TENSORS}, timeout=60
            ).is_success
            deadline = 2 + 5 * (time.monotonic() - began)
        with closing(socket.socket()) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(f"{head}\nX-Deadline-S: {deadline}\n\n".replace("\n", "\r\n").encode() + body)
            assert connection.recv(12) == b"HTTP/1.1 200"
            assert inside.inside > q.nbytes
            until = time.monotonic() + 60
            while inside.inside and time.monotonic() < until:
                time.sleep(0.02)
            assert inside.inside == 0
            if take == 600:  # the connection itself may stay as long
                connection.close()
            while server.server_state.connections and time.monotonic() < until:
                time.sleep(0.02)
            assert not server.server_state.connections
        slow = b""  # one that takes its time, but takes it
        with closing(socket.create_connection((host, int(port)), timeout=30)) as connection:
            connection.sendall(f"{head}\nConnection: close\n\n".replace("\n", "\r\n").encode() + body)
            while part := connection.recv(1 << 20):
                slow += part
                time.sleep(0.02)
        assert len(slow) > q.nbytes


def test_connections_are_so_many(gang: ToyGang) -> None:
    """More are closed, whether or not they ask for something: the process needs files for itself."""
    with serving(gang) as (url, server), ExitStack() as held:
        server.config.limit_concurrency = 8
        host, port = url.removeprefix("http://").split(":")
        for _ in range(40):
            held.enter_context(closing(socket.create_connection((host, int(port)), timeout=30)))
        until = time.monotonic() + 30
        while len(server.server_state.connections) != 10 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(server.server_state.connections) == 10
        held.close()
        while server.server_state.connections and time.monotonic() < until:
            time.sleep(0.01)
        assert httpx.get(f"{url}/live").status_code == 200


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"prompt": [None] * 9999}),
        (CompletionRequest, {"prompt": "x", **{f"x{number}": 1 for number in range(9999)}}),
        (CompletionRequest, {"prompt": "x", "stop": [0] * 9999}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(number): "x" for number in range(9999)}}),
        (ChatRequest, {"messages": [{}] * 4096}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 9999}]}),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": "x"}], "metadata": dict.fromkeys(map(str, range(99)), 1)},
        ),
    ],
)
def test_not_every_fault_is_listed(kind: Any, fields: dict[str, Any]) -> None:
    """A list of them is a hundred times the body, and takes seconds in which nobody else is answered."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate({"model": "toy"} | fields)
    assert refused.value.error_count() <= 4


def test_what_nobody_expected_is_an_answer_too(gang: ToyGang, monkeypatch: pytest.MonkeyPatch) -> None:
    def info() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(gang, "info", info)
    with serving(gang) as (url, _):
        reply = httpx.get(f"{url}/v1/models", headers={"X-Request-Id": "mine-8"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert reply.headers["x-request-id"] == "mine-8"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert 'ringfa3_requests_total{route="/v1/models",status="500"} 1.0' in httpx.get(f"{url}/metrics").text


def test_a_client_that_leaves_in_its_body_is_no_error(gang: ToyGang, caplog: pytest.LogCaptureFixture) -> None:
    with serving(gang) as (url, server):
        host, port = url.removeprefix("http://").split(":")
        head = f"POST /v1/attention HTTP/1.1\nHost: localhost\nContent-Type: {TENSORS}\nContent-Length: 99\n\n"
        with closing(socket.create_connection((host, int(port)))) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode() + b"x")
            until = time.monotonic() + 30
            while not server._app.state.service.bytes.inside and time.monotonic() < until:
                time.sleep(0.005)
        while server._app.state.service.bytes.inside and time.monotonic() < until:
            time.sleep(0.005)
        assert 'route="/v1/attention",status="499"} 1.0' in httpx.get(f"{url}/metrics").text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_no_thread_is_to_be_had(gang: ToyGang, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is too much at once, and takes no place for ever."""

    start = threading.Thread.start

    def none(thread: threading.Thread) -> None:
        if thread.name == "completion":
            raise RuntimeError("can't start new thread")
        start(thread)

    with serving(gang) as (url, server):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none)
            reply = httpx.post(f"{url}/v1/completions", json=ASK)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        assert server._app.state.service.completions.inside == 0
        assert httpx.post(f"{url}/v1/completions", json=ASK).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_work_along(gang: ToyGang, stream: bool) -> None:
    with serving(gang) as (url, server):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps(LONG | {"stream": stream})
        with closing(socket.create_connection((host, int(port)))) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            until = time.monotonic() + 30
            while not gang.steps and time.monotonic() < until:
                time.sleep(0.005)
            assert gang.running == 1
        assert rests(gang)
        assert max(gang.steps.values()) < LONG["max_tokens"]
        until = time.monotonic() + 30
        while server._app.state.service.completions.inside and time.monotonic() < until:
            time.sleep(0.01)
        assert server._app.state.service.completions.inside == 0
        assert 'ringfa3_completions_total{finish="abandoned"} 1.0' in httpx.get(f"{url}/metrics").text


def test_deadlines(gang: ToyGang) -> None:
    hurry = {"X-Deadline-S": "0.3"}
    with serving(gang) as (url, _):
        began = time.monotonic()
        reply = httpx.post(f"{url}/v1/completions", json=LONG, headers=hurry)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert 0.25 < time.monotonic() - began < 20  # the whole answer takes 40
        text = httpx.post(f"{url}/v1/completions", json=LONG | {"stream": True}, headers=hurry).text
        assert json.loads(text.strip().rpartition("data: ")[2])["error"]["code"] == "deadline_exceeded"
        assert rests(gang)
        for given in ("0", "-1", "nan", "soon"):
            assert httpx.post(f"{url}/v1/completions", json=ASK, headers={"X-Deadline-S": given}).status_code == 400
    with serving(gang, limits=Limits(deadline_s=0.3)) as (url, _):
        reply = httpx.post(f"{url}/v1/completions", json=LONG, headers={"X-Deadline-S": "100"})
        assert reply.status_code == 504


def test_too_many_at_once_are_told_to_come_back(gang: ToyGang) -> None:
    with serving(gang, limits=Limits(completions=2)) as (url, _):
        with ExitStack() as clients:
            for _ in range(2):
                clients.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}))
            reply = httpx.post(f"{url}/v1/completions", json=ASK)
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
            assert reply.json()["error"]["type"] == "rate_limit_error"
        assert rests(gang)
        assert httpx.post(f"{url}/v1/completions", json=ASK).status_code == 200
    with serving(gang, limits=Limits(json_bytes_together=300)) as (url, _):
        long = LONG | {"stream": True, "user": "x" * 100}
        with httpx.stream("POST", f"{url}/v1/completions", json=long):
            assert httpx.post(f"{url}/v1/completions", json=ASK).status_code == 200
            reply = httpx.post(f"{url}/v1/completions", json=long)
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
            assert "bytes of JSON" in reply.json()["error"]["message"]
        assert rests(gang)
    gang.capacity = 0  # of the engine's queue
    with serving(gang) as (url, _):
        for stream in (False, True):
            reply = httpx.post(f"{url}/v1/completions", json=ASK | {"stream": stream})
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")


def test_a_rank_that_fails(gang: ToyGang) -> None:
    with serving(gang) as (url, _):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as reply:
            lines = reply.iter_lines()
            assert '"text"' in next(lines)
            gang.fail(1)
            error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
        assert error["code"] == "rank_failed"
        assert "rank 1 on here: died" in error["message"]
        for stream in (False, True):  # before there was news the status says it
            reply = httpx.post(f"{url}/v1/completions", json=ASK | {"stream": stream})
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert "rank 1 on here: died" in reply.json()["error"]["message"]
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/live").status_code == 200
        assert 'ringfa3_rank_up{host="here",rank="1"} 0.0' in httpx.get(f"{url}/metrics").text


def test_no_prompt_in_the_log(gang: ToyGang, caplog: pytest.LogCaptureFixture) -> None:
    secret = "xyzzy-plugh"
    with caplog.at_level(logging.DEBUG), serving(gang) as (url, _):
        httpx.post(f"{url}/v1/completions", json=ASK | {"prompt": secret}, headers={"X-Request-Id": "mine-7"})
        httpx.post(f"{url}/v1/completions", json=ASK | {"prompt": [secret]})
        httpx.post(f"{url}/v1/completions", json=ASK | {"prompt": {"text": secret}})
        httpx.post(
            f"{url}/v1/chat/completions", json={"model": "toy", "messages": [{"role": "user", "content": secret}]}
        )
        httpx.get(f"{url}/v1/sessions/{secret}")
    ours = [
        record.getMessage() for record in caplog.records if record.name.startswith(("ringfa3", "uvicorn", "asyncio"))
    ]
    assert any("mine-7 POST /v1/completions 200" in line and "tokens=5" in line for line in ours)
    assert len(ours) >= 5
    assert not any(secret in line for line in ours)


def test_why_it_is_not_ready_is_for_those_with_the_token(gang: ToyGang) -> None:
    with serving(gang, access=Access(TOKEN, None)) as (url, _):
        gang.fail(1)
        for token, told in ((TOKEN, "not ready: rank 1 on here is "), ("another", "not ready")):
            reply = httpx.get(f"{url}/ready", headers={"Authorization": f"Bearer {token}"})
            assert reply.status_code == 503
            message = reply.json()["error"]["message"]
            assert message.startswith(told)
            assert (message == told) == (token != TOKEN)


def test_reading_the_prompt_takes_a_place_and_time(gang: ToyGang, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer can take seconds: no more of its work is taken on than of the ranks', and not for longer."""
    free, tokenizer = threading.Event(), gang.tokenizer

    def slow(text: str) -> Any:
        free.wait(60)
        return tokenizer(text)

    monkeypatch.setattr(gang, "tokenizer", slow)
    with serving(gang, limits=Limits(completions=1)) as (url, server), ExitStack() as stack:
        stack.callback(free.set)
        late = httpx.post(f"{url}/v1/completions", json=ASK, headers={"X-Deadline-S": "0.3"}, timeout=30)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert server._app.state.service.completions.inside == 0
        first = stack.enter_context(ThreadPoolExecutor(1)).submit(
            httpx.post, f"{url}/v1/completions", json=ASK, timeout=60
        )
        while not server._app.state.service.completions.inside:
            time.sleep(0.005)
        assert httpx.post(f"{url}/v1/completions", json=ASK).status_code == 429
        free.set()
        assert first.result().json()["choices"][0]["text"] == answer("Once upon", 5)


def test_draining(gang: ToyGang) -> None:
    """What is under way ends, nothing new is begun, and what takes too long is told so."""
    with serving(gang, limits=Limits(drain_s=4.0)) as (url, server):
        replies: dict[str, Any] = {}

        def ask(name: str, body: dict[str, Any]) -> None:
            replies[name] = httpx.post(f"{url}/v1/completions", json=body, timeout=20)

        bodies = {"short": LONG | {"max_tokens": 40}, "long": LONG, "stream": LONG | {"stream": True}}
        clients = [threading.Thread(target=ask, args=item) for item in bodies.items()]
        for client in clients:
            client.start()
        while gang.running < 3:
            time.sleep(0.005)
        server.handle_exit(15)
        until = time.monotonic() + 3
        while httpx.get(f"{url}/ready").status_code == 200 and time.monotonic() < until:
            time.sleep(0.02)
        late = httpx.post(f"{url}/v1/completions", json=ASK)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/live").status_code == 200
        for client in clients:
            client.join(30)
        assert replies["short"].json()["usage"]["completion_tokens"] == 40
        assert (replies["long"].status_code, replies["long"].json()["error"]["code"]) == (503, "shutting_down")
        assert '"code":"shutting_down"' in replies["stream"].text.replace(" ", "")
    assert rests(gang)


def test_a_second_signal_breaks_off_what_is_in_flight(gang: ToyGang, caplog: pytest.LogCaptureFixture) -> None:
    """Each client is told; no traceback; long before the first signal's time is over."""
    caplog.set_level(logging.INFO)
    gang.attending.clear()  # it computes until it is set
    tensors = b"".join(pack({name: torch.zeros(1, 4, 1, 8) for name in "qkv"}))
    asked: dict[str, dict[str, Any]] = {
        "long": {"url": "/v1/completions", "json": LONG},
        "stream": {"url": "/v1/completions", "json": LONG | {"stream": True}},
        "attention": {"url": "/v1/attention", "content": tensors, "headers": {"Content-Type": TENSORS}},
    }
    with ExitStack() as stack:
        stack.callback(gang.attending.set)
        url, server = stack.enter_context(serving(gang, limits=Limits(drain_s=600.0)))
        http = stack.enter_context(httpx.Client(base_url=url, timeout=120))
        pool = stack.enter_context(ThreadPoolExecutor(3))
        replies = {name: pool.submit(http.post, **call) for name, call in asked.items()}
        service = server._app.state.service
        while gang.running < 2 or not service.attentions.inside:
            time.sleep(0.005)
        server.handle_exit(15)
        while http.get("/ready").status_code == 200:
            time.sleep(0.02)
        assert not any(reply.done() for reply in replies.values())
        for _ in range(3):
            server.handle_exit(15)
        told = {name: reply.result(60) for name, reply in replies.items()}
    for name in ("long", "attention"):
        assert (told[name].status_code, told[name].json()["error"]["code"]) == (503, "shutting_down"), name
    assert '"code":"shutting_down"' in told["stream"].text.replace(" ", "")
    assert [record for record in caplog.records if record.exc_info] == []
    assert "Traceback" not in caplog.text  # as uvicorn's lifespan writes them
    assert [line for line in caplog.messages if line.startswith("told to end")] == [
        "told to end: waiting at most 600 s for 3 requests in flight; a second signal (Ctrl-C) breaks them off",
        "told to end a second time: requests in flight are broken off",
    ]
    assert rests(gang)


def test_nothing_in_flight_is_not_waited_for(gang: ToyGang, caplog: pytest.LogCaptureFixture) -> None:
    with serving(gang, limits=Limits(drain_s=600.0)) as (url, _):
        assert httpx.post(f"{url}/v1/completions", json=ASK).status_code == 200
        while httpx.get(f"{url}/v1/info", timeout=30).json()["completions_in_flight"]:
            time.sleep(0.005)
    assert not any(line.startswith("told to end") for line in caplog.messages)


def test_conversations_are_so_many(gang: ToyGang) -> None:
    with serving(gang, limits=Limits(conversations=2)) as (url, _):
        for name in ("a", "b", "a", "c"):
            assert httpx.post(f"{url}/v1/completions", json=ASK | {"session": name}).status_code == 200
    assert gang.forgotten == ["b"]


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(argv)


def test_another_address_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.TOKEN, raising=False)
    assert serve.access_from(options()) == Access(None, LOOPBACK)
    assert serve.access_from(options("--host", "::1", "--allow-host", "Box")) == Access(None, LOOPBACK | {"box"})
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        with pytest.raises(ValueError, match=r"--host: wanted a loopback address, or a token"):
            serve.access_from(options("--host", host))
    with pytest.raises(ValueError, match="--host: wanted an IP address"):
        serve.access_from(options("--host", "box"))
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert serve.access_from(options("--host", "0.0.0.0", "--token-file", str(file))) == Access(TOKEN, None)
    monkeypatch.setenv(serve.TOKEN, TOKEN)
    assert serve.access_from(options("--host", "0.0.0.0")) == Access(TOKEN, None)
    with pytest.raises(ValueError, match="--host"):  # taken out of the environment, for ranks to know nothing of it
        serve.access_from(options("--host", "0.0.0.0"))
    for short in ("", "short", "é" * 20, "two words of a token"):
        file.write_text(short)
        with pytest.raises(ValueError, match="--token-file: wanted 16 or more"):
            serve.access_from(options("--token-file", str(file)))
    for argv in (["--token", TOKEN], [f"--token={TOKEN}"], ["--token"]):
        with pytest.raises(ValueError, match="others can read command lines") as refused:
            serve.access_from(options(*argv))
        assert TOKEN not in str(refused.value)


def test_limits_are_checked() -> None:
    for name, value in (
        ("--deadline", "nan"),
        ("--deadline", "inf"),
        ("--max-json-mib", "inf"),
        ("--max-json-mib", "nan"),
    ):
        with pytest.raises(ValueError, match="wanted more than 0"):
            serve.limits_from(options(name, value), cpu=True)
    for name in ("--deadline", "--max-json-mib", "--max-completions"):
        with pytest.raises(ValueError, match="wanted more than 0"):
            serve.limits_from(options(name, "0"), cpu=True)
    assert serve.limits_from(options("--deadline", "5"), cpu=True).deadline_s == 5


@pytest.mark.parametrize("body", ['{"error": "text"}', '{"error": {}}', "[]", "<html>"])
def test_what_a_proxy_says_is_a_service_error(body: str) -> None:
    with pytest.raises(client.ServiceError, match=r"Bad Gateway"):
        client._check(httpx.Response(502, text=body))


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    """getaddrinfo would serve on 34463 for 99999."""
    with pytest.raises(ValueError, match=f"--port: wanted 0 to 65535, got {port}"):
        bind("127.0.0.1", port)
