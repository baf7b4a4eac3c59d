"""ALiBi and dropout over a group: what one device computes, mask and all, at every world, layout and transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ringfa3
from ringfa3 import Mask, Plan, places
from ringfa3.flash_attn import flash_attn_func
from ringfa3_kernels import Dropout, Unsupported, Visible
from tests.kernels.places import kept
from tests.ring.test_ulysses import group_of

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
MASKS = {"causal": Mask(), "full": Mask(causal=False), "documents": Mask(documents=(17, 1, 30, 13))}
SEED = 2**64 - 3


@dataclass(frozen=True)
class Case:
    """One call on inputs drawn from a fixed seed; see tests/ring/test_attention.py."""

    mask: Mask = MASKS["causal"]
    layout: str = "zigzag"
    transport: str = "ring"
    shape: tuple[int, int] | None = None  # of the mesh
    seqlen: int = 61
    Hq: int = 4
    Hkv: int = 2
    dtype: torch.dtype = torch.float32
    softcap: float = 0.0
    sinks: bool = False
    alibi: str = ""  # "heads", or "rows" where batch rows differ
    p: float = 0.0
    impl: str = "aten"

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(5)
        sizes = {"q": self.Hq, "k": self.Hkv, "v": self.Hkv, "dout": self.Hq}
        made = {n: torch.randn(2, self.seqlen, h, 16, generator=g).to(self.dtype) for n, h in sizes.items()}
        made["dlse"] = torch.randn(2, self.Hq, self.seqlen, generator=g)
        made["sinks"] = torch.randn(self.Hq, generator=g)
        return made

    def slopes(self) -> Tensor | None:
        slopes = torch.tensor([2.0 ** -(1 + i / 2) for i in range(2 * self.Hq)]).view(2, self.Hq)
        return {"heads": slopes[0], "rows": slopes, "": None}[self.alibi]

    def options(self) -> dict[str, Any]:
        seed = SEED if self.p else None
        return {"alibi_slopes": self.slopes(), "dropout_p": self.p, "dropout_seed": seed, "softcap": self.softcap}


def on_one_device(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Plain attention in this dtype by autograd, with a mask of its own making."""
    x = {name: t.to(dtype).requires_grad_() for name, t in case.inputs().items()}
    wide = torch.promote_types(dtype, torch.float32)
    hops = Plan.build(case.mask, "contiguous", case.seqlen, 1, 0).hops
    visible = hops[0].visible if hops else Visible.full(case.seqlen, case.seqlen)
    group = case.Hq // case.Hkv
    s = torch.einsum("bihd,bjhd->bhij", x["q"], x["k"].repeat_interleave(group, 2)).to(wide) / 4
    s = case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
    i = torch.arange(case.seqlen)
    slopes = case.slopes()
    if slopes is not None:
        s = s - torch.atleast_2d(slopes).to(wide)[..., None, None] * (i[:, None] - i).abs()
    s = s.masked_fill(~visible.mask(case.seqlen), -torch.inf)
    if case.sinks:
        s = torch.cat([s, x["sinks"].to(wide)[:, None, None].expand(2, -1, case.seqlen, 1)], -1)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse[..., None])[..., : case.seqlen]
    if case.p:
        stays = kept(i[None], i[None], range(case.Hq), range(2), Dropout(case.p, SEED))
        p = p * stays.to(wide) / (1 - case.p)
    out = torch.einsum("bhij,bjhd->bihd", p.to(dtype), x["v"].repeat_interleave(group, 2))
    torch.autograd.backward([out, lse], [x["dout"].detach(), x["dlse"].detach().to(wide)])
    return {"out": out.detach(), "lse": lse.detach(), "dq": x["q"].grad, "dk": x["k"].grad, "dv": x["v"].grad}  # type: ignore[dict-item]


