"""Plans: all ranks' hops together paint the global mask exactly once, and what goes out to shards comes back."""

import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from ringfa3.layout import balanced, resolve
from ringfa3.mask import Mask
from ringfa3.plan import Plan, plan
from ringfa3.shards import shard, unshard
from ringfa3_kernels import Visible
from tests.ring.masks import dense, masks
from tests.ring.test_layout import NAMES, Foreign

LAYOUTS = [*NAMES, Foreign()]


@st.composite
def worlds(draw, longest=28, causal=None):
    """A mask, its length, and the plans of all ranks of a world."""
    seqlen = draw(st.integers(0, longest))
    mask = draw(masks(seqlen)) if seqlen else Mask(causal=draw(st.booleans()))
    if causal is not None and mask.causal != causal:
        mask = Mask(causal=causal, documents=mask.documents, chunk=mask.chunk)
    layout, world = draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, 8))
    return mask, seqlen, [Plan.build(mask, layout, seqlen, world, rank) for rank in range(world)]


def painted(plans, B):
    """How often each pair is computed: int [B, Sq, Sk], from every rank's hops alone."""
    key_positions = [p.positions.numpy() for p in plans]
    total = np.zeros((B, plans[0].seqlen, plans[0].seqlen), int)
    for p in plans:
        rows = p.positions.numpy()
        for hop in p.hops:
            keys = key_positions[hop.source][hop.keys]
            mask = hop.visible.mask(len(keys)).numpy()
            total[np.ix_(range(B), rows, keys)] += np.broadcast_to(mask, (B, len(rows), len(keys)))
    return total


@given(worlds())
def test_paints_the_mask_exactly_once(case):
    mask, seqlen, plans = case
    expected = dense(mask, seqlen) if seqlen else np.zeros((1, 0, 0), bool)
    np.testing.assert_array_equal(painted(plans, expected.shape[0]), expected)


@given(worlds())
def test_ranks_agree_on_who_holds_and_needs_what(case):
    _, seqlen, plans = case
    world = len(plans)
    for p in plans:
        assert p.lengths == p.kv_lengths == plans[0].lengths
        assert p.needs == plans[0].needs
        assert p.lengths[p.rank] == p.positions.numel()
        assert p.positions.dtype == torch.int64
        assert bool((p.positions.diff() > 0).all())
        needed = p.needs[p.rank]
        nearest_first = [(p.rank - distance) % world for distance in range(world)]
        assert [hop.source for hop in p.hops] == [s for s in nearest_first if needed[s] is not None]
        assert all(hop.keys == needed[hop.source] for hop in p.hops)
    assert sum(plans[0].lengths) == seqlen
    np.testing.assert_array_equal(np.sort(np.concatenate([p.positions for p in plans])), np.arange(seqlen))


@given(worlds())
def test_needs_are_tight_where_runs_have_step_1(case):
    *_, plans = case
    for p in plans:
        if any(step > 1 for hand in p.dealing.runs for *_, step in hand):
            return
        for hop in p.hops:
            seen = hop.visible.mask(hop.keys.stop - hop.keys.start).reshape(-1, hop.keys.stop - hop.keys.start).any(0)
            assert bool(seen.all() if p.layout.name == "contiguous" else seen[0] & seen[-1])


@given(worlds(longest=60))
def test_bounds_are_what_kernels_are_promised(case):
    mask, _, plans = case
    for p in plans:
        n = p.positions.numel()
        for hop in p.hops:
            Sk = hop.keys.stop - hop.keys.start
            hop.visible.check(Sk)
            assert hop.visible.lo.shape == hop.visible.hi.shape == ((n,) if mask.batch is None else (mask.batch, n))
            assert hop.visible.lo.is_contiguous()
            assert hop.visible.hi.is_contiguous()
            assert (
                hop.visible.lo.data_ptr() % 16 == hop.visible.hi.data_ptr() % 16 == p.hops[0].visible.lo.data_ptr() % 16
            )


@given(worlds(longest=60))
def test_kind_is_exact(case):
    *_, plans = case
    for p in plans:
        for hop in p.hops:
            Sq, Sk = p.positions.numel(), hop.keys.stop - hop.keys.start
            full, causal = Visible.full(Sq, Sk), Visible.causal(Sq, Sk)
            is_full = bool((hop.visible.mask(Sk) == full.mask(Sk)).all())
            is_causal = bool(((hop.visible.lo == 0) & (hop.visible.hi == causal.hi)).all())
            assert hop.visible.kind == ("full" if is_full else "causal" if is_causal else "intervals")


