"""OpenAI's API, asked by OpenAI's client over real HTTP: what it sends is served, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.launch.toy_gang import ToyGang, answer, serving


@pytest.fixture(scope="module")
def gang() -> Iterator[ToyGang]:
    toy = ToyGang()
    yield toy
    toy.close()


@pytest.fixture(scope="module")
def url(gang: ToyGang) -> Iterator[str]:
    with serving(gang) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_completion(client: openai.OpenAI) -> None:
    made = client.completions.create(model="toy", prompt="Once upon", max_tokens=12, temperature=0, seed=3)
    assert made.choices[0].text == answer("Once upon", 12, 3)
    assert (made.object, made.model, made.choices[0].finish_reason) == ("text_completion", "toy", "length")
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (9, 12, 21)
    assert (
        client.completions.create(model="toy", prompt=list(b"Once upon"), max_tokens=12, seed=3).choices == made.choices
    )
    assert client.completions.create(model="toy", prompt="Once upon", max_tokens=12, seed=4).choices != made.choices


def test_a_stream_is_the_same_text_in_parts(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "toy", "prompt": "Once upon", "max_tokens": 30}
    parts = list(client.completions.create(**options, stream=True))
    assert "".join(part.choices[0].text for part in parts) == answer("Once upon", 30)
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["length"]
    assert len({part.id for part in parts}) == 1
    assert all(part.usage is None for part in parts)
    with_usage = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert with_usage[-1].choices == []
    assert with_usage[-1].usage is not None
    assert with_usage[-1].usage.total_tokens == 9 + 30
    assert all(part.usage is None for part in with_usage[:-1])


def test_token_ids_where_they_are_asked_for(client: openai.OpenAI, url: str) -> None:
    want = answer("Once upon", 30)
    options: dict[str, Any] = {"model": "toy", "prompt": "Once upon", "max_tokens": 30}
    made = client.completions.create(**options, extra_body={"return_token_ids": True})
    assert made.choices[0].to_dict()["token_ids"] == list(want.encode())
    parts = list(client.completions.create(**options, stream=True, extra_body={"return_token_ids": True}))
    assert [i for part in parts for i in part.choices[0].to_dict()["token_ids"]] == list(want.encode())
    assert "".join(part.choices[0].text for part in parts) == want
    chat: dict[str, Any] = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
    for more in ({}, {"stream": True}):
        reply = httpx.post(f"{url}/v1/chat/completions", json=chat | {"return_token_ids": True} | more)
        lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")] or [reply.text]
        told = [i for line in lines for i in json.loads(line)["choices"][0].get("token_ids", ())]
        assert bytes(told).decode() == answer("<user>x", 9)
    for more in ({}, {"return_token_ids": False}):
        assert "token_ids" not in httpx.post(f"{url}/v1/completions", json=options | more).text


def test_tokens_without_text_are_told(client: openai.OpenAI) -> None:
    """The end token has none, nor have the first bytes of a character."""
    answered = answer("a", 4096)
    made = client.completions.create(model="toy", prompt="a", max_tokens=4000, extra_body={"return_token_ids": True})
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].to_dict()["token_ids"] == [*answered.encode(), 0]
    assert made.usage is not None
    assert made.usage.completion_tokens == len(answered) + 1


def test_a_conversation(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    told = "<system>Be short.<user>Hello"
    made = client.chat.completions.create(model="toy", messages=messages, max_completion_tokens=20)
    assert made.choices[0].message.content == answer(told, 20)
    assert made.choices[0].message.role == "assistant"
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(told)
    parts = list(client.chat.completions.create(model="toy", messages=messages, max_tokens=20, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer(told, 20)
    assert parts[-1].choices[0].finish_reason == made.choices[0].finish_reason
    unbounded = client.chat.completions.create(model="toy", messages=messages)  # to the model's end token
    assert unbounded.choices[0].finish_reason == "stop"
    assert unbounded.choices[0].message.content == answer(told, 4096)
    again = [*messages, made.choices[0].message.model_dump(), {"role": "user", "content": "More"}]  # as people do it
    client.chat.completions.create(model="toy", messages=again, max_tokens=1)


def test_stop_strings_end_an_answer(client: openai.OpenAI) -> None:
    whole = answer("Once upon", 60)
    letter = whole[20]
    for stop in (letter, [letter, "%"]):
        made = client.completions.create(model="toy", prompt="Once upon", max_tokens=60, stop=stop)
        assert made.choices[0].text == whole[: whole.index(letter)]
        assert made.choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "ringfa3"
    with pytest.raises(openai.NotFoundError, match="wanted one that /v1/models names"):
        client.models.retrieve("gpt")


TEXT = {"model": "toy", "prompt": "x"}
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("kind", "more", "param"),
    [
        ("text", {"n": 2}, "n"),
        ("text", {"logprobs": 5}, "logprobs"),
        ("text", {"best_of": 3}, "best_of"),
        ("text", {"echo": True}, "echo"),
        ("text", {"suffix": "."}, "suffix"),
        ("text", {"logit_bias": {"1": 1}}, "logit_bias"),
        ("text", {"presence_penalty": 0.5}, "presence_penalty"),
        ("text", {"frequency_penalty": -1}, "frequency_penalty"),
        ("text", {"temperature": -1}, "temperature"),
        ("text", {"temperature": "hot"}, "temperature"),
        ("text", {"top_p": 0}, "top_p"),
        ("text", {"max_tokens": 0}, "max_tokens"),
        ("text", {"max_tokens": 1.5}, "max_tokens"),
        ("text", {"max_tokens": True}, "max_tokens"),
        ("text", {"stop": ["a"] * 5}, "stop"),
        ("text", {"stop": ""}, "stop"),
        ("text", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("text", {"prompt": ""}, "prompt"),
        ("text", {"prompt": []}, "prompt"),
        ("text", {"prompt": [256]}, "prompt"),
        ("text", {"prompt": ["a", "b"]}, "prompt"),
        ("text", {"prompt": "\ud800"}, "prompt"),
        ("text", {"top_a": 0.5}, "top_a"),
        ("text", {"session": "a b"}, "session"),
        ("chat", {"logprobs": True}, "logprobs"),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"tools": [{"type": "function"}]}, "tools"),
        ("chat", {"tool_choice": "required"}, "tool_choice"),
        ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("chat", {"store": True}, "store"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("chat", {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_what_is_not_served_is_refused_by_name(url: str, kind: str, more: dict[str, Any], param: str) -> None:
    path, base = ("completions", TEXT) if kind == "text" else ("chat/completions", CHAT)
    body = json.dumps(base | more)
    reply = httpx.post(f"{url}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"].split(".")[0] == param, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "more",
    [
        *({"n": 1}, {"best_of": 1}, {"echo": False}, {"logprobs": None}, {"presence_penalty": 0.0}, {"logit_bias": {}}),
        *({"user": "me"}, {"stream": None}, {"top_k": 3}),
    ],
    ids=json.dumps,
)
def test_what_changes_nothing_is_taken(url: str, more: dict[str, Any]) -> None:
    reply = httpx.post(f"{url}/v1/completions", json=TEXT | more)
    assert reply.status_code == 200, reply.text


def test_the_models_length_is_kept(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 4095 tokens, got 4096") as refused:
        client.completions.create(model="toy", prompt="x" * 4096)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="at most 96 tokens, got 97"):
        client.completions.create(model="toy", prompt="x" * 4000, max_tokens=97)


def test_a_model_without_a_tokenizer_takes_ids() -> None:
    gang = ToyGang()
    gang.tokenizer = None
    try:
        with serving(gang) as (url, _):
            reply = httpx.post(f"{url}/v1/completions", json=TEXT)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")
            assert "no tokenizer" in reply.json()["error"]["message"]
    finally:
        gang.close()


def test_errors_are_openais(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    for path, method, status in (("/v1/nothing", "GET", 404), ("/v1/completions", "GET", 405), ("/live", "PUT", 405)):
        reply = httpx.request(method, url + path)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.post(f"{url}/v1/completions?stream=true", json=TEXT).json()["error"]["param"] == "stream"


def test_request_ids(client: openai.OpenAI, url: str) -> None:
    made = client.completions.create(model="toy", prompt="x")
    assert made._request_id
    given = httpx.get(f"{url}/live", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"]
    assert given == "mine-1"
    assert httpx.get(f"{url}/live", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"
