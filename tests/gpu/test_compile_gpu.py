"""torch.compile with inductor, CUDA graphs and autocast on code that calls us, on GPUs; two ranks over NVLink too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import ringfa3
from ringfa3 import Mask, ring_attention
from ringfa3.flash_attn import flash_attn_func, flash_attn_varlen_func
from tests.ring.test_compile import ASKED, OPS, count_plans, gradients

DEVICE = "cuda"
ROWS = 512


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(rows: int = ROWS, device: Any = DEVICE, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(2, rows, heads, 64, device=device, dtype=dtype) for heads in (4, 2, 2)]


def flash_windows(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flash_attn_func(q, k, v, causal=True, window_size=(100, 0), deterministic=True)


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Any:
    edges = torch.tensor([0, 100, 700, 2 * ROWS], dtype=torch.int32, device=q.device)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*packed, edges, edges, 2 * ROWS, 2 * ROWS, causal=True, deterministic=True)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flash_attn_func(q, k, v, causal=True, deterministic=True, return_attn_probs=True)


def ring(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return ring_attention(q, k, v, window=(300, 0), deterministic=True, return_lse=True)


def check(f: Callable[..., Any], inputs: list[Tensor], **options: Any) -> None:
    """Compiled code gives the same, bit for bit: it runs the same kernels, and dq is asked for without atomics."""
    compiled = torch.compile(f, fullgraph=True, **options)
    wanted = gradients(f, *inputs)
    for _ in range(3):  # graphs are warmed up, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        for got, want in zip([x.clone() for x in gradients(compiled, *inputs)], wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch's own first graph is
@pytest.mark.parametrize("f", [flash, flash_windows, varlen, ring], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(f: Callable[..., Any], mode: str) -> None:
    check(f, qkv(), mode=mode)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_equal_calls_build_one_plan(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = count_plans(monkeypatch)
    spelled = "cuda", f"cuda:{torch.cuda.current_device()}"
    plans = [ringfa3.plan(Mask(window=(300, 0)), "zigzag", ROWS, device=device) for device in spelled]
    f = torch.compile(ring, fullgraph=True) if way == "compiled" else ring
    tables = []
    for _ in range(3):
        gradients(f, *qkv())
        tables.append({**plans[0].hops[0].visible._tiles})
    assert plans[0] is plans[1]
    assert len(built) == 1  # the calls', which know their tensors' device, too
    assert tables[0]
    assert all(before is after for before, after in zip(tables[0].values(), tables[-1].values(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("f", [flash, ring], ids=lambda f: f.__name__)
def test_a_cuda_graph_holds_compiled_code(f: Callable[..., Any]) -> None:
    compiled = torch.compile(lambda *x: f(*x)[0], fullgraph=True)
    inputs = qkv()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            compiled(*inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        out = compiled(*inputs)
    for _ in range(2):
        for x, fresh in zip(inputs, qkv(), strict=True):
            x.copy_(fresh)
        graph.replay()
        assert torch.equal(out, f(*inputs)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("f", [flash, ring], ids=lambda f: f.__name__)
def test_autocast(f: Callable[..., Any]) -> None:
    def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            return f(q, k, v)

    inputs = qkv(dtype=torch.float32)
    wanted = gradients(lambda *x: f(*(y.bfloat16() for y in x)), *inputs)
    for through in (under_autocast, torch.compile(under_autocast, fullgraph=True)):
        for got, want in zip(gradients(through, *inputs), wanted, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_opcheck() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(64))
    opcheck(OPS.attend, (q, k, v, None, None, "causal", None, 0.0, True))
    deterministic = [True if i == 12 else x for i, x in enumerate(ASKED)]
    opcheck(OPS.ring_attention, (q, k, v, *deterministic))


def ranks_compile(rank: int, size: int) -> None:
    torch._dynamo.reset()
    device = torch.device("cuda", rank)
    torch.manual_seed(rank)
    plan = ringfa3.plan(Mask(documents=(300, 2 * ROWS - 300)), "zigzag", 2 * ROWS, device=device)
    for transport in ("pull", "ring", "gather"):
        options: dict[str, Any] = {"transport": transport, "deterministic": True}
        check(lambda q, k, v, o=options: ring_attention(q, k, v, **o, return_lse=True), qkv(device=device))
        check(lambda q, k, v, o=options: ring_attention(q, k, v, plan=plan, **o), qkv(device=device))


@pytest.mark.multigpu(2)
@pytest.mark.xdist_group("ranks, callers")
def test_two_ranks_compile(gpu_world: Any) -> None:
    gpu_world(2)(ranks_compile)
