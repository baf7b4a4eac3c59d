"""Pull and hierarchical on GPUs: masks and layouts, graphs, streams that race, two groups, memory, a watchdog."""

from __future__ import annotations

import threading
import time
import weakref
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist

import ringfa3
from ringfa3 import Mask, RankFailed
from ringfa3.gang import Gang
from ringfa3.transport import Pull
from ringfa3.transport.pool import GRADIENT, GRAIN, SHARD
from tests.gpu.test_ring_gpu import LAYOUTS, MASKS, Case, ring_case

pytestmark = [pytest.mark.multigpu(2), pytest.mark.xdist_group("ranks, pull")]  # one world, so one process

PULL, WIRED = (("transport", "pull"),), (("transport", "hierarchical:1"),)
CYCLES = 20_000_000  # of torch.cuda._sleep: about 10 ms


@pytest.mark.parametrize("transport", ["pull", "hierarchical:1"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_one_gpu(gpu_world, layout, mask, transport):
    gpu_world(2)(ring_case, Case(MASKS[mask], layout, options=(("transport", transport),)))


@pytest.mark.parametrize(
    "case",
    [
        Case(Mask(), dtype=torch.float16, options=PULL),
        Case(Mask(), dtype=torch.float32, D=64, options=PULL),
        Case(Mask(), heads=(8, 1), options=PULL),
        Case(Mask(), heads=(4, 4), seqlen=2048, options=PULL),
        Case(Mask(), seqlen=1, options=PULL),
        Case(Mask(), seqlen=1, options=WIRED),
        Case(Mask(), options=(("transport", "hierarchical:2"),)),
        Case(Mask(), options=(("transport", "hierarchical"),)),
        Case(Mask(), options=(("transport", "auto"),)),
        Case(Mask(window=(200, 0)), "contiguous", options=(*PULL, ("async_op", True))),
        Case(Mask(), options=(*PULL, ("deterministic", True))),
        Case(Mask(), seqlen=2048, options=(*PULL, ("agree", False))),
    ],
    ids=lambda case: f"{case.dtype} {case.heads} {case.seqlen} {dict(case.options)}",
)
def test_options(gpu_world, case):
    gpu_world(2)(ring_case, case)


def inputs(rank: int, size: int, seqlen: int, grad: bool = False) -> tuple[ringfa3.Plan, list[torch.Tensor]]:
    """A plan, and this rank's q, k, v of two batch rows."""
    device = torch.device("cuda", rank)
    p = ringfa3.plan(Mask(), "zigzag", seqlen, device=device)
    g = torch.Generator(device).manual_seed(rank)
    made = [torch.randn(2, p.lengths[rank], h, 128, generator=g, device=device) for h in (8, 2, 2)]
    return p, [x.bfloat16().requires_grad_(grad) for x in made]


def racing(rank: int, size: int, depth: int) -> None:
    """Ranks, streams and hops are delayed at random; data that came too early or stayed too short would show."""
    device = torch.device("cuda", rank)
    pool = Gang.of(None).pool(device, range(size))
    pull = Pull(pool, depth=depth)
    delays = torch.rand(4096, generator=torch.Generator().manual_seed(rank)).tolist()
    wrong = torch.zeros((), device=device)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(device)]

    def dawdle() -> None:
        if (delay := delays.pop()) > 0.5:
            torch.cuda._sleep(int(delay * CYCLES / 8))

    for call in range(24):
        mask = (Mask(causal=False), Mask(), Mask(window=(1500, 0)))[call % 3]
        p = ringfa3.plan(mask, ("contiguous", "zigzag")[call // 3 % 2], 8192, device=device)
        with torch.cuda.stream(streams[call % 2]):
            rows = torch.arange(p.kv_lengths[rank], device=device).view(1, -1, 1, 1)
            x = torch.cat([rows, rows + 9000]).float().expand(-1, -1, 2, 64) + 20000 * rank + call
            kv = x.contiguous(), -x
            dawdle()
            for hop, (k, v) in pull.rotate(kv, p):
                dawdle()
                want = torch.arange(hop.keys.start, hop.keys.stop, device=device) + 20000 * hop.source + call
                wrong += (k[0, :, 1, 7] != want).sum() + (v[1, :, 0, 63] != -want - 9000).sum() + (k != -v).sum()
            rotation = pull.rotate_backward(kv, p)
            for number, (hop, (k, v), (dk, dv)) in enumerate(rotation):
                dawdle()
                if number == 0:
                    dk.zero_(), dv.zero_()
                wrong += dk.any() + dv.any() + (k != -v).sum()
                dk += (rank + 1) * hop.source + call
                dv -= (rank + 1) * hop.source + call
            want = torch.zeros(p.kv_lengths[rank], device=device)
            for reader in range(size):
                if (keys := p.needs[reader][rank]) is not None:
                    want[keys] += (reader + 1) * rank + call
            dk, dv = rotation.home()
            wrong += (dk[1, :, 1, 5] != want).sum() + (dk != -dv).sum()
            del dk, dv, k, v, kv, x
            torch.full((1 << 22,), float("nan"), device=device)  # whoever still reads freed memory reads this
    torch.cuda.synchronize()
    assert int(wrong) == 0
    assert pool.waiting() is None


@pytest.mark.parametrize("depth", [1, 2])
def test_nothing_depends_on_who_is_late(gpu_world, depth):
    gpu_world(2)(racing, depth)


def many_in_flight(rank: int, size: int, transport: str) -> None:
    p, qkv = inputs(rank, size, 16384)
    want = ringfa3.ring_attention(*qkv, plan=p, transport="ring")
    torch.cuda.synchronize()
    results = [ringfa3.ring_attention(*qkv, plan=p, transport=transport) for _ in range(10)]
    handles = [ringfa3.ring_attention(*qkv, plan=p, transport=transport, async_op=True) for _ in range(10)]
    churn = [torch.full((1 << 22,), float("nan"), device=qkv[0].device) for _ in range(8)]
    del churn
    for result in [*results, *(handle.wait() for handle in handles)]:
        assert torch.equal(result, want)


@pytest.mark.parametrize("transport", ["pull", "hierarchical:1"])
def test_many_calls_in_flight(gpu_world, transport):
    gpu_world(2)(many_in_flight, transport)


def replayed(rank: int, size: int) -> None:
    """A captured forward pass follows its inputs; other calls come between replays; larger ones make new buffers."""
    p, qkv = inputs(rank, size, 4096)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        ringfa3.ring_attention(*qkv, plan=p, transport="pull")  # buffers cannot be made in a capture
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = ringfa3.ring_attention(*qkv, plan=p, transport="pull")
    longer, larger = inputs(rank, size, 8192)
    for call in range(8):
        qkv[call % 3].normal_()
        out.fill_(float("nan"))
        if rank == call % 2:
            torch.cuda._sleep(CYCLES)
        graph.replay()
        assert torch.equal(out, ringfa3.ring_attention(*qkv, plan=p, transport="ring"))
        again = ringfa3.ring_attention(*qkv, plan=p, transport="pull")
        assert torch.equal(again, out)
        if call > 3:  # the graph holds on to the smaller buffers
            whole = ringfa3.ring_attention(*larger, plan=longer, transport="pull")
            assert torch.equal(whole, ringfa3.ring_attention(*larger, plan=longer, transport="ring"))
        if call in (1, 6):  # those that the graph holds on to stay
            ringfa3.release_buffers()


def test_a_graph_of_a_forward_pass(gpu_world):
    gpu_world(2)(replayed)


def captured_cold(rank: int, size: int) -> None:
    p, qkv = inputs(rank, size, 65536 + 4096)
    ringfa3.ring_attention(*(x[:, :, :1] for x in qkv), plan=p, transport="pull")  # smaller buffers, and the plan
    torch.cuda.synchronize()
    refused = "wanted an error"
    try:
        with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            try:
                pull = Pull(Gang.of(None).pool(qkv[0].device, range(size)))
                for _ in pull.rotate((qkv[1], qkv[2]), p):
                    pass
            except RuntimeError as error:
                refused = str(error)
    except RuntimeError as error:  # an empty capture may be refused, too
        refused += f" ({error})"
    assert "run once before" in refused


def test_buffers_do_not_grow_in_a_capture(gpu_world):
    gpu_world(2)(captured_cold)
    gpu_world(2).close()  # what a broken capture leaves behind is nobody's business


@lru_cache
def second_group(size: int) -> dist.ProcessGroup:
    return dist.new_group(list(range(size)))


def in_two_groups(rank: int, size: int) -> None:
    """Calls of two groups on two streams, beside each other and other NCCL traffic."""
    p, qkv = inputs(rank, size, 8192, grad=True)
    q = ringfa3.plan(Mask(), "zigzag", 8192, second_group(size), device=qkv[0].device)
    want = ringfa3.ring_attention(*qkv, plan=p, transport="ring")
    wanted = torch.autograd.grad(want.sum(), qkv)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(4):
        one = ringfa3.ring_attention(*qkv, plan=p, transport="pull")
        with torch.cuda.stream(side):
            noise = torch.ones(1 << 20, device=qkv[0].device)
            dist.all_reduce(noise)
            two = ringfa3.ring_attention(*qkv, plan=q, transport="pull")
            grads = torch.autograd.grad(two.sum(), qkv)
        for x in (two, *grads, noise):
            x.record_stream(torch.cuda.current_stream())
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(one, want)
        assert torch.equal(two, want)
        for got, exact in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, exact, atol=2e-2, rtol=2e-2)  # sums in another order than the ring's
        side.wait_stream(torch.cuda.current_stream())


def test_two_groups(gpu_world):
    gpu_world(2)(in_two_groups)


def deterministic(rank: int, size: int, transport: str) -> None:
    """Gradients are bitwise the same, whoever is late."""
    p, qkv = inputs(rank, size, 8192, grad=True)
    found = []
    for call in range(4):
        if rank == call % 2:
            torch.cuda._sleep(CYCLES)
        out = ringfa3.ring_attention(*qkv, plan=p, transport=transport, deterministic=True)
        found.append(torch.autograd.grad(out.float().square().sum(), qkv))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("transport", ["pull", "hierarchical:1"])
def test_gradients_are_deterministic(gpu_world, transport):
    gpu_world(2)(deterministic, transport)


def declared(rank: int, size: int) -> None:
    """Shared buffers hold a shard and `depth` shares of a gradient, no more."""
    device = torch.device("cuda", rank)
    group = dist.new_group(list(range(size)))
    pool = Gang.of(group).pool(device, range(size))
    p = ringfa3.plan(Mask(causal=False), "contiguous", 65536, device=device)
    kv = [torch.randn(1, 32768, 2, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pull = Pull(pool)
    shard = 2 * kv[0].nbytes
    for _ in pull.rotate(kv, p):
        pass
    assert torch.cuda.max_memory_allocated() - before <= shard + (1 << 20)  # one landing buffer: one hop
    for _ in (rotation := pull.rotate_backward(kv, p)):
        pass
    rotation.home()
    assert shard <= pool.buffers(SHARD, 0)[0].numel() <= shard + GRAIN
    assert 2 * 2 * shard <= pool.buffers(GRADIENT, 0)[0].numel() <= 2 * 2 * shard + 2 * GRAIN
    # landing buffer, own share, the other's
    assert torch.cuda.max_memory_allocated() - before <= shard + 2 * 2 * shard + (1 << 20)


def test_memory(gpu_world):
    gpu_world(2)(declared)


def given_back(rank: int, size: int) -> None:
    """Nothing holds the buffers any more; calls in flight are finished before; the next ones are right."""
    p, qkv = inputs(rank, size, 1 << 16)
    group = dist.new_group(list(range(size)))
    want = ringfa3.ring_attention(*qkv, plan=p, transport="ring")
    pool = Gang.of(group).pool(qkv[0].device, range(size))
    for _ in range(3):
        got = ringfa3.ring_attention(*qkv, plan=p, group=group, transport="pull")
        held = [weakref.ref(buffer) for buffer in pool.buffers(SHARD, 0)]
        ringfa3.release_buffers(group)
        assert all(ref() is None for ref in held)
        assert torch.equal(got, want)


def test_buffers_are_given_back(gpu_world):
    gpu_world(2)(given_back)


def stays_away(rank: int, size: int) -> None:
    """Rank 1 does not come: rank 0's stream waits, its host does not, and a watchdog gets it free."""
    device = torch.device("cuda", rank)
    group = dist.new_group(list(range(size)))
    pool = Gang.of(group).pool(device, range(size))
    p = ringfa3.plan(Mask(causal=False), "contiguous", 4096, device=device)
    kv = [torch.randn(1, 2048, 2, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    pull = Pull(pool)
    for _ in range(2):  # buffers are made in the first
        for _ in pull.rotate_backward(kv, p):
            pass
        torch.cuda.synchronize()
    assert pool.waiting() is None
    dist.barrier()
    if rank == 0:
        begun = time.monotonic()
        for _ in range(3):
            for _ in pull.rotate_backward(kv, p):
                pass
        done = torch.cuda.current_stream().record_event()
        assert time.monotonic() - begun < 5  # the host has waited for nothing
        time.sleep(0.2)
        assert not done.query()
        assert pool.waiting() == (1, 1)
        watchdog = threading.Timer(0.2, pool.release)
        watchdog.start()
        done.synchronize()
        assert time.monotonic() - begun < 10
        watchdog.join()
        with pytest.raises(RankFailed, match="rank 1"):
            next(iter(pull.rotate(kv, p)))
    dist.barrier()


def test_a_watchdog_frees_streams(gpu_world):
    gpu_world(2)(stays_away)
