"""On CUDA: the quantising kernel is its torch twin bit for bit, and implementations keep the contract on fp8 inputs.

Hopper's fp8 kernel has tests of its own (test_fp8_hopper_gpu.py).
"""

from __future__ import annotations

import itertools
import secrets
from typing import Any

import pytest
import torch
from torch import Tensor

from ringfa3_kernels import attend, dequantize, quantize, quantize_keys, quantize_queries
from ringfa3_kernels import quantize_torch as twin
from ringfa3_kernels.quantized import FORMATS, SOURCES
from tests.kernels.contract import LAYOUTS, Case
from tests.kernels.fp8_contract import CASES, check_case, check_special

pytestmark = pytest.mark.gpu
E4M3, E5M2 = FORMATS


@pytest.fixture
def generator() -> torch.Generator:
    seed = secrets.randbits(32)
    print(f"inputs are of torch.Generator().manual_seed({seed})")
    return torch.Generator().manual_seed(seed)


def draw(generator: torch.Generator, B: int, S: int, H: int, D: int, dtype: torch.dtype) -> Tensor:
    """Numbers of many magnitudes, with zeros, NaN and infinities among them."""
    rows = 2.0 ** torch.randint(-6, 7, (B, S, H, 1), generator=generator)
    x = torch.randn(B, S, H, D, generator=generator) * rows
    x[:, 3:5] = 0.0
    x[0, 7, 0, 1], x[-1, S - 1, -1, 0], x[-1, 9, 0, 5] = torch.nan, torch.inf, -torch.inf
    return x.to("cuda", dtype)


def same(ours: tuple[Tensor, Tensor], twins: tuple[Tensor, Tensor]) -> bool:
    data, scale = ours
    return torch.equal(data.cpu().view(torch.uint8), twins[0].view(torch.uint8)) and torch.equal(scale.cpu(), twins[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_is_its_twin_bit_for_bit(layout: str, generator: torch.Generator) -> None:
    """Every size meets every pair of source and format in some layout: all in all would be 500 builds, of seconds."""
    pairs = list(itertools.product(SOURCES, FORMATS))
    sizes = (
        (64, 300, 128, 5, "keys"),
        (128, 517, 128, 1, "keys"),
        (128, 256, 0, 2, "rows"),
        (256, 130, 128, 3, "keys"),
        (256, 40, 0, None, "keys"),
        (80, 129, 128, None, "rows"),
        (16, 127, 0, 9, "rows"),
    )
    for turn, (D, S, block, seed, v_order) in enumerate(sizes, start=list(LAYOUTS).index(layout)):
        source, dtype = pairs[turn % len(pairs)]
        q, k, v = (LAYOUTS[layout](draw(generator, 2, S, 3, D, source)) for _ in "qkv")
        rotate: Any = False if seed is None else seed
        ours = (
            quantize_queries(q, block=block, rotate=rotate, dtype=dtype),
            *quantize_keys(k, v, block=block, rotate=rotate, v_order=v_order, dtype=dtype),  # type: ignore[arg-type]
        )
        options: dict[str, Any] = {"block": block, "seed": seed, "dtype": dtype}
        q, k, v = (x.cpu() for x in (q, k, v))
        twins = twin.quantize_queries(q, **options), *twin.quantize_keys(k, v, v_order=v_order, **options)
        for name, x, y in zip("qkv", ours, twins, strict=True):
            assert same((x.data, x.scale), y), (name, D, S, block, seed, source, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", ["reference", "portable"])
def test_attend_is_attention_on_what_fp8_stands_for(impl: str, case: Case, generator: torch.Generator) -> None:
    for block in (128, 0):
        for dtype in FORMATS:
            check_case(impl, case, "cuda", generator, block=block, dtype=dtype, rotate=dtype == E4M3)


@pytest.mark.parametrize("impl", ["reference", "portable"])
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(impl: str, generator: torch.Generator) -> None:
    check_special(impl, "cuda", generator)


def test_long_shards_pass_two_to_the_31_elements(generator: torch.Generator) -> None:
    """Offsets of 64 bits: the last rows of a tensor of more than 2^31 elements are quantised as they are alone."""
    S, H, D = 131072, 64, 264 - 8
    x = torch.zeros(1, S, H, D, dtype=torch.bfloat16, device="cuda")
    x[:, -128:] = torch.randn(1, 128, H, D, generator=generator).bfloat16().cuda()
    assert x.numel() >= 2**31
    got = quantize_queries(x).rows(S - 128, S)
    alone = quantize_queries(x[:, -128:])
    assert torch.equal(got.scale, alone.scale)
    assert torch.equal(got.data.view(torch.uint8), alone.data.view(torch.uint8))


def test_quantising_can_be_captured(generator: torch.Generator) -> None:
    """Nothing in it waits for the device or copies from the host: a CUDA graph replays it on new numbers."""
    q, k, v = (torch.randn(1, 300, 2, 64, generator=generator).bfloat16().cuda() for _ in "qkv")
    quantize(q, k, v, rotate=True), quantize(q, k, v, block=0)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_block, by_head = quantize(q, k, v, rotate=True), quantize(q, k, v, block=0)
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, generator=generator))
    graph.replay()
    for captured, fresh in ((by_block, quantize(q, k, v, rotate=True)), (by_head, quantize(q, k, v, block=0))):
        for x, y in zip(captured, fresh, strict=True):
            assert torch.equal(dequantize(x), dequantize(y))
            assert torch.equal(x.scale, y.scale)


def test_auto_serves_rows_order(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 200, 2, 64, generator=generator).bfloat16().cuda() for _ in "qkv")
    fp8 = quantize(q, k, v)
    truth = attend(*(dequantize(x, torch.float64) for x in fp8), impl="reference")
    assert (attend(*fp8).out - truth.out).abs().max() < 1e-2