def test_kinds_of_the_usual_hops():
    def kinds(layout, rank, mask=None):
        return [(h.source, h.visible.kind) for h in Plan.build(mask or Mask(), layout, 64, 4, rank).hops]

    assert kinds("contiguous", 2) == [(2, "causal"), (1, "full"), (0, "full")]
    assert kinds("zigzag", 2) == [(2, "causal"), (1, "full"), (0, "full"), (3, "intervals")]
    assert kinds("striped", 1) == [(1, "causal"), (0, "causal"), (3, "causal"), (2, "causal")]
    assert kinds("zigzag", 1, Mask(causal=False)) == [(1, "full"), (0, "full"), (3, "full"), (2, "full")]


def test_hops_take_only_what_is_visible():
    windowed = Plan.build(Mask(window=(5, 0)), "contiguous", 64, 4, 2)
    assert [(hop.source, hop.keys) for hop in windowed.hops] == [(2, slice(0, 16)), (1, slice(11, 16))]
    halves = Plan.build(Mask(), "zigzag", 64, 4, 2)  # of a lower rank, zigzag rows see the early chunk alone
    assert [hop.keys for hop in halves.hops] == [slice(0, 16), slice(0, 8), slice(0, 8), slice(0, 16)]
    own = Plan.build(Mask(documents=(16, 16, 16, 16)), "contiguous", 64, 4, 3)
    assert [hop.source for hop in own.hops] == [3]
    assert Plan.build(Mask(), "contiguous", 2, 4, 0).hops == ()
    # rank 0 holds 0:4 and 20:24; of rank 1's 4:8 and 16:20 its early rows see half, its late ones nothing
    early = Plan.build(Mask(causal=False, documents=(8, 12, 4)), "zigzag", 24, 3, 0).hops[1]
    assert (early.source, early.keys) == (1, slice(0, 4))
    assert early.visible.lo.tolist() == [0, 0, 0, 0, 4, 4, 4, 4]
    assert early.visible.hi.tolist() == [4] * 8


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 5), st.sampled_from(["contiguous", "zigzag", "striped"]))
def test_cross_attention_sees_every_key_once(seqlen, kv_seqlen, world, layout):
    plans = [Plan.build(Mask(causal=False), layout, seqlen, world, r, kv_seqlen=kv_seqlen) for r in range(world)]
    keys = [Plan.build(Mask(), layout, kv_seqlen, world, r).positions for r in range(world)]
    for p in plans:
        assert p.kv_lengths == tuple(map(len, keys))
        assert all(hop.visible.kind == "full" and hop.visible.rows == len(p.positions) for hop in p.hops)
        if len(p.positions):
            seen = [keys[hop.source][hop.keys] for hop in p.hops]
            assert sorted(torch.cat(seen).tolist() if seen else []) == list(range(kv_seqlen))


@given(worlds(), st.data())
def test_unshard_after_shard_is_identity(case, data):
    _, seqlen, plans = case
    dim = data.draw(st.integers(-3, 2))
    shape = [2, 3, 2]
    shape[dim] = seqlen
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    parts = [p.shard(x, dim) for p in plans]
    for p, part in zip(plans, parts, strict=True):
        torch.testing.assert_close(part, x.index_select(dim, p.positions), rtol=0, atol=0)
    torch.testing.assert_close(plans[0].join(parts, dim), x, rtol=0, atol=0)


def test_shard_and_join_are_differentiable():
    plans = [Plan.build(Mask(), "zigzag", 11, 3, rank) for rank in range(3)]
    x = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 11, dtype=torch.float64)
    (plans[0].join([p.shard(x) for p in plans]) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)


@given(worlds(causal=True), st.booleans())
def test_labels_are_the_next_token(case, padded):
    mask, seqlen, plans = case
    B = mask.batch or 2
    y = torch.arange(B * seqlen).reshape(B, seqlen) + 1000
    if padded and seqlen:
        y[:, -1] = -100
    visible = dense(mask, seqlen) if seqlen else np.zeros((1, 0, 0), bool)
    packs = mask.documents if mask.batch is not None else [mask.documents or (seqlen,)] * B
    expected = torch.full((B, seqlen), -7)
    for b in range(B):
        document = np.repeat(np.arange(len(packs[b])), packs[b])
        for i in range(seqlen - 1):
            if document[i] == document[i + 1] and not visible[b % len(visible), i, i + 1]:
                expected[b, i] = y[b, i + 1]
    before = y.clone()
    targets = [p.labels(y, ignore_index=-7) for p in plans]
    torch.testing.assert_close(plans[0].join(targets), expected, rtol=0, atol=0)
    assert torch.equal(y, before)


