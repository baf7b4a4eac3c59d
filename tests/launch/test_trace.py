"""ringfa3 trace: one valid trace of all ranks, clocks brought together, and what the summary adds up."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ringfa3_launch.cli import main
from ringfa3_launch.perfetto import COPIES, FIRST, HOPS, intersection, merge, shares, union, write
from ringfa3_launch.recording import CALL, CLOCK, Recording, compare_clocks, exchange

ROOT = Path(__file__).parents[2]
AHEAD = 5_000_000_000  # ns by which a pretended machine's clock is ahead


def check(trace: dict[str, Any], ranks: int) -> None:
    """What ui.perfetto.dev asks of a trace in the JSON format, and we of its rows."""
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} <= set("XMstf")
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert [names[rank].split(" (")[0] for rank in range(ranks)] == [f"rank {rank}" for rank in range(ranks)]
    rows = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    by_row: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            continue
        assert (event["pid"], event["tid"]) in rows, "every row has a name"
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            by_row.setdefault((event["pid"], event["tid"]), []).append((event["ts"], -event["dur"]))
    assert min(event["ts"] for event in events if event["ph"] == "X") < 1e5
    for (_, tid), spans in by_row.items():  # within a row ranges nest, or follow each other
        open_: list[float] = []
        for start, minus in sorted(spans):
            while open_ and open_[-1] <= start + 0.002:
                open_.pop()
            assert not open_ or start - minus <= open_[-1] + 0.002
            assert tid >= FIRST or not open_, "hops and copies do not nest"
            open_.append(start - minus)
    ends: dict[int, set[int]] = {}
    for event in events:
        if event["ph"] in "stf":
            ends.setdefault(event["id"], set()).add(event["pid"])
    assert all(len(processes) == 1 for processes in ends.values()), "arrows stay within a rank"


def test_two_ranks_forward_and_backward(tmp_path: Path, environment: dict[str, str]) -> None:
    out = tmp_path / "trace.json.gz"
    options = [
        "--ranks=2",
        "--seqlen=512",
        "--heads=2:1",
        "--head-dim=32",
        "--device=cpu",
        "--transport=ring",
        "--backward",
    ]
    command = [sys.executable, "-m", "ringfa3_launch", "trace", *options, "--calls=2", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "fwd+bwd causal D32 H2:1 S512 W2 fp32, zigzag, transport ring" in done.stdout
    assert "share its clock" in done.stdout
    assert "ui.perfetto.dev" in done.stdout
    trace = json.loads(gzip.decompress(out.read_bytes()))
    check(trace, 2)
    for rank in range(2):
        own = sorted((e for e in trace["traceEvents"] if e["pid"] == rank and e["ph"] == "X"), key=lambda e: e["ts"])
        hops = [event["name"] for event in own if event["tid"] == HOPS]
        sources = (rank, 1 - rank)
        names = [
            f"{way} hop {i + 1} of 2, keys of rank {s}"
            for way in ("forward", "backward")
            for i, s in enumerate(sources)
        ]
        assert hops == 2 * names
        copies = [event["name"] for event in own if COPIES <= event["tid"] < FIRST]
        assert "receive, beside forward hop 1 of 2" in copies
        assert not any("barrier" in name for name in copies)
        assert sum(event["name"].startswith(CALL) for event in own) == 2
        assert any(event["name"].startswith("aten::") for event in own)
    calls = [e for e in trace["traceEvents"] if e["name"] == f"{CALL} 1"]
    assert abs(calls[0]["ts"] - calls[1]["ts"]) < 5e5, "one clock: both ranks began the call after one barrier"
    for share in shares(trace):
        assert share.hops == 8
        assert 0 < share.compute < share.total
        assert share.total == pytest.approx(share.compute + share.gaps)
        assert 0 < share.longest <= share.gaps
        assert 0 <= share.both <= min(share.copy, share.compute)


def test_json_and_a_world_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one.json"
    assert (
        main(["trace", "--ranks=1", "--seqlen=64", "--head-dim=16", "--device=cpu", "--json", "--out", str(out)]) == 0
    )
    found = json.loads(capfd.readouterr().out)
    check(json.loads(out.read_text()), 1)
    assert found["trace"] == str(out)
    assert found["ranks"][0]["hops"] == 1
    assert found["ranks"][0]["overlap"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--heads", "3:2"), "--heads: wanted Q:KV with Q a multiple of KV"),
        (("--ranks", "-1"), "--ranks: wanted 1 or more, got -1"),
        (("--calls", "0"), "--calls: wanted 1 or more, got 0"),
        (("--seqlen", "many"), "--seqlen: wanted a number of tokens"),
        (("--out", "/nowhere/x.json"), "--out: wanted a file in a folder that exists"),
        (("--transport", "pigeon", "--ranks", "1"), "pigeon"),
    ],
)
def test_wrong_options_are_named(options: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--device", "cpu", "--seqlen", "64", *options]) == 2
    assert message in capfd.readouterr().err


def gpu_recording(rank: int, ahead: int = 0) -> Recording:
    """A profile as a GPU's: kernels and copies launched by two hops, at made-up times (us after the mark)."""
    mark = 4e12 + 1000 * rank

    def x(name: str, cat: str, ts: float, dur: float, pid: Any = 7, tid: Any = 7, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": cat, "ts": mark + ts, "dur": dur, "pid": pid, "tid": tid, "args": args}

    hops = [f"ringfa3 forward hop {i} of 2, keys of rank {s}" for i, s in ((1, rank), (2, 1 - rank))]
    events = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 20, "args": {"name": "stream 20 "}},
        x(CLOCK, "user_annotation", -50, 9),
        x(CLOCK, "user_annotation", 0, 1),
        x(f"{CALL} 1", "user_annotation", 10, 40),
        x("aten::early", "cpu_op", 5, 1),
        x("cudaLaunchKernel", "cuda_runtime", 12, 1, correlation=1),
        x("ncclDevKernel_SendRecv", "kernel", 20, 60, 0, 21, correlation=1),
        x(hops[0], "user_annotation", 15, 5),
        x("cudaLaunchKernel", "cuda_runtime", 16, 1, correlation=2),
        x("attend", "kernel", 30, 70, 0, 20, correlation=2),
        x(hops[1], "user_annotation", 25, 5),
        x("cudaLaunchKernel", "cuda_runtime", 26, 1, correlation=3),
        x("attend", "kernel", 110, 50, 0, 20, correlation=3),
        x("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 100, 5, 0, 20, correlation=4, bytes=8),
        x("Memcpy PtoP (Device -> Device)", "gpu_memcpy", 70, 20, 0, 22, correlation=5, bytes=4096),
        x("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 150, 20, 0, 22, correlation=6, bytes=4096),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 2, "pid": 7, "tid": 7, "ts": mark + 16},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 2, "pid": 0, "tid": 20, "ts": mark + 30, "bp": "e"},
        {"ph": "i", "name": "Record Window End", "pid": "", "tid": "", "ts": mark},
        x("PyTorch Profiler (0)", "Trace", -90, 900, "Spans", "PyTorch Profiler"),
    ]  # fmt: skip
    read = 1_795_000_000_000_000_000 + ahead
    return Recording(rank, f"host{rank}", read, ahead, 7000 if ahead else 0, {"traceEvents": events})


def test_kernels_find_their_hops_and_copies_their_rows(tmp_path: Path) -> None:
    trace = merge([gpu_recording(0), gpu_recording(1, AHEAD)], "two GPUs")
    check(trace, 2)
    own = [event for event in trace["traceEvents"] if event["pid"] == 1 and event["ph"] == "X"]
    hops = [(e["name"], e["dur"], e["args"]["where"]) for e in own if e["tid"] == HOPS]
    assert hops == [
        ("forward hop 1 of 2, keys of rank 1", 70, "GPU"),
        ("forward hop 2 of 2, keys of rank 0", 50, "GPU"),
    ]
    copies = [(e["name"], e["dur"]) for e in own if COPIES <= e["tid"] < FIRST]
    assert copies == [
        ("NCCL messages, beside forward hop 1 of 2", 60),
        ("copy from a peer, beside forward hop 1 of 2", 20),
        ("copy from a peer, beside forward hop 2 of 2", 20),
    ]
    assert {e["args"].get("hop") for e in own if e["name"] == "attend"} == {
        "ringfa3 forward hop 1 of 2, keys of rank 1",
        "ringfa3 forward hop 2 of 2, keys of rank 0",
    }
    assert not any(e["name"] in ("aten::early", CLOCK, "PyTorch Profiler (0)") for e in own)
    # one moment on both machines' clocks, whatever they show and wherever the profilers begin to count
    starts = [[e["ts"] for e in trace["traceEvents"] if e["pid"] == r and e["ph"] == "X"] for r in (0, 1)]
    assert starts[0] == pytest.approx(starts[1], abs=0.01)
    assert trace["otherData"]["clocks"].endswith("known to 7 us")
    assert len({e["id"] for e in trace["traceEvents"] if e["ph"] == "s"}) == 2, "arrows of two ranks do not meet"

    for share in shares(trace):  # kernels 30-100, 110-160, local copy 100-105; copies 20-90, 150-170
        figures = (share.total, share.compute, share.copy, share.both, share.gaps, share.longest)
        assert figures == pytest.approx((0.150, 0.125, 0.090, 0.070, 0.025, 0.010))
        assert share.overlap == pytest.approx(7 / 9)

    write(trace, tmp_path / "a.json")
    write(trace, tmp_path / "a.json.gz")
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(
        gzip.decompress((tmp_path / "a.json.gz").read_bytes())
    )


def test_a_profile_without_its_mark_is_refused() -> None:
    empty = Recording(1, "here", 0, 0, 0, {"traceEvents": []})
    with pytest.raises(ValueError, match="profile of rank 1: wanted the range"):
        merge([empty], "")


def clocks_of(rank: int, world: int) -> tuple[tuple[int, int], list[bytes]]:
    """What a rank finds out where the last one is on a machine of its own, whose clock is ahead."""
    far = rank == world - 1
    found = compare_clocks(None, "far" if far else "near", lambda: time.time_ns() + (AHEAD if far else 0))
    return found, exchange(b"x" * rank, dist.group.WORLD)


def test_clocks_are_compared_between_machines(world: Any) -> None:
    results = world(3)(clocks_of)
    (first, _), (second, data), (third, _) = results
    assert first == second == (0, 0)
    ahead, error = third
    assert 0 < error < 5e8
    assert abs(ahead - AHEAD) <= error
    assert data == [b"", b"x", b"xx"]


def test_unions() -> None:
    spans = union([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (2.0, 2.5)])
    assert spans == [(0.0, 2.5), (3.0, 4.0)]
    assert intersection(spans, [(1.0, 3.5), (3.75, 9.0)]) == [(1.0, 2.5), (3.0, 3.5), (3.75, 4.0)]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
