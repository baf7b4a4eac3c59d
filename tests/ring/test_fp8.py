"""fp8 on the ring: each shard rounded once, half the bytes, nothing lost on the way, for any mask and transport."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ringfa3
from ringfa3 import Fp8, Mask, Plan
from ringfa3.fp8 import _preferred, quantized_hops
from ringfa3.gang import Gang
from ringfa3.traffic import counted
from ringfa3.transport.choose import choose
from ringfa3.transport.pool import pieces, pitched
from ringfa3_kernels import Unsupported, dequantize, dispatch, quantize
from tests.ring.masks import masks
from tests.ring.test_attention import Case, on_one_device, ring_case, whole

TRANSPORTS = {
    1: ("ring",),
    2: ("ring", "gather", "pull", "hierarchical:1"),
    3: ("pull", "gather", "ring"),
    4: ("hierarchical:2", "ring", "pull", "gather"),
}
MASKS = (
    Mask(),
    Mask(causal=False),
    Mask(window=(100, 0)),
    Mask(causal=False, window=(30, 110)),
    Mask(documents=(190, 5, 160, 89)),
    Mask(prefix=200),
    Mask(documents=((444,), (130, 314))),
)
SEQLEN = 444  # no shard ends with a block of 128
PLAIN = Fp8()


def fresh(case: Case) -> Case:
    """The case on other numbers than ever before; the case says in a failure which."""
    return replace(case, seed=random.randrange(2**31))


@dataclass(frozen=True)
class Rounded(Case):
    """A case on the numbers that the kernels of a ring of `size` ranks read: every rank's shard rounded by itself."""

    size: int = 1
    fp8: Fp8 = PLAIN

    def inputs(self) -> dict[str, Tensor]:
        x = super().inputs()
        plans = [Plan.build(self.mask, self.layout, self.seqlen, self.size, rank) for rank in range(self.size)]
        read = [quantize(*(p.shard(x[n]) for n in "qkv"), block=self.fp8.block, rotate=self.fp8.rotate) for p in plans]
        for name, parts in zip("qkv", zip(*read, strict=True), strict=True):
            x[name] = plans[0].join([dequantize(part, torch.float64) for part in parts])
        return x


def check(case: Case, fp8: Fp8, shards: list[dict[str, Tensor]], gradients: str) -> None:
    """out and lse are those of the rounded q, k and v up to a few roundings of fp32, and gradients those asked for."""
    read = Rounded(**(vars(case) | {"size": len(shards), "fp8": fp8}))
    truth, got = on_one_device(read, torch.float64), whole(case, shards)
    if gradients == "exact":
        truth |= {n: x for n, x in on_one_device(case, torch.float64).items() if n in ("dq", "dk", "dv")}
    for name, exact in truth.items():
        seen = exact.isfinite()
        assert torch.equal(got[name].isneginf(), exact.isneginf()), (name, case)
        error = (got[name].double() - exact)[seen].abs().max()
        assert error <= 2e-5 * max(1.0, exact[seen].abs().max()), (name, float(error), case)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("size", TRANSPORTS)
def test_attention_of_rounded_shards(world, size, mask):
    turn = MASKS.index(mask)
    layout = ("zigzag", "contiguous", "striped", "balanced")[(turn + size) % 4]
    case = fresh(Case(mask, layout, TRANSPORTS[size][turn % len(TRANSPORTS[size])], SEQLEN))
    fp8 = Fp8(block=(128, 0)[turn % 2], gradients="rounded")
    check(case, fp8, world(size)(ring_case, case, {"fp8": fp8}), "rounded")


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(sinks=True, softcap=4.0), {}),
        (Case(Hq=8, Hkv=1, B=1, scale=0.2, transport="gather"), {"async_op": True}),
        (Case(seqlen=2), {}),
        (Case(seqlen=129, layout="contiguous", D=64, transport="pull"), {}),
        (Case(transport="pull", layout="striped"), {"agree": False}),
    ],
    ids=str,
)
def test_options(world, case, options):
    case = fresh(replace(case, seqlen=SEQLEN if case.seqlen == 61 else case.seqlen))
    if options.get("agree") is False:
        case = replace(case, seqlen=448)
    fp8 = Fp8(gradients="rounded")
    check(case, fp8, world(2)(ring_case, case, {"fp8": fp8} | options), "rounded")