def shared(rank: int, size: int, case: Case, options: dict[str, Any]) -> dict[str, Tensor]:
    """The same by ring_attention, put together: all ranks' results on every rank."""
    group = group_of(case.shape) if case.shape else None
    p = ringfa3.plan(case.mask, case.layout, case.seqlen, group)
    x = {n: p.shard(t, 2 if n == "dlse" else 1) if n != "sinks" else t for n, t in case.inputs().items()}
    q, k, v = (x[n].requires_grad_() for n in "qkv")
    got = ringfa3.ring_attention(
        q, k, v, mask=case.mask, layout=case.layout, transport=case.transport, impl=case.impl, group=group,
        sink_logits=x["sinks"] if case.sinks else None, return_lse=True, **case.options(), **options,
    )  # fmt: skip
    out, lse = got.wait() if options.get("async_op") else got
    torch.autograd.backward([out, lse], [x["dout"], x["dlse"]])
    found = {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {name: p.unshard(t, 2 if name == "lse" else 1) for name, t in found.items()}  # type: ignore[arg-type]


def check(case: Case, results: list[dict[str, Tensor]]) -> None:
    """Errors against fp64 at most twice those of plain attention in the inputs' dtype, on every rank alike."""
    truth, plain = on_one_device(case, torch.float64), on_one_device(case, case.dtype)
    for name, exact in truth.items():
        assert all(torch.equal(other[name], results[0][name]) for other in results)
        mine, theirs = ((x[name].double() - exact).abs().max().item() for x in (results[0], plain))
        floor = 1e-6 * max(1.0, exact.abs().max().item())
        assert mine <= 2 * theirs + floor, f"{name}: error {mine:.2e}, plain attention's is {theirs:.2e}"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_one_device(world, size, layout, mask):
    number = LAYOUTS.index(layout) + list(MASKS).index(mask) + size
    case = Case(MASKS[mask], layout, ("ring", "gather", "pull")[number % 3], alibi="heads", p=0.3)
    check(case, world(size)(shared, case, {}))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(alibi="rows"), {}),
        (Case(p=0.5), {"deterministic": True}),
        (Case(alibi="rows", p=0.2, softcap=3.0, Hq=6, Hkv=1), {"async_op": True}),
        (Case(alibi="heads", p=0.1, sinks=True, seqlen=48), {"agree": False}),
        (Case(alibi="heads", p=0.1, dtype=torch.bfloat16, seqlen=128), {}),
        (Case(alibi="heads", p=0.4, impl="portable", seqlen=40), {}),
        (Case(alibi="rows", p=0.4, seqlen=3), {"agree": True}),
    ],
    ids=["slopes by row", "dropout", "softcap, MQA", "sinks", "bf16", "portable", "three rows"],
)
def test_options_and_odd_sizes(world, size, case, options):
    check(case, world(size)(shared, case, options))


@pytest.mark.parametrize(("size", "shape"), [(2, None), (3, None), (4, None), (4, (2, 2)), (2, (2, 1)), (3, (1, 3))])
@pytest.mark.parametrize("heads", [(4, 2), (5, 1)], ids=str)
def test_heads_that_travel_keep_their_numbers(world, size, shape, heads):
    """Ulysses and meshes deal heads: slopes and dropout go by a head's number in the whole model."""
    case = Case(
        layout="zigzag" if shape else "contiguous", transport="auto" if shape else "ulysses", shape=shape,
        alibi="rows", p=0.3, Hq=heads[0], Hkv=heads[1],
    )  # fmt: skip
    check(case, world(size)(shared, case, {}))


def places_kept(rank: int, size: int, layout: str, transport: str, shape: tuple[int, int] | None) -> Tensor:
    """bool [2, 4, 61, 61]: which probabilities stay, read off unit vectors as values."""
    n, group = 61, group_of(shape) if shape else None
    p = ringfa3.plan(Mask(causal=False), layout, n, group)
    q = torch.zeros(2, p.lengths[rank], 4, 64)
    v = p.shard(torch.eye(n, 64)[None, :, None].expand(2, -1, 2, -1))
    out = ringfa3.ring_attention(
        q, torch.zeros_like(v), v, causal=False, layout=layout, transport=transport, dropout_p=0.4, dropout_seed=SEED,
        group=group,
    )  # fmt: skip
    return (p.unshard(out)[..., :n] != 0).transpose(1, 2)


