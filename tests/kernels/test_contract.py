"""All implementations on the CPU keep one contract, tests/kernels/contract.py; portable in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from ringfa3_kernels import aten, dispatch
from tests.kernels.contract import CASES, CLAUSES, Case, check

# Every clause in fp32 and in a 16-bit dtype; the gradients in fp64, as the ring's tests lean on those.
ASKED = (
    *((clause, torch.float32) for clause in CLAUSES),
    ("forward", torch.float16),
    ("backward", torch.bfloat16),
    ("shards", torch.bfloat16),
    ("shards", torch.float16),
    ("backward", torch.float64),
)
# In Triton's interpreter a call takes up to a second: each clause in one dtype, and that the others are refused.
INTERPRETED = (
    ("forward", torch.float16),
    ("backward", torch.float16),
    ("shards", torch.float32),
    ("forward", torch.bfloat16),
    ("forward", torch.float64),
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that cases of 80 rows have interiors, which aten gives to torch's operator, as well as edges."""
    monkeypatch.setattr(aten, "TILE", 16)


@pytest.mark.parametrize(
    ("impl", "clause", "dtype"),
    [
        pytest.param(impl, clause, dtype, id=f"{impl}-{clause}-{str(dtype).removeprefix('torch.')}")
        for impl in dispatch.IMPLEMENTATIONS
        for clause, dtype in (INTERPRETED if impl == "portable" else ASKED)
    ],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(impl: str, case: Case, clause: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    if impl == "portable" and torch.cuda.is_available():
        pytest.skip("portable runs on the GPU of this machine: tests/gpu/test_contract_gpu.py")
    check(clause, impl, case, dtype, "cpu", generator)
