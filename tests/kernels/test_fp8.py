"""attend on fp8 inputs: every implementation that runs here, special numbers, what is refused, how accurate it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ringfa3_kernels import (
    Partial,
    Quantized,
    Unsupported,
    Visible,
    attend,
    attend_backward,
    dequantize,
    dispatch,
    portable,
    quantize,
)
from ringfa3_kernels.aot import build_all
from ringfa3_kernels.call import Call
from ringfa3_kernels.positional import Dropout
from tests.kernels.contract import Case, window
from tests.kernels.fp8_contract import CASES, YARDSTICK, check_case, check_special

NEXT = Path(__file__).parents[2] / ".triton-next"  # the newest Triton; the oldest is installed
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Three = tuple[Quantized, Quantized, Quantized]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels are compiled for the GPU")
IMPLEMENTATIONS = [pytest.param(impl, marks=on_cpu if impl == "portable" else ()) for impl in YARDSTICK]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_attend_is_attention_on_what_fp8_stands_for(impl: str, case: Case, generator: torch.Generator) -> None:
    """Block scales and rotation; and one scale a head, in e5m2, which the interpreter's time allows in few cases."""
    check_case(impl, case, "cpu", generator, block=128, dtype=E4M3, rotate=True)
    if impl != "portable" or case.name in ("one row", "causal, fewer keys"):
        check_case(impl, case, "cpu", generator, block=0, dtype=E5M2, rotate=False)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(impl: str, generator: torch.Generator) -> None:
    with np.errstate(invalid="ignore"):  # NumPy's own warning, there too
        check_special(impl, "cpu", generator, *([[window(40, 0)]] if impl == "portable" else []))


def draw(generator: torch.Generator, Sq: int = 40, Sk: int = 150, D: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(1, Sq, 4, D, generator=generator),
        torch.randn(1, Sk, 2, D, generator=generator),
        torch.randn(1, Sk, 2, D, generator=generator),
    )


def test_v_in_keys_order_is_the_same_v(generator: torch.Generator) -> None:
    q, k, v = draw(generator)
    rows, keys = quantize(q, k, v), quantize(q, k, v, v_order="keys")
    for impl in ("reference", "aten"):
        a, b = attend(*rows, impl=impl), attend(*keys, impl=impl)
        assert torch.equal(a.out, b.out)
        assert torch.equal(a.lse, b.lse)
    with pytest.raises(Unsupported, match="portable: of fp8 it reads v in order 'rows', got 'keys'"):
        attend(*keys, impl="portable")


def test_tiny_and_huge_blocks_beside_each_other(generator: torch.Generator) -> None:
    """Blocks of v from 1e-30 to 1e30 beside each other, zeros among them: no overflow, no NaN."""
    q, k, _ = draw(generator, Sq=3, Sk=5 * 128)
    v = torch.randn(1, 5, 128, 2, 32, generator=generator)
    v = (v * torch.tensor([1e-30, 1.0, 0.0, 1e30, 1e-3]).view(1, 5, 1, 1, 1)).flatten(1, 2)
    inputs = quantize(q, k, v)
    truth = attend(*(dequantize(x, torch.float64) for x in inputs), impl="reference")
    for impl in YARDSTICK:
        if impl == "portable" and torch.cuda.is_available():
            continue
        result = attend(*inputs, impl=impl)
        assert result.out.isfinite().all()
        assert (result.out - truth.out).abs().max() < 1e-2 * truth.out.abs().max()
        assert torch.allclose(result.lse.double(), truth.lse, atol=1e-4)


def test_nothing_to_see() -> None:
    q, k, v = (torch.zeros(2, S, 2, 16) for S in (5, 0, 0))
    empty = attend(*quantize(q, k, v), out_dtype=torch.bfloat16)
    assert empty.out.dtype == torch.bfloat16
    assert not empty.out.any()
    assert (empty.lse == -torch.inf).all()
    into = Partial(torch.ones(2, 5, 2, 16), torch.zeros(2, 2, 5))
    assert torch.equal(attend(*quantize(q, k, v), into=into).out, torch.ones(2, 5, 2, 16))
    blind = torch.full((5,), 3, dtype=torch.int32)
    k = torch.ones(2, 7, 2, 16)
    unseen = attend(*quantize(q, k, k), Visible(blind, blind))
    assert not unseen.out.any()
    assert (unseen.lse == -torch.inf).all()


