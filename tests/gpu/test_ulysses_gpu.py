"""Ulysses and the mesh ulysses x ring over NCCL: masks, heads, directions, and many calls in flight."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ringfa3
from ringfa3 import Mask
from tests.gpu.test_ring_gpu import agrees

pytestmark = [pytest.mark.multigpu(2), pytest.mark.xdist_group("ranks, ulysses")]  # one world, so one process

MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=(200, 0)),
    "window both sides": Mask(causal=False, window=(100, 300)),
    "documents": Mask(documents=(400, 1, 900, 747 - 1)),
    "prefix": Mask(prefix=700),
    "chunk": Mask(chunk=512),
    "per batch row": Mask(documents=((1000, 1047), (2, 45, 2000))),
}
ALONE = (("transport", "ulysses"),)


@dataclass(frozen=True)
class Case:
    """One call on inputs drawn from a seed; options are ring_attention's. Without a mesh's shape: Ulysses alone."""

    mask: Mask
    shape: tuple[int, int] | None = None
    layout: str = "contiguous"
    dtype: torch.dtype = torch.bfloat16
    seqlen: int = 2047
    B: int = 2
    heads: tuple[int, int] = (8, 2)
    D: int = 128
    options: tuple[tuple[str, Any], ...] = field(default=ALONE)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Whole q, k, v, dout [B, S, H, D] and dlse [B, Hq, S], the same on every rank."""
        g = torch.Generator().manual_seed(0)
        sizes = (self.heads[0], self.heads[1], self.heads[1], self.heads[0])
        made = [torch.randn(self.B, self.seqlen, h, self.D, generator=g).to(device, self.dtype) for h in sizes]
        return [*made, torch.randn(self.B, self.heads[0], self.seqlen, generator=g).to(device)]


@lru_cache
def mesh_of(shape: tuple[int, int] | None) -> DeviceMesh | None:
    return None if shape is None else init_device_mesh("cuda", shape, mesh_dim_names=("ulysses", "ring"))


def ulysses_case(rank: int, size: int, case: Case) -> None:
    device = torch.device("cuda", rank)
    mesh = mesh_of(case.shape)
    p = ringfa3.plan(case.mask, case.layout, case.seqlen, mesh, device=device)
    q, k, v, dout, dlse = case.inputs(device)
    mine = [p.shard(x).requires_grad_() for x in (q, k, v)]
    options = dict(case.options)
    got = ringfa3.ring_attention(*mine, mask=case.mask, layout=case.layout, return_lse=True, group=mesh, **options)
    out, lse = got.wait() if options.get("async_op") else got
    torch.autograd.backward([out, lse], [p.shard(dout), p.shard(dlse, 2)])
    found = [out.detach(), lse.detach(), *(x.grad for x in mine)]
    agrees(case, p, found)


@pytest.mark.parametrize("mask", MASKS)
def test_ulysses_alone_equals_one_gpu(gpu_world, mask):
    gpu_world(2)(ulysses_case, Case(MASKS[mask]))


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "window", "documents", "per batch row"])
def test_meshes_equal_one_gpu(gpu_world, shape, mask):
    gpu_world(2)(ulysses_case, Case(MASKS[mask], shape, "zigzag", options=(("transport", "auto"),)))


@pytest.mark.parametrize(
    "case",
    [
        Case(Mask(), dtype=torch.float16, B=1),
        Case(Mask(), dtype=torch.float32, D=64),
        Case(Mask(), heads=(4, 1)),
        Case(Mask(), heads=(7, 1), B=1),
        Case(Mask(), heads=(6, 3)),
        Case(Mask(), seqlen=1),
        Case(Mask(window=(200, 0)), options=(*ALONE, ("async_op", True))),
        Case(Mask(), heads=(4, 1), options=(*ALONE, ("deterministic", True))),
        Case(Mask(), seqlen=2048, options=(*ALONE, ("agree", False))),
    ],
    ids=[
        "fp16",
        "fp32",
        "shared head",
        "uneven heads",
        "uneven groups",
        "one token",
        "async",
        "deterministic",
        "alone",
    ],
)
def test_options(gpu_world, case):
    gpu_world(2)(ulysses_case, case)


@pytest.mark.multigpu(4)
@pytest.mark.parametrize("layout", ["zigzag", "striped", "balanced"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_mesh_of_four_equals_one_gpu(gpu_world, layout, mask):
    transport = ("ring", "gather", "auto")[list(MASKS).index(mask) % 3]
    case = Case(MASKS[mask], (2, 2), layout, options=(("transport", transport),))
    gpu_world(4)(ulysses_case, case)
    gpu_world(4)(ulysses_case, replace(case, heads=(6, 1)))


@pytest.mark.multigpu(4)
@pytest.mark.parametrize("heads", [(8, 2), (6, 2), (5, 1)], ids=str)
def test_ulysses_of_four_equals_one_gpu(gpu_world, heads):
    gpu_world(4)(ulysses_case, Case(Mask(), heads=heads))


def many_in_flight(rank: int, size: int, shape: tuple[int, int] | None) -> None:
    """Buffers reused while messages or kernels still need them would show as differing results."""
    device = torch.device("cuda", rank)
    layout, options = ("contiguous", dict(ALONE)) if shape is None else ("zigzag", {"transport": "ring"})
    p = ringfa3.plan(Mask(), layout, 8192 * size, mesh_of(shape), device=device)
    g = torch.Generator(device).manual_seed(rank)
    q, k, v = (
        torch.randn(1, 8192, h, 128, generator=g, device=device, dtype=torch.bfloat16).requires_grad_()
        for h in (8, 2, 2)
    )
    dout = torch.randn(q.shape, generator=g, device=device, dtype=q.dtype)
    want = ringfa3.ring_attention(q, k, v, plan=p, **options)
    grads = torch.autograd.grad(want, (q, k, v), dout)
    torch.cuda.synchronize()
    results = [ringfa3.ring_attention(q, k, v, plan=p, **options) for _ in range(6)]
    handles = [ringfa3.ring_attention(q, k, v, plan=p, async_op=True, **options) for _ in range(6)]
    churn = [torch.full((1 << 22,), float("nan"), device=device) for _ in range(8)]
    del churn
    for result in [*results, *(handle.wait() for handle in handles)]:
        assert torch.equal(result, want)
        for a, b in zip(torch.autograd.grad(result, (q, k, v), dout), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # the kernels may add in another order


@pytest.mark.parametrize("shape", [None, pytest.param((2, 2), marks=pytest.mark.multigpu(4))], ids=["alone", "mesh"])
def test_many_calls_in_flight(gpu_world, shape):
    gpu_world(2 if shape is None else 4)(many_in_flight, shape)


def not_blocked(rank: int, size: int) -> float:
    """Host seconds of 4 calls and backward passes while the device is kept busy for about a second before them."""
    device = torch.device("cuda", rank)
    p = ringfa3.plan(Mask(), "contiguous", 4096 * size, device=device)
    q, k = (torch.randn(1, 4096, h, 128, device=device, dtype=torch.bfloat16).requires_grad_() for h in (8, 2))
    for _ in range(3):  # kernels compiled, memory pooled
        ringfa3.ring_attention(q, k, k, plan=p, transport="ulysses").sum().backward()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    start = time.monotonic()
    for _ in range(4):
        ringfa3.ring_attention(q, k, k, plan=p, transport="ulysses").sum().backward()
    taken = time.monotonic() - start
    torch.cuda.synchronize()
    return taken


def test_the_host_is_never_blocked(gpu_world):
    assert max(gpu_world(2)(not_blocked)) < 0.5
