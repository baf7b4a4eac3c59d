"""Quantisation: what data and scales stand for, the kernel against its torch twin, and the numbers that are special."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ringfa3_kernels import (
    Quantized,
    Unsupported,
    dequantize,
    dispatch,
    quantize,
    quantize_keys,
    quantize_queries,
    quantized,
)
from ringfa3_kernels import quantize_torch as twin
from ringfa3_kernels.aot import Build, build_all
from ringfa3_kernels.portable import quantize as kernel
from ringfa3_kernels.quantized import FORMATS, SOURCES, key_order
from tests.kernels.contract import LAYOUTS

NEXT = Path(__file__).parents[2] / ".triton-next"  # the newest Triton; the oldest is installed
E4M3, E5M2 = FORMATS
# unit roundoff: of what is normal in the format, rounding takes away at most this share
ROUNDOFF = {E4M3: 2.0**-4, E5M2: 2.0**-3}
LEAST = {E4M3: 2.0**-10, E5M2: 2.0**-17}  # half the smallest number above 0: what rounding takes from others at most
MOST = {E4M3: 448.0, E5M2: 57344.0}

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernel is compiled for the GPU")


def draw(generator: torch.Generator, B: int, S: int, H: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers whose magnitude differs a lot from row to row."""
    rows = 2.0 ** torch.randint(-6, 7, (B, S, H, 1), generator=generator)
    return (torch.randn(B, S, H, D, generator=generator) * rows).to(dtype)


def block_amax(x: Tensor, block: int) -> Tensor:
    """[B, S, H, D] -> [B, S, H, 1]: the largest finite magnitude among what shares a row's scale, by its definition."""
    result = torch.zeros(*x.shape[:3], 1, dtype=torch.float64)
    step = block or max(1, x.shape[1])
    for start in range(0, x.shape[1], step):
        rows = x[:, start : start + step].double()
        largest = torch.where(rows.isfinite(), rows, 0.0).abs().amax((1, 3), keepdim=True)
        result[:, start : start + step] = largest
    return result


def assert_rounded(x: Tensor, got: Quantized) -> None:
    """Every number within rounding of the truth, and the scale the least power of two that holds the largest one."""
    truth, scale = x.double(), scale_by_row(got)
    error = (dequantize(got, torch.float64) - truth).abs()
    dtype = got.data.dtype
    assert (error <= torch.maximum(truth.abs() * ROUNDOFF[dtype], scale * LEAST[dtype])).all()
    largest = block_amax(x, got.block)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert (largest <= scale * MOST[dtype]).all()
    assert ((largest > scale / 2 * MOST[dtype]) | (largest == 0)).all()
    assert (scale[(largest == 0).expand_as(scale)] == 1).all()


def scale_by_row(x: Quantized) -> Tensor:
    """fp64 [B, S, H, 1]."""
    rows = torch.arange(x.length) // (x.block or max(1, x.length))
    return x.scale.double()[:, :, rows].transpose(1, 2)[..., None]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("block", [128, 0])
