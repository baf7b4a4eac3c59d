"""The command line: help that teaches, errors that name the option, output with and without rich."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from typing import Any

import pytest

from ringfa3_launch.cli import COMMANDS, main
from ringfa3_launch.console import NO_RICH, Console


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What --help prints; argparse leaves by SystemExit(0)."""
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_and_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--help")
    assert all(command[0] in text for command in COMMANDS)
    assert "examples:" in text
    assert "Exit status" in text


@pytest.mark.parametrize("command", list(COMMANDS), ids=" ".join)
def test_help_of_a_command(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, *command, "--help")
    assert f"usage: ringfa3 {' '.join(command)}" in text
    assert "--json" in text or command == ("serve",)  # which answers in JSON over HTTP


def test_help_needs_no_torch() -> None:
    program = "import sys; from ringfa3_launch.cli import build; build(['--help']); sys.exit('torch' in sys.modules)"
    roots = "import sys; sys.path[:0] = ['.', 'kernels', 'launch']; "
    assert subprocess.run([sys.executable, "-c", roots + program], timeout=60).returncode == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--version").startswith("ringfa3 ")


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out
    assert main(["bench"]) == 2
    assert "attention" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seqlens", "1K,x"], "--seqlens: wanted a number of tokens such as 4096, 4K or 1M, got 'x'"),
        (["--worlds", "0"], "--worlds: wanted 1..2"),
        (["--heads", "3:2"], "--heads: wanted Q:KV with Q a multiple of KV, such as 32:8, got '3:2'"),
        (["--mask", "diagonal"], "--mask: wanted causal, full, window=TOKENS"),
        (["--peers", "fa9"], "--peers: wanted sdpa-math"),
        (["--directions", "bwd"], "--directions: wanted fwd, fwd+bwd, got 'bwd'"),
        (["--mask", "window=0"], "--mask window=: wanted a number of tokens such as 4096, 4K or 1M, got '0'"),
        (["--transport", "foo"], "--transport: wanted auto, pull, ring, gather, hierarchical, ulysses"),
        (["--head-dim", "100"], "--head-dim: wanted a multiple of 8 from 8 to 256, got 100"),
        (["--out", "/dev/null/x"], "--out: wanted a folder that can be made and written to, got /dev/null/x (Not a"),
    ],
)
def test_wrong_options_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--device", "cpu", *argv]) == 2
    assert message in _refusal(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--world", "0"], "--world: wanted 2 ranks or more, got 0"),
        (["--world", "-3"], "--world: wanted 2 ranks or more, got -3"),
        (["--transports", "pull,foo"], "--transports: wanted auto, pull, ring, gather, hierarchical, ulysses, hierarc"),
        (["--transports", "mesh:2x1:foo"], "mesh:UxR or mesh:UxR:TRANSPORT, got 'foo'"),
        (["--window", "0@1K"], "--window: wanted a number of tokens"),
        (["--packed", "x"], "--packed: wanted a number of tokens"),
        (["--long", "x"], "--long: wanted a number of tokens"),
        (["--head-dim", "4"], "--head-dim: wanted a multiple of 8 from 8 to 256, got 4"),
        (["--out", "/dev/null/x"], "--out: wanted a folder that can be made and written to, got /dev/null/x (Not a"),
    ],
)
def test_wrong_options_of_the_ring_are_named(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfa3_launch.bench.ring.play", _measures_nothing)
    assert main(["bench", "ring", "--device", "cpu", *argv]) == 2
    assert message in _refusal(capsys)


@pytest.mark.parametrize("command", [["bench", "attention"], ["bench", "ring"], ["trace"], ["doctor"]], ids=" ".join)
def test_a_gpu_that_is_asked_for_must_be_there(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main([*command, "--device", "cuda"]) == 2
    assert _refusal(capsys) == "ringfa3: --device: wanted 'cuda' on a machine with a GPU, got a machine without\n"


def test_only_what_was_not_expected_says_where_to_find_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(args: Any) -> int:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("ringfa3_launch.doctor.run", fails)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.endswith("together  (RINGFA3_TRACEBACK=1 shows where)\n")


def _measures_nothing(*args: Any, **options: Any) -> None:
    raise AssertionError("it began to measure")


def _refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """What stderr says: a refusal and nothing else."""
    said = capsys.readouterr().err
    assert "RINGFA3_TRACEBACK" not in said
    assert said.startswith("ringfa3: ")
    assert said.count("\n") == 1
    return said


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ringfa3_launch.doctor.run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "ringfa3: interrupted\n"


@pytest.mark.parametrize("rich", [True, False])
def test_tables_and_progress(rich: bool) -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err, rich=rich)
    console.heading("speed")
    console.table(("peer", "TFLOP/s"), [("ours", "1.5"), ("[theirs]", "12.25")], ["ok", "broken"])
    with console.progress(2) as advance:
        advance("first", 1)
        advance("second", 1)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["speed"] in lines
    assert ["[theirs]", "12.25"] in lines  # brackets are text, not markup
    assert err.getvalue() == "[1/2] first\n[2/2] second\n"
    ours, theirs = (line for line in out.getvalue().splitlines() if "ours" in line or "theirs" in line)
    assert ours.index("1.5") + 3 == theirs.index("12.25") + 5, "numbers are flushed right"


def test_without_rich_says_so_and_prints_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err)
    console.say("hello")
    assert (out.getvalue(), err.getvalue()) == ("hello\n", NO_RICH + "\n")
