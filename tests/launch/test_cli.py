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
    assert "--json" in text


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
        (["--seqlens", "1K,x"], "size: wanted a number of tokens such as 4096, 4K or 1M, got 'x'"),
        (["--worlds", "0"], "--worlds: wanted 1..2"),
        (["--heads", "3:2"], "--heads: wanted Q:KV with Q a multiple of KV, such as 32:8, got '3:2'"),
        (["--mask", "diagonal"], "--mask: wanted causal, full, window=TOKENS"),
        (["--peers", "fa9"], "--peers: wanted sdpa-math"),
        (["--directions", "bwd"], "--directions: wanted fwd, fwd+bwd, got 'bwd'"),
    ],
)
def test_wrong_options_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--device", "cpu", *argv]) == 2
    assert message in capsys.readouterr().err


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
