"""A rank is killed in the middle of prompts and of answers, under torchrun and under Ray; the callers hear of it.

The local launcher's ranks are killed in test_service_faults.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.patience import patience

PROGRAM = """
import json, os, signal, sys, threading, time
from functools import partial
from ringfa3 import RankFailed
from ringfa3.inference import Sampling
from ringfa3_launch.cluster import RingCluster

launcher, model, patience = sys.argv[1], sys.argv[2], float(sys.argv[3])
options = dict(device="cpu", model=model, memory=64 << 20, chunk=512)
TASKS = {  # what is asked, how many tokens of answer, and what grows meanwhile
    "prefill": ([3 * i % 128 for i in range(30000)], 4, "prefilled_tokens"),
    "decode": (list(range(100)), 20000, "completion_tokens"),
}

def answer(cluster):
    return [event.token for event in cluster.complete(list(range(100)), Sampling(max_tokens=12))]

def call(cluster, ids, most, heard):
    try:
        for event in cluster.complete(ids, Sampling(max_tokens=most, ignore_eos=True)):
            pass
    except RankFailed as error:
        heard.append([error.rank, error.host, str(error), time.monotonic()])

def kill(cluster, ids, most, counter):
    heard, before = [], cluster.info()["engine"][counter]
    callers = [threading.Thread(target=call, args=(cluster, ids[i:], most, heard)) for i in range(2)]
    for caller in callers:
        caller.start()
    while cluster.info().get("engine", {}).get(counter, 0) < before + 20:
        time.sleep(0.01)
    dead = cluster.health()[1].pid
    since = time.monotonic()
    os.kill(dead, signal.SIGKILL)
    while cluster.ready():
        time.sleep(0.01)
    unready = time.monotonic() - since
    for caller in callers:
        caller.join(60)
    cluster.wait(patience)
    while not cluster.ready():
        time.sleep(0.05)
    told = [[*what, at - since] for *what, at in heard]
    return {"unready": unready, "heard": told, "again": time.monotonic() - since}

if __name__ == "__main__":
    begin = RingCluster.torchrun if launcher == "torchrun" else partial(RingCluster.ray, 2, address="local")
    cluster = begin(**options)
    if cluster is not None:
        with cluster:
            first = answer(cluster)
            for name, task in TASKS.items():
                print(json.dumps({name: kill(cluster, *task), "same": answer(cluster) == first}), flush=True)
"""


@pytest.mark.parametrize(
    ("launcher", "cause"),
    [
        ("torchrun", "signal SIGKILL"),
        pytest.param(
            "ray",
            "SYSTEM_ERROR",
            marks=pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
        ),
    ],
)
def test_a_rank_is_killed(launcher: str, cause: str, tmp_path: Path, environment: dict[str, str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    (script := tmp_path / "program.py").write_text(PROGRAM)
    for name in [name for name in environment if name.startswith("RAY_")]:
        del environment[name]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if launcher == "torchrun" else []
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), launcher, str(tmp_path / "llama"), str(patience(30))],
        env=environment | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=patience(200),
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [next(iter(each)) for each in said] == ["prefill", "decode"]
    for each in said:
        assert each.pop("same")
        (found,) = each.values()
        assert found["unready"] < patience(2)
        assert found["again"] < patience(30)
        assert len(found["heard"]) == 2
        for rank, host, message, seconds in found["heard"]:
            assert (rank, host) == (1, os.uname().nodename)
            assert cause in message
            assert seconds < patience(5)
