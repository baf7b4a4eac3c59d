"""The cost model: exact pairs, what was measured on H200s, and laws that any schedule keeps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfa3.cost import Job, Link, Machine, Way, hiding_tokens, predict, recommend
from ringfa3.cost.job import work
from ringfa3.cost.scene import overlap
from ringfa3.layout import resolve
from ringfa3.mask import Mask
from ringfa3.plan import Plan
from ringfa3_kernels import Unsupported
from tests.patience import patience
from tests.ring.masks import masks

H200 = Machine.h200()
RING = json.loads((Path(__file__).parents[2] / "docs" / "results" / "ring.json").read_text())
LAYOUTS = ("zigzag", "contiguous", "striped", "balanced")
K = 1024


def job(seqlen: int = 64 * K, world: int = 4, **options) -> Job:
    return Job(options.pop("mask", Mask()), seqlen, world, options.pop("Hq", 32), options.pop("Hkv", 8), 128, **options)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(LAYOUTS), st.integers(1, 4), st.integers(1, 40))
def test_pairs_and_needs_are_the_plans(data: st.DataObject, layout: str, world: int, seqlen: int) -> None:
    mask = data.draw(masks(seqlen))
    found = work(mask, resolve(layout, mask), seqlen, world, 4)
    for rank in range(world):
        plan = Plan.build(mask, layout, seqlen, world, rank)
        pairs, deepest = np.zeros(world, int), np.zeros(world, int)
        for hop in plan.hops:
            seen = (hop.visible.hi - hop.visible.lo).clamp(min=0)
            pairs[hop.source], deepest[hop.source] = int(seen.sum()), int(seen.max())
        assert found.pairs[rank].tolist() == pairs.tolist()
        assert found.deepest[rank].tolist() == deepest.tolist()
        assert found.needs[rank] == plan.needs[rank]
    assert (found.computed >= found.pairs).all()
    assert found.pairs.sum() == mask.pairs(seqlen)


def test_tiles_along_the_edges_cost_what_they_hold() -> None:
    """16 rows, causal, tiles of 4 by 4: the triangle of 10 tiles; striped over 4 ranks, each hop one whole tile."""
    assert work(Mask(), resolve("contiguous"), 16, 1, 4).computed[0, 0] == 10 * 16
    assert (work(Mask(), resolve("striped"), 16, 4, 4).computed == 16).all()


def test_a_million_tokens_on_eight_ranks_take_less_than_a_second() -> None:
    work.cache_clear()
    started = time.perf_counter()
    found = predict(job(1 << 20, 8, backward=True, mask=Mask(window=(4095, 0))), Way("pull", "zigzag"))
    assert time.perf_counter() - started < patience(1)
    assert found.scene.work.pairs.sum() == Mask(window=(4095, 0)).pairs(1 << 20)


@pytest.mark.parametrize("seqlen", ["16K", "32K", "64K", "128K"])
@pytest.mark.parametrize("way", ["pull", "ring", "ulysses"])
def test_two_h200(way: str, seqlen: str) -> None:
    """docs/results/ring.json: speed within 9% (forward 0.93 to 1.04, both 0.98 to 1.09), the ring's memory forward
    within 6%; with the backward up to 1.27 of what was measured: never too little."""
    for backward in (False, True):
        case = f"{'fwd+bwd' if backward else 'fwd'} causal D128 H32:8 S{seqlen} W2 bf16"
        found = predict(job(int(seqlen[:-1]) * K, 2, backward=backward), Way(way))
        assert found.tflops == pytest.approx(RING["rounds"][case][way]["tflops"], rel=0.09)
        if way != "ring":  # pull's pool has the size of longer calls before
            continue
        gib = next(row["ours"] for row in RING["rows"] if row["case"] == f"{case} {way}" and row["metric"] == "GiB")
        assert gib * 0.94 <= max(found.memory) / 2**30 <= gib * (1.3 if backward else 1.06)


@pytest.mark.parametrize(
    ("way", "world", "seqlen", "measured", "tolerance"),
    [
        ("ring", 2, 64, 637, 0.10),
        ("ring", 2, 128, 664, 0.05),
        ("ulysses", 2, 16, 492, 0.14),
        ("ulysses", 2, 64, 609, 0.09),
        ("ulysses", 2, 128, 639, 0.05),
        ("ulysses", 4, 16, 446, 0.06),
        ("ulysses", 4, 64, 608, 0.07),
        ("ulysses", 4, 256, 650, 0.04),
    ],
)
def test_other_libraries_on_fa3(way: str, world: int, seqlen: int, measured: float, tolerance: float) -> None:
    """ring-flash-attn zigzag and yunchang (ANCHORS.md, forward) with FA3's speed: never quicker than predicted by more
    than 6%. What they lose beside it (merge kernels, transposes) is not predicted: up to 14% at 16K."""
    fa3 = H200.with_kernels("ANCHORS.md, FA3, 32:8", forward=((2.2e12, 747), (35.2e12, 679)))
    found = predict(job(seqlen * K, world), Way(way), fa3).tflops
    assert measured * 0.94 <= found <= measured * (1 + tolerance)


def test_links_say_what_was_measured() -> None:
    mib = 1 << 20
    for ranks, kind, size, gbs in (
        (2, "sendrecv", 64, 261),
        (4, "sendrecv", 4, 83),
        (2, "pull", 64, 365),
        (8, "pull", 256, 372),
    ):
        assert size * mib / H200.link(kind, ranks).seconds(size * mib) / 1e9 == pytest.approx(gbs)
    # 3.32 ms of attention beside 128 MiB: 3.75 ms over NCCL, 3.50 ms pulled, on 2 GPUs
    for kind, ms in (("sendrecv", 3.75), ("pull", 3.50)):
        link = H200.link(kind, 2)
        assert 3.32 + 1e3 * link.stall * link.seconds(128 * mib) == pytest.approx(ms, rel=0.01)
    assert H200.with_bandwidth("pull", 186, "here").link("pull", 2).seconds(1 << 30) == (1 << 30) / 186e9
    times = [H200.link("sendrecv", 2).seconds(size) for size in (0, 1, 1 << 20, 4 << 20, 5 << 20, 1 << 28, 1 << 30)]
    assert times == sorted(times)
    assert times[0] == 0 < times[1]


def test_rule_of_thumb() -> None:
    """2 (Hkv / Hq) F / BW forward, 2.4 backward; the schedule turns from waiting to hidden about there."""
    assert hiding_tokens(32, 8, 660, 365) == pytest.approx(2 * 0.25 * 660e12 / 365e9)
    assert hiding_tokens(32, 8, 600, 365, backward=True) == pytest.approx(2.4 * 0.25 * 600e12 / 365e9)
    assert hiding_tokens(8, 8, 660, 365, itemsize=4) == pytest.approx(4 * 660e12 / 365e9)
    link = Link(((1.0, 365.0),), 0.0, 0.0)
    ideal = dataclasses.replace(
        H200, forward=((1.0, 660.0),), pull=((2, link),), launch=0.0, call=0.0, state=0.0, memory_bandwidth=1e18, tile=1
    )
    tokens = hiding_tokens(32, 8, 660, 365)
    for share, hidden in ((1.05, True), (0.9, False)):
        found = predict(job(int(8 * tokens * share) // 16 * 16, 8), Way("pull", "zigzag"), ideal)
        late = max(step.waited for step in found.steps)
        assert (late < 1e-8) == hidden


WAYS = [
    Way(transport, layout, u)
    for transport, layout, u in itertools.product(("pull", "ring", "gather", "hierarchical"), LAYOUTS, (1, 2))
] + [Way("ulysses", "contiguous")]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.transport}-{way.layout}-{way.ulysses}")
def test_laws_of_schedules(way: Way, backward: bool) -> None:
    """Every pair is computed once and after its keys came; no rank does two hops, no channel two copies, at once."""
    lengths = (1000, 3000, 96, 12288, 16384 - 12288 - 4096)
    asked = job(16 * K, 8, hosts=2, backward=backward, mask=Mask(documents=lengths))
    if way.transport == "pull" and way.ulysses == 1:
        asked = dataclasses.replace(asked, hosts=1)
    if way.transport == "pull" and way.ulysses == 2:
        with pytest.raises(Unsupported, match="across hosts use hierarchical"):
            predict(asked, way)
        asked = dataclasses.replace(asked, hosts=1)
    found = predict(asked, way)
    pairs = asked.mask.pairs(asked.seqlen)
    for direction in ("forward", "backward") if backward else ("forward",):
        steps = [step for step in found.steps if step.direction == direction]
        assert sum(step.pairs for step in steps) == pairs
        assert len({(step.rank, step.source) for step in steps}) == len(steps)
    assert all(step.start >= step.arrived and step.end > step.start and step.waited >= 0 for step in found.steps)
    for rank in range(found.scene.ring):
        own = sorted((step.start, step.end) for step in found.steps if step.rank == rank)
        assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(own))
        for link in (False, True):  # between hosts or not
            copies = sorted(
                (c.start, c.end)
                for c in found.copies
                if c.rank == rank and (found.scene.host(c.peer) != found.scene.host(rank)) == link
            )
            assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(copies))
        assert found.ends[rank] >= max((end for _, end in own), default=0)
    assert sum(found.losses.values()) == pytest.approx(1 - found.efficiency, abs=1e-9)
    assert 0 <= found.hidden <= 1 + 1e-9
    assert found.seconds >= max(found.computing)


def test_backward_moves_fp32_gradients_home() -> None:
    """Each rank's share of every other shard's gradient: as many elements as its keys and values, twice their bytes."""
    for transport in ("pull", "gather"):
        found = predict(job(16 * K, 4, backward=True, mask=Mask(causal=False)), Way(transport, "contiguous"))
        size = {what: sum(c.size for c in found.copies if c.what == what) for what in ("keys", "gradients")}
        assert size["gradients"] == size["keys"]  # keys came twice, in half the bytes
    ring = predict(job(16 * K, 4, backward=True, mask=Mask(causal=False)), Way("ring", "contiguous"))
    sums = sum(c.size for c in ring.copies if c.what == "gradients")
    shard = 4 * K * 2 * 8 * 128 * 4
    assert sums == 4 * 3 * shard  # from rank 1 on to rank 3, and home


def test_windows_skip_hops_nobody_needs() -> None:
    found = predict(job(64 * K, 8, mask=Mask(window=(4095, 0))), Way("ring", "contiguous"))
    assert {(step.rank - step.source) % 8 for step in found.steps} == {0, 1}
    assert all(copy.size <= 4095 * 2 * 8 * 128 * 2 for copy in found.copies)


def test_memory_has_no_term_in_the_whole_sequence() -> None:
    pull, ring, gather = (max(predict(job(1 << 20, 64), Way(t)).memory) for t in ("pull", "ring", "gather"))
    small = max(predict(job(1 << 18, 16), Way("pull")).memory)  # as many rows a rank
    assert pull == small
    assert ring < gather
    assert gather > (1 << 20) * 2 * 8 * 128 * 2 > pull  # K and V of all keys


def test_recommendations() -> None:
    packed = recommend(job(32 * K, 4, mask=Mask(documents=(20000, 300, 300, 300, 32768 - 20900))))
    assert packed.best.way.layout_name in ("balanced", "contiguous")
    assert packed.best.efficiency > recommend(packed.best.job, layouts=["zigzag"], ulysses=(1,)).best.efficiency
    causal = recommend(job(64 * K, 4), ulysses=(1,))
    assert causal.best.way.transport == "pull"
    assert {p.way.transport for p in causal.ranked} == {"pull", "ring", "gather"}
    assert "pull" in causal.reason
    assert causal.reason.count(".") >= 1
    seconds = [p.seconds for p in causal.ranked[1:]]
    assert seconds == sorted(seconds)
    tight = recommend(job(8 << 20, 1, backward=True))
    assert tight.reason.startswith("One GPU")
    small = dataclasses.replace(H200, memory=2e9)
    full = recommend(job(1 << 20, 8), small)
    assert full.reason.startswith("Nothing fits: even ")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"Hq: wanted a multiple of Hkv, got 6 and 4"):
        job(Hq=6, Hkv=4)
    with pytest.raises(ValueError, match=r"hosts: wanted a divisor of the 4 ranks, got 3"):
        job(hosts=3)
    with pytest.raises(ValueError, match=r"transport: wanted pull, .*, got 'tcp'"):
        Way("tcp")
    with pytest.raises(ValueError, match="depth: wanted at least 2 buffers"):
        Way("ring", depth=1)
    with pytest.raises(ValueError, match=r"machine: wanted rates of kernels for fp32"):
        predict(job(dtype="fp32"), Way("ring"))
    with pytest.raises(Unsupported, match="divisor of the 2 query heads, got 4"):
        predict(job(Hq=2, Hkv=1), Way("ulysses"))
    with pytest.raises(Unsupported, match=r"hierarchical: wanted a ring axis over hosts.*, got 1 host"):
        predict(job(), Way("hierarchical"))
    with pytest.raises(Unsupported, match="wanted a way to do this on 4 ranks, got none: "):
        recommend(job(), transports=["hierarchical"], ulysses=(2,))
    with pytest.raises(ValueError, match="bandwidth: wanted that of pull"):
        H200.with_bandwidth("tcp", 1, "")
    with pytest.raises(ValueError, match="points: wanted ascending"):
        Link(((2, 1), (1, 1)), 0, 0)


def test_ulysses_splits_key_heads_as_far_as_they_go() -> None:
    """Eight KV heads over 4 ranks: 2 each; 2 over 8: 1 each, twice over; 3 groups of 4 heads over 2: two of them."""
    heads = [
        predict(job(4 * K, u, Hq=Hq, Hkv=Hkv), Way("ulysses")).scene.Hkv
        for u, Hq, Hkv in ((4, 32, 8), (8, 16, 2), (2, 12, 3))
    ]
    assert heads == [2, 1, 2]


def test_overlap_counts_moments_once() -> None:
    assert overlap(0.0, 10.0, [(-1.0, 2.0), (1.0, 3.0), (9.0, 12.0), (20.0, 21.0)]) == 4.0
    assert overlap(0.0, 1.0, []) == 0.0
