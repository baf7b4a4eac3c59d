"""flash-attn's and ring-flash-attn's functions on CUDA: error rule, no synchronising, graphs whose lengths change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ringfa3 import flash_attn
from ringfa3 import ring_flash_attn as rfa
from tests.kernels.oracle import assert_close, plain
from tests.ring.test_flash_attn import block_mask, cu, seen, turned
from tests.ring.test_ring_flash_attn import positions, visible

DEVICE = "cuda"
NAMES = ("out", "lse", "dq", "dk", "dv")


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def judge(got: tuple[Tensor, ...], x: list[Tensor], mask: Tensor, names: tuple[str, ...] = NAMES) -> None:
    options: dict[str, Any] = {"scale": None, "softcap": 0.0}
    truth, yardstick = (plain(*x, mask.to(x[0].device), dtype=each, **options) for each in (torch.float64, x[0].dtype))
    for name, part in zip(names, got, strict=True):
        assert_close(name, part, getattr(truth, name), getattr(yardstick, name), x[0].dtype)


@contextmanager
def no_synchronising() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that not every such operation is noticed
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 100, 128])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (True, (200, 0)), (False, (90, 30))]
)
def test_batches_and_packed_tensors(D, causal, window):
    x = draw((2, 515, 3, 4, D), (2, 515, 4, D))
    qkv = x[0].clone().requires_grad_()
    out, lse, _ = flash_attn.flash_attn_qkvpacked_func(
        qkv, causal=causal, window_size=window, return_attn_probs=True, deterministic=True
    )
    dlse = torch.zeros_like(lse)
    out.backward(x[1])
    mask = seen(515, 515, causal, window).expand(2, -1, -1)
    judge((out.detach(), lse.detach(), *qkv.grad.unbind(2)), [*x[0].unbind(2), x[1], dlse], mask)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(-1, -1), (130, 0)])
def test_packed_sequences_without_synchronising(window):
    rows, keys = [300, 0, 1, 700, 129], [300, 40, 513, 700, 0]
    x = draw((1, sum(rows), 8, 128), (1, sum(keys), 2, 128), (1, sum(keys), 2, 128), (1, sum(rows), 8, 128))
    cu_q, cu_k = cu(rows).to(DEVICE), cu(keys).to(DEVICE)

    def run() -> tuple[Tensor, ...]:
        q, k, v = (t[0].clone().requires_grad_() for t in x[:3])
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            q, k, v, cu_q.clone(), cu_k.clone(), 700, 700, causal=True, window_size=window, return_attn_probs=True
        )
        out.backward(x[3][0])
        return tuple(t[None] for t in (out.detach(), lse.detach(), q.grad, k.grad, v.grad))

    run()
    with no_synchronising():
        got = run()
    judge(got, [*x, torch.zeros_like(got[1])], block_mask(rows, keys, True, window))


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_sees_the_lengths_of_its_day():
    q, k, v = draw((600, 4, 128), (600, 4, 128), (600, 4, 128))
    lengths = cu([200, 400]).to(DEVICE)

    def call() -> Tensor:
        return flash_attn.flash_attn_varlen_func(q, k, v, lengths, lengths, 600, 600, causal=True)  # type: ignore[no-any-return]

    graph, out = captured(call)
    for first in (200, 37, 600):
        lengths.copy_(cu([first, 600 - first]))
        graph.replay()
        fresh = cu([first, 600 - first]).to(DEVICE)
        wanted = flash_attn.flash_attn_varlen_func(q, k, v, fresh, fresh, 600, 600, causal=True)
        torch.testing.assert_close(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("Sq", [1, 4, 40])
@torch.no_grad()
def test_caches_in_a_graph(Sq, paged):
    B, Hq, Hkv, D, capacity = 3, 8, 2, 128, 1024
    q, k, v = draw((B, Sq, Hq, D), (B, Sq, Hkv, D), (B, Sq, Hkv, D))
    known = draw((B, capacity, Hkv, D), (B, capacity, Hkv, D))
    angles = torch.rand(capacity, D // 2, device=DEVICE) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    options: dict[str, Any] = {"cache_leftpad": torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)}
    order = torch.arange(B * 4, device=DEVICE)
    shape: tuple[int, ...] = (B, capacity, Hkv, D)
    if paged:
        order = torch.randperm(B * 4, device=DEVICE)
        options["block_table"], shape = order.view(B, 4).int(), (B * 4, 256, Hkv, D)
    caches = [torch.empty(shape, device=DEVICE, dtype=torch.bfloat16) for _ in "kv"]
    lengths = torch.tensor([9, 5, 300], dtype=torch.int32, device=DEVICE)

    def call() -> Tensor:
        return flash_attn.flash_attn_with_kvcache(  # type: ignore[no-any-return]
            q, *caches, k, v, cos, sin, lengths, causal=True, rotary_interleaved=False, **options
        )

    graph, out = captured(call)
    with no_synchronising():
        call()
    for of_day in ([9, 5, 300], [983, 511, 7]):
        lengths.copy_(torch.tensor(of_day))
        for cache, content in zip(caches, known, strict=True):
            cache.fill_(torch.nan)
            pages = cache.view(B * 4, 256, Hkv, D)
            for b, n in enumerate(of_day):
                left, span = (0, 3, 5)[b], torch.arange(n, device=DEVICE)
                span = span[left:]
                pages[order[b * 4 + span // 256], span % 256] = content[b, span]
        graph.replay()
        for b, n in enumerate(of_day):
            left, new = (0, 3, 5)[b], [n + i for i in range(Sq)]
            tables = cos.cpu(), sin.cpu()
            rows, key = (turned(t[b].cpu(), *tables, new, False).to(DEVICE, torch.bfloat16) for t in (q, k))
            keys = torch.cat([known[0][b, left:n], key])
            values = torch.cat([known[1][b, left:n], v[b]])
            x = [
                rows[None],
                keys[None],
                values[None],
                torch.zeros_like(rows)[None],
                torch.zeros(1, Hq, Sq, device=DEVICE),
            ]
            judge((out[b : b + 1],), x, seen(Sq, n + Sq - left, True, (-1, -1))[None], ("out",))


def ring_rank(rank: int, size: int, name: str, documents: list[int]) -> tuple[Any, ...]:
    """One rank's call on its share of the whole, and what it holds of the result."""
    device = torch.device("cuda", rank)
    mine = positions(name, documents, size, rank)
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(sum(documents), H, 128, generator=g).bfloat16() for H in (8, 2, 2, 8)]
    q, k, v, dout = (t[mine].to(device).requires_grad_(i < 3) for i, t in enumerate(x))
    if name.startswith("llama3"):
        lengths = rfa.llama3_flash_attn_prepare_cu_seqlens(cu(documents).to(device), True, rank, size)
        given: tuple[Any, ...] = (*lengths[:4], 1, lengths[4])
    else:
        given = cu([n // size for n in documents]).to(device), max(documents)
    call = getattr(rfa, name)
    call(q, k, v, *given, causal=True).backward(dout)  # compiled, and lengths read
    q.grad = k.grad = v.grad = None
    with no_synchronising():
        out, lse, _ = call(q, k, v, *given, causal=True, return_attn_probs=True)
    out.backward(dout)
    return mine, *(t.detach().cpu() for t in (out, lse.T, q.grad, k.grad, v.grad))


@pytest.mark.multigpu(2)
@pytest.mark.xdist_group("ranks, callers")
@pytest.mark.parametrize(
    "name", ["ring_flash_attn_varlen_func", "zigzag_ring_flash_attn_varlen_func", "llama3_flash_attn_varlen_func"]
)
def test_ring_variants(gpu_world, name):
    documents = [400, 0, 4, 900, 744]
    ranks = gpu_world(2)(ring_rank, name, documents)
    total, g = sum(documents), torch.Generator().manual_seed(0)
    x = [torch.randn(total, H, 128, generator=g).bfloat16()[None] for H in (8, 2, 2, 8)]
    whole = [torch.full((total, *part.shape[1:]), torch.nan, dtype=part.dtype) for part in ranks[0][1:]]
    for mine, *parts in ranks:
        for into, part in zip(whole, parts, strict=True):
            into[mine] = part
    whole[1] = whole[1].T
    judge(tuple(t[None] for t in whole), [*x, torch.zeros(1, 8, total)], visible(documents, True, (-1, -1)))
