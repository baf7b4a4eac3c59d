"""What is particular to the portable kernels: tile bounds, launch order, odd strides, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ringfa3_kernels import (
    Partial,
    Unsupported,
    Visible,
    attend,
    attend_backward,
    dispatch,
    portable,
    reference,
    row_delta,
)
from ringfa3_kernels.call import Call
from ringfa3_kernels.portable import configs, launch

CPU_CALL = Call(
    direction="forward", device="cpu", capability=(0, 0), dtype=torch.float16, B=1, Sq=8, Sk=8, Hq=1, Hkv=1, D=64,
    batched_visible=False, softcap=False, into=False, out_dtype=torch.float32, accumulate=False, deterministic=False,
    aligned=True,
)  # fmt: skip
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels are compiled for the GPU")
Inputs = tuple[torch.Tensor, ...]


def random_inputs(
    generator: torch.Generator, Sq: int, Sk: int, *, Hq: int = 2, Hkv: int = 1, D: int = 16, B: int = 1
) -> Inputs:
    """q, k, v, dout in fp32 on the device that the kernels run on."""
    shapes = ((B, Sq, Hq, D), (B, Sk, Hkv, D), (B, Sk, Hkv, D), (B, Sq, Hq, D))
    return tuple(torch.randn(shape, generator=generator).to(device()) for shape in shapes)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def everything(inputs: Inputs, visible: Visible, impl: str, **options: Any) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv of one implementation."""
    q, k, v, dout = inputs
    result = attend(q, k, v, visible, impl=impl, **options)
    delta = row_delta(dout, result.out)
    dq, dk, dv = grads = [torch.zeros(x.shape, dtype=result.lse.dtype, device=x.device) for x in (q, k, v)]
    attend_backward(dout, q, k, v, result.lse, delta, visible, dq=dq, dk=dk, dv=dv, impl=impl, **options)
    return [result.out, result.lse, *grads]


def assert_agrees(inputs: Inputs, visible: Visible, **options: Any) -> None:
    """Portable within twice plain PyTorch's error (plus rounding of the largest value) of fp64."""
    exact = everything(tuple(x.double() for x in inputs), visible, "reference", **options)
    plain = everything(inputs, visible, "reference", **options)
    ours = everything(inputs, visible, "portable", **options)
    for name, x, y, z in zip(("out", "lse", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        finite = z.isfinite()
        assert torch.equal(x.isfinite(), finite), name
        far, allowed = ((t.double() - z)[finite].abs().max().item() for t in (x, y))
        assert far <= 2 * allowed + 5e-7 * max(1.0, z[finite].abs().max().item()), (name, far, allowed)


def test_every_head_dim_has_a_config_on_every_device() -> None:
    for kernel in ("forward", "keys", "queries"):
        for capability in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)):
            for head_dim in range(8, 257, 8):
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    config = configs.pick(kernel, head_dim, dtype, capability)
                    assert not config.tma or (capability == (9, 0) and dtype != torch.float32)
                    assert configs.padded(head_dim) >= head_dim


@on_cpu
def test_refuses_by_name_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert portable.unsupported(CPU_CALL) is None
    assert "bfloat16" in (portable.unsupported(replace(CPU_CALL, dtype=torch.bfloat16)) or "")
    assert "float64" in (portable.unsupported(replace(CPU_CALL, dtype=torch.float64)) or "")
    monkeypatch.setattr(portable, "interpreted", lambda: False)
    assert "needs a CUDA device of capability 8.0" in (portable.unsupported(CPU_CALL) or "")
    old = replace(CPU_CALL, device="cuda", capability=(7, 5))
    assert "capability 8.0" in (portable.unsupported(old) or "")
    assert portable.unsupported(replace(old, capability=(8, 0), dtype=torch.bfloat16)) is None


@on_cpu
def test_a_named_portable_never_falls_back() -> None:
    x = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match=r"portable: .*bfloat16"):
        attend(x, x, x, impl="portable")
    assert dispatch.load("portable") is portable


@pytest.mark.parametrize("side", ["keys", "rows"])
def test_invisible_tiles_are_never_visited(side: str, generator: torch.Generator) -> None:
    """Only the first 64 rows see anything, the first 64 keys: NaN elsewhere would reach the result through 0 * NaN."""
    q, k, v, dout = random_inputs(generator, 128, 128)
    i = torch.arange(128, dtype=torch.int32, device=q.device)
    visible = Visible(torch.where(i < 64, 0, 64).int(), torch.full_like(i, 64))
    delta = torch.zeros(1, 2, 128, device=q.device)

    def run() -> list[torch.Tensor]:
        result = attend(q, k, v, visible, impl="portable")
        dq, dk, dv = grads = [torch.zeros_like(x) for x in (q, k, v)]
        attend_backward(dout, q, k, v, result.lse, delta, visible, dq=dq, dk=dk, dv=dv, impl="portable")
        return [result.out, result.lse, *grads]

    clean = run()
    for x in (k, v) if side == "keys" else (q, dout):
        x[:, 64:] = torch.nan
    for x, y in zip(run(), clean, strict=True):
        assert torch.equal(x, y)
    assert not clean[0][:, 64:].any()


