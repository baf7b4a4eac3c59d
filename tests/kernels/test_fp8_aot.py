"""The Hopper forward on fp8 compiles for sm_90a, under both Tritons, to the schedule that it was written for."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from ringfa3_kernels.quantized import key_order

ROOT = Path(__file__).parents[2]
NEXT = ROOT / ".triton-next"
CONSUMERS = 2  # warpgroups of a tile, each with its own copy of the key loop
Job = dict[str, Any]

# What the speed is claimed for, and what else the ring calls: compiled under both Tritons.
TUNED: list[Job] = [
    {"D": 128, "mask": "full", "mode": "plain"},
    {"D": 128, "mask": "causal", "mode": "plain"},
    {"D": 128, "mask": "intervals", "mode": "into"},
]
OTHERS: list[Job] = [
    {"D": 128, "mask": "full", "mode": "into"},
    {"D": 64, "mask": "causal", "mode": "plain"},
    {"D": 64, "mask": "intervals", "mode": "into"},
    {"D": 80, "mask": "full", "mode": "wide", "Sk": 2000, "softcap": True, "change": {"LAZY": 4}},
    {"D": 128, "mask": "causal", "mode": "last", "Sq": 16, "Hq": 24, "Hkv": 4, "change": {"TWO_LEVEL": False}},
]


def name(job: Job) -> str:
    """A readable test id."""
    return "-".join(str(x) for x in job.values())


class Builds:
    """Compiles its jobs in one process of one Triton, at the first question; answers job by job."""

    def __init__(self, path: Path | None, jobs: list[Job]) -> None:
        self._path, self._jobs = path, jobs

    def __getitem__(self, job: Job) -> Job:
        if job not in self._jobs:
            pytest.skip("the oldest Triton alone compiles these: what is tuned is compiled under both")
        return self._builds[self._jobs.index(job)]

    @cached_property
    def _builds(self) -> list[Job]:
        # not in this process: conftest.py has Triton interpret here, and Gluon does not run interpreted
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join([*([str(self._path)] if self._path else []), str(ROOT / "kernels")])
        command = [sys.executable, "-m", "ringfa3_kernels.aot", "ringfa3_kernels.hopper.fp8_builds"]
        done = subprocess.run(
            command, input=json.dumps(self._jobs), capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module", params=["oldest", pytest.param("newest", marks=pytest.mark.slow)])
def builds(request: pytest.FixtureRequest) -> Builds:
    if request.param == "newest" and not NEXT.is_dir():
        pytest.fail(f"{NEXT} is missing: make .triton-next")
    return Builds(NEXT, TUNED) if request.param == "newest" else Builds(None, [*TUNED, *OTHERS])


@pytest.mark.parametrize("job", [*TUNED, *OTHERS], ids=name)
def test_fp8_products_stay_asynchronous_and_memory_fits(builds: Builds, job: Job) -> None:
    build = builds[job]
    assert build["serialised"] == [], "ptxas serialises wgmma"
    assert build["rash"] == 0, "an mbarrier is told by one thread what others may not have done yet"
    D = 64 if job["D"] <= 64 else 128
    # of a warpgroup: QK of the first block and in the loop, in steps of 32 along D; PV in the loop and last, along keys
    assert build["qgmma"] == CONSUMERS * 2 * (D // 32 + 128 // 32)
    assert build["hgmma"] == 0
    assert build["tma"] > 0
    assert build["shared"] <= 232448, "shared memory of an H100"


@pytest.mark.parametrize("job", [*TUNED, *OTHERS], ids=name)
def test_key_loops_neither_spill_nor_take_p_apart(builds: Builds, job: Job) -> None:
    steps = builds[job]["steps"]
    assert [step["spills"] for step in steps] == [0] * CONSUMERS
    assert [step["prmt"] for step in steps] == [0] * CONSUMERS, "P's four numbers a register are packed again"


@pytest.mark.parametrize("job", [*TUNED, *OTHERS], ids=name)
def test_p_is_converted_whole(builds: Builds, job: Job) -> None:
    """Two numbers an instruction, of the first block and in the loop: fewer if some registers were taken for others."""
    assert builds[job]["conversions"] == CONSUMERS * 2 * 32


@pytest.mark.parametrize("job", [j for j in TUNED if j["mask"] == "full"], ids=name)
def test_each_byte_of_p_is_the_key_that_v_has_there(builds: Builds, job: Job) -> None:
    """wgmma's fragments by the PTX manual, for thread t of four.

    Of scores, register 4 n + 2 h + b is row h (of two, 8 apart) and key 8 n + 2 t + b. Of the fp8 operand, byte i of
    register 2 u + h (in each product, of 32 keys) is row h and place 16 u + 4 t + i.
    """
    key = key_order().view(4, 4)  # of 16 keys, by t and byte
    wanted = []
    for product, u, h in itertools.product(range(4), range(2), range(2)):
        keys = 32 * product + 16 * u + key[0]  # of thread 0
        wanted.append([4 * (j // 8) + 2 * h + j % 8 for j in keys.tolist()])
    assert builds[job]["operand"] == wanted * CONSUMERS


@pytest.mark.parametrize("job", TUNED, ids=name)
def test_softmax_runs_under_the_matrix_products(builds: Builds, job: Job) -> None:
    for step in builds[job]["steps"]:
        assert step["maxima"] >= 64, "the wait for P V comes before the row maximum is done"
        assert step["exps"] <= 56, "the wait for P V comes when nothing is left to hide the rescale under"
