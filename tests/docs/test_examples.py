"""examples/ run as they stand, on CPU ranks, and check themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.launch import tiny_model

Run = Callable[..., str]


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    def run(*command: str) -> str:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_ring_attention(run: Run) -> None:
    """An odd length; its own check is against fp64."""
    said = run("launch/torchrun.sh", "--nproc", "2", "examples/ring_attention.py", "--seqlen", "1003")
    rows = [int(n) for n in re.findall(r"^rank \d of 2 on cpu: (\d+) rows", said, re.MULTILINE)]
    assert len(rows) == 2
    assert sum(rows) == 1003
    assert re.search(r"^error of 8 rows: \d\.\de-0[6-9]$", said, re.MULTILINE), said


def test_packed_documents(run: Run) -> None:
    """balanced shares the pairs more evenly than contiguous and zigzag do here."""
    said = run(sys.executable, "examples/packed_documents.py", "--documents", "300", "20", "100", "93")
    spread = {}
    for layout, shares in re.findall(r"^(\w+): loss .*; pairs by rank: (.*)$", said, re.MULTILINE):
        percents = [int(share) for share in re.findall(r"(\d+)%", shares)]
        spread[layout] = max(percents) - min(percents)
    assert spread.keys() == {"contiguous", "zigzag", "balanced"}, said
    assert spread["balanced"] == min(spread.values()) < 10, said


def test_long_prompt(run: Run, tmp_path: Path) -> None:
    """The second question costs its own tokens only."""
    model, text = tiny_model.write(tmp_path / "model"), tmp_path / "long.txt"
    text.write_text(tiny_model.prompt(120))
    command = ("--model", str(model), "--file", str(text), "--device", "cpu", "--tokens", "4", "w1 w2", "w3")
    said = run(sys.executable, "examples/long_prompt.py", *command)
    told = [tuple(map(int, each)) for each in re.findall(r"^\[(\d+) tokens, (\d+) of them", said, re.MULTILINE)]
    assert len(told) == 2, said
    assert told[0] == (122, 0)
    assert told[1][0] - 4 <= told[1][1] < told[1][0]
