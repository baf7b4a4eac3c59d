"""ring_attention against attention on one device: every layout, mask and transport, forward and backward."""

from __future__ import annotations

import gc
import inspect
import os
import sys
import time
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringfa3
from ringfa3 import Mask, Plan, RankFailed
from ringfa3_kernels import Unsupported, Visible
from tests.ring.masks import masks

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=(9, 0)),
    "window both sides": Mask(causal=False, window=(5, 11)),
    "documents": Mask(documents=(17, 1, 30, 13)),
    "prefix": Mask(prefix=23),
    "chunk": Mask(chunk=16),
    "per batch row": Mask(documents=((40, 21), (9, 50, 2))),
}
CAUSAL = MASKS["causal"]
SEQLEN = 61


@dataclass(frozen=True)
class Case:
    """One call of ring_attention on inputs drawn from a seed."""

    mask: Mask = CAUSAL
    layout: str = "zigzag"
    transport: str = "ring"
    seqlen: int = SEQLEN
    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    D: int = 16
    dtype: torch.dtype = torch.float32
    softcap: float = 0.0
    scale: float | None = None
    sinks: bool = False
    impl: str = "aten"
    seed: int = 0

    def inputs(self) -> dict[str, Tensor]:
        """Whole q, k, v, gradients of out and lse, and sinks; the same wherever it is called."""
        g = torch.Generator().manual_seed(self.seed)
        sizes = {"q": self.Hq, "k": self.Hkv, "v": self.Hkv, "dout": self.Hq}
        made = {n: torch.randn(self.B, self.seqlen, h, self.D, generator=g).to(self.dtype) for n, h in sizes.items()}
        made["dlse"] = torch.randn(self.B, self.Hq, self.seqlen, generator=g)
        made["sinks"] = torch.randn(self.Hq, generator=g)
        return made


