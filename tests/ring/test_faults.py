"""What must not go wrong in silence: calls that end in the middle, things done out of order, autocast."""

from __future__ import annotations

import contextlib

import pytest
import torch

import ringfa3
from ringfa3 import RankFailed, attention


def shards(rank: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    """This rank's q, k, v of 24 rows."""
    g = torch.Generator().manual_seed(seed)
    p = ringfa3.plan(ringfa3.Mask(), "zigzag", 24)
    return [p.shard(torch.randn(1, 24, h, 16, generator=g)).requires_grad_() for h in (2, 1, 1)]


def ends_in_the_middle(rank: int, size: int) -> str:
    """One rank's kernel fails; what every rank's next call says."""
    qkv = shards(rank, size)
    ringfa3.ring_attention(*qkv, transport="gather")
    kernel = attention.attend

    def fails(*args: object, **kwargs: object) -> None:
        raise MemoryError("no room")

    if rank == 0:
        attention.attend = fails  # type: ignore[assignment]
        with pytest.raises(MemoryError, match="no room"):
            ringfa3.ring_attention(*qkv, transport="gather")
        attention.attend = kernel
    else:
        with contextlib.suppress(RankFailed):  # where the alarm comes before this call ends
            ringfa3.ring_attention(*qkv, transport="gather")
    with pytest.raises(RankFailed, match="ended in the middle") as failed:
        ringfa3.ring_attention(*qkv, transport="gather")
    assert failed.value.rank == 0
    return str(failed.value)


def test_a_call_that_ends_in_the_middle_fails_the_next_one_everywhere(world):
    assert len(world(2)(ends_in_the_middle)) == 2
    world(2).close(patient=False)  # the group is of no use any more


def waits_in_any_order(rank: int, size: int) -> list[torch.Tensor]:
    """Gradients of two calls in flight, waited for in another order on each rank."""
    calls = [shards(rank, size, seed) for seed in (1, 2)]
    handles = [ringfa3.ring_attention(*qkv, async_op=True) for qkv in calls]
    for i in (0, 1) if rank == 0 else (1, 0):
        handles[i].wait()
    sum((i + 1) * handles[i].wait().square().sum() for i in range(2)).backward()  # type: ignore[union-attr]
    waited = [x.grad for qkv in calls for x in qkv]
    again = [shards(rank, size, seed) for seed in (1, 2)]
    sum((i + 1) * ringfa3.ring_attention(*qkv).square().sum() for i, qkv in enumerate(again)).backward()  # type: ignore[union-attr]
    for got, want in zip(waited, [x.grad for qkv in again for x in qkv], strict=True):
        torch.testing.assert_close(got, want)
    return []


def test_handles_may_be_waited_for_in_any_order(world):
    world(2)(waits_in_any_order)


def backward_out_of_order(rank: int, size: int) -> None:
    losses = [ringfa3.ring_attention(*shards(rank, size, seed)).sum() for seed in (1, 2)]
    with pytest.raises(ValueError, match=r"^backward passes run in .*: rank 0 is in that of call \d+, rank 1 in that"):
        losses[rank].backward()
    with pytest.raises(ValueError, match=r"different orders: rank 0 is in that of call \d+, rank 1 in a forward pass$"):
        ringfa3.ring_attention(*shards(rank, size)) if rank else losses[0].backward()


def test_backward_passes_of_different_calls_do_not_meet(world):
    world(2)(backward_out_of_order)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_autocast_does_not_reach_the_maths(impl: str, dtype: torch.dtype) -> None:
    def run() -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        qkv = [torch.randn(1, 40, h, 16, generator=g).to(dtype).requires_grad_() for h in (4, 2, 2)]
        out, lse = ringfa3.ring_attention(*qkv, return_lse=True, impl=impl)
        (out.float().square().sum() + lse.sum()).backward()
        return [out, lse, *(x.grad for x in qkv)]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    for got, want in zip(cast, plain, strict=True):
        assert torch.equal(got, want)


def test_async_with_inference_tensors() -> None:
    with torch.inference_mode():
        q = torch.randn(1, 8, 2, 16)
        assert torch.equal(ringfa3.ring_attention(q, q, q, async_op=True).wait(), ringfa3.ring_attention(q, q, q))


def test_plan_says_layout_and_causality() -> None:
    q = torch.randn(1, 8, 2, 16)
    plan = ringfa3.plan(ringfa3.Mask(causal=False), "contiguous", 8)
    for wrong in ({"layout": "zigzag"}, {"causal": True}):
        with pytest.raises(ValueError, match="beside plan"):
            ringfa3.ring_attention(q, q, q, plan=plan, **wrong)
    with pytest.raises(ValueError, match="window"):
        ringfa3.ring_attention(q, q, q, window=(3, 0)) is None or ringfa3.ring_attention(q, q, q, window=(3.0, 0))
