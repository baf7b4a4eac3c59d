"""All implementations on the CPU keep one contract, tests/kernels/contract.py; portable in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from ringfa3_kernels import Visible, aten, attend, dispatch
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


def check_nan(impl: str, D: int, causal: bool, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """A NaN in a row of q, continued over two shards of keys, makes that row's out and lse NaN, and no others."""
    S, cut, row = 150, 80, 100
    q, k, v = (torch.randn(1, S, H, D, generator=generator).to(device, dtype) for H in (2, 1, 1))
    q[0, row, 1, 3] = torch.nan
    begin = torch.zeros(S, dtype=torch.int32, device=device)
    end = torch.arange(1, S + 1, dtype=torch.int32, device=device) if causal else begin + S
    state = None
    for keys, seen in ((slice(0, cut), end.clamp(max=cut)), (slice(cut, S), (end - cut).clamp(min=0))):
        visible = Visible(begin, seen) if causal else None
        state = attend(q, k[:, keys], v[:, keys], visible, into=state, impl=impl)
    assert state is not None
    wanted = torch.zeros(1, 2, S, dtype=torch.bool)
    wanted[0, 1, row] = True
    assert torch.equal(state.lse.isnan().cpu(), wanted)
    assert torch.equal(state.out.isnan().cpu(), wanted.transpose(1, 2)[..., None].expand(1, S, 2, D))
    assert state.out.nan_to_num(0.0, torch.inf, -torch.inf).isfinite().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("impl", [impl for impl in dispatch.IMPLEMENTATIONS if impl != "hopper"])
def test_nan_stays_in_its_row(impl: str, causal: bool, generator: torch.Generator) -> None:
    if impl == "portable" and torch.cuda.is_available():
        pytest.skip("portable runs on the GPU of this machine: tests/gpu/test_contract_gpu.py")
    check_nan(impl, 16, causal, torch.float32, "cpu", generator)
