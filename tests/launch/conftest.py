"""Fixtures of the launch tests: a user's environment, and ranks that can import ranks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def environment() -> dict[str, str]:
    """A user's of a clean clone: source roots on the path, no GPU to see, no interpreter for Triton, no launcher."""
    path = os.pathsep.join([str(HERE), *(str(ROOT / root) for root in (".", "kernels", "launch"))])
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    for name in ("NCCL_NVLS_ENABLE", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "TRITON_INTERPRET"):
        env.pop(name, None)
    return env


@pytest.fixture
def _ranks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))  # a spawned rank gets this process's sys.path
