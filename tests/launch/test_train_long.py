"""examples/train_long.py: the same curve however many ranks share a sequence, killed and resumed; its benchmark."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = "--device cpu --steps 6 --seqlen 200 --hidden 32 --layers 1 --heads 2 --kv-heads 1 --warmup 2"
TINY += " --save-every 2 --lr 0.01"
LONG = 500.0  # seconds that imports may take on a busy machine
CLOSE = 1e-5  # relative, of losses in fp32; 1.1e-7 measured


def script(path: str) -> Any:
    """A script of this repository as a module."""
    name = Path(path).stem
    if name not in sys.modules or not str(sys.modules[name].__file__).endswith(path):
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def train(rank: int, size: int, options: str, die_after: int = 0) -> list[float]:
    """The losses of a run in this world; killed after some step, where that is asked for."""
    job = script("examples/train_long.py")
    args = job.parser().parse_args(options.split())

    def tell(step: int, loss: float) -> None:
        if step == die_after:
            raise KeyboardInterrupt

    try:
        losses: list[float] = job.train(args, torch.device("cpu"), tell)
    except KeyboardInterrupt:
        return []
    return losses


def refused(rank: int, size: int, options: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        train(rank, size, options)


def lagging(rank: int, size: int, options: str) -> list[float]:
    """Train where the folder does not show the newest checkpoint to rank 1 yet."""
    found = Path.glob

    def glob(self: Path, pattern: str) -> list[Path]:
        return [path for path in found(self, pattern) if path.name != "step-000004"]

    with patch.object(Path, "glob", glob) if rank == 1 else nullcontext():
        return train(rank, size, options)


@pytest.fixture
def curve(world: Any, tmp_path: Path) -> list[float]:
    """What two ranks that share a sequence make of it."""
    losses: list[float] = world(2)(train, f"{TINY} --batch 2 --out {tmp_path}/two", timeout=LONG)[0]
    return losses


@pytest.mark.parametrize(("ranks", "cp"), [(1, 1), (4, 4), (4, 2), (3, 3)])
def test_the_same_curve(world: Any, tmp_path: Path, curve: list[float], ranks: int, cp: int) -> None:
    assert len(curve) == 6
    assert curve[-1] < curve[0] - 0.05  # it learns
    for losses in world(ranks)(train, f"{TINY} --batch 2 --cp {cp} --out {tmp_path}/other", timeout=LONG):
        assert losses == pytest.approx(curve, rel=CLOSE)


def test_killed_and_resumed(world: Any, tmp_path: Path, curve: list[float]) -> None:
    """Step 5 is lost with the run that made it; the next one goes on after 4, on another number of ranks."""
    options = f"{TINY} --batch 2 --out {tmp_path}/killed"
    assert world(2)(train, options, 5) == [[], []]
    folder = tmp_path / "killed"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert len((folder / "curve.jsonl").read_text().splitlines()) == 5
    (folder / "checkpoints" / "step-000006.partial").mkdir()  # of a run killed while it saved
    assert world(4)(train, options, timeout=LONG)[0] == pytest.approx(curve, rel=CLOSE)
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == pytest.approx(curve, rel=CLOSE)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert (folder / "curve.png").stat().st_size > 1000
    # all steps are done: nothing to train, the curve is there
    assert world(2)(train, options)[1] == pytest.approx(curve, rel=CLOSE)
    world(2)(refused, options + " --lr 5", "--lr: wanted 0.01, as in the run")
    world(2)(refused, options + f" --report {tmp_path}/none", "--report: wanted steps to time")
    unsaid = f"{TINY} --save-every 0 --out {tmp_path}/unsaid"  # --batch is one a dp rank
    world(2)(train, unsaid + " --cp 1", 1)
    world(2)(refused, unsaid + " --cp 2", "--batch: wanted 2, as in the run")
    assert len(world(2)(train, options + " --lr 0.005 --steps 2 --fresh")[0]) == 2


def test_rank_0_says_where_to_go_on(world: Any, tmp_path: Path, curve: list[float]) -> None:
    options = f"{TINY} --batch 2 --out {tmp_path}/lagging"
    world(2)(train, options, 5)
    assert world(2)(lagging, options, timeout=LONG) == [pytest.approx(curve, rel=CLOSE)] * 2


def test_as_a_job(world: Any, environment: dict[str, str], tmp_path: Path, curve: list[float]) -> None:
    """launch/torchrun.sh goes on with what another run has left."""
    options = [*TINY.split(), "--batch", "2", "--out", str(tmp_path / "job")]
    world(2)(train, " ".join(options), 5)
    command = ["launch/torchrun.sh", "--nproc", "2", "examples/train_long.py", *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["[5/6]", "[6/6]"]
    lines = (tmp_path / "job" / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(curve, rel=CLOSE)


def test_refusals(world: Any, tmp_path: Path) -> None:
    options = f"{TINY} --out {tmp_path}/none"
    world(2)(refused, options + " --peer torch --document 0", "--peer: wanted CUDA")
    world(3)(refused, options + " --cp 2", "--cp: wanted a divisor of the 3 ranks, got 2")
    world(4)(refused, options + " --cp 2 --batch 3", "--batch: wanted a multiple of the 2 dp ranks, got 3")
    world(2)(refused, options + " --cp 0", "--cp: wanted a divisor of the 2 ranks, got 0")
    world(2)(refused, options + " --batch 0", "--batch: wanted a multiple of the 1 dp ranks, got 0")
    world(2)(refused, options + " --keep 0", "--keep: wanted at least 1")
    job = script("examples/train_long.py")
    for wrong in ("--peer torch", "--peer torch --document 0 --seqlen 1026"):
        with pytest.raises(ValueError, match="--peer: wanted --document 0"):
            job.check_peer(job.parser().parse_args(wrong.split()), torch.device("cuda"), 2)


def test_the_benchmark_writes_its_results(tmp_path: Path) -> None:
    """With runs that are made up: what the files say of them."""
    bench = script("launch/bench/training.py")
    asked = []

    def run(command: Sequence[str], limit: float) -> tuple[int, str]:
        options = dict(pairwise(command))
        peer = options.get("--peer", "ringfa3")
        asked.append(peer)
        if peer == "torch-cudnn":
            return 1, "noise\ntrain_long.py: --peer: wanted CUDA\nmore"
        speed, peak = {"ringfa3": (1200.0, 3 << 30), "torch": (1000.0, 4 << 30)}[peer]
        folder = Path(options["--out"])
        found = {"tokens_per_second": speed, "spread": 10.0, "peak_bytes": peak, "steps": 6, "ranks": 2}
        (folder / "report.json").write_text(json.dumps(found))
        (folder / "curve.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n')
        return 0, ""

    options = ["--device", "cpu", "--seqlen", "2K", "--peers", "torch,torch-cudnn", "--out", str(tmp_path)]
    assert bench.main(options, run) == 0
    assert asked == ["ringfa3", "torch", "torch-cudnn", "torch", "ringfa3"]  # what is missing is not tried again
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    case = "train causal D128 H16:4 S2K W2 fp32 hidden2048 layers16"
    missing = "torch-cudnn (missing: train_long.py: --peer: wanted CUDA)"
    assert rows == [
        {"case": case, "metric": "tokens/s", "ours": 1200, "spread": 0, "peer": "torch", "theirs": 1000, "ratio": 1.2},
        {"case": case, "metric": "GiB", "ours": 3, "spread": 0, "peer": "torch", "theirs": 4, "ratio": 1.333},
        {"case": case, "metric": "tokens/s", "ours": 1200, "spread": 0, "peer": missing, "theirs": None, "ratio": None},
        {"case": case, "metric": "GiB", "ours": 3, "spread": 0, "peer": missing, "theirs": None, "ratio": None},
    ]
    assert "| 1.2 |" in (tmp_path / "training.md").read_text()
    assert (tmp_path / "training.png").stat().st_size > 1000
    assert bench.main([*options, "--rounds", "1"], lambda *_: (1, "boom")) == 1
