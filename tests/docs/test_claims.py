"""Figures that the README and the documentation quote are those of docs/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT

RESULTS = ROOT / "docs" / "results"
RING: dict[str, dict[str, dict[str, float]]] = json.loads((RESULTS / "ring.json").read_text())["rounds"]
DIRECTIONS = {"forward": "fwd", "forward and backward": "fwd+bwd"}
SHORT = {
    "NCCL ring": "ring",
    "one GPU, the whole sequence": "one GPU",
    "ring-flash-attn, zigzag": "ring-flash-attn-zigzag",
    "torch's context_parallel, all-to-all": "context-parallel-fa3-alltoall",
}
PARTS = (
    "pull",
    "ring",
    "ulysses",
    "kernels alone",
    "one launch",
    "one GPU",
)  # of a case's entrants those that are ours


def tables(page: Path) -> list[tuple[list[str], list[list[str]]]]:
    """Head and rows of a page's tables, without backticks."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", page.read_text(), re.MULTILINE):
        rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append((rows[0], rows[2:]))
    return found


def speed(case: str, who: str) -> float:
    """TFLOP/s per GPU in docs/results/ring.json; "best of the others" is the fastest that is not ours."""
    entrants = RING[case]
    if who == "best of the others":
        return max(each["tflops"] for name, each in entrants.items() if name not in PARTS)
    return entrants[SHORT.get(who, who)]["tflops"]


def memory(case: str, who: str) -> float:
    """GiB of a rank."""
    rows = json.loads((RESULTS / "ring.json").read_text())["rows"]
    return next(row["ours"] for row in rows if row["case"] == f"{case} {who}" and row["metric"] == "GiB")


def rounded(quoted: str, figure: float) -> bool:
    """Whether this is the figure, to the digits that are quoted."""
    digits = len(quoted.partition(".")[2])
    return abs(float(quoted) - figure) <= 0.501 * 10**-digits


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_the_ring(page: str) -> None:
    lengths = ["", "16K", "32K", "64K", "128K"]
    ((_, rows),) = (table for table in tables(ROOT / page) if table[0] == lengths)
    for label, *cells in rows:
        direction, _, who = label.partition(": ")
        for length, cell in zip(lengths[1:], cells, strict=True):
            case = f"{DIRECTIONS[direction]} causal D128 H32:8 S{length} W2 bf16"
            figure, _, more = cell.partition(" (")
            assert rounded(figure, speed(case, who)), (label, length)
            assert not more or rounded(more.rstrip(")"), memory(case, who)), (label, length)


def test_layouts() -> None:
    cases = {
        "packed documents, 64K": "fwd packed D128 H32:8 S64K",
        "window of 4K in 256K": "fwd window4K D128 H32:8 S256K",
    }
    ((_, rows),) = (table for table in tables(ROOT / "docs" / "choosing.md") if table[0] == ["", "pull", "ring"])
    assert len(rows) == 4
    for label, *cells in rows:
        what, _, layout = label.partition(": ")
        for transport, cell in zip(("pull", "ring"), cells, strict=True):
            assert rounded(cell, speed(f"{cases[what]} W2 bf16", f"{transport} {layout}")), label


def test_one_gpu() -> None:
    """Ours, and FlashAttention-3's and cuDNN's in brackets."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "attend_forward.json").read_text())["rows"]
    lengths = ["", "2K", "8K", "16K", "64K"]
    ((_, table),) = (table for table in tables(ROOT / "README.md") if table[0] == lengths)
    for label, *cells in table:
        for length, cell in zip(lengths[1:], cells, strict=True):
            case = f"fwd {label.partition(':')[0]} D128 H16:16 S{length} W1 bf16"
            peers = {row["peer"]: row for row in rows if row["case"] == case and row["metric"] == "TFLOP/s"}
            figures = (peers["fa3"]["ours"], peers["fa3"]["theirs"], peers["cudnn"]["theirs"])
            quoted = re.fullmatch(r"(\d+) \((\d+), (\d+)\)", cell)
            assert quoted, cell
            assert all(map(rounded, quoted.groups(), figures)), case


def test_a_long_prompt() -> None:
    """The README's sentence on 128K tokens over two GPUs."""
    rows = json.loads((RESULTS / "inference.json").read_text())["rows"]
    one, two = (
        next(r["ours"] for r in rows if f"S128K W{world}" in r["case"] and r["metric"] == "s to first token")
        for world in (1, 2)
    )
    quoted = re.search(r"first token after ([\d.]+) s on the two, ([\d.]+) times", (ROOT / "README.md").read_text())
    assert quoted
    assert rounded(quoted[1], two)
    assert rounded(quoted[2], one / two)