def test_ulysses_rounds_after_the_exchange(world):
    case = fresh(Case(layout="contiguous", transport="ulysses", seqlen=300))
    shards = world(2)(ring_case, case, {"fp8": Fp8(gradients="rounded")})
    alone = Rounded(**vars(case))  # every rank has its heads of the whole sequence: one shard's blocks
    truth, got = on_one_device(alone, torch.float64), whole(case, shards)
    for name, exact in truth.items():
        assert (got[name].double() - exact).abs().max() <= 2e-5 * max(1.0, exact.abs().max()), (name, case)


def portable(rank: int, size: int, case: Case) -> None:
    """The Triton kernel, here interpreted, reads slices with their scales as `aten` does: 3e-4 apart, not 3e-2."""
    p = Plan.build(case.mask, case.layout, case.seqlen, size, rank)
    q, k, v = (p.shard(case.inputs()[n]) for n in "qkv")
    options = {"mask": case.mask, "layout": case.layout, "transport": case.transport, "fp8": Fp8()}
    one, other = (ringfa3.ring_attention(q, k, v, impl=impl, **options) for impl in ("aten", "portable"))
    assert (one - other).abs().max() < 5e-3


def test_portable_kernels(world):
    case = Case(Mask(window=(140, 0)), "contiguous", "gather", 300, B=1, Hq=2, Hkv=1)
    world(2)(portable, fresh(case))


def exactly(rank: int, size: int, case: Case, fp8: Fp8) -> None:
    """out is another, every gradient is bit for bit that of the call without fp8."""
    rounded, plain = (ring_case(rank, size, case, options) for options in ({"fp8": fp8}, {}))
    assert not torch.equal(rounded["out"], plain["out"])
    for name in ("dq", "dk", "dv"):
        assert torch.equal(rounded[name], plain[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transport", ["ring", "pull", "ulysses"])
def test_exact_gradients_are_those_without_fp8(world, transport, dtype):
    case = Case(transport=transport, layout="contiguous", seqlen=260, dtype=dtype)
    world(2)(exactly, fresh(case), Fp8(rotate=True))


def rotated(rank: int, size: int, case: Case) -> None:
    """Gradients through a rotation are turned back: they agree with those without one as far as e4m3 goes."""
    results = [ring_case(rank, size, case, {"fp8": Fp8(rotate=seed, gradients="rounded")}) for seed in (False, True, 7)]
    for name in ("out", "dq", "dk", "dv"):
        plain, *turned = (result[name] for result in results)
        for x in turned:  # two roundings of about 5% each; gradients that were not turned back differ by 140%
            assert 0 < (x - plain).norm() < 0.3 * plain.norm(), name
        assert not torch.equal(*turned)


def test_gradients_are_rotated_back(world):
    world(2)(rotated, fresh(Case(seqlen=300, D=64)))


def bytes_by_hop(rank: int, size: int, case: Case) -> tuple[dict[int, int], ...]:
    """What a forward pass sends and receives: without fp8 and with it."""
    counts: list[dict[int, int]] = []
    p = Plan.build(case.mask, case.layout, case.seqlen, size, rank)
    q, k, v = (p.shard(case.inputs()[n]) for n in "qkv")
    for fp8 in (None, Fp8()):
        with counted() as moved:
            ringfa3.ring_attention(
                q, k, v, mask=case.mask, layout=case.layout, transport=case.transport, impl="aten", fp8=fp8
            )
        counts += [dict(moved.sent), dict(moved.received)]
    return tuple(counts)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=(128, 0))], ids=str)
def test_half_the_bytes_travel_in_every_hop(world, size, mask):
    for transport in TRANSPORTS[size]:
        case = Case(mask, "zigzag", transport, 256 * size, dtype=torch.bfloat16)
        for sent, received, less_sent, less_received in world(size)(bytes_by_hop, case):
            assert received
            assert sent or transport in ("pull", "hierarchical:2")
            for before, after in ((sent, less_sent), (received, less_received)):
                assert after.keys() == before.keys()
                for hop, number in before.items():  # of 128 keys of a head: 128 D bytes and 4 of scale, not 256 D
                    assert after[hop] * 64 * case.D == number * (32 * case.D + 1), (transport, hop)


