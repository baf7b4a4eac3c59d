"""The Hopper backward compiles for sm_90a, under both Tritons, to the schedule that each config was made for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from ringfa3_kernels.hopper import backward_schedule
from ringfa3_kernels.types import Visible

ROOT = Path(__file__).parents[2]
NEXT = ROOT / ".triton-next"
WORKERS = 2
MASKS = ("full", "causal", "intervals")
Job = dict[str, Any]


def name(job: Job) -> str:
    """A readable test id."""
    return "-".join(str(x) for x in job.values())


# What is fast because its SASS is right: the table's rows with 16-bit dk and dv.
TUNED: list[Job] = [{"D": D, "mask": m, "mode": "plain"} for D in (64, 128, 256) for m in MASKS]
# What must compile without being serialised, at whatever speed.
OTHERS: list[Job] = [
    *({"D": D, "mask": "intervals", "mode": "keys"} for D in (64, 128, 256)),
    {"D": 128, "mask": "intervals", "mode": "add"},
    {"D": 256, "mask": "causal", "mode": "add"},
    {"D": 128, "mask": "causal", "mode": "add", "dtype": "float16"},
    {"D": 128, "mask": "causal", "mode": "plain", "softcap": True},
    {"D": 64, "mask": "intervals", "mode": "plain", "dtype": "float16", "softcap": True},
    {"D": 120, "mask": "full", "mode": "wide", "Sk": 2000},
    {"D": 64, "mask": "causal", "mode": "plain", "softcap": True},
    {"D": 256, "mask": "causal", "mode": "plain", "softcap": True},
    {"D": 256, "mask": "intervals", "mode": "keys", "softcap": True},
    {"D": 128, "mask": "causal", "mode": "plain", "change": {"WRITER": False}},
    {"D": 64, "mask": "causal", "mode": "plain", "change": {"WRITER": False}},
]
JOBS = [*TUNED, *OTHERS]
# Bytes spilled: of loop-invariant scalars, where 64 scores a thread (D 64) or a mask leave no registers.
SPILLS = {"3.6.0": {64: 104, 128: 36, 256: 0}, "3.9.0": {64: 144, 128: 56, 256: 0}}
# Reads and writes of them a step, in the worst consumer, under 3.6.
TOUCHED = {(128, "full"): 0, (128, "causal"): 5, (256, "full"): 0, (256, "causal"): 0, (256, "intervals"): 0}


class Builds:
    """Compiles its jobs in a few processes of one Triton, at the first question; answers job by job."""

    def __init__(self, path: Path | None, jobs: list[Job]) -> None:
        self._path, self._jobs = path, jobs

    def __getitem__(self, job: Job) -> Job:
        if job not in self._jobs:
            pytest.skip("the oldest Triton alone compiles these: what is tuned is compiled under both")
        return self._builds[self._jobs.index(job)]

    @cached_property
    def _builds(self) -> list[Job]:
        with ThreadPoolExecutor(WORKERS) as pool:
            shares = list(pool.map(self._run, [self._jobs[i::WORKERS] for i in range(WORKERS)]))
        return [shares[i % WORKERS][i // WORKERS] for i in range(len(self._jobs))]

    def _run(self, share: list[Job]) -> list[Job]:
        # not in this process: conftest.py has Triton interpret here, and Gluon does not run interpreted
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = [str(self._path)] if self._path else []
        env["PYTHONPATH"] = os.pathsep.join([*paths, str(ROOT / "kernels")])
        command = [sys.executable, "-m", "ringfa3_kernels.aot", "ringfa3_kernels.hopper.backward_builds"]
        done = subprocess.run(command, input=json.dumps(share), capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module", params=["oldest", pytest.param("newest", marks=pytest.mark.slow)])
def builds(request: pytest.FixtureRequest) -> Builds:
    if request.param == "newest" and not NEXT.is_dir():
        pytest.fail(f"{NEXT} is missing: make .triton-next")
    return Builds(NEXT, TUNED) if request.param == "newest" else Builds(None, JOBS)


@pytest.mark.parametrize("job", JOBS, ids=name)
def test_wgmma_stays_asynchronous_and_memory_fits(builds: Builds, job: Job) -> None:
    build = builds[job]
    assert build["serialised"] == [], "ptxas serialises wgmma"
    assert build["rash"] == 0, "an mbarrier is told by one thread what others may not have done yet"
    assert build["hgmma"] > 0
    assert build["tma"] > 0
    assert build["shared"] <= 232448, "shared memory of an H100"


@pytest.mark.parametrize("job", TUNED, ids=name)
def test_tuned_kernels_keep_their_registers(builds: Builds, job: Job) -> None:
    build = builds[job]
    assert build["spills"] <= SPILLS[build["triton"]][job["D"]]
    assert len(build["steps"]) == 2, "two consumers, each with its loop"
    touched = TOUCHED.get((job["D"], job["mask"]))
    if build["triton"] == "3.6.0" and touched is not None:
        assert max(step["spills"] for step in build["steps"]) <= touched


@pytest.mark.parametrize("job", [job for job in TUNED if job["D"] < 256], ids=name)
def test_products_run_under_the_exps_and_under_dq(builds: Builds, job: Job) -> None:
    for step in builds[job]["steps"]:
        # S and dP are issued before S is waited for, and the exps come while dP runs
        assert re.search(r"M\*\d+( B)?( M\*\d+)? W1 E", step["flow"]), step["flow"]
        # dQ is stored, for the copy engine, after its own wait and before the last wait, that for dK
        assert re.search(r"M\*\d+ W[12] .*S\*32 B.* W0", step["flow"]), step["flow"]
        assert step["prmt"] == 0, "16-bit operands are packed again in every step"


@pytest.mark.parametrize("job", [job for job in TUNED if job["D"] == 256], ids=name)
def test_one_consumer_computes_p_a_step_ahead_and_the_other_ds(builds: Builds, job: Job) -> None:
    probabilities, gradient = sorted(builds[job]["steps"], key=lambda step: "E" not in step["flow"])
    # exps and stores of P wait for no product of this step; dV is issued before dS is there, dQ and dK once it is, and
    # dQ leaves (R) before the next step's scores are issued, and dK waited for under those
    flow = probabilities["flow"]
    assert re.fullmatch(r"E[ESB*\d ]* M\*4 B M\*12 W1 [BS*\d ]*R [BS*\d ]*R M\*16 W1 B W0", flow), flow
    # dS is stored under dV, and dQ leaves before the last wait, that for dK
    flow = gradient["flow"]
    assert re.fullmatch(r"M\*16 W0 B M\*4 S\*4 B\*2 M\*12 W1 [BS*\d ]*R [BS*\d ]*R W0 B", flow), flow
    assert probabilities["prmt"] == 0, "16-bit operands are packed again in every step"
    assert gradient["prmt"] <= 16, "one unpacks two numbers of P, 32 a thread"


def test_tables_of_a_mask() -> None:
    # rows 0..5 of 6 see [0, 2), nothing, nothing, [3, 5), [3, 7), [6, 9)
    lo = torch.tensor([0, 2, 3, 3, 3, 6], dtype=torch.int32)
    hi = torch.tensor([2, 2, 3, 5, 7, 9], dtype=torch.int32)
    visible = Visible(lo, hi)
    bounds = backward_schedule.row_bounds(visible, 4, 9)
    assert bounds.shape == (1, 2, 12)
    mask = visible.mask(9)
    for key in range(12):
        first, stop = bounds[0, :, key].tolist()
        rows = [i for i in range(6) if first <= i < stop]
        assert rows == ([i for i in range(6) if mask[i, key]] if key < 9 else [])
    table = backward_schedule.tile_table(visible, 2, 4, 9)
    tiles = {n: blocks for n, *blocks, _, _, _ in table[0].tolist()}
    assert sorted(tiles) == [0, 1, 2]
    lengths = [end - begin for _, begin, _, _, end, *_ in table[0].tolist()]
    assert lengths == sorted(lengths, reverse=True)
    for n, (begin, full_begin, full_end, end) in tiles.items():
        keys = mask[:, 4 * n : min(4 * n + 4, 9)]
        for block in range(3):
            rows = keys[2 * block : 2 * block + 2]
            assert begin <= block < end or not rows.any()
            if full_begin <= block < full_end:
                assert rows.all()
                assert 4 * n + 4 <= 9, "blocks of a tile that reaches past Sk are all masked"


@pytest.mark.parametrize(
    ("heads", "masked", "wave"), [(16, False, 1), (16, True, 2), (3, True, 1)], ids=["full", "masked", "odd heads"]
)
def test_heads_take_turns_where_lengths_differ(heads: int, masked: bool, wave: int) -> None:
    assert backward_schedule.heads_per_wave(heads, 1, 16384, 128, masked=masked) == wave