@pytest.mark.parametrize("S", [1, 127, 128, 300])
def test_every_number_is_rounded_once(S: int, block: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    for source in SOURCES:
        q = draw(generator, 2, S, 3, 40, source)
        k, v = draw(generator, 2, S, 1, 40, source), draw(generator, 2, S, 1, 40, source)
        for x, got in zip((q, k, v), quantize(q, k, v, block=block, dtype=dtype), strict=True):
            assert got.shape == x.shape
            assert got.scale.shape == (2, x.shape[2], -(-S // 128) if block else 1)
            assert_rounded(x, got)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Whether data and scales are the same bits."""
    return torch.equal(a[0].view(torch.uint8), b[0].view(torch.uint8)) and torch.equal(a[1], b[1])


@on_cpu
@pytest.mark.parametrize(
    ("layout", "block", "dtype"),
    [*((layout, 128, E4M3) for layout in LAYOUTS), ("dense", 0, E4M3), ("dense", 128, E5M2), ("slice", 0, E5M2)],
)
def test_the_kernel_is_its_twin_bit_for_bit(
    layout: str, block: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The kernel in Triton's interpreter, on every layout, rotated and not, with numbers of all kinds in it."""
    for S, D, seed, v_order, source in ((130, 64, 5, "keys", torch.float16), (77, 40, None, "rows", torch.float32)):
        q, k, v = (draw(generator, 2, S, 2, D, source) for _ in "qkv")
        for x in (q, k, v):
            x[:, 3:5] = 0.0
            x[0, 7, 0, 1], x[1, S - 1, 1, 0], x[1, 9, 0, 5] = torch.nan, torch.inf, -torch.inf
            x[0, 20] *= 1e-7
        q, k, v = (LAYOUTS[layout](x) for x in (q, k, v))
        options: dict[str, Any] = {"block": block, "seed": seed, "dtype": dtype}
        with np.errstate(all="ignore"):  # inf - inf: the interpreter's NumPy would warn
            ours = kernel.quantize_queries(q, **options), *kernel.quantize_keys(k, v, v_order=v_order, **options)
        twins = twin.quantize_queries(q, **options), *twin.quantize_keys(k, v, v_order=v_order, **options)
        for name, x, y in zip("qkv", ours, twins, strict=True):
            assert same(x, y), (name, S, D)


@pytest.mark.parametrize("D", [16, 64, 128, 256])
def test_the_rotation_is_orthogonal_and_of_the_seed(D: int) -> None:
    """Signs and a Hadamard matrix: entries of one size, rows at right angles, another matrix for another seed."""
    matrix = twin.rotate(torch.eye(D), 3)
    assert torch.equal(matrix.abs(), torch.ones(D, D))
    assert torch.equal(matrix @ matrix.T, D * torch.eye(D))
    assert torch.equal(matrix, twin.rotate(torch.eye(D), 3))
    assert not torch.equal(matrix, twin.rotate(torch.eye(D), 4))
    i = torch.arange(D)
    parity = sum(((i[:, None] & i) >> bit) & 1 for bit in range(8))
    assert torch.equal(matrix, (1.0 - 2.0 * (torch.as_tensor(parity) % 2)) * twin.signs(3, D)[:, None])


def test_signs_are_fair() -> None:
    """65,536 signs of 256 fixed seeds: their sum stays within 5 standard deviations (256 each)."""
    total = sum(int(twin.signs(seed, 256).sum()) for seed in range(256))
    assert abs(total) < 5 * 256


@pytest.mark.parametrize("block", [128, 0])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_rotated_rows_keep_their_length_and_products(D: int, block: int, generator: torch.Generator) -> None:
    """What fp8 stands for after the rotation is the rotated row, within rounding: so q.k is what it was."""
    q = torch.randn(1, 150, 2, D, generator=generator)
    got = quantize_queries(q, block=block, rotate=11)
    assert got.seed == 11
    truth = twin.rotate(q.double(), 11) * D**-0.5
    error = (dequantize(got, torch.float64) - truth).abs()
    assert (error <= truth.abs() * (ROUNDOFF[E4M3] + 1e-4) + scale_by_row(got) * LEAST[E4M3] + 1e-5).all()
    torch.testing.assert_close(
        torch.einsum("bihd,bjhd->bhij", truth, truth), torch.einsum("bihd,bjhd->bhij", *(q.double(),) * 2)
    )


def test_keys_order_is_rows_order_permuted(generator: torch.Generator) -> None:
    for S in (1, 100, 128, 300):
        k, v = draw(generator, 2, S, 3, 24), draw(generator, 2, S, 3, 24)
        rows, keys = (quantize_keys(k, v, v_order=order)[1] for order in ("rows", "keys"))
        assert keys.data.shape == (2, 3, 24, -(-S // 128) * 128)
        assert keys.shape == rows.shape
        assert torch.equal(keys.scale, rows.scale)
        assert torch.equal(dequantize(keys), dequantize(rows))
        assert dequantize(keys).shape == v.shape
        # by its definition: place 4 t + 2 c + b of 16 holds key 8 c + 2 t + b
        lines = keys.data.float()
        for place in range(min(S, 32)):
            t, c, b = place % 16 // 4, place % 4 // 2, place % 2
            key = place // 16 * 16 + 8 * c + 2 * t + b
            wanted = rows.data[:, key].float() if key < S else torch.zeros(2, 3, 24)
            assert torch.equal(lines[..., place], wanted)
        assert not lines[..., S:].any() or S % 16  # permuted within 16, so zeros from there on
        assert not lines[..., -(-S // 16) * 16 :].any()
    assert sorted(key_order().tolist()) == list(range(16))


@pytest.mark.parametrize("order", ["rows", "keys"])
@pytest.mark.parametrize("block", [128, 0])
def test_slices_of_rows_are_views(block: int, order: str, generator: torch.Generator) -> None:
    k, v = draw(generator, 1, 400, 2, 16), draw(generator, 1, 400, 2, 16)
    for x in quantize_keys(k, v, block=block, v_order=order):  # type: ignore[arg-type]
        whole = dequantize(x)
        for start, stop in ((0, 400), (128, 300), (128, 256), (384, 400), (256, 256), (0, 1)):
            part = x.rows(start, stop)
            assert part.length == stop - start
            assert torch.equal(dequantize(part), whole[:, start:stop])
            assert part.data.untyped_storage().data_ptr() == x.data.untyped_storage().data_ptr()
        for start, stop in ((1, 10), (128, 401), (256, 128), (-128, 0)):
            with pytest.raises(ValueError, match="Quantized rows: wanted 0 <= start"):
                x.rows(start, stop)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_zeros_have_scale_one(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, 200, 1, 16)
    for block in (128, 0):
        for x in quantize(zero, zero, zero, block=block, dtype=dtype):
            assert torch.equal(x.scale, torch.ones_like(x.scale))
            assert torch.equal(dequantize(x), zero)
    one_row = zero.clone()
    one_row[0, 150] = 3.0
    scale = quantize_queries(one_row, dtype=dtype).scale
    assert scale[0, 0, 0] == 1
    assert scale[0, 0, 1] != 1


@pytest.mark.parametrize("size", [65504.0, 6e-8, 1e-30, 1e-44, 1e38, 3.4e38])
def test_the_largest_and_the_smallest_numbers(size: float, generator: torch.Generator) -> None:
    """A scale reaches from 2^-60 to the top: nothing overflows, and below 2^-70 numbers count as 0."""
    x = size * (0.5 + 0.5 * torch.rand(1, 140, 1, 64, generator=generator))
    if size in (65504.0, 6e-8):
        x = x.half()
    got = quantize_queries(x)
    assert got.scale.isfinite().all()
    assert (got.scale > 0).all()
    error = (dequantize(got, torch.float64) - x.double()).abs()
    assert (error <= x.double() * ROUNDOFF[E4M3] + 2.0**-70).all()
    rotated = quantize_queries(x, rotate=True)
    lost = x.double().amax() * 8 > 3.4e38  # the sums of a row, before they are divided by 8, pass the range of fp32
    assert bool(dequantize(rotated).isfinite().all()) or lost


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rotate", [False, True])
def test_what_is_not_finite_stays_where_it_is(value: float, rotate: bool, generator: torch.Generator) -> None:
    """In q and k it becomes NaN, in v it makes its key NaN, and no other number or scale changes."""
    q, k, v = (draw(generator, 2, 200, 2, 64) for _ in "qkv")
    k[1, 40, 0], v[1, 30, 1, 3] = 0.0, 0.0  # what takes no part in a scale
    q[0, 7, 1, 9] = 0.0
    clean = quantize(q, k, v, rotate=rotate)
    q[0, 7, 1, 9], k[1, 40, 0, 5], v[1, 30, 1, 3] = value, value, value
    got = quantize(q, k, v, rotate=rotate)
    numbers = [dequantize(x) for x in got]
    for x, before, marked in zip(numbers, clean, ([(0, 7, 1)], [(1, 40, 0), (1, 30, 1)], []), strict=True):
        rows = x.isnan().any(-1)
        assert [tuple(r) for r in rows.nonzero().tolist()] == sorted(marked, key=lambda r: (r[0], r[1], r[2]))
        kept = ~rows
        if not rotate or not marked:
            assert torch.equal(x[kept], dequantize(before)[kept])
    if not rotate:
        assert int(numbers[0].isnan().sum()) == 1
        for x, y in zip(got, clean, strict=True):
            assert torch.equal(x.scale, y.scale)
    assert numbers[1][1, 30, 1].isnan().all()
    assert numbers[2][1, 30, 1, 3] == 0


def test_no_rows_and_no_batch() -> None:
    for shape in ((2, 0, 3, 16), (0, 5, 3, 16)):
        x = torch.zeros(shape)
        for block in (128, 0):
            for got in quantize(x, x, x, block=block, v_order="keys"):
                assert got.shape == shape
                assert (got.scale == 1).all()
                assert dequantize(got).shape == shape


def test_wrong_arguments_are_refused_by_name() -> None:
    x = torch.zeros(1, 4, 1, 16)
    for wrong, message in (
        (lambda: quantize(x.double(), x, x), r"q: wanted dtype bfloat16, float16 or float32, got torch\.float64"),
        (lambda: quantize(x, x[0], x), r"k: wanted 4 dimensions"),
        (lambda: quantize(x, x, None), r"v: wanted a Tensor, got NoneType"),  # type: ignore[arg-type]
        (lambda: quantize(x, x, x.half()), r"v: wanted k's shape, dtype and device"),
        (lambda: quantize(x, x, x, block=64), r"block: wanted 128, or 0 .* got 64"),
        (lambda: quantize(x, x, x, rotate=-1), r"rotate: wanted False, True or a seed"),
        (lambda: quantize(x, x, x, v_order="heads"), r"v_order: wanted 'rows' or 'keys', got 'heads'"),  # type: ignore[arg-type]
        (lambda: quantize(x, x, x, dtype=torch.float16), r"dtype: wanted float8_e4m3fn or float8_e5m2"),
        (lambda: quantize(x[..., :4], x, x), r"q: wanted a head_dim that is a multiple of 8"),
        (lambda: quantize(x.clone().requires_grad_(), x, x), r"q: wanted no requires_grad"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_quantized_is_checked() -> None:
    good = quantize_queries(torch.zeros(2, 130, 3, 16))
    assert good.nbytes == 2 * 130 * 3 * 16 + 4 * 2 * 3 * 2
    for change, message in (
        ({"order": "columns"}, "order: wanted 'rows' or 'keys'"),
        ({"block": 64}, "block: wanted 128, or 0"),
        ({"block": 0}, r"scale: wanted float32 \[2, 3, 1\]"),
        ({"data": good.data.float()}, "data: wanted dtype float8_e4m3fn"),
        ({"data": good.data[0]}, "data: wanted 4 dimensions"),
        ({"length": 129}, "data: wanted 129 rows for length 129"),
        ({"scale": good.scale.double()}, r"scale: wanted float32 \[2, 3, 2\], got torch.float64"),
        ({"scale": good.scale[..., :1]}, r"scale: wanted float32 \[2, 3, 2\]"),
        ({"scale": good.scale.to("meta")}, "scale: wanted data's device cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=f"Quantized {message}"):
            replace(good, **change)


def test_what_cannot_be_served_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 4, 1, 24)
    with pytest.raises(Unsupported, match="a head_dim that is a power of two, got 24"):
        quantize_queries(x, rotate=True)
    with pytest.raises(Unsupported, match="fp8 needs a CUDA device of capability"):
        quantize_queries(x.to("meta"))
    monkeypatch.setattr(dispatch, "capability", lambda device: (8, 6))
    assert "8.9 or newer (or the CPU), got one of capability 8.6" in str(
        quantized.unsupported_device(torch.device("cuda"))
    )
    monkeypatch.setattr(dispatch, "capability", lambda device: (8, 9))
    assert quantized.unsupported_device(torch.device("cuda")) is None


# bytes of spill stores that a build may have, the larger of Triton 3.6 and 3.9; 0 where nothing is said
SPILLS = {"256 rotated keys": 184}
JOBS: dict[str, dict[str, Any]] = {
    "64 rotated": {"head_dim": 64, "capability": [8, 9], "rotate": True},
    "128 rotated keys": {"head_dim": 128, "capability": [9, 0], "rotate": True, "keys": True},
    "256 rotated keys": {"head_dim": 256, "capability": [9, 0], "rotate": True, "keys": True},
    "80 given": {"head_dim": 80, "capability": [8, 9], "step": "given"},
    "128 measured": {"head_dim": 128, "capability": [9, 0], "rotate": True, "step": "measure"},
    "128 q e5m2": {"head_dim": 128, "capability": [9, 0], "pair": False, "rotate": True, "wanted": "float8_e5m2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("newest", [False, True], ids=["oldest", "newest"])
def test_the_kernel_compiles_without_spills(newest: bool) -> None:
    if newest and not NEXT.is_dir():
        pytest.fail(f"{NEXT} is missing: make .triton-next/installed")
    names = ["128 rotated keys", "64 rotated"] if newest else list(JOBS)
    packages = NEXT if newest else None
    builds = build_all(
        "ringfa3_kernels.portable.quantized_builds",
        [{"kernel": "quantize"} | JOBS[n] for n in names],
        packages=packages,
    )
    found: dict[str, Build] = dict(zip(names, builds, strict=True))
    print(found)
    assert {name: b.spills for name, b in found.items() if b.spills > SPILLS.get(name, 0)} == {}
    assert all(b.shared <= 101376 for b in found.values())