def test_autocast_does_not_reach_inside(generator: torch.Generator) -> None:
    inputs = quantize(*draw(generator))
    plain = attend(*inputs, softcap=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attend(*inputs, softcap=3.0)
    assert torch.equal(inside.out, plain.out)


WRONG: dict[str, tuple[Callable[[Three], object], str]] = {
    "mixed": (lambda x: attend(x[0], dequantize(x[1]), x[2]), "k: wanted Quantized, as the others are, got Tensor"),
    "plain q": (lambda x: attend(dequantize(x[0]), x[1], x[2]), "q: wanted Quantized, as the others are, got Tensor"),
    "no v": (lambda x: attend(x[0], x[1], None), "v: wanted Quantized, as the others are, got NoneType"),  # type: ignore[arg-type]
    "lengths": (lambda x: attend(x[0], x[1], x[2].rows(0, 100)), r"v: wanted k's shape \[1, 150, 2, 32\]"),
    "q in keys order": (
        lambda x: attend(quantize(*(dequantize(x[1]),) * 3, v_order="keys")[2], *x[1:]),
        "q: wanted order",
    ),
    "heads": (lambda x: attend(x[1], x[0], x[0]), "q: wanted a number of heads that is a multiple of k's 4, got 2"),
    "head_dim": (lambda x: attend(x[0], *quantize(*(torch.zeros(1, 9, 2, 16),) * 3)[1:]), "k: wanted q's head_dim 32"),
    "batch": (lambda x: attend(x[0], *quantize(*(torch.zeros(2, 9, 2, 32),) * 3)[1:]), "k: wanted q's batch size 1"),
    "format": (
        lambda x: attend(x[0], *quantize(*(torch.zeros(1, 9, 2, 32),) * 3, dtype=E5M2)[1:]),
        r"k: wanted q's dtype torch\.float8_e4m3fn, got torch\.float8_e5m2",
    ),
    "rotated apart": (
        lambda x: attend(x[0], *quantize(*(torch.zeros(1, 9, 2, 32),) * 3, rotate=3)[1:]),
        "k: wanted to be rotated as q is, with seed None, got 3",
    ),
    "v rotated": (lambda x: attend(x[0], x[1], replace(x[2], seed=1)), "v: wanted no rotation"),
    "out_dtype": (lambda x: attend(*x, out_dtype=torch.float64), r"out_dtype: wanted float32, bfloat16 or float16"),
    "into": (lambda x: attend(*x, into=Partial(torch.zeros(1), torch.zeros(1))), r"into\.out: wanted torch\.float32"),
    "visible": (lambda x: attend(*x, Visible.full(3, 150)), r"visible: wanted bounds \[40\]"),
    "softcap": (lambda x: attend(*x, softcap=-1.0), "softcap: wanted 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_by_name(name: str, generator: torch.Generator) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(quantize(*draw(generator)))


def test_the_backward_takes_what_was_quantised(generator: torch.Generator) -> None:
    q, k, v = draw(generator)
    fp8 = quantize(q, k, v)
    lse = torch.zeros(1, 4, 40)
    grads: dict[str, Any] = {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    with pytest.raises(Unsupported, match="reads no fp8: give it the 16-bit"):
        attend_backward(q, *fp8, lse, lse, **grads)  # type: ignore[arg-type]


def test_alibi_and_dropout_are_refused_by_name(generator: torch.Generator) -> None:
    fp8 = quantize(*draw(generator))
    options: tuple[dict[str, Any], ...] = ({"alibi": torch.ones(4)}, {"dropout": Dropout(0.1, 1)})
    for given in options:
        with pytest.raises(Unsupported, match=f"{next(iter(given))}: wanted None for fp8"):
            attend(*fp8, **given)


def test_who_serves_fp8() -> None:
    call = Call(
        direction="forward", device="cuda", capability=(8, 9), dtype=E4M3, B=1, Sq=8, Sk=8, Hq=1, Hkv=1, D=64,
        batched_visible=False, softcap=False, into=False, out_dtype=torch.float32, accumulate=False,
        deterministic=False, aligned=True, blocks=(128, 128, 128),
    )  # fmt: skip
    assert dispatch.why_not("aten", replace(call, device="cpu", capability=(0, 0))) is None
    keys = replace(call, v_order="keys", capability=(9, 0))
    assert "order 'rows'" in (dispatch.why_not("portable", keys) or "")
    assert dispatch.why_not("reference", keys) is None


def test_portable_says_which_gpus_have_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "interpreted", lambda: False)
    call = Call(
        direction="forward", device="cuda", capability=(8, 6), dtype=E4M3, B=1, Sq=8, Sk=8, Hq=1, Hkv=1, D=64,
        batched_visible=False, softcap=False, into=False, out_dtype=torch.float32, accumulate=False,
        deterministic=False, aligned=True, blocks=(0, 0, 0),
    )  # fmt: skip
    assert portable.unsupported(call) == "fp8 needs capability 8.9"
    assert portable.unsupported(replace(call, capability=(8, 9))) is None


def with_outliers(S: int, D: int, generator: torch.Generator) -> Tensor:
    """FlashAttention-3's: a thousandth of the places gets another normal number of standard deviation 10 on top."""
    x = torch.randn(1, S, 4, D, generator=generator)
    return x + 10 * torch.randn(x.shape, generator=generator) * (torch.rand(x.shape, generator=generator) < 1e-3)


def test_rotation_lowers_the_error_of_outliers_and_scales_follow_their_rows() -> None:
    """With fixed numbers: these are ratios of errors, and single outliers make them."""
    generator = torch.Generator().manual_seed(8)
    q, k, v = (with_outliers(1024, 64, generator) for _ in "qkv")
    q = q[:, :256]
    truth = attend(*(x.double() for x in (q, k, v)), impl="reference").out

    def error(**options: Any) -> float:
        out = attend(*quantize(q, k, v, **options), impl="aten").out
        return float((out - truth).square().mean().sqrt())

    rotated = error(rotate=True)
    assert error() > 1.4 * rotated
    assert error(block=0) > 1.4 * rotated
    assert error(rotate=True, dtype=E5M2) > 1.5 * rotated
    # where blocks differ by more than the format's range, one scale a head loses the small ones, a block's does not
    small = v * torch.where(torch.arange(1024) < 512, 1.0, 1e-7)[:, None, None]
    rows = Visible(torch.full((256,), 512, dtype=torch.int32), torch.full((256,), 1024, dtype=torch.int32))
    exact = attend(q.double(), k.double(), small.double(), rows, impl="reference").out
    by_block, by_head = (
        attend(*quantize(q, k, small, block=block), rows, impl="aten").out - exact for block in (128, 0)
    )
    assert by_block.square().mean() < by_head.square().mean() / 4


AOT_JOBS: list[dict[str, Any]] = [
    {"head_dim": 128, "capability": [9, 0]},
    {"head_dim": 128, "capability": [8, 9], "softcap": True},
    {"head_dim": 256, "capability": [8, 9], "wanted": "float8_e5m2"},
    {"head_dim": 64, "capability": [9, 0], "continues": False},
    {"head_dim": 256, "capability": [9, 0]},
]


@pytest.mark.slow
@pytest.mark.parametrize("newest", [False, True], ids=["oldest", "newest"])
def test_portable_compiles_without_spills(newest: bool) -> None:
    if newest and not NEXT.is_dir():
        pytest.fail(f"{NEXT} is missing: make .triton-next/installed")
    jobs = [{"kernel": "forward"} | job for job in (AOT_JOBS[:2] if newest else AOT_JOBS)]
    builds = build_all("ringfa3_kernels.portable.quantized_builds", jobs, packages=NEXT if newest else None)
    for job, build in zip(jobs, builds, strict=True):
        print(job, build)
        assert build.spills == 0, job
        assert not build.serialised, job
        assert build.shared <= 101376, job
        assert build.hgmma if job["capability"] == [9, 0] else build.hmma, job
