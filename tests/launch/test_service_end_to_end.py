"""`ringfa3 serve` as a newcomer starts it: two CPU ranks and the small model; asked, robbed of a rank, asked again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch

from ringfa3_launch.client import Client, SessionGone, Unavailable
from tests.launch.toy_gang import plain
from tests.patience import patience

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Served:
    """The command, running."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def wait_ready(self, seconds: float) -> float:
        """Seconds until /ready says so."""
        began = time.monotonic()
        while httpx.get(f"{self.url}/ready", timeout=30).status_code != 200:
            assert time.monotonic() - began < seconds, self.log.read_text()
            time.sleep(0.05)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join(str(root / each) for each in (".", "kernels", "launch"))
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    for name in ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "RINGFA3_TOKEN"):
        env.pop(name, None)
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "ringfa3_launch", "serve", "--port", "0", "--drain", "5"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
        )
    assert process.stdout is not None
    try:
        said = ""
        for said in process.stdout:
            if "serving on" in said:
                break
        found = re.search(r"http://\S+", said)
        assert found, said + log.read_text()
        yield Served(found[0], process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def used(client: Client) -> list[int]:
    """Pages of every rank's cache in use."""
    return [rank["cache_pages_used"] for rank in client.info()["ranks"]]


@pytest.mark.slow
def test_what_the_readme_shows(served: Served) -> None:
    """curl, OpenAI's client, and ours."""
    models = subprocess.run(["curl", "-s", f"{served.url}/v1/models"], capture_output=True, text=True, check=True)
    model = json.loads(models.stdout)["data"][0]["id"]
    body = json.dumps({"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 16})
    kind = "Content-Type: application/json"
    curl = ["curl", "-s", f"{served.url}/v1/chat/completions", "-H", kind, "-d", body]
    told = json.loads(subprocess.run(curl, capture_output=True, text=True, check=True).stdout)
    answer = told["choices"][0]["message"]["content"]
    assert "Paris" in answer
    assert told["choices"][0]["finish_reason"] == "stop"
    prefill = httpx.get(f"{served.url}/v1/info").json()["gang"]["last_prefill"]
    assert prefill["tokens"] == told["usage"]["prompt_tokens"]
    assert [{hop["source"] for hop in rank["hops"]} for rank in prefill["ranks"]] == [{0, 1}] * 2
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        parts = client.chat.completions.create(
            model=model,
            messages=QUESTION,
            temperature=0,
            max_tokens=16,
            stream=True,  # type: ignore[arg-type]
        )
        assert "".join(part.choices[0].delta.content or "" for part in parts) == answer
    q, k, v = torch.randn(1, 200, 6, 16).split((4, 1, 1), dim=2)
    with Client(served.url) as ours:
        want = plain(q, k, v)[0]
        torch.testing.assert_close(ours.attention(q, k, v), want, rtol=0, atol=1e-5)
        with ours.session(heads=4, kv_heads=1, head_dim=16, max_tokens=200) as session:
            session.append(k[:, :150], v[:, :150])
            session.append(k[:, 150:], v[:, 150:])
            torch.testing.assert_close(session.attend(q[:, -3:]), want[:, -3:], rtol=0, atol=1e-5)
        first = ours.complete("The first ten primes are", temperature=0, max_tokens=8, session="primes")
        more = ours.complete(f"The first ten primes are{first.text} and", temperature=0, max_tokens=2, session="primes")
        assert more.usage["prompt_tokens_details"]["cached_tokens"] > 5
        before = used(ours)
        texts = ours.stream("word " * 1500, temperature=0, max_tokens=2000, ignore_eos=True)
        assert next(texts)
        assert sum(used(ours)) > sum(before) + 15  # pages of 64 tokens
        texts.close()  # type: ignore[attr-defined]  # a generator: the client leaves
        left = time.monotonic()
        while used(ours) != before:
            assert time.monotonic() - left < patience(10)
            time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_is_killed_while_it_answers(served: Served) -> None:
    """The caller hears which rank; /ready says no, then yes again; answers are the same as before."""
    served.wait_ready(patience(30))
    with Client(served.url) as client:
        before = client.chat(QUESTION, temperature=0, max_tokens=16).text
        ranks = {rank["rank"]: rank["pid"] for rank in client.info()["ranks"]}
        texts = client.stream("Once upon a time", temperature=0, max_tokens=2000, ignore_eos=True)
        assert next(texts)
        with client.session(heads=2, kv_heads=1, head_dim=16, max_tokens=64) as session:
            session.append(torch.zeros(1, 8, 1, 16), torch.zeros(1, 8, 1, 16))
            killed = time.monotonic()
            os.kill(ranks[1], signal.SIGKILL)
            with pytest.raises(Unavailable, match=r"rank 1 on .*SIGKILL") as failed:
                for _ in texts:
                    pass
            assert time.monotonic() - killed < patience(5)
            assert failed.value.code == "rank_failed"
            while client.ready():
                assert time.monotonic() - killed < patience(2)
            with pytest.raises(Unavailable) as down:
                client.chat(QUESTION)
            assert down.value.retry_after
            assert httpx.get(f"{served.url}/live").status_code == 200
            served.wait_ready(patience(30))
            with pytest.raises(SessionGone, match="410"):
                session.attend(torch.zeros(1, 1, 2, 16))
        info = client.info()
        assert info["restarts"] == 1
        assert {rank["rank"]: rank["pid"] for rank in info["ranks"]}.keys() == ranks.keys()
        assert client.chat(QUESTION, temperature=0, max_tokens=16).text == before
        assert "ringfa3_gang_restarts 1.0" in httpx.get(f"{served.url}/metrics").text
