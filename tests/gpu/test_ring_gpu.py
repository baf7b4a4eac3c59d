"""ring_attention over NCCL: every layout and mask, forward and backward, and a million tokens on two GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import ringfa3
from ringfa3 import Mask, Plan
from ringfa3_kernels import Visible, attend, attend_backward, row_delta

pytestmark = [pytest.mark.multigpu(2), pytest.mark.xdist_group("ranks")]  # one world, so one process

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
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
SEQLEN = 2047


@dataclass(frozen=True)
class Case:
    """One call on inputs drawn from a seed; options are ring_attention's."""

    mask: Mask
    layout: str = "zigzag"
    dtype: torch.dtype = torch.bfloat16
    seqlen: int = SEQLEN
    heads: tuple[int, int] = (8, 2)
    D: int = 128
    options: tuple[tuple[str, Any], ...] = field(default=(("transport", "ring"),))

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Whole q, k, v, dout [2, S, H, D] and dlse [2, Hq, S], the same on every rank."""
        g = torch.Generator().manual_seed(0)
        sizes = (self.heads[0], self.heads[1], self.heads[1], self.heads[0])
        made = [torch.randn(2, self.seqlen, h, self.D, generator=g).to(device, self.dtype) for h in sizes]
        return [*made, torch.randn(2, self.heads[0], self.seqlen, generator=g).to(device)]


def on_one_gpu(case: Any, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv by the reference, in this dtype."""
    q, k, v, dout = (x.to(dtype) for x in case.inputs(device)[:4])
    dlse = case.inputs(device)[4]
    p = Plan.build(case.mask, "contiguous", case.seqlen, 1, 0, device)
    visible: Visible = p.hops[0].visible
    wide = torch.promote_types(dtype, torch.float32)
    state = attend(q, k, v, visible, out_dtype=dtype, impl="reference")
    delta = row_delta(dout, state.out, dlse.to(wide))
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=device) for x in (q, k, v))
    attend_backward(dout, q, k, v, state.lse, delta, visible, dq=dq, dk=dk, dv=dv, impl="reference")
    return [state.out, state.lse, dq.to(dtype), dk.to(dtype), dv.to(dtype)]


def agrees(case: Any, p: Plan, found: list[Tensor]) -> None:
    """out, lse, dq, dk, dv of this rank's rows err at most twice as much as plain attention on one GPU."""
    truth, plain = (on_one_gpu(case, p.device, dtype) for dtype in (torch.float64, case.dtype))
    for name, exact, theirs, ours in zip(("out", "lse", "dq", "dk", "dv"), truth, plain, found, strict=True):
        exact, theirs = (p.shard(x, 2 if name == "lse" else 1).double() for x in (exact, theirs))
        assert ours.shape == exact.shape
        if not ours.numel():  # this rank's shard is empty
            continue
        error, allowed = ((x - exact).abs().max().item() for x in (ours.double(), theirs))
        assert error <= 2 * allowed + 1e-5 * max(1.0, exact.abs().max().item()), (
            f"{name}: {error:.2e}, plain {allowed:.2e}"
        )


def ring_case(rank: int, size: int, case: Case) -> None:
    device = torch.device("cuda", rank)
    p = ringfa3.plan(case.mask, case.layout, case.seqlen, device=device)
    q, k, v, dout, dlse = case.inputs(device)
    mine = [p.shard(x).requires_grad_() for x in (q, k, v)]
    options = dict(case.options)
    got = ringfa3.ring_attention(*mine, mask=case.mask, layout=case.layout, return_lse=True, **options)
    out, lse = got.wait() if options.get("async_op") else got
    torch.autograd.backward([out, lse], [p.shard(dout), p.shard(dlse, 2)])
    found = [out.detach(), lse.detach(), *(x.grad for x in mine)]
    agrees(case, p, found)


@pytest.mark.parametrize("transport", ["ring", "gather"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_one_gpu(gpu_world, layout, mask, transport):
    gpu_world(2)(ring_case, Case(MASKS[mask], layout, options=(("transport", transport),)))


@pytest.mark.parametrize(
    "case",
    [
        Case(Mask(), dtype=torch.float16),
        Case(Mask(), dtype=torch.float32, D=64),
        Case(Mask(), seqlen=1),
        Case(Mask(window=(200, 0)), "contiguous", options=(("transport", "ring"), ("async_op", True))),
        Case(Mask(), options=(("transport", "ring"), ("deterministic", True))),
        Case(Mask(), options=(("transport", "auto"), ("softcap", 0.0), ("agree", False)), seqlen=2048),
    ],
    ids=["fp16", "fp32", "one token", "async", "deterministic", "no agreement"],
)
def test_options(gpu_world, case):
    gpu_world(2)(ring_case, case)


def many_in_flight(rank: int, size: int) -> None:
    """Buffers reused while kernels still read them would show as differing results."""
    device = torch.device("cuda", rank)
    p = ringfa3.plan(Mask(), "zigzag", 16384, device=device)
    g = torch.Generator(device).manual_seed(rank)
    qkv = [torch.randn(1, 8192, h, 128, generator=g, device=device, dtype=torch.bfloat16) for h in (8, 2, 2)]
    want = ringfa3.ring_attention(*qkv, plan=p, transport="ring")
    torch.cuda.synchronize()
    results = [ringfa3.ring_attention(*qkv, plan=p, transport="ring") for _ in range(10)]
    handles = [ringfa3.ring_attention(*qkv, plan=p, transport="ring", async_op=True) for _ in range(10)]
    churn = [torch.full((1 << 22,), float("nan"), device=device) for _ in range(8)]
    del churn
    for result in [*results, *(handle.wait() for handle in handles)]:
        assert torch.equal(result, want)


def test_many_calls_in_flight(gpu_world):
    gpu_world(2)(many_in_flight)


def million(rank: int, size: int) -> int:
    """Forward and backward of 1M tokens, 8 heads of 128; sampled rows against fp32 maths; peak bytes."""
    device = torch.device("cuda", rank)
    S, H, D = 1 << 20, 8, 128
    p = ringfa3.plan(Mask(), "zigzag", S, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    g = torch.Generator(device).manual_seed(rank)
    q, k, v = (
        torch.randn(1, p.lengths[rank], H, D, generator=g, device=device, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    out, lse = ringfa3.ring_attention(q, k, v, plan=p, return_lse=True)
    out.backward(torch.ones_like(out))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device)
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v))
    whole_k, whole_v = (p.unshard(x.detach()) for x in (k, v))
    for row in (0, 1000, p.lengths[rank] // 2, p.lengths[rank] - 1):
        position = int(p.positions[row])
        keys, values = (x[0, : position + 1].float() for x in (whole_k, whole_v))
        s = torch.einsum("hd,jhd->hj", q[0, row].detach().float(), keys) * D**-0.5
        torch.testing.assert_close(lse[0, :, row].detach(), torch.logsumexp(s, -1), atol=1e-3, rtol=1e-4)
        exact = torch.einsum("hj,jhd->hd", torch.softmax(s, -1), values)
        torch.testing.assert_close(out[0, row].detach().float(), exact, atol=2e-3, rtol=2e-2)
    return peak


@pytest.mark.slow
def test_a_million_tokens_fit_on_two_gpus(gpu_world):
    peaks = gpu_world(2)(million, timeout=580)
    # q, k, v, out and their gradients are 8 GiB a rank; fp32 state, dq, dk, dv and pieces under way as much again
    assert max(peaks) < 40 << 30
