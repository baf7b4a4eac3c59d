"""The order in which benchmarks take turns."""

import importlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_each_follows_each_other_equally_often(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "kernels" / "bench"))
    rounds = importlib.import_module("rounds")
    names = [f"kernel {i}" for i in range(n)]
    cycle = rounds.orders(names)
    assert all(sorted(row) == names for row in cycle)
    followers = Counter(pair for row in cycle for pair in pairwise(row))
    assert len(followers) == n * (n - 1)
    assert len(set(followers.values())) <= 1
