"""launch/bench/scaling.py: its cases for 2, 4 and 8 ranks, a dry run on two CPU ranks out of time, and its engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ringfa3_launch.bench.case import RING_PEERS, Case
from ringfa3_launch.bench.match import Match

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "bench" / "scaling.py"
K, M = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matches(scaling: ModuleType, world: int) -> list[Match]:
    case = Case("fwd", "causal", 128, 32, 8, K, world, "bf16")
    transports = scaling.default_transports(world)
    found: list[Match] = scaling.plan_of(case, transports, RING_PEERS, unit=K, rounds=3.0, impl="auto")
    return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_what_is_judged_comes_first(scaling: ModuleType, world: int) -> None:
    found = matches(scaling, world)
    assert len({match.name for match in found}) == len(found)
    order = {(m.case.world, m.case.direction, m.case.mask, m.case.seqlen): i for i, m in enumerate(found)}
    second = 256 * K if world == 8 else 16 * K
    judged = [(world, "fwd", "causal", 64 * K), (world, "fwd", "causal", second), (world, "fwd+bwd", "causal", 64 * K)]
    assert [order[key] for key in judged] == [0, 1, 2]
    assert order[world, "fwd", "packed", 64 * K] == 3
    assert {(world, d, mask) for d in ("fwd", "fwd+bwd") for mask in ("packed", "window=4096")} < {
        key[:3] for key in order
    }
    assert set(RING_PEERS) < {entry.name for entry in found[0].entries}
    names = {entry.transport for entry in found[0].entries if entry.method == "ours"}
    wanted = {"pull", "ring", "gather", "ulysses", f"hierarchical:{world // 2}"}
    assert wanted <= names
    assert {name for name in names if "mesh" in name} == {4: {"mesh:2x2"}, 8: {"mesh:2x4", "mesh:4x2"}}.get(
        world, set()
    )
    longest = max(m.case.seqlen for m in found if m.case.direction == "fwd+bwd")
    assert longest == (2 * M if world == 8 else M)
    if world == 8:  # weak scaling from 2, at 8K and 32K tokens a rank
        assert {(2, "fwd", "causal", 16 * K), (2, "fwd", "causal", 64 * K)} < set(order)


def test_dry_run_stops_when_its_time_is_over(tmp_path: Path, environment: dict[str, str]) -> None:
    options = ["--device=cpu", "--world=2", "--unit=4", "--heads=2:1", "--head-dim=16", "--rounds=1.5", "--engine=0"]
    options += ["--transports=pull,ring", "--peers=none", "--seconds=10", "--out", str(tmp_path)]
    # more rounds than seconds, on however quick a machine: a dozen matches of 1.5 s
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert found["command"].startswith("python scaling.py --device=cpu")
    rows = {(row["case"], row["metric"], row["peer"]): row for row in found["rows"]}
    first = "fwd causal D16 H2:1 S256 W2 fp32"
    for transport in ("pull", "ring"):
        assert rows[f"{first} {transport}", "TFLOP/s", "one GPU"]["ratio"] > 0
        assert rows[f"{first} {transport}", "TFLOP/s", "kernels alone"]["ratio"] > 0
        error = rows[f"{first} {transport}", "relative error", "plain attention"]
        assert 0 < error["ours"] <= 2 * error["theirs"] + 1e-6
    skipped = "\n".join(found["skipped"])
    assert "s left" in skipped, "it had more to do than time"
    assert "decode merge latency: --engine 0" in skipped
    assert (tmp_path / "scaling.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "skipped: " in done.stdout
    assert not list(tmp_path.glob("*.part"))


def test_the_engines_rows_are_in_the_document(tmp_path: Path, environment: dict[str, str]) -> None:
    """No time for a match: the engine alone."""
    options = ["--device=cpu", "--world=2", "--unit=1", "--peers=none", "--seconds=1", "--engine=1"]
    command = [sys.executable, str(SCRIPT), *options, "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert {row["metric"] for row in found["rows"]} > {"s to first token", "µs per layer"}, done.stderr
    assert all(row["ours"] > 0 for row in found["rows"])
    assert "[scaling_inference.md](scaling_inference.md)" in (tmp_path / "scaling.md").read_text()
    assert done.returncode == 1, "none of ours ran"


def test_wrong_options_are_named(environment: dict[str, str]) -> None:
    command = [sys.executable, str(SCRIPT), "--device=cpu", "--world=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode != 0
    assert "--world: wanted 2, the ranks there are, got 1" in done.stderr
