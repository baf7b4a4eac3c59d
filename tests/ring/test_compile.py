"""torch's tools on code that calls us: compile, export, opcheck, checkpoint, autocast, vmap, FakeTensor, DTensor."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import ringfa3
from ringfa3 import Mask, operators, ring_attention
from ringfa3.flash_attn import flash_attn_func, flash_attn_varlen_func
from ringfa3_kernels import Unsupported

OPS = torch.ops.ringfa3
PATIENCE = 500.0  # seconds for ranks that compile, on a machine that does ten other things
CU = torch.tensor([0, 10, 24, 24, 48], dtype=torch.int32)
ASKED = (None, None, None, None, None, None, None, 0.0, None, "", None, "auto", False, "auto", True, True)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(n: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, n, heads, 16, dtype=dtype) for heads in (4, 2, 2)]


def gradients(f: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """What f returns, and the gradients of its inputs for a loss that weighs all of that."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = f(*leaves)
    results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in results]
    sum((x * weight).sum() for x, weight in zip(results, weights, strict=True)).backward()
    return [x.detach() for x in results] + [x.grad for x in leaves if x.grad is not None]


def compiled(f: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def check(f: Callable[..., Any], *inputs: Tensor, through: Callable[..., Any] = compiled) -> None:
    """f gives the same, and the same gradients, through this."""
    plain, other = gradients(f, *inputs), gradients(through(f), *inputs)
    assert len(plain) == len(other)
    for got, want in zip(other, plain, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def ring_with_plan(q: Tensor, k: Tensor, v: Tensor) -> Any:
    plan = PLANS["window"]
    return ring_attention(q, k, v, plan=plan, group=plan.group)


PLANS = {"window": ringfa3.plan(Mask(window=(6, 0)), "contiguous", 24)}
DOCUMENTS = torch.tensor([10, 14])
CALLS: dict[str, Callable[..., Any]] = {
    "plain": ring_attention,
    "options": lambda q, k, v: ring_attention(q, k, v, window=(5, 0), softcap=3.0, scale=0.2, return_lse=True),
    "deterministic": lambda q, k, v: ring_attention(q, k, v, causal=False, deterministic=True, layout="striped"),
    "documents": lambda q, k, v: ring_attention(q, k, v, documents=[10, 14]),
    "documents by row": lambda q, k, v: ring_attention(q, k, v, documents=[[10, 14], [2, 2, 20]]),
    "documents in a tensor": lambda q, k, v: ring_attention(q, k, v, documents=DOCUMENTS),
    "plan": ring_with_plan,
    "flash": lambda q, k, v: flash_attn_func(q, k, v, return_attn_probs=True),
    "flash causal": lambda q, k, v: flash_attn_func(q, k, v, causal=True, softcap=2.0),
    "flash window": lambda q, k, v: flash_attn_func(q, k, v, window_size=(5, 2)),
    "flash odd": lambda q, k, v: flash_attn_func(q[..., :13], k[..., :13], v[..., :13], causal=True),
    "varlen": lambda q, k, v: flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), CU, CU, 24, 24, causal=True
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_a_break(call: str) -> None:
    check(CALLS[call], *qkv())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch 2.11's own
def test_inductor_takes_our_operators() -> None:
    check(ring_attention, *qkv(), through=lambda f: compiled(f, "inductor"))  # nothing for a C++ compiler to do


def test_sinks_compile() -> None:
    check(lambda q, k, v, sinks: ring_attention(q, k, v, sink_logits=sinks, return_lse=True), *qkv(), torch.randn(4))


def test_other_plans_and_lengths_are_compiled_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(lambda q, k, v, plan: ring_attention(q, k, v, plan=plan), counter)
    kept = []
    for length, window in ((24, 5), (24, 6), (24, 7), (32, 5), (40, 3), (48, 9)):
        plan = ringfa3.plan(Mask(window=(window, 0)), "zigzag", length)
        kept.append(plan)
        q, k, v = qkv(length)
        torch.testing.assert_close(f(q, k, v, plan), ring_attention(q, k, v, plan=plan))
    assert counter.frame_count <= 3  # the first; plans as numbers; lengths as numbers


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_equal_calls_build_one_plan(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out = ring_attention(q, k, v, window=(7, 0))
        return ring_attention(out, k, v, window=(7, 0), layout="zigzag") + ring_attention(q, k, v, documents=[20, 36])

    built = count_plans(monkeypatch)
    f = compiled(calls) if way == "compiled" else calls
    for _ in range(3):
        gradients(f, *qkv(56))
    assert built == [Mask(window=(7, 0)), Mask(documents=(20, 36))]
    made = [ringfa3.plan(Mask(window=(7, 0)), "zigzag", 56, device=device) for device in ("cpu", torch.device("cpu"))]
    assert made[0] is made[1]
    assert len(built) == 2


def count_plans(monkeypatch: pytest.MonkeyPatch) -> list[Mask]:
    """The masks of the plans that are built from now on, when none is kept."""
    sys.modules["ringfa3.plan"]._kept.cache_clear()  # type: ignore[attr-defined]  # ringfa3.plan is the function
    build, built = ringfa3.Plan.build, []

    def counted(mask: Mask, *args: Any, **options: Any) -> ringfa3.Plan:
        built.append(mask)
        return build(mask, *args, **options)

    monkeypatch.setattr(ringfa3.Plan, "build", staticmethod(counted))
    return built


def test_a_plan_that_is_gone_is_named() -> None:
    with pytest.raises(ValueError, match="plan: wanted one that lives"):
        ringfa3.Plan.by_key(1)


@pytest.mark.parametrize("name", ["attend causal", "attend intervals", "attend half", "ring_attention"])
def test_opcheck(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(12, torch.bfloat16 if "half" in name else torch.float32))
    seen = None, None, "causal", None, 0.0, False
    if "intervals" in name:
        lo = torch.arange(12, dtype=torch.int32) // 2
        seen = lo, lo + 1, "intervals", 0.3, 2.0, True
    if name == "ring_attention":
        opcheck(OPS.ring_attention, (q, k, v, *ASKED))
        out, lse, ticket = OPS.ring_attention(q.detach(), k.detach(), v.detach(), *ASKED)
        last, backward = (ticket,), OPS.ring_attention_backward
    else:
        opcheck(OPS.attend, (q, k, v, *seen))
        out, lse = OPS.attend(q.detach(), k.detach(), v.detach(), *seen)
        last, backward = seen, OPS.attend_backward
    saved = q.detach(), k.detach(), v.detach(), out, lse
    for dout, dlse in ((torch.randn_like(out), torch.randn_like(lse)), (torch.randn_like(out), None), (None, lse)):
        opcheck(backward, (dout, dlse, *saved, *last))


def test_a_task_lives_as_long_as_its_ticket() -> None:
    gc.collect()
    before = len(operators._HELD)
    q, k, v = qkv()
    out, lse, ticket = OPS.ring_attention(q, k, v, *ASKED)
    assert len(operators._HELD) == before + 1
    alias, copy = ticket.detach(), ticket.clone()
    del ticket
    for either in (alias, copy):
        OPS.ring_attention_backward(out, None, q, k, v, out, lse, either)
    del alias, either
    assert len(operators._HELD) == before
    with pytest.raises(RuntimeError, match="got a copy"):
        OPS.ring_attention_backward(out, None, q, k, v, out, lse, copy)
    OPS.ring_attention(q, k, v, *ASKED[:-1], False)
    gradients(compiled(ring_attention), q, k, v)
    gc.collect()
    assert len(operators._HELD) == before


@pytest.mark.parametrize("call", ["options", "flash causal"])
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "compiled"])
def test_activation_checkpointing(call: str, way: str) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return CALLS[call](q * 1.5, k.sin(), v)

    def recomputed(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return checkpoint(block, q, k, v, use_reentrant=way == "reentrant")

    check(block, *qkv(), through=lambda _: compiled(recomputed) if way == "compiled" else recomputed)


@pytest.mark.parametrize("call", ["options", "sinks", "flash causal", "varlen"])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.float64], ids=str)
def test_autocast_casts_at_the_door(call: str, given: torch.dtype) -> None:
    sinks = torch.randn(4)
    f = CALLS.get(call, lambda q, k, v: ring_attention(q, k, v, sink_logits=sinks, return_lse=True))
    used = given if given == torch.float64 else torch.bfloat16  # autocast leaves fp64 alone

    def cast(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return f(*(x.to(used) for x in (q, k, v)))

    def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return f(q, k, v)

    inputs = qkv(dtype=given)
    check(cast, *inputs, through=lambda _: under_autocast)
    if given == torch.float32:
        check(cast, *inputs, through=lambda _: compiled(under_autocast))
        attention = torch.nn.functional.scaled_dot_product_attention
        with torch.autocast("cpu", torch.bfloat16):
            theirs = attention(*(x.transpose(1, 2) for x in (inputs[0],) * 3))
            assert flash_attn_func(*(inputs[0],) * 3).dtype == theirs.dtype
            mixed = ring_attention(inputs[0], inputs[1].bfloat16(), inputs[2])  # as after rotary embeddings in fp32
        assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize("call", ["plain", "flash"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_vmap_is_refused(call: str, way: str) -> None:
    f = torch.vmap(CALLS[call])
    error = Exception if way == "compiled" else NotImplementedError  # fullgraph has its own
    with pytest.raises(error, match=r"ring_attention: wanted .* torch\.vmap's"):
        (compiled(f) if way == "compiled" else f)(*(x[None] for x in qkv()))


@pytest.mark.parametrize("call", ["plain", "options", "flash causal", "flash window"])
@pytest.mark.parametrize("strict", [False, True])
def test_exports(call: str, strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return CALLS[call](q, k, v)

    length = torch.export.Dim("length", min=4, max=4096)
    shapes = None if call == "flash window" else ({1: length},) * 3
    program = torch.export.export(Model(), tuple(qkv(24)), strict=strict, dynamic_shapes=shapes)
    inputs = qkv(24 if shapes is None else 40)
    torch.testing.assert_close(program.module()(*inputs), CALLS[call](*inputs))


def test_export_refuses_a_plan() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return ring_with_plan(q, k, v)

    with pytest.raises(Unsupported, match=r"plan: wanted None under torch\.export"):
        torch.export.export(Model(), tuple(qkv()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mask", {"mask": Mask(window=(3, 0))}),
        ("layout", {"layout": ringfa3.balanced(Mask(documents=(10, 14)))}),
        ("agree", {"agree": None}),
        ("plan", {"plan": "zigzag"}),
        ("async_op", {"async_op": True}),
        ("documents", {"documents": "packed"}),
        ("fp8", {"fp8": "per_head"}),
    ],
)
def test_what_cannot_be_compiled_is_named(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=f"{name}: wanted"):
        compiled(lambda q, k, v: ring_attention(q, k, v, **options))(*qkv())


def test_wrong_arguments_are_errors_of_the_call() -> None:
    f = compiled(lambda q, k, v: ring_attention(q, k, v, documents=DOCUMENTS))
    with pytest.raises(ValueError, match="documents: wanted lengths that sum to seqlen 20"):
        f(*qkv(20))


@pytest.mark.parametrize("call", ["options", "flash causal"])
def test_fake_tensors(call: str) -> None:
    real = CALLS[call](*qkv())
    with FakeTensorMode() as mode:
        fake = CALLS[call](*(mode.from_tensor(x) for x in qkv()))
    for got, want in zip(*(x if isinstance(x, tuple) else (x,) for x in (fake, real)), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def ranks_compile(rank: int, size: int) -> None:
    torch._dynamo.reset()
    group = dist.new_group(range(size))
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    flat = init_device_mesh("cpu", (size, 1), mesh_dim_names=("ulysses", "ring"))
    packed = ringfa3.plan(Mask(documents=(11, 13)), "zigzag", 24, group)
    meshed = ringfa3.plan(Mask(), "zigzag", 24, flat)

    def calls(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = ring_attention(q, k, v, return_lse=True)
        out = ring_attention(out, k, v, group=group, layout="striped")
        out = ring_attention(out, k, v, group=mesh, causal=False, transport="ring")
        out = ring_attention(out, k, v, transport="ulysses", agree=False)
        out = ring_attention(out, k, v, plan=meshed)
        out = checkpoint(
            lambda *x: ring_attention(*x, plan=packed, group=packed.group, transport="gather"), out, k.sin(), v,
            use_reentrant=False,
        )  # fmt: skip
        return out, lse

    torch.manual_seed(rank)
    check(calls, *qkv(24 // size))
    opcheck(OPS.ring_attention, (*(x.requires_grad_() for x in qkv(24 // size)), *ASKED))


def ranks_agree_when_compiled_code_runs(rank: int, size: int) -> None:
    torch._dynamo.reset()
    f = compiled(lambda q, k, v, softcap: ring_attention(q, k, v, softcap=softcap))
    with torch.no_grad():
        f(*qkv(12), 1.0)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"ranks disagree on softcap: rank 0 has 1\.0, rank 1 has 2\.0"):
                f(*qkv(12), 1.0 + rank)
        f(*qkv(12), 2.0)
    with pytest.raises(ValueError, match="documents: wanted an integer of at least 0, got -1"):
        compiled(lambda q, k, v, lengths: ring_attention(q, k, v, documents=lengths))(
            *qkv(12), torch.tensor([4, 20] if rank == 0 else [4, -1])
        )


def dtensors(rank: int, size: int) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    torch.manual_seed(0)  # the same on every rank
    whole = [*qkv(24, torch.float64), torch.randn(4, dtype=torch.float64)]
    weights = torch.randn(2, 24, 4, 16, dtype=torch.float64)

    leaves = [x.clone().requires_grad_() for x in whole]
    mine_alone = dist.new_group([rank], use_local_synchronization=True)
    out, lse = ring_attention(*leaves[:3], sink_logits=leaves[3], group=mine_alone, return_lse=True)
    ((out * weights).sum() + lse.sum()).backward()
    placements = [Shard(1)] * 3 + [Replicate()]
    parts = [distribute_tensor(x, mesh, [p]).requires_grad_() for x, p in zip(whole, placements, strict=True)]
    for through in (lambda f: f, compiled):
        mine, my_lse = through(lambda *x: ring_attention(*x[:3], sink_logits=x[3], return_lse=True))(*parts)
        assert (mine.placements, my_lse.placements) == ((Shard(1),), (Shard(2),))
        assert mine.device_mesh == mesh
        torch.testing.assert_close(mine.full_tensor(), out)
        torch.testing.assert_close(my_lse.full_tensor(), lse)
        weighed = distribute_tensor(weights, mesh, [Shard(1)])
        ((mine * weighed).sum() + my_lse.sum()).full_tensor().backward()
        for part, leaf in zip(parts, leaves, strict=True):
            torch.testing.assert_close(part.grad.full_tensor(), leaf.grad)
            part.grad = None
    zigzag = ringfa3.plan(Mask(), "zigzag", 24, mesh)
    dealt = [DTensor.from_local(zigzag.shard(x), mesh, [Shard(1)]) for x in whole[:3]]
    torch.testing.assert_close(
        zigzag.unshard(ring_attention(*dealt, plan=zigzag).to_local()), ring_attention(*whole[:3], group=mine_alone)
    )
    torch.testing.assert_close(
        ring_attention(*dealt, layout="zigzag", group=mesh.get_group()).to_local(),
        ring_attention(*dealt, plan=zigzag, group=mesh).to_local(),
    )
    q, k, v = (x.detach() for x in parts[:3])
    two = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "cp"))
    other = [distribute_tensor(x, two, [Replicate(), Shard(1)]) for x in whole[:3]]
    cut = distribute_tensor(whole[3], mesh, [Shard(0)])
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("k: wanted a DTensor sharded on dim 1.*axis cp", (q, distribute_tensor(whole[1], mesh, [Replicate()]), v), {}),
        ("q: wanted a DTensor sharded on dim 1.*got S.2.", (q.redistribute(placements=[Shard(2)]), k, v), {}),
        ("q: wanted .* over axis dp", tuple(other), {}),
        ("v: wanted a DTensor", (q, k, v.to_local()), {}),
        ("group: wanted that of the DTensors' mesh", (q, k, v), {"group": two}),
        (
            "group: wanted that of the DTensors' mesh",
            (q, k, v),
            {"plan": ringfa3.plan(Mask(), "zigzag", 24, mine_alone)},
        ),
        ("alibi_slopes: wanted a Tensor", (q, k, v), {"alibi_slopes": cut}),
        ("async_op: wanted False", (q, k, v), {"async_op": True}),
        ("sink_logits: wanted a DTensor replicated", (q, k, v), {"sink_logits": cut}),
    ]
    for message, tensors, options in wrong:
        with pytest.raises(ValueError, match=f"^{message}"):
            ring_attention(*tensors, **options)
    with pytest.raises(ValueError, match="q: wanted tensors of one device, got DTensors"):
        flash_attn_func(q, k, v)


def test_two_ranks_compile(world: Any) -> None:
    world(2)(ranks_compile, timeout=PATIENCE)


def test_ranks_agree_when_compiled_code_runs(world: Any) -> None:
    world(2)(ranks_agree_when_compiled_code_runs, timeout=PATIENCE)


def test_dtensors(world: Any) -> None:
    world(2)(dtensors, timeout=PATIENCE)
