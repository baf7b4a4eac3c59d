"""Many clients at once, and a thousand that mean harm: a service in a process of its own, which then ends with 0."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import schemathesis
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.numpy import save
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ringfa3_launch.cluster import RingCluster
from ringfa3_launch.service import Limits
from tests.launch import tiny_model
from tests.launch.toy_gang import answer, serving
from tests.patience import patience

ROOT = Path(__file__).parents[2]
CLIENTS = 200
HARM = settings(
    max_examples=50,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
CONFORMS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@dataclass
class Served:
    """A service in its process."""

    url: str
    process: subprocess.Popen[str]

    @property
    def resident(self) -> int:
        """Bytes of memory that it has."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    path = os.pathsep.join(str(ROOT / root) for root in (".", "kernels", "launch"))
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.toy_gang"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
            cwd=ROOT,
        )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url, log.read_text()
        yield Served(url, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_200_clients_at_once(served: Served) -> None:
    """120 find room, others are told to come back; every answer is what the model says to that prompt alone."""
    refused: Counter[int] = Counter()

    async def ask(http: httpx.AsyncClient, number: int) -> str:
        body = {"model": "toy", "prompt": f"client {number}", "max_tokens": 60, "seed": number, "stream": True}
        while True:
            async with http.stream("POST", f"{served.url}/v1/completions", json=body) as reply:
                if reply.status_code == 429:
                    refused[number] += 1
                    await asyncio.sleep(float(reply.headers["retry-after"]) * random.uniform(0.2, 0.6))
                    continue
                assert reply.status_code == 200, await reply.aread()
                parts = [line[6:] async for line in reply.aiter_lines() if line.startswith("data: ")]
            assert parts.pop() == "[DONE]"
            return "".join(json.loads(part)["choices"][0]["text"] for part in parts)

    async def everybody() -> list[str]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(limits=limits, timeout=60) as http:
            return await asyncio.gather(*(ask(http, number) for number in range(CLIENTS)))

    answers = asyncio.run(everybody())
    assert answers == [answer(f"client {number}", 60, number) for number in range(CLIENTS)]
    assert refused
    assert httpx.get(f"{served.url}/v1/info").json()["completions_in_flight"] == 0


def test_200_clients_of_real_ranks(tmp_path: Path) -> None:
    """Two ranks and a tiny model: nothing but 429s, and every answer is what transformers says to that prompt alone."""
    folder = tiny_model.write(tmp_path)
    prompts = [[(7 * i + j * (1 + i % 5)) % tiny_model.WORDS for j in range(1 + i % 40)] for i in range(CLIENTS)]
    refused = 0

    async def ask(http: httpx.AsyncClient, prompt: list[int]) -> list[int]:
        nonlocal refused
        body = {"model": folder.name, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        while True:
            more = {"stream": True, "return_token_ids": True}
            async with http.stream("POST", "/v1/completions", json=body | more) as reply:
                if reply.status_code == 429:
                    refused += 1
                    await asyncio.sleep(float(reply.headers["retry-after"]) * random.uniform(0.2, 0.6))
                    continue
                assert reply.status_code == 200, await reply.aread()
                parts = [line[6:] async for line in reply.aiter_lines() if line.startswith("data: ")]
            assert parts.pop() == "[DONE]"
            return [token for part in parts for token in json.loads(part)["choices"][0]["token_ids"] or ()]

    async def everybody(url: str) -> list[list[int]]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=patience(120)) as http:
            return await asyncio.gather(*(ask(http, prompt) for prompt in prompts))

    with (
        RingCluster.local(2, device="cpu", model=folder, pages=200) as cluster,
        serving(cluster, limits=Limits(completions=120)) as (url, _),
    ):
        answers = asyncio.run(everybody(url))
        assert refused
        until = time.monotonic() + patience(10)
        while any(rank.cache_used for rank in cluster.health()):
            assert time.monotonic() < until
            time.sleep(0.05)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for length in range(1, 41):  # prompts of one length together
        ids = torch.tensor(prompts[length - 1 :: 40])
        seen = torch.ones_like(ids)
        said = model.generate(ids, attention_mask=seen, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for prompt, tokens, right in zip(ids, answers[length - 1 :: 40], said[:, length:].tolist(), strict=True):
            assert tokens == right[: len(tokens)], prompt
            assert len(tokens) == 12 or tokens[-1] == model.config.eos_token_id


def test_a_thousand_that_mean_harm(served: Served) -> None:
    """Requests that break the OpenAPI document, and hostile tensors: 4xx each time, alive, no memory lost."""
    statuses: Counter[int] = Counter()
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    taking = [each for each in operations if each.query or (each.body and not each.label.endswith("append"))]
    assert len(taking) == 5  # the others take nothing that can be wrong, but a session's id
    before = 0

    def refuse(case: Case) -> None:
        reply = case.call(base_url=served.url)
        assert 400 <= reply.status_code < 500, (case.as_curl_command(), reply.status_code, reply.text)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        statuses[reply.status_code] += 1

    for operation in taking:
        HARM(given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))(refuse))()
        before = before or served.resident  # after the first: imports and pools are not growth
    with httpx.Client(base_url=served.url, headers={"Content-Type": "application/octet-stream"}) as http:
        for number, body in enumerate(hostile(random.Random(5), 760)):
            reply = http.post("/v1/attention", content=body)
            assert 400 <= reply.status_code < 500, (number, body[:200], reply.status_code, reply.text)
            statuses[reply.status_code] += 1
    assert sum(statuses.values()) >= 1000, statuses
    assert served.process.poll() is None
    assert served.resident - before < 48 << 20, "memory grew"
    good = {"model": "toy", "prompt": "Once upon", "max_tokens": 5}
    assert httpx.post(f"{served.url}/v1/completions", json=good).json()["choices"][0]["text"] == answer("Once upon", 5)


