"""Decode on CUDA: the contract, long caches, CUDA graphs, no synchronisation, addresses past 2^31 elements."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest
import torch

from ringfa3_kernels import Visible, decode
from tests.gpu.test_flash_attn_gpu import no_synchronising
from tests.kernels.decode_contract import CASES, Case, Inputs, check

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Several tiles of every config, more programs than multiprocessors, pages smaller and larger than a tile
LONG = (
    Case("one sequence", (5000,), Hq=32, Hkv=8, D=128, page=64, splits=(None, 1, 3, 100)),
    Case("small pages", (3000, 1), Hq=8, Hkv=2, D=128, page=16, splits=(None, 1)),
    Case("large pages", (3000, 70), Hq=8, Hkv=2, D=64, page=256, splits=(None, 1)),
    Case("8 tokens", (2000, 1500, 3), Sq=8, Hq=32, Hkv=8, D=128, page=64),
    Case("16 tokens", (1000,), Sq=16, Hq=32, Hkv=8, D=128, page=64),
    Case("MQA, several tiles of rows", (1000,), Sq=4, Hq=64, Hkv=1, D=64, page=32),
    Case("window", (3000, 100), Sq=2, Hq=8, Hkv=2, D=128, page=64, window=1000),
    Case("softcap", (2000,), Hq=8, Hkv=4, D=256, page=64, softcap=30.0),
    Case("head_dim 72", (1000, 300), Hq=6, Hkv=2, D=72, page=64),
    Case("40 sequences", tuple(range(0, 2000, 50)), Hq=4, Hkv=1, D=64, page=32, splits=(None, 1, 7)),
    Case("300 sequences", tuple(i % 97 for i in range(300)), Hq=4, Hkv=2, D=64, page=16),
    Case("keys before pages", (1500, 800), Hq=8, Hkv=2, D=128, page=64, layout="keys before pages"),
    Case("heads before keys", (1500, 800), Hq=8, Hkv=2, D=128, page=64, layout="heads before keys"),
    Case("unaligned", (1500, 800), Hq=8, Hkv=2, D=128, page=64, layout="unaligned"),
)


def generator() -> torch.Generator:
    seed = secrets.randbits(32)
    print(f"inputs are of torch.Generator().manual_seed({seed})")
    return torch.Generator().manual_seed(seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", ["portable", "aten", "reference"])
def test_contract(impl: str, case: Case, dtype: torch.dtype) -> None:
    check(impl, case, dtype, "cuda", generator())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_contract_over_many_tiles(case: Case, dtype: torch.dtype) -> None:
    check("portable", case, dtype, "cuda", generator())


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [None, 1])
def test_one_cuda_graph_serves_all_lengths(splits: int | None) -> None:
    """Captured for one batch, replayed for another: other lengths, tables and queries in the same tensors."""
    case = Case("", (3000, 10, 0, 700), Sq=2, Hq=8, Hkv=2, D=128, page=64, window=2000)
    first, second = (Inputs.draw(each, torch.bfloat16, "cuda", generator()) for each in (case, _other(case)))
    wanted = second.decode("portable", splits)
    held = [first.q, first.k_pages, first.v_pages, first.block_table, first.visible.lo, first.visible.hi]
    new = [second.q, second.k_pages, second.v_pages, second.block_table, second.visible.lo, second.visible.hi]

    def run() -> list[torch.Tensor]:
        partial = decode(*held[:4], Visible(*held[4:]), splits=splits, impl="portable")
        return [partial.out, partial.lse]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for old, value in zip(held, new, strict=True):
        old.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found[0], wanted.out)
    assert torch.equal(found[1], wanted.lse)


def _other(case: Case) -> Case:
    return replace(case, lengths=(64, 2999, 3000, 0))


@pytest.mark.gpu
def test_nothing_synchronises_and_results_repeat() -> None:
    inputs = Inputs.draw(LONG[3], torch.bfloat16, "cuda", generator())
    before = inputs.decode("portable", None)
    with no_synchronising():
        again = decode(inputs.q, inputs.k_pages, inputs.v_pages, inputs.block_table, inputs.visible)
    assert torch.equal(again.out, before.out)
    assert torch.equal(again.lse, before.lse)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("far", [False, True], ids=["pages first", "keys first"])
def test_addresses_past_2_to_the_31st(far: bool) -> None:
    """The last pages of a cache of 2^31 elements and more, 4.6 GB each of keys and values.

    With keys first even neighbours of a page lie 2^25 elements apart, so that a tile spans more than 2^31.
    """
    P, page, H, D = 36_000, 64, 8, 128
    shape = (page, P, H, D) if far else (P, page, H, D)
    pages = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
    k, v = (x.transpose(0, 1) if far else x for x in pages)
    table = torch.arange(P - 20, P, device="cuda", dtype=torch.int32)[None]
    small = [torch.randn(20, page, H, D, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
    for x, part in zip((k, v), small, strict=True):
        x[P - 20 :] = part
    q = torch.randn(1, 2, 32, D, device="cuda", dtype=torch.bfloat16)
    visible = Visible.causal(2, 20 * page, "cuda")
    found = decode(q, k, v, table, visible, impl="portable")
    wanted = decode(q, *small, table - (P - 20), visible, impl="portable")
    assert torch.equal(found.out, wanted.out)
    assert torch.equal(found.lse, wanted.lse)