def test_labels_refuse():
    p = Plan.build(Mask(documents=((3, 4), (7,))), "zigzag", 7, 2, 0)
    with pytest.raises(ValueError, match=r"y: wanted token ids \[2, 7\], got shape \[3, 7\]"):
        p.labels(torch.zeros(3, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"y: wanted token ids \[2, 7\], got shape \[2, 8\]"):
        p.labels(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels: wanted a plan with a causal mask"):
        Plan.build(Mask(causal=False), "zigzag", 7, 2, 0).labels(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels: wanted this rank's 3, got"):
        p.loss_weight(torch.zeros(2, 7))


REFUSED = [
    ({"seqlen": -1}, "seqlen: wanted an integer in .* got -1"),
    ({"seqlen": 2**30}, "seqlen: wanted an integer in .* got 1073741824"),
    ({"seqlen": 8.0}, "seqlen: wanted an integer in .* got 8.0"),
    ({"mask": True}, "mask: wanted a Mask, got bool"),
    ({"mask": Mask(documents=(3, 4))}, "documents: wanted lengths that sum to seqlen 8, got 7"),
    ({"layout": "spiral"}, "layout: wanted .* got 'spiral'"),
    ({"kv_seqlen": 9}, "kv_seqlen: wanted Mask"),
    ({"rank": 2}, "rank: wanted one in .* got rank 2 of 2"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_build_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Plan.build(**({"mask": Mask(), "layout": "zigzag", "seqlen": 8, "world": 2, "rank": 0} | change))


def test_shards_refuse():
    p = Plan.build(Mask(), "zigzag", 8, 2, 0)
    with pytest.raises(ValueError, match=r"x: wanted 8 positions in dim 1, got shape \[1, 7\]"):
        p.shard(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="dim: wanted one of x's 2 dimensions, got 2"):
        p.shard(torch.zeros(1, 8), 2)
    with pytest.raises(ValueError, match="group: wanted 2 ranks, as the shards were dealt, got 1"):
        p.unshard(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="dim: wanted one of x's 2 dimensions, got -3"):
        Plan.build(Mask(), "zigzag", 8, 1, 0).unshard(torch.zeros(1, 8), -3)
    with pytest.raises(ValueError, match="parts: wanted a shard per rank, 2, got 1"):
        p.join([torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="x: wanted rank 1's 4 positions in dim 1"):
        p.join([torch.zeros(1, 4), torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="mask: wanted a Mask, got list"):
        plan([], "zigzag", 8)
    with pytest.raises(ValueError, match=r"layout: wanted .* got \['zigzag'\]"):
        plan(Mask(), ["zigzag"], 8)
    with pytest.raises(ValueError, match="group: wanted a ProcessGroup or a 1-D DeviceMesh"):
        plan(Mask(), "zigzag", 8, group=3)


@pytest.mark.parametrize("wrong", [64.0, True, np.float64(64), "64"], ids=repr)
def test_a_kept_plan_does_not_let_a_wrong_length_in(wrong):
    p = plan(Mask(causal=False), "zigzag", 64, kv_seqlen=1)
    assert plan(Mask(causal=False), "zigzag", np.int64(64), kv_seqlen=np.int32(1)) is p
    plan(Mask(causal=False), "zigzag", 1)
    unshard(torch.zeros(1, 64), 64)
    for name, call in {
        "seqlen": lambda: plan(Mask(causal=False), "zigzag", wrong),
        "kv_seqlen": lambda: plan(Mask(causal=False), "zigzag", 64, kv_seqlen=wrong),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: wanted an integer in \[0, 2\*\*30\), got"):
            call()
    with pytest.raises(ValueError, match=r"^seqlen: wanted an integer"):
        unshard(torch.zeros(1, 64), wrong)


def test_plan_is_kept_by_value():
    first = plan(Mask(documents=[3, 5]), "zigzag", 8)
    assert plan(Mask(documents=np.array([3, 5])), resolve("zigzag"), 8, device="cpu") is first
    assert plan(Mask(documents=[5, 3]), "zigzag", 8) is not first
    assert plan(Mask(documents=[3, 5]), "striped", 8) is not first
    assert (first.world, first.rank) == (1, 0)
    assert first.layout.name == "zigzag"
    assert plan(Mask(documents=[3, 5]), "balanced", 8).layout == balanced(Mask(documents=[3, 5]))


def destroys_groups(rank, size):
    """A plan of a destroyed group is forgotten when another is made, others are not; a plan that is held stays."""
    lasting, group = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
    other = plan(Mask(), "zigzag", 64, lasting)
    held, gone = plan(Mask(), "striped", 64, group), weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    assert plan(Mask(), "zigzag", 64, lasting) is other
    assert gone() is not None
    plan(Mask(), "contiguous", 64, lasting)
    assert gone() is held.group
    del held
    assert gone() is None
    again = plan(Mask(), "zigzag", 64, lasting)
    plan(Mask(), "contiguous", 65, lasting)
    assert plan(Mask(), "zigzag", 64, lasting) is again
    dist.destroy_process_group(lasting)


def test_plans_do_not_keep_destroyed_groups(world):
    world(2)(destroys_groups)


def test_describe_counts_pairs():
    mask = Mask(documents=(30, 34), window=(7, 0))
    plans = [Plan.build(mask, "zigzag", 64, 4, rank) for rank in range(4)]
    totals = [int(p.describe().splitlines()[-1].split()[0]) for p in plans]
    assert sum(totals) == mask.pairs(64)
    assert "zigzag, rank 2 of 4" in plans[2].describe()
    assert "16:24, 40:48" in plans[2].describe()


def on_ranks(rank, world):
    """What only a real group can show; runs on every rank of it."""
    for layout in ("contiguous", "zigzag", "striped"):
        for seqlen in (0, 1, 2 * world + 1, 37):
            p = plan(Mask(), layout, seqlen)
            for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
                x = (torch.arange(seqlen * 6).reshape(2, seqlen, 3) % 7).to(dtype)
                assert torch.equal(p.unshard(p.shard(x)), x)
                assert torch.equal(unshard(shard(x, layout=layout), seqlen, layout=layout), x)
    seqlen = 2 * world + 3
    p = plan(Mask(documents=(4, seqlen - 4)), "zigzag", seqlen)
    for dtype in (torch.float64, torch.bfloat16):
        mine = torch.ones(seqlen, p.lengths[rank], dtype=dtype).requires_grad_()
        weight = torch.arange(seqlen * seqlen).reshape(seqlen, seqlen).to(dtype) % 16
        (p.unshard(mine) * weight * (rank + 1)).sum().backward()
        factor = sum(range(1, world + 1))  # each rank's loss weighs the same positions by its rank + 1
        assert torch.equal(mine.grad, p.shard(weight) * factor)
    y = torch.arange(2 * seqlen).reshape(2, seqlen)
    y[:, seqlen // 2 :] = -100
    targets = p.labels(y)
    losses = torch.randn(2, seqlen, generator=torch.Generator().manual_seed(0))
    valid = Plan.build(p.mask, "zigzag", seqlen, 1, 0).labels(y) != -100
    expected = losses[valid].mean()
    mine, kept = p.shard(losses), targets != -100
    by_token = (mine * p.loss_weights(targets)).sum()
    by_mean = mine[kept].mean().nan_to_num() * p.loss_weight(targets)
    for product in (by_token, by_mean):
        dist.all_reduce(product)
        torch.testing.assert_close(product / world, expected)
    x = torch.arange(seqlen)[None]
    mesh = init_device_mesh("cpu", (world,))
    on_mesh = plan(p.mask, "striped", seqlen, mesh)
    assert torch.equal(on_mesh.unshard(on_mesh.shard(x)), x)
    with pytest.raises(ValueError, match=r"group: wanted a ProcessGroup or a 1-D DeviceMesh.* the axes \[1, 1, \d\]"):
        plan(p.mask, "striped", seqlen, init_device_mesh("cpu", (1, 1, world)))
    first = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match=r"^group: this rank is not a member of it$"):
            plan(p.mask, "zigzag", seqlen, first)
    return plan(p.mask, "zigzag", seqlen) is p


@pytest.mark.parametrize("n", [2, 3])
def test_on_a_real_group(world, n):
    assert world(n)(on_ranks) == [True] * n
