"""Seeds that failures name, for the tests of the kernels."""

from __future__ import annotations

import secrets

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers, other ones in each run; a failure shows the seed under "Captured stdout setup"."""
    seed = secrets.randbits(32)
    print(f"inputs are of torch.Generator().manual_seed({seed})")
    return torch.Generator().manual_seed(seed)
