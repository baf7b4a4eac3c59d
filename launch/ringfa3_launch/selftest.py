"""What the ranks of doctor's self-test do: ring attention, forward and backward, against the oracle in fp64."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ringfa3.attention import ring_attention
from ringfa3.mask import Mask
from ringfa3.plan import plan
from ringfa3_kernels import Visible, attend, attend_backward, row_delta
from ringfa3_launch.rank import RankInfo, pick_device

ROWS, HQ, HKV, D = 301, 4, 2, 64  # rows a rank; odd, so that shards are uneven
FLOOR = 1e-6  # relative error below which nobody is wrong: fp32 sums in another order


def ring_errors(info: RankInfo, device: str) -> dict[str, Any]:
    """Relative errors of out, dq, dk and dv over the whole sequence, and what they may be: twice plain attention's.

    Returns:
        {"device", "dtype", "seqlen", "seconds" (of the second call, forward and backward), "errors", "limits"}.
    """
    place = pick_device(info.local_rank, info.local_world, device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    S = ROWS * info.world
    generator = torch.Generator().manual_seed(0)
    heads = (HQ, HKV, HKV, HQ)
    q, k, v, dout = (torch.randn(1, S, h, D, generator=generator).to(place, dtype) for h in heads)
    dealt = plan(Mask(causal=True), "zigzag", S, device=place)
    shard = [dealt.shard(x).requires_grad_() for x in (q, k, v)]
    for _ in range(2):  # the first call loads libraries and compiles kernels
        begin = time.perf_counter()
        out = ring_attention(*shard, plan=dealt)
        grads = torch.autograd.grad(out, shard, dealt.shard(dout))
        if place.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    got = [dealt.unshard(x.detach()) for x in (out, *grads)]
    exact = _plain(q, k, v, dout, torch.float64)
    plain = _plain(q, k, v, dout, dtype)
    names = ("out", "dq", "dk", "dv")
    return {
        "device": place.type,
        "dtype": str(dtype).removeprefix("torch."),
        "seqlen": S,
        "seconds": seconds,
        "errors": {name: _error(x, y) for name, x, y in zip(names, got, exact, strict=True)},
        "limits": {name: 2 * _error(x, y) + FLOOR for name, x, y in zip(names, plain, exact, strict=True)},
    }


def _plain(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of plain attention, computed in dtype."""
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
    visible = Visible.causal(q.shape[1], k.shape[1], q.device)
    out, lse = (p := attend(q, k, v, visible, out_dtype=dtype, impl="reference")).out, p.lse
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    options: dict[str, Any] = {"accumulate": False, "impl": "reference"}
    attend_backward(dout, q, k, v, lse, row_delta(dout, out), visible, dq=dq, dk=dk, dv=dv, **options)
    return out, dq, dk, dv


def _error(x: Tensor, exact: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((x.double() - exact).norm() / exact.norm())