def test_the_openapi_document_is_right(served: Served) -> None:
    """Requests that keep to it are answered as it says: status, type and form."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    paths = schema.raw_schema["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/attention", "/v1/sessions"} < set(paths)
    assert "422" not in json.dumps(paths)
    few = settings(HARM, max_examples=25)
    seen: Counter[int] = Counter()

    def conform(case: Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body |= {"model": "toy", "max_tokens": 9, "max_completion_tokens": 9, "stop": None}
            if case.path == "/v1/completions":
                del case.body["max_completion_tokens"]
        reply = case.call(base_url=served.url)
        case.validate_response(reply, checks=CONFORMS)
        seen[reply.status_code] += 1

    for each in schema.get_all_operations():
        few(given(each.ok().as_strategy(generation_mode=GenerationMode.POSITIVE))(conform))()
    assert seen[200] > 15, seen


def hostile(chance: random.Random, count: int) -> Iterator[bytes]:
    """Bodies of tensors with one thing wrong each: the end cut, the length or the header changed, a number changed."""
    parts = {name: np.ones((1, 8, 2, 8), dtype=np.float32) for name in "qkv"}
    good = save(parts)
    size = struct.unpack_from("<Q", good)[0]
    header = json.loads(good[8 : 8 + size])
    for number in range(count):
        kind = number % 4
        if kind == 0:
            yield good[: chance.randrange(len(good))]
        elif kind == 1:
            yield struct.pack("<Q", chance.choice((0, 1, size - 1, size + 1, 1 << chance.randrange(14, 64)))) + good[8:]
        elif kind == 2:
            at = chance.randrange(8, 8 + size)
            yield good[:at] + bytes([chance.choice((0, 0x22, 0x5B, 0x7B, 0xC3, 0xFF))]) + good[at:]
        else:
            changed = json.loads(json.dumps(header))
            entry = changed[chance.choice("qkv")]
            wrong = chance.choice((-1, True, None, "8", 8.5, 1 << 63, 1 << 200, [8], {}))
            field = chance.choice(("dtype", "shape", "data_offsets"))
            if field == "dtype":
                entry[field] = wrong
            else:
                entry[field][chance.randrange(len(entry[field]))] = wrong
            text = json.dumps(changed).encode()
            yield struct.pack("<Q", len(text)) + text + good[8 + size :]
