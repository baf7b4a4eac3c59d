"""fp8 on the ring of two GPUs: what arrives (v in either order), how exact it is, gradients, bytes, NaN."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ringfa3
from ringfa3 import Fp8, Plan
from ringfa3.fp8 import served_order
from ringfa3.traffic import counted
from ringfa3_kernels import attend, quantize
from tests.gpu.test_ring_gpu import MASKS, Case
from tests.ring.test_fp8 import SEQLEN, everywhere, not_finite

pytestmark = [pytest.mark.multigpu(2), pytest.mark.xdist_group("ranks, fp8")]  # one world, so one process

TRANSPORTS = ("ring", "gather", "pull", "hierarchical:1", "hierarchical:2")


@pytest.mark.parametrize("block", [128, 0])
@pytest.mark.parametrize("order", ["rows", "keys"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_either_order_arrives(gpu_world, transport, order, block):
    gpu_world(2)(everywhere, transport, order, block, random.randrange(2**31), "cuda")


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).square().mean().sqrt())


def as_exact_as_one_gpu(rank: int, size: int, case: Case, fp8: Fp8) -> None:
    """A rank's root mean square error against fp64 is at most a quarter above that of one fp8 call of all rows.

    Of the same rows: those that see few keys err more, and under a causal mask the first rank has them.
    """
    device = torch.device("cuda", rank)
    p = ringfa3.plan(case.mask, case.layout, case.seqlen, device=device)
    q, k, v = case.inputs(device)[:3]
    visible = Plan.build(case.mask, "contiguous", case.seqlen, 1, 0, device).hops[0].visible
    exact = attend(q.double(), k.double(), v.double(), visible, impl="reference").out
    order = served_order(q.shape[2], k.shape[2], case.D, q.dtype, device, False, "auto", fp8.block, fp8.rotate)
    whole = quantize(q, k, v, block=fp8.block, rotate=fp8.rotate, v_order=order)
    alone = attend(*whole, visible, out_dtype=q.dtype).out
    shards = [p.shard(x) for x in (q, k, v)]
    out = ringfa3.ring_attention(*shards, plan=p, fp8=fp8, **dict(case.options))
    assert out.dtype == q.dtype
    assert error(out, p.shard(exact)) <= 1.25 * error(p.shard(alone), p.shard(exact))
    assert error(alone, exact) <= 0.15 * float(exact.square().mean().sqrt())  # about 0.05


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mask", MASKS)
def test_as_exact_as_one_gpu(gpu_world, mask, transport):
    case = Case(MASKS[mask], "zigzag", options=(("transport", transport),))
    gpu_world(2)(as_exact_as_one_gpu, case, Fp8(rotate=True))


@pytest.mark.parametrize(
    ("case", "fp8"),
    [
        (Case(MASKS["causal"], D=64), Fp8()),
        (Case(MASKS["causal"], D=256, heads=(4, 4)), Fp8(rotate=7)),
        (Case(MASKS["causal"], D=80), Fp8()),
        (Case(MASKS["causal"], dtype=torch.float16), Fp8(block=0)),
        (Case(MASKS["window"], "striped"), Fp8()),
        (Case(MASKS["causal"], heads=(8, 1), seqlen=300), Fp8()),
    ],
    ids=str,
)
def test_options(gpu_world, case, fp8):
    gpu_world(2)(as_exact_as_one_gpu, replace(case, options=(("transport", "pull"),)), fp8)


def gradients(rank: int, size: int, case: Case, kind: str) -> None:
    """Exact ones are those of the call without fp8 bit for bit; rounded ones err by less than a fifth."""
    device = torch.device("cuda", rank)
    p = ringfa3.plan(case.mask, case.layout, case.seqlen, device=device)
    q, k, v, dout, _ = case.inputs(device)
    found = []
    for fp8 in (None, Fp8(rotate=True, gradients=kind)):
        leaves = [p.shard(x).requires_grad_() for x in (q, k, v)]
        out = ringfa3.ring_attention(*leaves, plan=p, fp8=fp8, deterministic=True, **dict(case.options))
        found.append(torch.autograd.grad(out, leaves, p.shard(dout)))
    for plain, other in zip(*found, strict=True):
        if kind == "exact":
            assert torch.equal(plain, other)
        else:
            assert 0 < (plain.double() - other.double()).norm() < 0.2 * plain.double().norm()


@pytest.mark.parametrize("kind", ["exact", "rounded"])
@pytest.mark.parametrize("transport", ["ring", "pull", "hierarchical:1"])
def test_gradients(gpu_world, transport, kind):
    gpu_world(2)(gradients, Case(MASKS["causal"], options=(("transport", transport),)), kind)


def halved(rank: int, size: int, transport: str) -> None:
    device = torch.device("cuda", rank)
    case = Case(MASKS["causal"], seqlen=2048)
    p = ringfa3.plan(case.mask, "zigzag", case.seqlen, device=device)
    shards = [p.shard(x) for x in case.inputs(device)[:3]]
    received = []
    for fp8 in (None, Fp8()):
        with counted() as moved:
            ringfa3.ring_attention(*shards, plan=p, transport=transport, fp8=fp8)
        received.append(dict(moved.received))
    before, after = received
    assert before
    assert after == {hop: number * (32 * case.D + 1) // (64 * case.D) for hop, number in before.items()}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_half_the_bytes_travel(gpu_world, transport):
    gpu_world(2)(halved, transport)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("transport", ["ring", "pull"])
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(gpu_world, transport, name):
    position, rows = random.randrange(SEQLEN), torch.arange(SEQLEN)
    sees = (rows >= position) & (rows <= position + 120) if name != "q" else rows == position
    for wrong in gpu_world(2)(not_finite, name, position, torch.inf, transport, "cuda"):
        assert torch.equal(wrong, sees), position
