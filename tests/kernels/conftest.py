"""Seeds that failures name, and one thread, for the tests of the kernels."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers, other ones in each run; a failure shows the seed under "Captured stdout setup"."""
    seed = secrets.randbits(32)
    print(f"inputs are of torch.Generator().manual_seed({seed})")
    return torch.Generator().manual_seed(seed)
