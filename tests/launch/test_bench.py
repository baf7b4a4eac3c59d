"""ringfa3 bench attention: a tiny sweep on CPU ranks, its three files, and what figures are made of."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ringfa3_launch.bench import report, timing
from ringfa3_launch.bench.case import Case, document_lengths, format_size, parse_mask, parse_size
from ringfa3_launch.bench.sweep import Result
from ringfa3_launch.bench.timing import Clock, Contestant, Memory, Timing

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
        assert rows[name, "GiB", "none"]["ours"] > 1024 * 64 * 4 * 4 / int(name[-6]) / 2**30  # q, k, v and out at least
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
