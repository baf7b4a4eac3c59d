"""The service as a Ray Serve application: its options, and, where Serve is installed, the whole of it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from ringfa3_launch.service.ray_serve import parse

ROOT = Path(__file__).parents[2]
NEEDED = ("ray", "grpc", "aiohttp", "opencensus", "opentelemetry.sdk")  # ray[serve]
missing = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]


def test_options_are_those_of_serve() -> None:
    found = parse({"ranks": 2, "device": "cpu", "attention_only": True, "log-text": "false", "max_json_mib": "0.5"})
    assert (found.ranks, found.device, found.attention_only, found.log_text) == (2, "cpu", True, False)
    assert (found.max_json_mib, found.model, found.chunk) == (0.5, None, 512)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"host": "0.0.0.0"}, "host: wanted an option that is not Ray Serve's to decide, got '0.0.0.0'"),
        ({"token": "secret"}, "token: wanted an option that is not Ray Serve's"),
        ({"token-file": "x"}, "token-file: wanted an option that is not Ray Serve's"),
        ({"rank": 2}, "unrecognized arguments: --rank=2"),
        ({"ranks": "two"}, "--ranks: invalid int value: 'two'"),
        ({"device": "tpu"}, "--device: invalid choice: 'tpu'"),
    ],
)
def test_nonsense_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(args)


SERVED = """
import socket

import httpx, ray, torch
from ray import serve
from safetensors.torch import load, save
from torch.nn.functional import scaled_dot_product_attention

from ringfa3_launch.service.ray_serve import build

if __name__ == "__main__":
    ray.init("local", num_cpus=4, num_gpus=0, object_store_memory=80_000_000, include_dashboard=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"port": port})
    serve.run(build({"ranks": "2", "device": "cpu", "attention_only": "true"}), name="ringfa3", route_prefix="/")
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    assert client.get("/ready").status_code == 200
    assert client.get("/ready", headers={"Host": "elsewhere.example"}).status_code == 421
    q, k, v = (torch.randn(1, 65, heads, 32) for heads in (4, 2, 2))
    kind = {"Content-Type": "application/octet-stream"}
    answer = client.post("/v1/attention", content=save({"q": q, "k": k, "v": v}), headers=kind)
    assert answer.status_code == 200, answer.text
    wanted = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(load(answer.content)["out"], wanted.transpose(1, 2))
    assert ray.available_resources()["CPU"] == 1
    serve.delete("ringfa3")
    assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}
    serve.shutdown()
    print("served")
"""


@pytest.mark.skipif(bool(missing), reason=f"ray[serve] is not installed: no {', '.join(missing)}")
def test_served(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "served.py"
    script.write_text(SERVED)
    for name in [name for name in environment if name.startswith("RAY_")]:
        del environment[name]
    environment |= {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    path = os.pathsep.join([environment["PYTHONPATH"], *(each for each in sys.path if each)])
    environment |= {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "served"