def everywhere(rank: int, size: int, name: str, order: str, block: int, seed: int, kind: str = "cpu") -> None:
    """What arrives of v in order "keys" is what arrives in rows; and both are what the source has rounded."""
    g = torch.Generator().manual_seed(seed)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    x = torch.randn(2, SEQLEN, 2, 16, generator=g).to(device)
    for mask in MASKS:
        for layout in ("zigzag", "striped"):
            p = ringfa3.plan(mask, layout, SEQLEN, device=device)
            transport = choose(name, p, 0, device, Gang.of(None))
            k = p.shard(x)
            _, rotation = quantized_hops(transport, p, k, k, -k, Fp8(block=block), order)
            seen = []
            for hop, (k_hop, v_hop) in rotation:
                source = Plan.build(mask, layout, SEQLEN, size, hop.source)
                shard = source.shard(x)
                want = [dequantize(y)[:, hop.keys] for y in quantize(shard, shard, -shard, block=block)[1:]]
                assert torch.equal(dequantize(k_hop), want[0])
                assert torch.equal(dequantize(v_hop), want[1])
                seen.append(hop.source)
            assert sorted(seen) == sorted(hop.source for hop in p.hops)


@pytest.mark.parametrize("order", ["rows", "keys"])
@pytest.mark.parametrize(
    ("size", "name"), [(1, "ring"), (2, "gather"), (3, "ring"), (3, "pull"), (4, "hierarchical:2")]
)
def test_either_order_arrives(world, size, name, order):
    world(size)(everywhere, name, order, random.choice([128, 0]), random.randrange(2**31))