@pytest.mark.parametrize(
    ("size", "layout", "transport", "shape"),
    [
        (1, "contiguous", "auto", None),
        (2, "zigzag", "ring", None),
        (3, "striped", "pull", None),
        (4, "balanced", "gather", None),
        (4, "zigzag", "hierarchical:2", None),
        (3, "contiguous", "ulysses", None),
        (4, "striped", "ring", (2, 2)),
    ],
)
def test_the_mask_is_the_same_bit_for_bit(world, size, layout, transport, shape):
    wanted = kept(torch.arange(61)[None], torch.arange(61)[None], range(4), range(2), Dropout(0.4, SEED))
    for found in world(size)(places_kept, layout, transport, shape):
        assert torch.equal(found, wanted)


def crossed(rank: int, size: int) -> Tensor:
    """Which probabilities stay where keys are of another sequence: bool [1, 2, 20, 33]."""
    p = ringfa3.plan(Mask(causal=False), "striped", 20, kv_seqlen=33)
    keys = ringfa3.plan(Mask(causal=False), "striped", 33)
    v = keys.shard(torch.eye(33, 40)[None, :, None].expand(-1, -1, 2, -1))
    q = torch.zeros(1, p.lengths[rank], 2, 40)
    out = ringfa3.ring_attention(q, torch.zeros_like(v), v, plan=p, dropout_p=0.4, dropout_seed=SEED)
    return (p.unshard(out)[..., :33] != 0).transpose(1, 2)


def test_cross_attention_counts_the_keys_own_positions(world):
    wanted = kept(torch.arange(20)[None], torch.arange(33)[None], range(2), range(1), Dropout(0.4, SEED))
    for found in world(3)(crossed):
        assert torch.equal(found, wanted)


def drawn(rank: int, size: int, state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Results with the seed drawn; two calls, and one after the generator is set back."""
    x = torch.randn(1, 8, 2, 8, generator=torch.Generator().manual_seed(rank))
    torch.manual_seed(state)
    first, second = (ringfa3.ring_attention(x, x, x, dropout_p=0.5) for _ in "12")
    torch.manual_seed(state)
    return first, second, ringfa3.ring_attention(x, x, x, dropout_p=0.5)


def test_a_seed_that_is_not_given_is_torchs(world):
    for first, second, again in world(2)(drawn, 3):
        assert torch.equal(first, again)
        assert not torch.equal(first, second)


def wrong(rank: int, size: int, which: str) -> str:
    """What is said where the ranks differ, or a rank's options are wrong."""
    x = torch.randn(1, 8, 2, 8)
    torch.manual_seed(rank)
    options: dict[str, Any] = {
        "seeds": {"dropout_p": 0.5, "dropout_seed": rank},
        "states": {"dropout_p": 0.5},
        "shares": {"dropout_p": 0.5 + rank / 8, "dropout_seed": 1},
        "slopes": {"alibi_slopes": torch.ones(2) if rank else None},
        "shapes": {"alibi_slopes": torch.ones(1, 2) if rank else torch.ones(2)},
        "one": {"alibi_slopes": torch.ones(2, requires_grad=rank == 1)},
    }[which]
    try:
        ringfa3.ring_attention(x, x, x, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("seeds", "dropout_seed"),
        ("states", "dropout_seed"),
        ("shares", "dropout_p"),
        ("slopes", "alibi_slopes"),
        ("shapes", "alibi_slopes"),
        ("one", "alibi_slopes: wanted no requires_grad"),
    ],
)
def test_ranks_that_differ_hear_of_it_all(world, which, name):
    for said in world(2)(wrong, which):
        assert name in said


def unseeded(rank: int, size: int) -> str:
    x = torch.randn(1, 8, 2, 8)
    with pytest.raises(ValueError, match="dropout_seed") as caught:
        ringfa3.ring_attention(x, x, x, dropout_p=0.5, agree=False)
    return str(caught.value)


def test_ranks_that_do_not_compare_need_a_seed(world):
    assert all("agree=False" in said for said in world(2)(unseeded))


