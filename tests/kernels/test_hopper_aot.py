"""The Hopper forward compiles for sm_90a, under both Tritons, to the schedule that each config was tuned for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NEXT = ROOT / ".triton-next"
MASKS = ("full", "causal", "intervals")
WORKERS = 2
Job = dict[str, Any]


def name(job: Job) -> str:
    """A readable test id."""
    return "-".join(str(x) for x in job.values())


# What is fast because its SASS is right: the table's rows with 16-bit output, and their continuing variants.
TUNED: list[Job] = [{"D": D, "mask": m, "mode": "plain"} for D in (64, 128, 256) for m in MASKS]
TUNED.append({"D": 64, "mask": "causal", "mode": "plain", "Sq": 2048, "Sk": 2048})  # two warpgroups
INTO: list[Job] = [{"D": D, "mask": m, "mode": "into"} for D in (64, 128, 256) for m in ("full", "intervals")]
# What must compile and be right in the same way, at whatever speed.
OTHERS: list[Job] = [
    {"D": 128, "mask": "full", "mode": "plain", "dtype": "float16"},
    {"D": 128, "mask": "causal", "mode": "last"},
    {"D": 256, "mask": "intervals", "mode": "last"},
    {"D": 128, "mask": "causal", "mode": "plain", "softcap": True},
    {"D": 128, "mask": "causal", "mode": "wide", "dtype": "float16", "softcap": True},
    {"D": 120, "mask": "full", "mode": "wide", "Sk": 2000},
    {"D": 128, "mask": "causal", "mode": "plain", "Sq": 16, "Hq": 24, "Hkv": 4},
]


class Builds:
    """Compiles its jobs in a few processes of one Triton, started at the first question; answers job by job."""

    def __init__(self, path: Path | None, jobs: list[Job]) -> None:
        self._pool = ThreadPoolExecutor(WORKERS)
        self._shares = [jobs[i::WORKERS] for i in range(WORKERS)]
        self._path = path
        self._done: list[Future[list[Job]]] = [self._pool.submit(self._run, share) for share in self._shares]

    def _run(self, share: list[Job]) -> list[Job]:
        # not in this process: conftest.py has Triton interpret here, and Gluon does not run interpreted
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = [str(self._path)] if self._path else []
        env["PYTHONPATH"] = os.pathsep.join([*paths, str(ROOT / "kernels")])
        command = [sys.executable, "-m", "ringfa3_kernels.aot", "ringfa3_kernels.hopper.builds"]
        done = subprocess.run(command, input=json.dumps(share), capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def __getitem__(self, job: Job) -> Job:
        for share, done in zip(self._shares, self._done, strict=True):
            if job in share:
                return done.result()[share.index(job)]
        pytest.skip("the oldest Triton alone compiles these: what is tuned is compiled under both")


@pytest.fixture(scope="module", params=["oldest", pytest.param("newest", marks=pytest.mark.slow)])
def builds(request: pytest.FixtureRequest) -> Builds:
    if request.param == "newest" and not NEXT.is_dir():
        pytest.fail(f"{NEXT} is missing: make .triton-next")
    return Builds(NEXT, [*TUNED, *INTO]) if request.param == "newest" else Builds(None, [*TUNED, *INTO, *OTHERS])


@pytest.mark.parametrize("job", [*TUNED, *INTO, *OTHERS], ids=name)
def test_wgmma_stays_asynchronous_and_memory_fits(builds: Builds, job: Job) -> None:
    build = builds[job]
    assert build["serialised"] == [], "ptxas serialises wgmma"
    assert build["rash"] == 0, "an mbarrier is told by one thread what others may not have done yet"
    assert build["hgmma"] > 0
    assert build["tma"] > 0
    assert build["shared"] <= 232448, "shared memory of an H100"


@pytest.mark.parametrize("job", TUNED, ids=name)
def test_tuned_kernels_do_not_spill(builds: Builds, job: Job) -> None:
    build = builds[job]
    newer = build["triton"] != "3.6.0"  # its ptxas spills a scalar or two outside the loops
    assert build["spills"] <= (8 if newer and job["mask"] == "intervals" and job["D"] != 128 else 0)


@pytest.mark.parametrize("job", [*TUNED, *INTO, *OTHERS], ids=name)
def test_key_loops_do_not_spill(builds: Builds, job: Job) -> None:
    assert [step["spills"] for step in builds[job]["steps"]] == [0] * consumers(job)


@pytest.mark.parametrize("job", [*TUNED, *INTO], ids=name)
def test_softmax_runs_under_the_matrix_products(builds: Builds, job: Job) -> None:
    rows = 64 if job["D"] < 256 else 32  # registers of a thread's scores: BN / 2
    for step in builds[job]["steps"]:
        assert step["maxima"] >= rows, "the wait for P V comes before the row maximum is done"


@pytest.mark.parametrize("job", [j for j in [*TUNED, *INTO] if j["D"] == 128], ids=name)
def test_wait_lies_among_the_exps(builds: Builds, job: Job) -> None:
    for step in builds[job]["steps"]:
        assert 8 <= step["exps"] <= 40, "FlashAttention-3 waits after about 15 of the 64"


@pytest.mark.parametrize("job", [*TUNED, *[j for j in INTO if j["D"] > 64]], ids=name)
def test_probabilities_stay_packed(builds: Builds, job: Job) -> None:
    assert [step["prmt"] for step in builds[job]["steps"]] == [0] * consumers(job), "P is packed again in every step"


def consumers(job: Job) -> int:
    """Warpgroups of the tile, each with its own copy of the key loop."""
    return 3 if job["D"] <= 64 and "Sk" not in job else 2