def on_one_device(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Plain attention in this dtype by autograd: what the ring is compared with (and, in fp64, the truth)."""
    x = {name: t.to(dtype).requires_grad_() for name, t in case.inputs().items()}
    wide = torch.promote_types(dtype, torch.float32)
    p = Plan.build(case.mask, "contiguous", case.seqlen, 1, 0)
    visible = p.hops[0].visible if p.hops else Visible.full(case.seqlen, case.seqlen)
    mask = visible.mask(case.seqlen)
    group = case.Hq // case.Hkv
    s = torch.einsum("bihd,bjhd->bhij", x["q"], x["k"].repeat_interleave(group, 2)).to(wide)
    s = s * (case.D**-0.5 if case.scale is None else case.scale)
    s = case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
    s = s.masked_fill(~(mask if mask.ndim == 2 else mask[:, None]), -torch.inf)
    if case.sinks:
        sink = x["sinks"].to(wide)[:, None, None].expand(case.B, -1, case.seqlen, 1)
        s = torch.cat([s, sink], -1)
    lse = torch.logsumexp(s, -1)
    weights = torch.exp(s - lse[..., None])[..., : case.seqlen]
    out = torch.einsum("bhij,bjhd->bihd", weights.to(dtype), x["v"].repeat_interleave(group, 2))
    torch.autograd.backward([out, lse], [x["dout"].detach(), x["dlse"].detach().to(wide)])
    got = {"out": out.detach(), "lse": lse.detach(), "dq": x["q"].grad, "dk": x["k"].grad, "dv": x["v"].grad}
    if case.sinks:
        got["dsinks"] = x["sinks"].grad
    return got  # type: ignore[return-value]


def ring_case(rank: int, size: int, case: Case, options: dict[str, Any]) -> dict[str, Tensor]:
    """The same by ring_attention, from shards; what every rank holds of the results."""
    p = Plan.build(case.mask, case.layout, case.seqlen, size, rank)
    x = {n: p.shard(t, 2 if n == "dlse" else 1) if n != "sinks" else t for n, t in case.inputs().items()}
    q, k, v, sinks = (x[n].requires_grad_() for n in ("q", "k", "v", "sinks"))
    got = ringfa3.ring_attention(
        q, k, v, mask=case.mask, layout=case.layout, transport=case.transport, softcap=case.softcap, scale=case.scale,
        sink_logits=sinks if case.sinks else None, return_lse=True, impl=case.impl, **options,
    )  # fmt: skip
    out, lse = got.wait() if options.get("async_op") else got
    assert out.dtype == q.dtype
    torch.autograd.backward([out, lse], [x["dout"], x["dlse"]])
    grads = {"dq": q.grad, "dk": k.grad, "dv": v.grad} | ({"dsinks": sinks.grad} if case.sinks else {})
    assert all(g is not None for g in grads.values())
    return {"out": out.detach(), "lse": lse.detach()} | grads  # type: ignore[operator]


def whole(case: Case, shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' results, put together."""
    p = Plan.build(case.mask, case.layout, case.seqlen, len(shards), 0)
    joined = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        joined[name] = sum(parts) if name == "dsinks" else p.join(parts, 2 if name == "lse" else 1)
    return joined  # type: ignore[return-value]


def check(case: Case, shards: list[dict[str, Tensor]]) -> dict[str, float]:
    """Error against fp64 at most twice that of plain attention in the inputs' dtype; the errors."""
    truth, plain, got = on_one_device(case, torch.float64), on_one_device(case, case.dtype), whole(case, shards)
    errors = {}
    for name, exact in truth.items():
        mine, theirs = (torch.nan_to_num(x[name].double() - exact).abs().max() for x in (got, plain))
        assert torch.equal(got[name].isneginf(), exact.isneginf()), name
        assert not got[name].isnan().any(), name
        floor = 1e-6 * max(1.0, exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 1.0)
        assert mine <= 2 * theirs + floor, f"{name}: error {mine:.2e}, plain attention's is {theirs:.2e}"
        errors[name] = mine.item()
    return errors


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_one_device(world, size, layout, mask):
    transport = ("ring", "gather")[(LAYOUTS.index(layout) + list(MASKS).index(mask) + size) % 2]
    case = Case(MASKS[mask], layout, transport)
    check(case, world(size)(ring_case, case, {}))


@pytest.mark.parametrize("transport", ["ring", "gather"])
@pytest.mark.parametrize(
    "case",
    [
        Case(B=3, Hq=8, Hkv=1, D=24),
        Case(B=1, Hq=2, Hkv=2, D=8, scale=0.7),
        Case(softcap=3.0),
        Case(sinks=True),
        Case(Mask(window=(9, 0)), sinks=True, softcap=2.0, dtype=torch.bfloat16),
        Case(dtype=torch.bfloat16, seqlen=128),
        Case(seqlen=2),
        Case(seqlen=1, layout="striped"),
        Case(seqlen=3, layout="contiguous"),
        Case(Mask(causal=False), seqlen=5, layout="balanced"),
        Case(Mask(documents=(17, 1, 30, 13)), "balanced", dtype=torch.bfloat16),
    ],
    ids=lambda case: f"{case.layout}-S{case.seqlen}-{case.dtype}-cap{case.softcap}-sinks{case.sinks}-B{case.B}",
)
def test_options_and_odd_sizes(world, case, transport):
    case = replace(case, transport=transport)
    check(case, world(3)(ring_case, case, {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_does_not_grow_with_the_world(world, dtype):
    case = Case(seqlen=192, dtype=dtype, D=32)
    errors = {size: check(case, world(size)(ring_case, case, {})) for size in (1, 2, 3, 4, 8)}
    for name, alone in errors[1].items():
        for size, found in errors.items():
            assert found[name] <= 1.5 * alone + 1e-6, (
                f"{name}: error {found[name]:.2e} at world {size}, {alone:.2e} at 1"
            )


@given(data=st.data())
@settings(max_examples=40)
def test_any_mask_layout_and_length(world, data):
    seqlen = data.draw(st.integers(1, 40), "seqlen")
    mask = data.draw(masks(seqlen), "mask")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    transport = data.draw(st.sampled_from(["ring", "gather"]), "transport")
    size = data.draw(st.sampled_from([2, 3]), "size")
    case = Case(mask, layout, transport, seqlen, B=mask.batch or 2, D=8, sinks=data.draw(st.booleans(), "sinks"))
    check(case, world(size)(ring_case, case, {}))


def by_plan(rank: int, size: int) -> None:
    p = ringfa3.plan(Mask(window=(7, 0)), "striped", 33)
    x = torch.randn(1, 33, 2, 16, generator=torch.Generator().manual_seed(0))
    q = p.shard(x)
    options = {"transport": "ring", "impl": "aten"}
    want = ringfa3.ring_attention(q, q, q, window=(7, 0), layout="striped", **options)
    for also in ({"agree": False}, {"mask": p.mask, "layout": p.layout}, {"group": dist.group.WORLD}):
        assert torch.equal(ringfa3.ring_attention(q, q, q, plan=p, **also, **options), want)
    even = ringfa3.ring_attention(q[:, :8], q[:, :8], q[:, :8], agree=False, **options)
    assert torch.equal(even, ringfa3.ring_attention(q[:, :8], q[:, :8], q[:, :8], **options))
    with pytest.raises(ValueError, match="plan: wanted one for rank"):
        ringfa3.ring_attention(q, q, q, plan=Plan.build(Mask(), "zigzag", 33, size + 1, rank), **options)
    if size > 1:
        uneven = x[:, : 10 - 2 * rank]  # no layout deals 10 rows to rank 0 and 8 to rank 1
        with pytest.raises(ValueError, match=r"q: wanted the contiguous layout's shards of 18 rows, \[9, 9\]"):
            ringfa3.ring_attention(uneven, uneven, uneven, layout="contiguous", **options)


@pytest.mark.parametrize("size", [1, 2])
def test_plans(world, size):
    world(size)(by_plan)


def cross(rank: int, size: int, kv_seqlen: int) -> None:
    g = torch.Generator().manual_seed(0)
    whole_q, whole_k = torch.randn(1, 13, 2, 16, generator=g), torch.randn(1, kv_seqlen, 2, 16, generator=g)
    p = ringfa3.plan(Mask(causal=False), "zigzag", 13, kv_seqlen=kv_seqlen)
    q = p.shard(whole_q).requires_grad_()
    k = ringfa3.shard(whole_k).requires_grad_()
    out, lse = ringfa3.ring_attention(q, k, k, plan=p, return_lse=True, transport="ring", impl="aten")
    out.sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    if kv_seqlen == 0:
        assert not out.any()
        assert lse.isneginf().all()
        assert not q.grad.any()
        return
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (whole_q, whole_k, whole_k)))
    torch.testing.assert_close(out, p.shard(want.transpose(1, 2)))


@pytest.mark.parametrize("kv_seqlen", [0, 1, 29])
def test_cross_attention(world, kv_seqlen):
    world(3)(cross, kv_seqlen)


def meshes(rank: int, size: int) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ring"))
    place = mesh["ring"].get_local_rank()
    q = torch.randn(1, 8, 2, 16, generator=torch.Generator().manual_seed(rank // 2))
    mine = q[:, place::2]
    got = ringfa3.ring_attention(mine, mine, mine, group=mesh["ring"], layout="striped", transport="ring", impl="aten")
    alone = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(got, alone[:, place::2])
    with pytest.raises(ValueError, match="group: wanted a ProcessGroup or a 1-D DeviceMesh"):
        ringfa3.ring_attention(mine, mine, mine, group=mesh)


def test_meshes_and_subgroups(world):
    world(4)(meshes)


BAD = {
    "q: wanted 4 dimensions": {"q": torch.zeros(1, 8, 16)},
    "q: wanted a Tensor": {"q": 3},
    "k: wanted q's dtype": {"k": torch.zeros(1, 8, 2, 16).half()},
    "k: wanted q's 8 rows": {"k": torch.zeros(1, 7, 2, 16), "v": torch.zeros(1, 7, 2, 16)},
    "v: wanted k's shape": {"v": torch.zeros(1, 8, 1, 16)},
    "q: wanted a number of heads that is a multiple of k's 2, got 3": {"q": torch.zeros(1, 8, 3, 16)},
    "q: wanted at least one head, got 0": {"q": torch.zeros(1, 8, 0, 16)},
    "q: wanted a head_dim": {n: torch.zeros(1, 8, 2, 264) for n in "qkv"},
    "window: wanted": {"window": (-2, 0)},
    "documents: wanted lengths that sum": {"documents": (3, 4)},
    "documents: wanted lengths for q's 1 batch rows, got them for 2": {"documents": ((8,), (8,))},
    "softcap: wanted 0": {"softcap": -1.0},
    "scale: wanted a finite number": {"scale": float("nan")},
    "layout: wanted": {"layout": "spiral"},
    "transport: wanted": {"transport": "pigeon"},
    "impl: wanted": {"impl": "fastest"},
    "sink_logits: wanted a number per query head": {"sink_logits": torch.zeros(3)},
    "plan: wanted a Plan": {"plan": "zigzag"},
    "window: wanted none beside mask": {"mask": Mask(), "window": (3, 0)},
    "causal: wanted none beside plan": {"plan": Plan.build(Mask(), "zigzag", 8, 1, 0), "causal": False},
    "layout: wanted the plan's": {"plan": Plan.build(Mask(), "zigzag", 8, 1, 0), "layout": "striped"},
    "group: wanted": {"group": 3},
    "agree: wanted": {"agree": "yes"},
    "causal: wanted True or False, got 'no'": {"causal": "no"},
    "deterministic: wanted True or False, got 'no'": {"deterministic": "no"},
    "return_lse: wanted True or False, got 'no'": {"return_lse": "no"},
    "async_op: wanted True or False, got 'no'": {"async_op": "no"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    good = {name: torch.zeros(1, 8, 2, 16) for name in "qkv"}
    given = {"impl": "aten"} | good | BAD[message]
    with pytest.raises(ValueError, match="wanted") as caught:
        ringfa3.ring_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert str(caught.value).startswith(message)


def one_rank_is_wrong(rank: int, size: int) -> None:
    good = torch.zeros(1, 8, 2, 16)
    for name, value in (("window", (-2, 0)), ("softcap", -1.0), ("transport", "pigeon"), ("return_lse", "no")):
        with pytest.raises(ValueError, match="wanted") as caught:
            ringfa3.ring_attention(good, good, good, impl="aten", **({name: value} if rank == 1 else {}))
        assert str(caught.value).startswith(name if rank == 1 else f"rank 1: {name}")
    double = good.double()
    with pytest.raises(Unsupported if rank == 1 else ValueError):
        ringfa3.ring_attention(double, double, double, impl="portable" if rank == 1 else "aten")
    other = good.bfloat16() if rank else good
    differing = [
        ("dtype", {}, (other,) * 3),
        ("layout", {"layout": "striped" if rank else "zigzag"}, (good,) * 3),
        ("mask", {"window": (3, 0) if rank else None}, (good,) * 3),
        ("scale", {"scale": 0.5 if rank else 0.4}, (good,) * 3),
        ("heads", {}, (torch.zeros(1, 8, 4, 16) if rank else good, good, good)),
        ("head_dim", {}, (torch.zeros(1, 8, 2, 8 if rank else 16),) * 3),
        ("transport", {"transport": "ring" if rank else "gather"}, (good,) * 3),
        ("gradients wanted", {}, (good.clone().requires_grad_(rank == 1), good, good)),
    ]
    for name, options, qkv in differing:
        with pytest.raises(ValueError, match=f"ranks disagree on {name}: rank"):
            ringfa3.ring_attention(*qkv, impl="aten", **options)
    of_plan = "ranks disagree on plan: rank 0 has none, rank 1 has one of 16 positions$"
    with pytest.raises(ValueError, match=of_plan):
        ringfa3.ring_attention(good, good, good, plan=ringfa3.plan(Mask(), "zigzag", 16) if rank else None)
    assert ringfa3.ring_attention(good, good, good, impl="aten").shape == good.shape


def test_what_is_wrong_on_one_rank_is_an_error_on_all(world):
    world(2)(one_rank_is_wrong)


@pytest.mark.parametrize("transport", ["ring", "gather"])
def test_async_result_and_gradients(world, transport):
    case = Case(Mask(window=(9, 0)), transport=transport, sinks=True)
    check(case, world(3)(ring_case, case, {"async_op": True}))
    case = Case(transport=transport)
    check(case, world(1)(ring_case, case, {"async_op": True}))


def test_handles_are_many_and_hold_nothing() -> None:
    q = torch.randn(1, 2, 1, 8)
    handles = [ringfa3.ring_attention(q, q, q, async_op=True, agree=False) for _ in range(200)]
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)  # not a call deeper for each of them
    try:
        out = handles[-1].wait()  # finishes all of them
    finally:
        sys.setrecursionlimit(usual)
    assert all(handle.done() for handle in handles)
    assert torch.equal(handles[0].wait(), out)
    held = weakref.ref(out)
    del handles, out
    gc.collect()
    assert held() is None


def test_a_broken_wait_is_not_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 1, 8)
    handle = ringfa3.ring_attention(q, q, q, async_op=True)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(handle._started, "result", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            handle.wait()


def overlap(rank: int, size: int, late: float) -> None:
    q = torch.randn(1, 64, 2, 16)
    options = {"transport": "ring", "causal": False, "impl": "aten", "agree": False}
    want = ringfa3.ring_attention(q, q, q, **options)
    if rank == 1:
        time.sleep(late)
    start = time.monotonic()
    handles = [ringfa3.ring_attention(q, q, q, async_op=True, **options) for _ in range(3)]
    if rank == 0:
        assert time.monotonic() - start < late / 2  # the call does not wait for the hops,
        while time.monotonic() - start < late / 2:
            q @ q.transpose(2, 3)  # other work goes on meanwhile,
        assert not any(handle.done() for handle in handles)  # and the other rank has not even come
    for handle in (*handles, handles[0]):
        assert torch.equal(handle.wait(), want)
    assert handles[0].done()
    handle = ringfa3.ring_attention(q, q, q, async_op=True, **options)
    mixed = ringfa3.ring_attention(q, q, q, **options)  # comes after the other, on every rank
    assert torch.equal(mixed, handle.wait())
    handle = ringfa3.ring_attention(q, q, q, async_op=True, **options)
    q += 1
    with pytest.raises(RuntimeError, match="q: wanted it untouched until wait"):
        handle.wait()


def test_async_calls_overlap_with_other_work(world):
    world(2)(overlap, 2.0)


def fail_later(rank: int, size: int) -> None:
    q = torch.randn(1, 64, 2, 16)
    options = {"transport": "ring", "causal": False, "impl": "aten"}
    ringfa3.ring_attention(q, q, q, **options)
    if rank == 1:
        os._exit(1)
    handle = ringfa3.ring_attention(q, q, q, async_op=True, agree=False, **options)
    with pytest.raises(RankFailed):
        handle.wait()


def test_async_errors_come_at_wait(world):
    world(2)(fail_later, dying=(1,))
