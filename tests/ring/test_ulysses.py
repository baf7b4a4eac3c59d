"""Ulysses and the mesh ulysses x ring: against attention on one device, and who holds which heads and positions."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ringfa3
from ringfa3 import Mask, Plan, RankFailed, profiling
from ringfa3.mesh import Axes
from ringfa3.ulysses import Heads, deal_heads
from ringfa3_kernels import Unsupported, attend, attend_backward, row_delta
from tests.ring.masks import masks
from tests.ring.test_attention import LAYOUTS, MASKS, Case, check

WINDOW = Mask(window=(9, 0))


@lru_cache  # groups take longer to make than these cases to run
def group_of(shape: tuple[int, int] | None) -> DeviceMesh | None:
    """A mesh of all ranks, (ulysses, ring); None: Ulysses alone over the default group."""
    return None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=("ulysses", "ring"))


def ulysses_case(
    rank: int, size: int, case: Case, shape: tuple[int, int] | None, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Results and gradients of all ranks, put together by `unshard`: the same on every rank."""
    group = group_of(shape)
    p = ringfa3.plan(case.mask, case.layout, case.seqlen, group)
    x = {n: p.shard(t, 2 if n == "dlse" else 1) if n != "sinks" else t for n, t in case.inputs().items()}
    q, k, v, sinks = (x[n].requires_grad_() for n in ("q", "k", "v", "sinks"))
    got = ringfa3.ring_attention(
        q, k, v, mask=case.mask, layout=case.layout, transport=case.transport, softcap=case.softcap, scale=case.scale,
        sink_logits=sinks if case.sinks else None, return_lse=True, impl=case.impl, group=group, **options,
    )  # fmt: skip
    out, lse = got.wait() if options.get("async_op") else got
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    torch.autograd.backward([out, lse], [x["dout"], x["dlse"]])
    found = {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    joined = {name: p.unshard(t, 2 if name == "lse" else 1) for name, t in found.items()}  # type: ignore[arg-type]
    if case.sinks:
        assert sinks.grad is not None
        dist.all_reduce(sinks.grad)
        joined["dsinks"] = sinks.grad
    return joined


def check_all(case: Case, results: list[dict[str, Tensor]]) -> None:
    """Every rank got the same, and it is right."""
    for other in results[1:]:
        assert all(torch.equal(other[name], x) for name, x in results[0].items())
    alone = replace(case, layout="contiguous")  # what lies whole
    check(alone, results[:1])


PURE = Case(layout="contiguous", transport="ulysses")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_ulysses_alone_equals_one_device(world, size, mask):
    case = replace(PURE, mask=MASKS[mask])
    check_all(case, world(size)(ulysses_case, case, None, {}))


@pytest.mark.parametrize("heads", [(8, 2), (6, 2), (4, 1), (7, 1), (12, 3), (10, 5), (4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_that_do_not_divide(world, heads, dtype):
    case = replace(PURE, Hq=heads[0], Hkv=heads[1], dtype=dtype, seqlen=63, D=24)
    check_all(case, world(4)(ulysses_case, case, None, {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_mesh_equals_one_device(world, layout, mask):
    number = LAYOUTS.index(layout) + list(MASKS).index(mask)
    case = Case(MASKS[mask], layout, ("ring", "gather", "pull")[number % 3], Hq=6, Hkv=1 + number % 2)
    check_all(case, world(4)(ulysses_case, case, (2, 2), {}))


@pytest.mark.parametrize("shape", [(1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_meshes_of_one_axis(world, shape, layout):
    case = Case(MASKS["documents"], layout, "auto")
    check_all(case, world(3)(ulysses_case, case, shape, {}))


@pytest.mark.parametrize("shape", [None, (2, 2)], ids=["alone", "mesh"])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(B=3, Hq=8, Hkv=1, D=24), {}),
        (Case(sinks=True, Hq=8), {"async_op": True}),
        (Case(WINDOW, sinks=True, softcap=2.0, dtype=torch.bfloat16), {"deterministic": True}),
        (Case(dtype=torch.bfloat16, seqlen=128, B=1, scale=0.3), {"async_op": True}),
        (Case(seqlen=2, Hq=5, Hkv=1), {}),
        (Case(seqlen=1), {}),
        (Case(seqlen=3, B=1), {"agree": True}),
        (Case(seqlen=64), {"agree": False}),
    ],
    ids=lambda x: f"S{x.seqlen}-B{x.B}-{x.dtype}" if isinstance(x, Case) else "-".join(x),
)
def test_options_and_odd_sizes(world, case, options, shape):
    case = replace(case, transport="auto" if shape else "ulysses", layout="zigzag" if shape else "contiguous")
    check_all(case, world(4)(ulysses_case, case, shape, options))


@given(data=st.data())
@settings(max_examples=25)
def test_any_mask_heads_and_length(world, data):
    seqlen = data.draw(st.integers(1, 40), "seqlen")
    mask = data.draw(masks(seqlen), "mask")
    Hkv = data.draw(st.integers(1, 4), "Hkv")
    Hq = Hkv * data.draw(st.integers(-(-4 // Hkv), 4), "group")
    shape = data.draw(st.sampled_from([None, (2, 2), (4, 1), (1, 4)]), "shape")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout") if shape else "contiguous"
    transport = data.draw(st.sampled_from(["ring", "gather", "pull", "auto"]), "transport") if shape else "ulysses"
    case = Case(mask, layout, transport, seqlen, mask.batch or 2, Hq, Hkv, D=8, sinks=data.draw(st.booleans()))
    check_all(case, world(4)(ulysses_case, case, shape, {}))


def bitwise(rank: int, size: int) -> None:
    """Sums over ranks have one order: gradients of shared heads repeat exactly."""
    g = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(2, 33, h, 16, generator=g, dtype=torch.bfloat16).requires_grad_() for h in (8, 1, 1))
    dout = torch.randn(q.shape, generator=g, dtype=q.dtype)
    seen = []
    for _ in range(3):
        out = ringfa3.ring_attention(q, k, v, transport="ulysses", deterministic=True, impl="aten")
        seen.append(torch.autograd.grad(out, (q, k, v), dout))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_deterministic(world):
    world(3)(bitwise)


def shared_head(rank: int, size: int) -> None:
    g = torch.Generator().manual_seed(0)
    whole = {h: torch.randn(1, 64, h, 16, generator=g).bfloat16() for h in (8, 1)}
    q, k = (ringfa3.shard(whole[h], layout="contiguous").requires_grad_() for h in (8, 1))
    out = ringfa3.ring_attention(q, k, k.detach(), transport="ulysses", causal=False, impl="aten")
    out.backward(torch.ones_like(out))
    state = attend(whole[8], whole[1], whole[1], out_dtype=torch.bfloat16, impl="aten")
    dout, (dq, dk, dv) = torch.ones_like(whole[8]), (torch.zeros(1, 64, h, 16) for h in (8, 1, 1))
    delta = row_delta(dout, state.out)
    attend_backward(dout, whole[8], whole[1], whole[1], state.lse, delta, dq=dq, dk=dk, dv=dv, impl="aten")
    assert k.grad is not None
    exact = ringfa3.shard(dk, layout="contiguous")
    assert ((k.grad.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


def test_a_shared_heads_gradient_is_rounded_once(world):
    """A rank's share is much larger than the sum: rounded before, it would leave far more than an ulp of the sum."""
    world(4)(shared_head)


def cross(rank: int, size: int, shape: tuple[int, int] | None, kv_seqlen: int) -> None:
    g = torch.Generator().manual_seed(0)
    whole_q, whole_k = torch.randn(2, 13, 4, 16, generator=g), torch.randn(2, kv_seqlen, 2, 16, generator=g)
    group, layout = group_of(shape), "zigzag" if shape else "contiguous"
    p = ringfa3.plan(Mask(causal=False), layout, 13, group, kv_seqlen=kv_seqlen)
    q = p.shard(whole_q).requires_grad_()
    k = ringfa3.shard(whole_k, layout=layout, group=group).requires_grad_()
    transport = "ring" if shape else "ulysses"
    out, lse = ringfa3.ring_attention(q, k, k, plan=p, return_lse=True, transport=transport, impl="aten")
    out.sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    if kv_seqlen == 0:
        assert not out.any()
        assert lse.isneginf().all()
        assert not q.grad.any()
        return
    leaf = whole_k.clone().requires_grad_()
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (whole_q, leaf, leaf)), enable_gqa=True
    )
    want.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(out, p.shard(want.transpose(1, 2)))
    torch.testing.assert_close(k.grad, ringfa3.shard(leaf.grad, layout=layout, group=group))


@pytest.mark.parametrize("shape", [None, (2, 2)], ids=["alone", "mesh"])
@pytest.mark.parametrize("kv_seqlen", [0, 1, 29])
def test_cross_attention(world, shape, kv_seqlen):
    world(4)(cross, shape, kv_seqlen)


def test_heads_are_dealt_by_groups():
    for Hkv in range(1, 9):
        for group in range(1, 6):
            for size in range(1, Hkv * group + 1):
                shares = deal_heads(Hkv * group, Hkv, size)
                heads = [h for share in shares for h in range(share.q.start, share.q.stop)]
                assert heads == list(range(Hkv * group))
                for share in shares:
                    count, kv = share.q.stop - share.q.start, share.kv.stop - share.kv.start
                    assert count > 0
                    assert count % kv == 0
                    assert {h // group for h in range(share.q.start, share.q.stop)} == set(
                        range(share.kv.start, share.kv.stop)
                    )
                    assert count == kv * group or kv == 1  # whole groups, or a part of one
                    readers = [other for other in shares if other.kv.start < share.kv.stop > other.kv.start >= 0]
                    readers = [o for o in readers if o.kv.start <= share.kv.start < o.kv.stop]
                    assert share.shared == (len(readers) > 1)
                most = max(share.q.stop - share.q.start for share in shares)
                # the least that the rule allows: groups whole where ranks are fewer, else ranks within every group
                assert most == (-(-Hkv // size) * group if size <= Hkv else -(-group // (size // Hkv)))
    with pytest.raises(ValueError, match="axes: wanted those of a mesh of 6 ranks"):
        Plan.build(Mask(), "zigzag", 8, 6, 0, axes=Axes.of(2, 2))
    assert [(s.q.start, s.q.stop) for s in deal_heads(6, 2, 4)] == [(0, 1), (1, 3), (3, 4), (4, 6)]
    with pytest.raises(ValueError, match="q: wanted at least one query head for each of 4 Ulysses ranks, got 3"):
        deal_heads(3, 1, 4)


@given(data=st.data())
def test_a_mesh_deals_every_position_once(data):
    ulysses, ring = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    seqlen = data.draw(st.integers(0, 60))
    mask = data.draw(masks(seqlen)) if seqlen else Mask()
    layout = data.draw(st.sampled_from(LAYOUTS))
    ranks = [[u * ring + r for r in range(ring)] for u in range(ulysses)]
    if data.draw(st.booleans()):  # the ring axis first
        ranks = [[r * ulysses + u for r in range(ring)] for u in range(ulysses)]
    axes = Axes.of(ulysses, ring, ranks)
    size = ulysses * ring
    plans = [Plan.build(mask, layout, seqlen, size, rank, axes=axes) for rank in range(size)]
    np.testing.assert_array_equal(np.sort(np.concatenate([p.positions for p in plans])), np.arange(seqlen))
    for r in range(ring):
        column = [plans[ranks[u][r]] for u in range(ulysses)]
        whole = Plan.build(mask, layout, seqlen, ring, r)
        assert torch.equal(torch.cat([p.positions for p in column]), whole.positions)
        assert max(p.lengths[p.rank] for p in column) - min(p.lengths[p.rank] for p in column) <= 1
        for p in column:
            assert (p.ring.world, p.ring.rank, p.ring.needs) == (ring, r, whole.needs)
            assert [hop.source for hop in p.hops] == [hop.source for hop in whole.hops]
    x = torch.randn(2, seqlen, 3)
    parts = [p.shard(x) for p in plans]
    assert all(part.shape[1] == p.lengths[p.rank] == p.positions.numel() for part, p in zip(parts, plans, strict=True))
    assert torch.equal(plans[0].join(parts), x)
    if mask.causal:
        y = torch.arange(seqlen).expand(mask.batch or 2, -1)
        whole_labels = Plan.build(mask, layout, seqlen, 1, 0).labels(y)
        assert torch.equal(plans[0].join([p.labels(y) for p in plans]), whole_labels)


def helpers(rank: int, size: int) -> None:
    """shard, unshard and loss_weight over meshes: ring axis first, cut from a deeper one, and without names."""
    swapped = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    deep = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("data", "ulysses", "ring"))
    unnamed = init_device_mesh("cpu", (2, 2))
    x = torch.randn(1, 27, 4, 16, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
    for mesh in (swapped, deep["ulysses", "ring"], unnamed):
        p = ringfa3.plan(Mask(), "striped", 27, mesh)
        mine = ringfa3.shard(x, layout="striped", group=mesh)
        assert torch.equal(mine, x[:, p.positions])
        assert torch.equal(p.unshard(mine), x)
        assert torch.equal(ringfa3.unshard(mine, 27, layout="striped", group=mesh), x)
        out = ringfa3.ring_attention(mine, mine, mine, group=mesh, layout="striped", impl="aten")
        torch.testing.assert_close(out, want[:, p.positions])
        assert torch.equal(out, ringfa3.ring_attention(mine, mine, mine, plan=p, impl="aten"))
        labels = p.labels(torch.arange(27))
        mean = p.loss_weight(labels) * labels[labels != -100].float().mean() / size
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, torch.arange(1.0, 27).mean())
        assert ringfa3.plan(Mask(), "striped", 27, mesh) is p
    u, r = swapped.get_local_rank("ulysses"), swapped.get_local_rank("ring")
    shard = torch.arange(27)[r::2]
    half = len(shard) // 2
    assert torch.equal(ringfa3.plan(Mask(), "striped", 27, swapped).positions, (shard[:half], shard[half:])[u])


def test_shards_of_meshes(world):
    world(4)(helpers)


def part_of_the_world(rank: int, size: int) -> None:
    """Two meshes of 2 x 2 side by side, each with a group of its own."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("data", "ulysses", "ring"))["ulysses", "ring"]
    x = torch.randn(1, 21, 4, 16, generator=torch.Generator().manual_seed(rank // 4))
    for _ in range(2):
        p = ringfa3.plan(Mask(), "zigzag", 21, mesh)
        mine = p.shard(x)
        assert p.world == 4
        assert torch.equal(p.unshard(mine), x)
        out = ringfa3.ring_attention(mine, mine, mine, plan=p, impl="aten")
        want = torch.nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, is_causal=True)
        torch.testing.assert_close(out, p.shard(want.transpose(1, 2)))
    alone = DeviceMesh("cpu", [[0, 1], [2, 3]] if rank < 4 else [[4, 5], [6, 7]], _init_backend=False)
    with pytest.raises(ValueError, match="group: wanted names for the axes"):
        ringfa3.shard(x, group=alone)


def test_meshes_of_some_of_the_ranks(world):
    world(8)(part_of_the_world)


def refusals(rank: int, size: int) -> None:
    x, options = torch.zeros(1, 8, 4, 16), {"impl": "aten"}
    mesh = group_of((2, 2))
    lone = {"transport": "ulysses"}
    few = torch.zeros(1, 8, 3, 16)
    every = [
        ("q: wanted at least one query head for each of 4 Ulysses ranks, got 3", few, lone),
        ("q: wanted at least one query head for each of 2 Ulysses ranks, got 1", few[:, :, :1], {"group": mesh}),
        ("layout: wanted the layout 'contiguous' for transport='ulysses', got Zigzag", x, {"layout": "zigzag", **lone}),
        ("plan: wanted the layout 'contiguous' for", x, {"plan": ringfa3.plan(Mask(), "zigzag", 32), **lone}),
        ("transport: wanted that of the ring axis, as the mesh has one of 2", x, {"group": mesh, **lone}),
        ("plan: wanted one for Axes", x, {"group": mesh, "plan": ringfa3.plan(Mask(), "zigzag", 32)}),
        (
            "plan: wanted one for a plain ring",
            x,
            {"group": dist.group.WORLD, "plan": ringfa3.plan(Mask(), "zigzag", 32, mesh)},
        ),
    ]
    for message, qkv, also in every:
        with pytest.raises(ValueError, match=message):
            ringfa3.ring_attention(qkv, qkv, qkv, **also, **options)
    ill = rank == 2  # on one rank alone, and every rank hears of it
    for message, wrong in (("softcap: wanted 0", {"softcap": -1.0}), ("window: wanted", {"window": (-2, 0)})):
        for good in (lone, {"group": mesh}):
            with pytest.raises(ValueError, match=("" if ill else "rank 2: ") + message):
                ringfa3.ring_attention(x, x, x, **good, **(wrong if ill else {}), **options)
    with pytest.raises(ValueError, match="rank 2: q: wanted at least" if not ill else "q: wanted at least"):
        ringfa3.ring_attention(*[few[:, :, :1] if ill else x] * 3, group=mesh, **options)
    with pytest.raises(ValueError, match="ranks disagree on"):
        ringfa3.ring_attention(x, x, x, layout="contiguous", **(lone if ill else {}), **options)
    short = x[:, : 8 - rank]
    for also in ({"group": mesh}, lone):
        with pytest.raises(ValueError, match=r"q: wanted the .* shards of 26 rows, \[.*\] by rank, got \[8, 7, 6, 5\]"):
            ringfa3.ring_attention(short, short, short, **also, **options)
    double = x.double()
    with pytest.raises(Unsupported if ill else ValueError, match="portable"):
        ringfa3.ring_attention(double, double, double, group=mesh, impl="portable" if ill else "aten")
    odd = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ring"))
    with pytest.raises(ValueError, match=r"with the axes 'ulysses' and 'ring', got .*data.*ring"):
        ringfa3.shard(x, group=odd)
    with pytest.raises(ValueError, match="ascend along both axes"):
        ringfa3.shard(x, group=DeviceMesh("cpu", [[1, 0], [3, 2]], mesh_dim_names=("ulysses", "ring")))
    assert ringfa3.ring_attention(x, x, x, group=mesh, **options).shape == x.shape


def test_what_is_wrong_is_refused_on_every_rank(world):
    world(4)(refusals)


def in_flight(rank: int, size: int) -> None:
    """Calls of a mesh, of Ulysses and of a ring in turn, waited for in another order."""
    mesh = group_of((2, 2))
    g = torch.Generator().manual_seed(rank)
    q, k = torch.randn(2, 12, 4, 16, generator=g), torch.randn(2, 12, 2, 16, generator=g)
    kinds = [{"group": mesh}, {"transport": "ulysses"}, {"transport": "ring"}] * 2
    want = [ringfa3.ring_attention(q, k, k, impl="aten", **kind) for kind in kinds]
    handles = [ringfa3.ring_attention(q, k, k, impl="aten", async_op=True, **kind) for kind in kinds]
    for handle, result in reversed(list(zip(handles, want, strict=True))):
        assert torch.equal(handle.wait(), result)


def test_many_calls_in_flight(world):
    world(4)(in_flight)


def dies_within(rank: int, size: int, moment: str) -> None:
    """Rank 3 is rank 1 of its ring and of its ulysses axis; its process ends in the middle of a call."""
    x, mesh = torch.zeros(1, 8, 4, 16), group_of((2, 2))
    ringfa3.ring_attention(x, x, x, group=mesh, impl="aten", transport="ring")
    if rank == 3:
        place, name = {"heads": (Heads, "spread"), "hops": (ringfa3.attention, "attend")}[moment]
        setattr(place, name, lambda *_, **__: os._exit(1))
    with pytest.raises(RankFailed) as caught:
        calls(2, x, mesh)  # rank 2 may have all it needs of the first; the next one hears of it
    assert caught.value.rank == 3


def calls(times: int, x: Tensor, mesh: DeviceMesh | None) -> None:
    for _ in range(times):
        ringfa3.ring_attention(x, x, x, group=mesh, impl="aten", transport="ring")


@pytest.mark.parametrize("moment", ["heads", "hops"])
def test_a_rank_that_dies_in_mid_call_is_named(world, moment):
    world(4)(dies_within, moment, dying=(3,))


def dies(rank: int, size: int) -> None:
    x, mesh = torch.zeros(1, 8, 4, 16), group_of((2, 2))
    ringfa3.ring_attention(x, x, x, group=mesh, impl="aten")
    if rank == 1:
        os._exit(1)
    with pytest.raises(RankFailed) as caught:
        ringfa3.ring_attention(x, x, x, group=mesh, impl="aten")
    assert caught.value.rank == 1


def test_a_dead_rank_of_a_mesh_is_named(world):
    world(4)(dies, dying=(1,))


def ranges(rank: int, size: int) -> list[str]:
    x, mesh = torch.zeros(1, 8, 4, 16, requires_grad=True), group_of((2, 2))
    with torch.profiler.profile() as profile, profiling.named():
        ringfa3.ring_attention(x, x, x, group=mesh, impl="aten", causal=False).sum().backward()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)  # type: ignore[union-attr]
    return [event.name.removeprefix("ringfa3 ") for event in events if event.name.startswith("ringfa3 ")]


def test_profiles_name_the_trade_and_the_hops_by_rank_of_the_mesh(world):
    for rank, names in enumerate(world(4)(ranges)):
        other = rank ^ 1  # on its ring
        hops = [f"hop 1 of 2, keys of rank {rank}", f"hop 2 of 2, keys of rank {other}"]
        assert names == [
            f"{way} {what}" for way in ("forward", "backward") for what in ("heads out", *hops, "heads home")
        ]
