"""ringfa3 bench: tiny runs of attention and ring on CPU ranks, their three files, and what figures are made of."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ringfa3_launch.bench import kernels, report, ring_plot, ring_report, timing
from ringfa3_launch.bench.case import Case, document_lengths, format_size, packed_lengths, parse_mask, parse_size
from ringfa3_launch.bench.guard import Guard
from ringfa3_launch.bench.match import HOPS, OURS, Entry, Match, Outcome
from ringfa3_launch.bench.ours import parse_mesh
from ringfa3_launch.bench.program import estimate
from ringfa3_launch.bench.ring_matches import CAUSAL, KERNELS, ONE_GPU, beside_causal, duel
from ringfa3_launch.bench.shard import Shard
from ringfa3_launch.bench.sweep import Result
from ringfa3_launch.bench.timing import Clock, Contestant, Memory, Timing
from ringfa3_launch.bench.verdicts import declared, judge

ROOT = Path(__file__).parents[2]
SLACK = 2 << 20  # the kernel counts resident pages a batch at a time
KEYS = {"case", "metric", "ours", "spread", "peer", "theirs", "ratio"}


def case(direction: str = "fwd", mask: str = "causal", seqlen: int = 1024, world: int = 1) -> Case:
    return Case(direction, mask, 64, 2, 1, seqlen, world, "fp32")


def test_tiny_sweep_writes_the_three_files(tmp_path: Path, environment: dict[str, str]) -> None:
    options = ["--seqlens=1K", "--worlds=1,2", "--heads=2:1", "--head-dim=64", "--dtype=fp32", "--seconds=0.2"]
    command = [
        sys.executable,
        "-m",
        "ringfa3_launch",
        "bench",
        "attention",
        *options,
        "--name=tiny",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.md", "tiny.png"]

    found = json.loads((tmp_path / "tiny.json").read_text())
    assert set(found) == {"command", "date", "commit", "device", "versions", "rows"}
    assert found["command"].startswith("ringfa3 bench attention --seqlens=1K")
    assert found["device"].startswith("2 CPU ranks on ")
    assert {"python", "torch"} <= set(found["versions"])
    assert all(set(row) == KEYS for row in found["rows"])
    names = [f"{d} causal D64 H2:1 S1K W{w} fp32" for w in (1, 2) for d in ("fwd", "fwd+bwd")]
    assert list(dict.fromkeys(row["case"] for row in found["rows"])) == names

    rows = {(row["case"], row["metric"], row["peer"]): row for row in found["rows"]}
    for name in names:
        assert rows[name, "TFLOP/s", "matrix product"]["ours"] > 0
        error = rows[name, "relative error", "plain attention"]
        assert 0 < error["ours"] <= 2 * error["theirs"] + 1e-6
        held = 1024 * 64 * 4 * (6 if name.startswith("fwd+bwd") else 4)  # q, k, v; dout. A call may reuse what is free
        assert rows[name, "GiB", "none"]["ours"] >= 0.999 * held / int(name[-6]) / 2**30
    for name in names[:2]:
        assert rows[name, "TFLOP/s", "sdpa-math"]["ratio"] > 0
        assert rows[name, "TFLOP/s", "sdpa-flash"]["ratio"] > 0
    assert rows[names[2], "TFLOP/s", "ours on W1"]["theirs"] == rows[names[0], "TFLOP/s", "sdpa-math"]["ours"]
    missing = {row["peer"] for row in found["rows"] if row["theirs"] is None}
    assert any(peer.startswith("sdpa-cudnn (missing: cuDNN needs") for peer in missing)
    assert any(peer.startswith("context-parallel (missing: ") for peer in missing)

    assert "missing: fa3: flash_attn_interface cannot be imported" in done.stdout
    text = (tmp_path / "tiny.md").read_text()
    assert "| 1K | 2 | fwd+bwd |" in text
    assert "(tiny.png)" in text
    assert (tmp_path / "tiny.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_rows_compare_what_they_say() -> None:
    timings = {"ours": Timing((1.0, 2.0, 4.0)), "sdpa-flash": Timing((4.0,)), "gemm": Timing((1.0,))}
    one = Result(case(), "cpu", timings, 1e12, {"fa3": "not there"}, {"ours": 2**30}, {"ours": 2e-3, "plain": 3e-3})
    two = Result(case(world=2), "cpu", {"ours": Timing((2.0,)), "gemm": Timing((1.0,))}, 1e12, {}, {}, {})
    rows = {(row["case"], row["metric"], row["peer"]): row for row in report.rows([one, two], peak=None)}
    rate = one.case.flops / 2.0 / 1e12
    flash = rows[one.case.name, "TFLOP/s", "sdpa-flash"]
    assert flash["ours"] == pytest.approx(rate, rel=1e-3)
    assert flash["ratio"] == 2.0  # ours takes half the time
    assert rows[one.case.name, "TFLOP/s", "fa3 (missing: not there)"]["theirs"] is None
    assert rows[one.case.name, "TFLOP/s", "matrix product"]["theirs"] == 1.0
    assert rows[one.case.name, "relative error", "plain attention"]["ratio"] == 1.5
    assert rows[two.case.name, "TFLOP/s", "ours on W1"]["ratio"] == 0.5  # as long, with two ranks: half as efficient


def test_failure_of_ours_is_shown() -> None:
    failed = Result(case(), "cpu", {"gemm": Timing((1.0,))}, 1e12, {}, {}, {}, failure="Unsupported: softcap")
    assert any("ours failed: Unsupported: softcap" in row["peer"] for row in report.rows([failed], peak=None))
    assert report.missing([failed]) == ["ours FAILED: Unsupported: softcap (fwd S1K W1)"]
    assert report.table([failed])[1][0][3] == "failed"


def test_dense_peak() -> None:
    assert report.dense_peak("NVIDIA H200", "bf16") == 989.4
    assert report.dense_peak("NVIDIA H100 PCIe", "fp16") == 756.0
    assert report.dense_peak("NVIDIA H100 80GB HBM3", "bf16") == 989.4
    assert report.dense_peak("NVIDIA A100-SXM4-80GB", "bf16") == 312.0
    assert report.dense_peak("AMD EPYC", "fp32") is None


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [("full", 1024**2), ("causal", 1024 * 1025 // 2), ("window=2", 2 * 1024 - 1), ("documents=1", 1024 * 1025 // 2)],
)
def test_flops_count_visible_pairs(mask: str, pairs: int) -> None:
    assert case(mask=mask).flops == 4 * pairs * 2 * 64
    assert case("fwd+bwd", mask).flops == 3.5 * 4 * pairs * 2 * 64


def test_names_and_sizes() -> None:
    assert case("fwd+bwd", "window=4096", 1 << 20, 8).name == "fwd+bwd window4K D64 H2:1 S1M W8 fp32"
    assert [parse_size(x) for x in ("1K", "3m", "1000")] == [1024, 3 << 20, 1000]
    assert [format_size(x) for x in (1024, 3 << 20, 1000, 1536)] == ["1K", "3M", "1000", "1536"]
    assert parse_mask("window=4K") == "window=4096"
    lengths = document_lengths(4096, 16)
    assert (len(lengths), sum(lengths)) == (16, 4096)
    assert len(set(lengths)) > 8, "uneven"


def test_interleaved_times_everyone_in_turn() -> None:
    calls: list[str] = []
    slow = Contestant("slow", lambda: (calls.append("s"), time.sleep(0.03)))
    quick = Contestant("quick", lambda: calls.append("q"))
    found = Clock(torch.device("cpu"), None).interleaved([slow, quick], seconds=0.3)
    assert len(found["slow"].seconds) == len(found["quick"].seconds)
    assert 3 <= len(found["slow"].seconds) <= timing.MOST_ROUNDS
    assert found["slow"].median >= 0.03 > 10 * found["quick"].median
    turns = "".join(name for name, _ in itertools.groupby(calls))
    assert turns.count("s") >= 3, "a round of one, a round of the other"


def test_quantiles() -> None:
    timed = Timing((4.0, 1.0, 2.0))
    assert timed.median == 2.0
    assert timed.quantile(0.25) == 1.5
    assert timed.quantile(1.0) == 4.0


@pytest.mark.skipif(sys.platform != "linux", reason="resets the high-water mark of a Linux process")
def test_memory_sees_what_a_call_takes_and_frees() -> None:
    size = 64 << 20

    def call() -> int:
        return torch.ones(size, dtype=torch.uint8).numel()

    memory = Memory(torch.device("cpu"))
    result, most, added = memory.peak(call)
    assert result == size
    assert most is not None
    assert added is not None
    assert size - SLACK <= added < 2 * size
    kept = torch.ones(size, dtype=torch.uint8)
    _, most, added = memory.peak(call)
    assert most is not None
    assert added is not None
    assert size - SLACK <= added < 2 * size
    assert most >= added + kept.numel() - SLACK, "in all, what was held before counts too"


def test_sample_is_exact() -> None:
    """The rows' exact values are attention's, out and dq, against torch's own in fp64."""
    from ringfa3_launch.bench.accuracy import Sample
    from ringfa3_launch.bench.peers import Inputs

    shape = Case("fwd+bwd", "window=20", 16, 4, 2, 96, 1, "fp32")
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 96, heads, 16) for heads in (4, 2, 2, 4))
    sample = Sample(shape, torch.arange(96), Inputs(q, k, v, dout), lambda: (k, v))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    mask = torch.from_numpy(np.tril(np.ones((96, 96), bool)) & ~np.tril(np.ones((96, 96), bool), -20))
    native = [x.transpose(1, 2) for x in wide]
    out = torch.nn.functional.scaled_dot_product_attention(*native, mask, enable_gqa=True).transpose(1, 2)
    dq = torch.autograd.grad(out, wide[0], dout.double())[0]
    torch.testing.assert_close(sample.exact, (out.detach()[:, sample.rows], dq[:, sample.rows]))
    sums = sample.squares(sample.take((out.detach(), dq)))
    assert float((sums[:, 0] / sums[:, 1]).max()) < 1e-28
    assert sample.rows[0] == 0
    assert sample.rows[-1] == 95


