"""Dropout and ALiBi on CUDA: the mask is the CPU's bit for bit, on one GPU and two, and nothing is read back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ringfa3
from ringfa3 import Mask, flash_attn
from ringfa3_kernels import Dropout, Visible, attend, attend_backward, dispatch
from tests.gpu.test_flash_attn_gpu import no_synchronising
from tests.kernels.places import kept

SEED = 0xFEDCBA9876543210


def unit_vectors(rows: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k that weigh all keys alike, and values that show each key's probability: D keys."""
    q, k = torch.zeros(2, rows, 4, D, device="cuda", dtype=dtype), torch.zeros(2, D, 2, D, device="cuda", dtype=dtype)
    return q, k, torch.eye(D, device="cuda", dtype=dtype)[None, :, None].expand(2, -1, 2, -1).contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_the_mask_is_the_same_bit_for_bit(D: int, dtype: torch.dtype) -> None:
    dropout = Dropout(0.3, SEED, 7, 2)
    q_pos, k_pos = torch.arange(300) * 3 + 2**31 - 1000, torch.arange(D) * 2
    wanted = kept(q_pos[None], k_pos[None], range(7, 11), range(2, 4), dropout)
    q, k, v = unit_vectors(300, D, dtype)
    places: dict[str, Any] = {"positions": (q_pos.cuda(), k_pos.cuda()), "dropout": dropout, "impl": "portable"}
    found = attend(q, k, v, Visible.full(300, D, "cuda"), **places)
    assert torch.equal((found.out != 0).transpose(1, 2).cpu(), wanted)
    dout = torch.eye(300, D, device="cuda", dtype=dtype)[None, :, None].expand(2, -1, 4, -1).contiguous()
    grads = {name: torch.empty_like(x) for name, x in (("dq", q), ("dk", k), ("dv", k))}
    delta = torch.zeros_like(found.lse)
    attend_backward(dout, q, k, v, found.lse, delta, accumulate=False, **grads, **places)
    shown = (grads["dv"] != 0).permute(0, 2, 3, 1).cpu()  # of the first D rows; heads of a group are summed
    assert torch.equal(shown, wanted[:, :, :D].unflatten(1, (2, 2)).any(2))


@pytest.mark.gpu
def test_auto_takes_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = unit_vectors(40, 64, torch.bfloat16)
    at = torch.arange(40, device="cuda"), torch.arange(64, device="cuda")
    asked = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *call: asked.append(choose(*call).NAME) or choose(*call))
    attend(q, k, v, positions=at, alibi=torch.ones(4, device="cuda"))
    attend(q, k, v, positions=at, dropout=Dropout(0.1, 0))
    assert asked == ["portable", "portable"]


@pytest.mark.gpu
def test_flash_attn_reads_nothing_back_and_repeats() -> None:
    q, k, v = (torch.randn(2, 515, 4, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv")
    slopes = torch.rand(2, 4, device="cuda")
    cu = torch.tensor([0, 300, 1030], device="cuda", dtype=torch.int32)

    def run() -> list[Tensor]:
        torch.manual_seed(4)
        out = flash_attn.flash_attn_func(q, k, v, 0.2, causal=True, alibi_slopes=slopes)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        more = flash_attn.flash_attn_varlen_func(*packed, cu, cu, 730, 730, 0.2, causal=True, alibi_slopes=slopes)
        return [out, more, *torch.autograd.grad([out, more], [q, k, v], [torch.ones_like(out), torch.ones_like(more)])]

    first = run()
    with no_synchronising():
        again = run()
    for x, y in zip(first[:2], again[:2], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(first[2:], again[2:], strict=True):  # padding's gradients are added up by atomics
        torch.testing.assert_close(x, y)


def ring(rank: int, size: int, layout: str, transport: str) -> None:
    """What two ranks compute is what one of them computes, with the same places dropped."""
    device = torch.device("cuda", rank)
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, 1023, h, 128, generator=g).to(device, torch.bfloat16).requires_grad_() for h in (8, 2, 2)]
    slopes = torch.rand(2, 8, generator=g).to(device)
    p = ringfa3.plan(Mask(), layout, 1023, device=device)
    mine = [p.shard(x.detach()).requires_grad_() for x in whole]
    options: dict[str, Any] = {"alibi_slopes": slopes, "dropout_p": 0.3, "dropout_seed": SEED}
    out = ringfa3.ring_attention(*mine, layout=layout, transport=transport, **options)
    alone = torch.distributed.new_group([rank], use_local_synchronization=True)
    expected = ringfa3.ring_attention(*whole, group=alone, **options)
    dout = torch.randn(2, 1023, 8, 128, generator=g).to(device, torch.bfloat16)
    out.backward(p.shard(dout))
    expected.backward(dout)
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(mine, whole, strict=True))]
    for got, wanted in pairs:
        wanted = p.shard(wanted.detach())
        assert (got - wanted).float().norm() <= 0.01 * wanted.float().norm()  # bf16's rounding is 0.002 of it


@pytest.mark.multigpu(2)
@pytest.mark.xdist_group("ranks, callers")
@pytest.mark.parametrize(
    ("layout", "transport"), [("zigzag", "ring"), ("striped", "pull"), ("zigzag", "gather"), ("contiguous", "ulysses")]
)
def test_two_gpus_drop_what_one_drops(gpu_world: Any, layout: str, transport: str) -> None:
    gpu_world(2)(ring, layout, transport)
