"""ringfa3 plan: tables and timelines, what its options change, and figures measured elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ringfa3.cost import Job, Machine, Way, predict
from ringfa3.mask import Mask
from ringfa3_launch.cli import main
from ringfa3_launch.measured import apply
from ringfa3_launch.timeline import LEGEND, draw, text

H200 = Machine.h200()


def plan(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["plan", *options]) == 0
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(capsys, *options, "--json"))
    return found


def test_tables_and_timeline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    png = tmp_path / "plan.png"
    shown = plan(capsys, "--seqlen", "64K", "--world", "4", "--png", str(png), "--rank", "2")
    assert "forward, causal, 64K tokens, 32:8 heads of 128, bf16, 4 GPUs" in shown
    assert any(line.split()[:2] == ["pull", "zigzag,"] for line in shown.splitlines())
    assert "hops of pull, zigzag" in shown
    hops = [line.split() for line in shown.splitlines() if line.startswith(" 2 fwd")]
    assert [row[2:4] for row in hops] == [["itself", "134.2"], ["rank", "1"], ["rank", "0"], ["rank", "3"]]
    assert "rank 3 " in shown
    assert LEGEND in shown
    assert "docs/results/ring.md" in shown
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_json_has_every_way_and_the_best_ones_hops(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--seqlen", "16K", "--world", "4", "--backward", "--mask", "documents=5", "--hosts", "2")
    assert found["best"] == found["ways"][0]["name"]
    assert {way["transport"] for way in found["ways"]} == {"ring", "gather", "hierarchical", "ulysses"}
    assert {step["direction"] for step in found["hops"]} == {"forward", "backward"}
    assert any("across hosts use hierarchical" in refused["why"] for refused in found["refused"])
    assert found["machine"]["sources"]["between hosts"].startswith("assumed")
    assert all(abs(sum(way["losses"].values()) - 1 + way["efficiency"]) < 1e-9 for way in found["ways"])


def test_options_narrow_the_ways(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--seqlen", "64K", "--world", "8")
    assert {way["name"] for way in document(capsys, *base, "--mesh", "2x4", "--layout", "zigzag")["ways"]} == {
        f"ulysses 2 x {transport} 4, zigzag" for transport in ("pull", "ring", "gather")
    }
    named = document(capsys, *base, "--transport", "ring,ulysses", "--layout", "striped")["ways"]
    assert {way["name"] for way in named} >= {"ring, striped", "ulysses", "ulysses 4 x ring 2, striped"}
    assert [way["name"] for way in document(capsys, *base, "--transport", "ring", "--layout", "striped")["ways"]] == [
        "ring, striped"
    ]


def test_given_figures_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--seqlen", "256K", "--world", "2", "--transport", "pull", "--layout", "zigzag", "--head-dim", "64")
    (plain,) = document(capsys, *base)["ways"]
    quick = document(capsys, *base, "--tflops", "6000", "--bandwidth", "pull=36")
    (way,) = quick["ways"]
    assert way["tflops"] > 3 * plain["tflops"]
    assert quick["machine"]["sources"]["pull"] == "--bandwidth"
    assert quick["hiding_tokens"] == pytest.approx(2 * 0.25 * 6000e12 / 36e9)


def test_measured_files(tmp_path: Path) -> None:
    doctor, bench = tmp_path / "doctor.json", tmp_path / "bench.json"
    speeds = {"copy GB/s": {"value": [[None, 186.0], [200.0, None]]}}
    doctor.write_text(json.dumps({"ok": True, "findings": {"links": speeds}}))
    found = apply(H200, doctor, "bf16")
    assert found.link("pull", 2).points[-1][1] == pytest.approx(186.0)
    assert dict(found.sources)["pull"] == "doctor.json: copies, the slowest pair of GPUs"

    tail = "causal D64 H2:1 S1K W1 fp32"
    rows = [
        {"case": f"fwd {tail}", "metric": "TFLOP/s", "ours": 2.0},
        {"case": f"fwd+bwd {tail}", "metric": "TFLOP/s", "ours": 1.0},
        {"case": f"fwd {tail.replace('W1', 'W2')}", "metric": "TFLOP/s", "ours": 9.0},
        {"case": f"fwd {tail}", "metric": "GiB", "ours": 9.0},
    ]
    bench.write_text(json.dumps({"device": "a CPU", "rows": rows}))
    found = apply(H200, bench, "fp32")
    pairs = 1024 * 1025 // 2
    assert found.rate(4 * pairs * 2 * 64, 64) == pytest.approx(2.0)
    # 3.5 at 1.0 take 3.5; the forward's 1 at 2.0 took 0.5 of it
    assert found.rate(10 * pairs * 2 * 64, 64, backward=True) == pytest.approx(2.5 / 3.0)
    assert found.dtypes == ("fp32",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "--measured: wanted a JSON file"),
        ('{"ok": true}', "--measured: wanted what `ringfa3 doctor --json` or a benchmark wrote"),
        ('{"findings": {"links": {}}}', "2 GPUs or more (without --quick), got none in"),
        ('{"rows": []}', "--measured: wanted ringfa3's TFLOP/s on one GPU in bf16"),
    ],
)
def test_files_that_say_nothing(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    assert main(["plan", "--seqlen", "1K", "--world", "2", "--measured", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--heads", "3:2"), "--heads: wanted Q:KV with Q a multiple of KV"),
        (("--hosts", "3"), "--hosts: wanted a divisor of the 4 ranks, got 3"),
        (("--head-dim", "100"), "--head-dim: wanted a multiple of 8 from 8 to 256, got 100"),
        (("--mesh", "3x2"), "--mesh: wanted ULYSSESxRING whose product is the 4 ranks"),
        (("--transport", "tcp"), "--transport: wanted pull, ring"),
        (("--layout", "spiral"), "--layout: wanted zigzag"),
        (("--transport", "pull", "--hosts", "2"), "across hosts use hierarchical"),
        (("--bandwidth", "tcp=1"), "--bandwidth: wanted pull, ring, hosts = GB/s"),
        (
            ("--bandwidth", "pull=0"),
            "--bandwidth: wanted pull, ring, hosts = GB/s above 0, such as pull=365, got 'pull=0'",
        ),
        (("--tflops", "0"), "--tflops: wanted FORWARD or FORWARD,BACKWARD above 0, such as 650,590, got '0'"),
        (("--depth", "0"), "--depth: wanted 2 buffers or more, one to read and one to fill, got 0"),
        (("--world", "100000"), "--world: wanted 1..512 ranks, got 100000"),
        (("--world", "0"), "--world: wanted 1..512 ranks, got 0"),
        (("--seqlen", "many"), "--seqlen: wanted a number of tokens"),
        (("--heads", "2:1", "--transport", "ulysses"), "--heads: wanted at least one query head for each of 4 Ulysses"),
        (("--heads", "6:2", "--mesh", "4x1"), "as plan covers head counts that divide (ring_attention serves others"),
        (("--png", "a.xyz"), "--png: wanted a file that ends in .png, got a.xyz"),
        (("--tflops", "fast"), "--tflops: wanted FORWARD or FORWARD,BACKWARD"),
        (("--tflops", "600", "--backward"), "--tflops: wanted FORWARD,BACKWARD with --backward"),
        (("--dtype", "fp32"), "--tflops: wanted speeds for fp32"),
        (("--rank", "9"), "--rank: wanted 'all' or one of the 4 ranks"),
        (("--mask", "diagonal"), "--mask: wanted causal"),
        (("--png", "/nowhere/x.png"), "--png: wanted a file in a folder that exists"),
    ],
)
def test_wrong_options_are_named(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--seqlen", "4K", "--world", "4", *options]) == 2
    assert message in capsys.readouterr().err


def test_text_timeline_tells_what_happens_when() -> None:
    found = predict(Job(Mask(), 64 << 10, 2, 32, 8, 128, backward=True), Way("ring"))
    lines = text(found, 2, 80)
    assert all(len(line) <= 80 for line in lines[:-1])
    hops = lines[0].removeprefix("rank 0    ")
    assert len(hops) == 70
    # forward with its own keys and rank 1's, and the same backward; both directions take their share of the time
    order = [a for a, b in zip(hops, hops[1:] + "|", strict=True) if a != b and a != "."]
    assert order == list("0101")
    assert hops.count("0") + hops.count("1") > 66
    assert {"-", "="} <= set(lines[1])


@pytest.mark.parametrize("transport", ["pull", "ring"])
def test_picture_says_whose_keys_arrive(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    found = predict(Job(Mask(), 16 << 10, 4, 32, 8, 128), Way(transport))
    draw(found, tmp_path / "x.png", "four")
    bars = [(b.get_paths()[0].get_extents(), b.get_facecolor()[0]) for b in drawn[0].axes[0].collections]
    for rank in range(4):
        hops = sorted((b.x0, tuple(colour)) for b, colour in bars if b.y0 == pytest.approx(rank - 0.02))
        arriving = sorted((b.x0, tuple(colour)) for b, colour in bars if b.y0 == pytest.approx(rank - 0.3))
        assert len({colour for _, colour in hops}) == 4
        assert [colour for _, colour in arriving] == [colour for _, colour in hops[1:]]  # in the order of the hops


def test_picture_of_many_ranks(tmp_path: Path) -> None:
    found = predict(Job(Mask(), 256 << 10, 32, 32, 8, 128, hosts=4), Way("hierarchical"))
    draw(found, tmp_path / "x", "many")
    assert (tmp_path / "x").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