FAKE = """
import torch
import torch.distributed as dist

def zigzag_ring_flash_attn_func(q, k, v, causal, group):
    if dist.get_rank(group) == 1:
        raise RuntimeError("out of luck")
    dist.recv(torch.zeros(1), group_src=1, group=group)  # for ever

def stripe_flash_attn_func(q, k, v, causal, group):
    return 2 * q
"""


def test_ring_takes_itself_apart_whatever_its_peers_do(tmp_path: Path, environment: dict[str, str]) -> None:
    """One peer hangs on one rank, another computes nonsense, a mesh has too many ranks: all of it is said."""
    fake = tmp_path / "lib" / "ring_flash_attn"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(FAKE)
    environment["PYTHONPATH"] += os.pathsep + str(fake.parent)
    options = ["--device=cpu", "--seqlens=512", "--heads=2:1", "--head-dim=32", "--dtype=bf16", "--seconds=0.1"]
    options += ["--transports=ring,mesh:2x1,mesh:1x3", "--peers=ring-flash-attn-zigzag,ring-flash-attn-stripe"]
    options += ["--directions=fwd", "--packed=512", "--window=none", "--long=1K", "--limit=8", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "ringfa3_launch", "bench", "ring", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "ring.json").read_text())
    assert found["command"].startswith("ringfa3 bench ring --device=cpu")
    assert found["device"].startswith("2 CPU ranks on ")
    assert all(set(row) == KEYS for row in found["rows"])

    plain = "fwd causal D32 H2:1 S512 W2 bf16"
    rows = {(row["case"], row["metric"], row["peer"]): row for row in found["rows"]}
    for transport in ("ring", "mesh:2x1"):
        for part in ("kernels alone", "one launch", "one GPU"):
            row = rows[f"{plain} {transport}", "TFLOP/s", part]
            assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"], rel=2e-3)
        error = rows[f"{plain} {transport}", "relative error", "plain attention"]
        assert 0 < error["ours"] <= 2 * error["theirs"]
    long = rows["fwd+bwd causal D32 H2:1 S1K W2 bf16 one call ring", "TFLOP/s", "none"]
    assert long["ours"] > 0
    assert [v["ok"] for v in found["verdicts"] if v["what"].startswith("one call ran")] == [True]
    assert set(found["rounds"][plain]) == {"ring", "mesh:2x1", "kernels alone", "one launch", "one GPU"}
    for entry in found["rounds"][plain].values():
        assert min(entry["ms"]) <= entry["median_ms"] <= max(entry["ms"])
        assert len(entry["ms"]) >= 2
    missing = "\n".join(found["missing"])
    assert "ring-flash-attn-zigzag: RuntimeError: out of luck (on rank 1)" in missing
    assert "ring-flash-attn-stripe: computes something else here" in missing
    assert "mesh:1x3: a mesh of 1 x 3 is not one of all 2 ranks" in missing
    same = [v for v in found["verdicts"] if v["what"].startswith("largest error over one GPU's")]
    assert [v["ok"] for v in same] == [True]
    text = (tmp_path / "ring.md").read_text()
    assert "| ring | " in text
    assert "mesh:1x3" in text
    assert (tmp_path / "ring.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_ring_that_hangs_is_given_up(tmp_path: Path, environment: dict[str, str]) -> None:
    """Nothing returns within no time: the run ends, says so and leaves what it has."""
    options = ["--device=cpu", "--seqlens=512", "--heads=2:1", "--head-dim=32", "--packed=none", "--window=none"]
    options += ["--transports=ring", "--peers=none", "--limit=0.0001", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "ringfa3_launch", "bench", "ring", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert "ringfa3: a call hangs: ring: did not return within 0 s; what was measured before is in" in done.stderr
    assert json.loads((tmp_path / "ring.json").read_text())["rows"] == []


def outcome(shape: Case, seconds: dict[str, float], transports: tuple[str, ...] = ("pull",), **more: object) -> Outcome:
    match = duel(shape, transports, ("yunchang-zigzag",), 1.0)
    if shape.mask != "causal":
        match = beside_causal(shape, transports, ("balanced", "zigzag"), 1.0)
    flops = {entry.name: entry.case.flops / entry.case.world for entry in match.entries}
    timings = {name: Timing((t, t, t)) for name, t in seconds.items()}
    parts: dict[str, dict[str, object]] = {x: {} for x in ("missing", "memory", "outside", "errors", "plain")}
    return Outcome(match, "cuda", timings, flops, **(parts | more))  # type: ignore[arg-type]


def verdicts(*outcomes: Outcome) -> dict[str, bool | None]:
    return {f"{v.what}, {v.who}": v.ok for v in judge(outcomes)}


def test_verdicts_on_the_ring() -> None:
    shape = Case("fwd", "causal", 128, 32, 8, 64 << 10, 2, "bf16")
    well = {"pull": 1.02, KERNELS: 1.0, ONE_GPU: 1.9, "yunchang-zigzag": 1.03}
    errors = {"errors": {"pull": 1.0e-3, ONE_GPU: 1.0e-3}, "plain": {"pull": 2e-3, ONE_GPU: 2e-3}}
    good = verdicts(outcome(shape, well, memory={"pull": int(declared(shape))}, **errors))
    assert good["time over kernels alone, pull"] is True
    assert good["speed over the best peer's, yunchang-zigzag, pull"] is True
    assert good["largest error over one GPU's, same rows, pull"] is True
    assert good["peak memory over tensors and declared buffers, pull"] is True
    errors["errors"]["pull"] = 1.1e-3
    bad = verdicts(outcome(shape, well | {"pull": 1.04}, memory={"pull": int(1.01 * declared(shape))}, **errors))
    assert set(bad.values()) == {False, None}
    assert sum(ok is False for ok in bad.values()) == 4
    assert bad["speed over one GPU's, pull"] is None  # asked of 4 and 8 GPUs
    four = verdicts(outcome(replace(shape, world=4), {"pull": 1.0, ONE_GPU: 3.9}))
    assert four["speed over one GPU's, pull"] is True
    four = verdicts(outcome(replace(shape, world=4), {"pull": 1.0, ONE_GPU: 3.7}))
    assert four["speed over one GPU's, pull"] is False


def test_verdicts_on_partials_masks_and_weak_scaling() -> None:
    shape = Case("fwd", "causal", 128, 32, 8, 16 << 10, 2, "bf16")
    partials = "kernels hop by hop over one launch, kernels alone"
    assert verdicts(outcome(shape, {"pull": 1.0, KERNELS: 1.01, "one launch": 1.0}))[partials] is True
    assert verdicts(outcome(shape, {"pull": 1.0, KERNELS: 1.03, "one launch": 1.0}))[partials] is False
    packed = replace(shape, mask="packed", seqlen=64 << 10)
    share = packed.flops / replace(packed, mask="causal").flops
    what = "TFLOP/s on visible pairs over plain causal's, pull balanced"
    times = {f"{CAUSAL}, pull": 1.0, "pull zigzag": 1.0}
    assert verdicts(outcome(packed, times | {"pull balanced": share / 0.81}))[what] is True
    assert verdicts(outcome(packed, times | {"pull balanced": share / 0.79}))[what] is False
    eight = replace(shape, seqlen=64 << 10, world=8)
    weak = "speed over 2 ranks' at 8K tokens a rank, pull"
    assert verdicts(outcome(shape, {"pull": 1.0}), outcome(eight, {"pull": 4.1}))[weak] is True
    assert verdicts(outcome(shape, {"pull": 1.0}), outcome(eight, {"pull": 4.2}))[weak] is False


@pytest.mark.parametrize(("mine", "plain", "ok"), [(3e-7, 1.4e-7, None), (3e-3, 1.4e-3, False), (2.7e-3, 1.4e-3, True)])
def test_an_error_below_the_floor_is_not_judged(mine: float, plain: float, ok: bool | None) -> None:
    shape = Case("fwd", "causal", 128, 32, 8, 16 << 10, 2, "bf16")
    found = verdicts(outcome(shape, {"pull": 1.0}, errors={"pull": mine}, plain={"pull": plain}))
    assert found["largest error over plain attention's, pull"] is ok


def test_only_what_is_asked_is_in_the_table_of_verdicts() -> None:
    shape = Case("fwd", "causal", 128, 32, 8, 64 << 10, 2, "bf16")
    found = judge([outcome(shape, {"pull": 1.02, KERNELS: 1.0, ONE_GPU: 1.9})])
    assert {v.what for v in found if not v.asked} == {"speed over one GPU's"}
    columns, lines, styles = ring_report.verdict_table(found)
    assert [line[columns.index("figure")] for line in lines] == ["time over kernels alone"]
    assert styles == ["ok"]


def test_a_single_length_is_seen_and_every_line_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(ring_plot.pyplot, "close", drawn.append)
    shape = Case("fwd", "causal", 128, 32, 8, 64 << 10, 2, "bf16")
    times = {"pull": 1.02, "ring": 1.03, "ulysses": 1.1, KERNELS: 1.0, "one launch": 0.99, ONE_GPU: 1.9}
    ring_plot.draw([outcome(shape, times, ("pull", "ring", "ulysses"))], tmp_path / "x.png", "x")
    [figure] = drawn
    speed, overhead, scaling = figure.axes
    assert {line.get_label() for line in speed.lines} == set(times)
    assert all(line.get_marker() not in ("None", "", None) for line in speed.lines)
    styles = [(line.get_color(), line.get_marker()) for line in speed.lines[:3]]
    assert len({colour for colour, _ in styles}) == len({mark for _, mark in styles}) == 3
    dotted = [line.get_label() for line in overhead.lines if line.get_linestyle() == ":"]
    assert dotted == ["asked of 2 GPUs: at most 1.03"]
    assert [list(line.get_xdata()) for line in scaling.lines] == [[1, 2]]  # one GPU, and the two


def test_ring_is_judged_by_its_own_kernels_only() -> None:
    shape = Case("fwd", "causal", 128, 32, 8, 64 << 10, 2, "bf16")
    timed = outcome(shape, {"ulysses": 1.0, "pull": 1.2, KERNELS: 1.0, ONE_GPU: 2.0}, ("ulysses", "pull"))
    assert verdicts(timed)["time over kernels alone, pull"] is False
    lines = {line[0]: line for line in ring_report.table(timed)}
    column = ring_report.COLUMNS.index("time/kernels")
    assert [lines[name][column] for name in ("ulysses", "pull", ONE_GPU)] == ["", "1.200", ""]
    assert lines[KERNELS][ring_report.COLUMNS.index("ours/it")] == "1.000"  # the fastest of ours is ulysses
    left_out = replace(timed, missing={"ulysses": "no"})
    assert ring_report.missing([left_out, left_out]) == [f"ulysses: no ({', '.join(['fwd causal S64K W2'] * 2)})"]


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_kernels_alone_compute_attention(direction: str) -> None:
    """In a world of one the hops are all there is: out and dq are exact; so is one launch."""
    shape = Case(direction, "window=20", 16, 4, 2, 96, 1, "fp32")
    shard = Shard.make(shape, "zigzag", None, torch.device("cpu"), 3)  # type: ignore[arg-type]
    found = shard.sample.take(kernels.hops(shard, shape)())
    torch.testing.assert_close(found, tuple(x.float() for x in shard.sample.exact), rtol=1e-4, atol=1e-5)
    if direction == "fwd":
        once = shard.sample.take(kernels.one_launch(shard, shape)())
        torch.testing.assert_close(once, tuple(x.float() for x in shard.sample.exact), rtol=1e-4, atol=1e-5)


def test_sample_takes_the_rows_it_is_told() -> None:
    shape = Case("fwd", "causal", 16, 2, 1, 64, 1, "fp32")
    shard = Shard.make(shape, "zigzag", None, torch.device("cpu"), 0, torch.tensor([3, 17, 63]))  # type: ignore[arg-type]
    assert shard.sample.rows.tolist() == [3, 17, 63]
    assert shard.sample.visible.hi.tolist() == [4, 18, 64]


def test_guard_leaves_what_hangs() -> None:
    guard = Guard(torch.device("cpu"), None, 0.2)
    assert guard.attempt(lambda: 3).result == 3
    late = guard.attempt(lambda: time.sleep(5))
    assert (late.hung, late.reason) == (True, "did not return within 0 s")
    failed = guard.attempt(lambda: 1 / 0)
    assert (failed.hung, failed.reason) == (False, "ZeroDivisionError: division by zero")


def test_estimate_grows_with_what_is_timed() -> None:
    shape = case(seqlen=1 << 16, world=2)
    entry = Entry("a", OURS, shape)
    one, two = (Match(shape, (entry, Entry("b", HOPS, shape))[:n], 1.0) for n in (1, 2))
    call = shape.flops / 2 / 1e9
    assert estimate(one, 1e9, "cuda") == pytest.approx(4 * call, rel=0.05)  # once, once more, and two rounds
    assert estimate(two, 1e9, "cuda") == pytest.approx(2 * estimate(one, 1e9, "cuda"), rel=0.05)
    assert estimate(replace(one, seconds=0.0), 1e9, "cuda") == pytest.approx(call, rel=0.05)


def test_packed_documents_and_meshes() -> None:
    lengths = packed_lengths(64 << 10, 0)
    assert sum(lengths) == 64 << 10
    assert all(256 <= n <= 32 << 10 for n in lengths[:-1])
    assert packed_lengths(64 << 10, 0) == lengths != packed_lengths(64 << 10, 1)
    assert max(packed_lengths(1024, 0)) <= 512
    assert parse_mask("packed=3") == "packed=3"
    assert case(mask="packed").flops < case().flops
    assert parse_mesh("ring") is None
    assert parse_mesh("mesh:2x4") == (2, 4, "auto")
    assert parse_mesh("mesh:2x4:hierarchical:2") == (2, 4, "hierarchical:2")
    with pytest.raises(ValueError, match="--transports: wanted mesh:UxR"):
        parse_mesh("mesh:2")