def checkpointed(rank: int, size: int, reentrant: bool | None) -> list[Tensor]:
    """Gradients, with activations recomputed in the backward pass or not."""
    g = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, 9, 2, 8, generator=g).requires_grad_() for _ in "qkv")
    torch.manual_seed(11)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ringfa3.ring_attention(q, k, v, dropout_p=0.5)  # type: ignore[no-any-return]

    out = layer(q, k, v) if reentrant is None else checkpoint(layer, q, k, v, use_reentrant=reentrant)
    out.square().sum().backward()
    return [out.detach(), q.grad, k.grad, v.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_the_same_again(world, reentrant):
    for kept_, again in zip(world(2)(checkpointed, None), world(2)(checkpointed, reentrant), strict=True):
        for x, y in zip(kept_, again, strict=True):
            assert torch.equal(x, y)


def forgetful(rank: int, size: int, call: str, reentrant: bool, seeds: list[int | None]) -> str:
    """What a pass says whose checkpoint does not set the generator back; "right" where its gradients are."""
    g = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, 9, 2, 8, generator=g).requires_grad_() for _ in "qkv")
    left = [*seeds, *seeds] if len(seeds) == 1 else list(seeds)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if call == "flash_attn":
            return flash_attn_func(q, k, v, dropout_p=0.5)  # type: ignore[no-any-return]
        return ringfa3.ring_attention(q, k, v, dropout_p=0.5, dropout_seed=left.pop(0))  # type: ignore[no-any-return]

    try:
        checkpoint(layer, q, k, v, use_reentrant=reentrant, preserve_rng_state=False).square().sum().backward()
    except ValueError as error:
        return str(error)
    found = [x.grad.clone() for x in (q, k, v)]
    ringfa3.ring_attention(q, k, v, dropout_p=0.5, dropout_seed=seeds[0]).square().sum().backward()
    return "right" if all(torch.equal(x.grad, 2 * y) for x, y in zip((q, k, v), found, strict=True)) else "wrong"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("call", ["ring", "flash_attn"])
def test_a_checkpoint_that_would_drop_otherwise_is_refused(world, call, reentrant):
    """It forgets the generator's state: the loss would be of one mask, and the gradients of another."""
    for said in world(2)(forgetful, call, reentrant, [None]):
        assert "dropout_seed: wanted preserve_rng_state=True (its default) or a seed in a checkpoint" in said


def test_a_seed_that_changes_is_refused(world):
    for said in world(2)(forgetful, "ring", False, [2**64 - 1, 2**63 - 1]):
        assert "got another seed or dropout_p when it recomputed" in said


def test_what_is_saved_of_dropout_lies_on_the_cpu():
    """Autograd's thread, which recomputes, has the default device of its own."""
    with torch.device("meta"):
        (saved,) = places.kept(Dropout(0.25, 2**64 - 1))
    assert saved.device.type == "cpu"
    assert places.changed(Dropout(0.25, 2**64 - 1), [saved]) is None
    for other in (Dropout(0.5, 2**64 - 1), Dropout(0.25, 1)):
        assert isinstance(places.changed(other, [saved]), ValueError)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_a_seed_needs_no_generator(world, reentrant, seed):
    assert world(2)(forgetful, "ring", reentrant, [seed]) == ["right"] * 2


X = torch.randn(2, 5, 4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 1}, r"dropout_p: wanted a number in \[0, 1\), got 1"),
        ({"dropout_p": "0.1"}, "dropout_p: .*got '0.1'"),
        ({"dropout_p": 0.1, "dropout_seed": -1}, r"dropout_seed: wanted an integer in \[0, 2\*\*64\) or None, got -1"),
        ({"alibi_slopes": [1.0]}, "alibi_slopes: wanted torch.float32 .*, got list"),
        ({"alibi_slopes": torch.ones(5)}, r"alibi_slopes: wanted torch.float32 \[4\] or \[2, 4\], got .* \[5\]"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes: wanted no requires_grad"),
    ],
    ids=str,
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ringfa3.ring_attention(X, X, X, **options)


def test_fp8_beside_them_is_refused():
    with pytest.raises(Unsupported, match="fp8: wanted None beside alibi_slopes or dropout_p"):
        ringfa3.ring_attention(X, X, X, fp8=ringfa3.Fp8(), dropout_p=0.1)
