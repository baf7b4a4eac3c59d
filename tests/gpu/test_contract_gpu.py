"""All implementations on CUDA keep the contract of tests/kernels/contract.py, bf16 included."""

from __future__ import annotations

import secrets

import pytest
import torch

from ringfa3_kernels import dispatch
from tests.kernels.contract import CASES, CLAUSES, Case, check
from tests.kernels.test_contract import check_nan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", dispatch.IMPLEMENTATIONS)
def test_contract(impl: str, case: Case, clause: str, dtype: torch.dtype) -> None:
    seed = secrets.randbits(32)
    print(f"inputs are of torch.Generator().manual_seed({seed})")
    check(clause, impl, case, dtype, "cuda", torch.Generator().manual_seed(seed))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("impl", ["hopper", "portable"])
def test_nan_stays_in_its_row(impl: str, D: int, causal: bool) -> None:
    check_nan(impl, D, causal, torch.bfloat16, "cuda", torch.Generator().manual_seed(secrets.randbits(32)))
