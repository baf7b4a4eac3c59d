"""The fp8 forward's arithmetic, in torch: against fp64 within what rounding P to e4m3 can do, for every draw."""

from __future__ import annotations

import secrets

import pytest
import torch
from torch import Tensor

from ringfa3_kernels import Partial, Quantized, Visible, dequantize, quantize
from ringfa3_kernels.hopper import fp8_twin
from ringfa3_kernels.quantized import key_order

HALF = 2.0**-4  # e4m3 rounds a normal number by at most this part of it
SUBNORMAL = 2.0**-10  # and a smaller one by at most this


def inputs(Sq: int, Sk: int, Hq: int = 2, Hkv: int = 1, D: int = 32, B: int = 2) -> list[Tensor]:
    """q, k, v whose blocks differ in size, v's by up to 2^10."""
    seed = secrets.randbits(32)
    print(f"inputs are of torch.Generator().manual_seed({seed})")
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(B, S, H, D, generator=generator) for S, H in ((Sq, Hq), (Sk, Hkv), (Sk, Hkv))]
    for x, most in zip(made, (1, 1, 10), strict=True):
        for begin in range(0, x.shape[1], 128):
            x[:, begin : begin + 128] *= 2.0 ** torch.randint(-most, 1, (1,), generator=generator)
    return made


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float = 0.0) -> tuple[Tensor, ...]:
    """In fp64: out [B, Sq, H, D], lse, and sum of weight * |v|, what errors of the weights are multiplied by."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s.masked_fill(~mask, -torch.inf)
    p = s.softmax(-1).nan_to_num(0.0)
    return *(torch.einsum("bhij,bjhd->bihd", p, x) for x in (v, v.abs())), s.logsumexp(-1), s


def check(got: Partial, q: Quantized, k: Quantized, v: Quantized, mask: Tensor, scale: float, **options: float) -> None:
    """Each weight is off by at most HALF of it or, where P is subnormal, by SUBNORMAL (of the row's largest / 2^8)."""
    wide = [dequantize(x, torch.float64) for x in (q, k, v)]
    lazy = int(options.pop("lazy", 0))
    out, spread, lse, s = exact(*wide, mask, scale, **options)
    largest = torch.exp(s.amax(-1) - lse).nan_to_num(0.0)  # weight of the row's largest score
    flushed = SUBNORMAL * 2.0 ** (lazy - 8) * largest.transpose(1, 2)[..., None]
    total = wide[2].abs().sum(1).repeat_interleave(q.shape[2] // k.shape[2], 1)[:, None]
    allowed = HALF * spread + flushed * total
    assert ((got.out - out).abs() <= 1.001 * allowed + 1e-5 * spread).all()
    seen = lse > -torch.inf
    assert (got.lse[~seen] == -torch.inf).all()
    assert (got.lse - lse)[seen].abs().max() < 1e-4


MASKS = {
    "full": lambda Sq, Sk: Visible.full(Sq, Sk),
    "causal": lambda Sq, Sk: Visible.causal(Sq, Sk),
    "window": lambda Sq, Sk: Visible((Visible.causal(Sq, Sk).hi - 40).clamp(min=0), Visible.causal(Sq, Sk).hi),
}


@pytest.mark.parametrize(("Sq", "Sk"), [(200, 300), (1, 128), (3, 77), (128, 256), (300, 200)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block", [128, 0])
def test_weights_are_off_by_e4m3_alone(mask: str, Sq: int, Sk: int, block: int) -> None:
    visible = MASKS[mask](Sq, Sk)
    made = quantize(*inputs(Sq, Sk), block=block, v_order="keys")
    got = fp8_twin.attend(*made, visible, scale=0.3)
    check(got, *made, visible.mask(Sk), 0.3)


def test_without_rounding_p_it_is_exact() -> None:
    made = quantize(*inputs(150, 700), v_order="keys")
    visible = Visible.causal(150, 700)
    got = fp8_twin.attend(*made, visible, scale=0.3, round_p=False)
    out, spread, lse, _ = exact(*(dequantize(x, torch.float64) for x in made), visible.mask(700), 0.3)
    assert ((got.out - out).abs() <= 1e-5 * spread + 1e-12).all()
    assert (got.lse - lse).abs().max() < 1e-4


@pytest.mark.parametrize("lazy", [0, 4])
def test_a_lazy_maximum_only_narrows_the_range(lazy: int) -> None:
    made = quantize(*inputs(100, 600), v_order="keys")
    visible = Visible.full(100, 600)
    got = fp8_twin.attend(*made, visible, scale=1.0, lazy=lazy)
    check(got, *made, visible.mask(600), 1.0, lazy=lazy)


def test_softcap() -> None:
    made = quantize(*inputs(100, 300), v_order="keys")
    got = fp8_twin.attend(*made, Visible.causal(100, 300), scale=-0.5, softcap=3.0)
    check(got, *made, Visible.causal(100, 300).mask(300), -0.5, softcap=3.0)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    made = quantize(*inputs(100, 300), v_order="keys")
    check(fp8_twin.attend(*made, Visible.full(100, 300), scale=scale), *made, Visible.full(100, 300).mask(300), scale)


def test_shards_continue_each_other() -> None:
    q, k, v = quantize(*inputs(130, 512), v_order="keys")
    visible = Visible.causal(130, 512)
    state = Partial(torch.zeros(2, 130, 2, 32), torch.full((2, 2, 130), -torch.inf))
    for begin in (256, 0, 384, 128):
        part = Visible(*((x - begin).clamp(0, 128) for x in (visible.lo, visible.hi)))
        state = fp8_twin.attend(q, k.rows(begin, begin + 128), v.rows(begin, begin + 128), part, scale=0.3, into=state)
    check(state, q, k, v, visible.mask(512), 0.3)


def test_a_key_that_is_nan_reaches_the_rows_that_see_it_and_no_others() -> None:
    q, k, v = inputs(200, 200)
    k[1, 60, 0, 3] = torch.nan
    v[0, 90, 0, 5] = torch.inf
    got = fp8_twin.attend(*quantize(q, k, v, v_order="keys"), Visible.causal(200, 200), scale=0.3)
    poisoned = torch.zeros(2, 200, dtype=torch.bool)
    poisoned[1, 60:] = poisoned[0, 90:] = True
    assert got.out.isnan().equal(poisoned[..., None, None].expand_as(got.out))
    assert got.lse.isnan().equal(poisoned[:, None].expand_as(got.lse))


def test_values_of_zero_do_not_hide_small_ones() -> None:
    """An empty block has scale 1: P in units of the largest scale seen would flush the rest to 0."""
    q, k, v = inputs(64, 384)
    v[:, 128:] *= 1e-6
    v[:, :128] = 0
    v[:, 256:] = 0
    made = quantize(q, k, v, v_order="keys")
    got = fp8_twin.attend(*made, Visible.full(64, 384), scale=0.3)
    check(got, *made, torch.ones(64, 384, dtype=torch.bool), 0.3)
    assert (got.out != 0).any()


def test_registers_hold_keys_in_the_order_of_v() -> None:
    assert fp8_twin.operand_places().equal(key_order())