@pytest.mark.parametrize("cache", [1, 1 << 14, 1 << 40])
def test_launch_order_covers_every_head(
    cache: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Sections of 1 head, of a few (the last one smaller) and of all."""
    monkeypatch.setattr(launch, "CACHE_BYTES", cache)
    assert_agrees(random_inputs(generator, 40, 70, Hq=6, Hkv=3, B=2), Visible.causal(40, 70, device()))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scale_may_be_negative_or_zero(scale: float, generator: torch.Generator) -> None:
    assert_agrees(random_inputs(generator, 33, 65), Visible.causal(33, 65, device()), scale=scale)


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap_is_exact_for_small_and_large_scores(softcap: float, generator: torch.Generator) -> None:
    assert_agrees(random_inputs(generator, 40, 40), Visible.causal(40, 40, device()), softcap=softcap)


def test_any_strides_give_the_same_result(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, 20, 36, Hq=1, B=2)
    visible = Visible.causal(20, 36, device())
    wanted = everything(inputs, visible, "portable")
    by_head = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    unaligned = tuple(torch.cat((x, x[..., :1]), -1)[..., :-1] for x in inputs)
    column = tuple(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in inputs)
    assert unaligned[0].stride(1) == 17
    assert column[0].stride(3) != 1
    for strided in (by_head, unaligned, column):
        for x, y in zip(everything(strided, visible, "portable"), wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dense", [True, False])
def test_into_is_continued_in_place(dense: bool, generator: torch.Generator) -> None:
    q, k, v, _ = random_inputs(generator, 40, 64)
    exact = reference.attend(
        *(x.double() for x in (q, k, v)), Visible.full(40, 64, device()), scale=0.25, softcap=0.0, into=None,
        out_dtype=torch.float64,
    )  # fmt: skip
    halves = [(k[:, :32], v[:, :32]), (k[:, 32:], v[:, 32:])]
    state = Partial.empty(q)
    if not dense:
        state = Partial(state.out.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), state.lse.mT.contiguous().mT)
    for keys, values in halves:
        assert attend(q, keys, values, scale=0.25, into=state, impl="portable").out is state.out
    torch.testing.assert_close(state.out.double(), exact.out, rtol=0, atol=2e-6)
    torch.testing.assert_close(state.lse.double(), exact.lse, rtol=0, atol=2e-6)


def test_gradients_are_added_once(generator: torch.Generator) -> None:
    """Storing into garbage and adding to ones give the same gradients."""
    q, k, v, dout = random_inputs(generator, 50, 40, Hq=4, Hkv=2)
    visible = Visible.causal(50, 40, device())
    result = attend(q, k, v, visible, impl="portable")
    delta = row_delta(dout, result.out)
    stored = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    added = [torch.ones_like(x) for x in (q, k, v)]
    for accumulate, grads in ((False, stored), (True, added)):
        dq, dk, dv = grads
        attend_backward(
            dout, q, k, v, result.lse, delta, visible, dq=dq, dk=dk, dv=dv, accumulate=accumulate, impl="portable"
        )
    for x, y in zip(stored, added, strict=True):
        torch.testing.assert_close(x + 1, y, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 72])
def test_tma_and_pointers_agree(head_dim: int, generator: torch.Generator) -> None:
    q, k, v, dout = (x.bfloat16() for x in random_inputs(generator, 700, 900, Hq=4, Hkv=2, D=head_dim, B=2))
    visible = Visible.causal(700, 900, "cuda")
    wanted = everything((q, k, v, dout), visible, "portable")
    unaligned = tuple(torch.cat((x, x[..., :1]), -1)[..., :-1] for x in (q, k, v, dout))
    for x, y in zip(everything(unaligned, visible, "portable"), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * y[y.isfinite()].abs().max().item())


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_2_to_the_31st(generator: torch.Generator) -> None:
    """The last rows of a shard past 2^31 elements come out as if alone: 1M tokens of 18 heads, 4.8 GB a tensor."""
    S, H, D, tail = 1 << 20, 18, 128, 256
    q, k, v, dout = (torch.randn(1, S, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    i = torch.arange(S, device="cuda", dtype=torch.int32)
    whole = Visible(torch.where(i < S - tail, i, S - tail), torch.where(i < S - tail, i + 1, S))
    short = tuple(x[:, S - tail :].clone() for x in (q, k, v, dout))
    wanted = everything(short, Visible.full(tail, tail, "cuda"), "portable")
    out, lse, *grads = everything((q, k, v, dout), whole, "portable")
    rows = [out, *grads]
    for x, y in zip(rows, (wanted[0], *wanted[2:]), strict=True):
        torch.testing.assert_close(x[:, S - tail :], y, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse[..., S - tail :], wanted[1], rtol=0, atol=1e-5)
