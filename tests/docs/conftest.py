"""Fixtures of the documentation's tests."""

from __future__ import annotations

import os
import sys

import pytest

from tests.docs.pages import ROOT


@pytest.fixture
def environment() -> dict[str, str]:
    """A user's of a clean clone on a machine without GPUs, offline."""
    path = os.pathsep.join(str(ROOT / root) for root in (".", "kernels", "launch"))
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for name in ("NCCL_NVLS_ENABLE", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "TRITON_INTERPRET", "RINGFA3_TOKEN"):
        env.pop(name, None)
    return env