def not_finite(
    rank: int, size: int, name: str, position: int, value: float, transport: str, kind: str = "cpu"
) -> Tensor:
    """bool [S]: which rows of the output hold NaN, where one element of q, k or v is not finite."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    p = ringfa3.plan(Mask(window=(120, 0)), "zigzag", SEQLEN, device=device)
    x = dict(zip("qkv", torch.randn(3, 1, SEQLEN, 2, 64, device=device).bfloat16(), strict=True))
    x[name][0, position, 1, 5] = value
    q, k, v = (p.shard(x[n]) for n in "qkv")
    out = ringfa3.ring_attention(q, k, v, plan=p, transport=transport, fp8=Fp8(rotate=True))
    assert out[:, :, 0].isfinite().all()  # the other head
    wrong = out[0, :, 1].isnan()
    assert torch.equal(wrong.any(-1), wrong.all(-1))
    return p.unshard(wrong.any(-1), 0).cpu()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(world, name, value):
    position = random.randrange(SEQLEN)
    rows = torch.arange(SEQLEN)
    sees = (rows >= position) & (rows <= position + 120) if name != "q" else rows == position
    for wrong in world(3)(not_finite, name, position, value, "ring" if name == "v" else "pull"):
        assert torch.equal(wrong, sees), position


def differ(rank: int, size: int) -> None:
    good = torch.randn(1, 8, 2, 16)
    for mine, other in (
        (None, Fp8()),
        (Fp8(), Fp8(block=0)),
        (Fp8(rotate=True), Fp8(rotate=1)),
        (Fp8(rotate=0), Fp8()),
    ):
        with pytest.raises(ValueError, match=r"ranks disagree on fp8: rank 0 has .*, rank 1 has"):
            ringfa3.ring_attention(good, good, good, impl="aten", fp8=other if rank else mine)
    other = Fp8(gradients="rounded") if rank else Fp8()
    leaf = good.clone().requires_grad_()
    with pytest.raises(ValueError, match="ranks disagree on fp8"):
        ringfa3.ring_attention(leaf, good, good, impl="aten", fp8=other)
    with pytest.raises(ValueError, match="fp8: wanted an Fp8 or None" if rank else "rank 1: fp8: wanted"):
        ringfa3.ring_attention(good, good, good, impl="aten", fp8=True if rank else None)
    uneven = torch.randn(1, 8, 2, 24)
    with pytest.raises(Unsupported if rank else ValueError, match="power of two, got 24"):
        ringfa3.ring_attention(uneven, uneven, uneven, impl="aten", fp8=Fp8(rotate=True) if rank else None)
    assert ringfa3.ring_attention(good, good, good, impl="aten", fp8=Fp8()).shape == good.shape


def test_disagreement_is_an_error_on_every_rank(world):
    world(2)(differ)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("block: wanted 128, or 0", {"block": 64}),
        ("block: wanted 128, or 0", {"block": False}),
        ("rotate: wanted False, True or a seed", {"rotate": -1}),
        ("rotate: wanted False, True or a seed", {"rotate": None}),
        ("gradients: wanted 'exact' or 'rounded'", {"gradients": "fast"}),
    ],
)
def test_wrong_options(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^Fp8 {message}"):
        Fp8(**options)


def test_fp64_is_refused():
    x = torch.randn(1, 8, 2, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="q: wanted dtype bfloat16, float16 or float32 beside fp8"):
        ringfa3.ring_attention(x, x, x, impl="aten", fp8=Fp8())


@pytest.mark.parametrize(
    ("by_rows", "by_keys", "wanted"),
    [
        ("aten", "aten", "rows"),
        ("portable", "hopper", "keys"),
        ("portable", "portable", "rows"),
        ("hopper", "portable", "rows"),
        (None, "hopper", "keys"),
        ("aten", None, "rows"),
    ],
)
def test_values_lie_as_the_first_implementation_wants_them(monkeypatch, by_rows, by_keys, wanted):
    def choose(call: Any, impl: str) -> Any:
        name = by_keys if call.v_order == "keys" else by_rows
        if name is None:
            raise Unsupported("no")
        return SimpleNamespace(NAME=name)

    monkeypatch.setattr(dispatch, "choose", choose)
    x = torch.empty(1, 0, 2, 64)
    assert _preferred(x, x, False, "auto", 128) == wanted


@given(data=st.data())
def test_wider_slices_show_the_same_keys(data):
    seqlen = data.draw(st.integers(1, 90), "seqlen")
    mask = data.draw(masks(seqlen), "mask")
    layout = data.draw(st.sampled_from(["contiguous", "zigzag", "striped", "balanced"]), "layout")
    size = data.draw(st.integers(1, 4), "size")
    block = data.draw(st.sampled_from([1, 4, 16, 128]), "block")
    for rank in range(size):
        plain = Plan.build(mask, layout, seqlen, size, rank)
        wide = plain.aligned(block)
        assert wide is plain.aligned(block)
        assert [hop.source for hop in wide.hops] == [hop.source for hop in plain.hops]
        for before, after in zip(plain.hops, wide.hops, strict=True):
            n = plain.kv_lengths[after.source]
            assert wide.needs[rank][after.source] == after.keys
            assert after.keys.start % block == 0
            assert after.keys.stop % block == 0 or after.keys.stop == n
            after.visible.check(after.keys.stop - after.keys.start)
            shown = []
            for hop in (before, after):
                mask_ = hop.visible.mask(hop.keys.stop - hop.keys.start)
                shown.append(torch.nn.functional.pad(mask_, (hop.keys.start, n - hop.keys.stop)))
            assert torch.equal(*shown)


@given(data=st.data())
def test_copies_of_slices(data):
    shape = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4), "shape")
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    cuts = [
        data.draw(st.integers(0, n - 1).flatmap(lambda a, n=n: st.tuples(st.just(a), st.integers(a + 1, n))))
        for n in shape
    ]
    source = whole[tuple(slice(*cut) for cut in cuts)]
    rows = pitched(source)
    assert rows is None or (rows.stride(1) == 1 and torch.equal(rows.flatten(), source.flatten()))
    target = torch.full(source.shape, -1)
    for there, part in pieces(target, source):
        assert there.is_contiguous()
        assert part.is_contiguous() or (part.ndim == 2 and part.stride(1) == 1)
        there.copy_(part)
    assert torch.equal(target, source)
