"""The Hopper forward on fp8, on a GPU: as near to fp64 as its twin in torch, over masks, shapes and continued states.

kernels/bench/bench_fp8.py checks many more shapes and, where something is wrong here, says which piece (`isolate`).
"""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ringfa3_kernels import Partial, Quantized, Unsupported, Visible, attend, dequantize, quantize, reference
from ringfa3_kernels.hopper import fp8_twin

pytestmark = pytest.mark.gpu
Three = tuple[Quantized, Quantized, Quantized]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("hopper's kernels need compute capability 9.0")


def inputs(Sq: int, Sk: int, D: int = 128, Hq: int = 4, Hkv: int = 2, B: int = 2) -> list[Tensor]:
    """q, k, v whose blocks differ in size, v's by up to 2^6."""
    seed = secrets.randbits(32)
    print(f"inputs are of torch.Generator('cuda').manual_seed({seed})")
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((Sq, Hq), (Sk, Hkv), (Sk, Hkv))
    made = [torch.randn(B, S, H, D, generator=generator, device="cuda") for S, H in shapes]
    for begin in range(0, Sk, 128):
        made[2][:, begin : begin + 128] *= 2.0 ** -int(torch.randint(0, 7, (1,), generator=generator, device="cuda"))
    return made


def seen(mask: str, Sq: int, Sk: int) -> Visible:
    """A mask by name."""
    causal = Visible.causal(Sq, Sk, "cuda")
    if mask == "window":
        return Visible((causal.hi - 150).clamp(min=0), causal.hi)
    if mask == "documents":
        edges = torch.tensor([0, 1, 100, 101, 256, 300, 512, 513], device="cuda", dtype=torch.int32)
        row = torch.arange(Sq, device="cuda", dtype=torch.int32) + Sk - Sq
        lo = edges[(torch.searchsorted(edges, row, right=True) - 1).clamp(min=0)]
        return Visible(torch.minimum(lo, causal.hi).int(), causal.hi)
    return causal if mask == "causal" else Visible.full(Sq, Sk, "cuda")


def close(
    got: Partial, made: Three, visible: Visible, scale: float, softcap: float = 0.0, twin: Partial | None = None
) -> None:
    """At most twice the twin's error against fp64 on the numbers that the fp8 tensors stand for.

    twin: by whose largest error ours is judged; None: the one that sees whole rows, by whose mean it always is.
    """
    wide = [dequantize(x, torch.float64) for x in made]
    exact = reference.attend(*wide, visible, scale=scale, softcap=softcap, into=None, out_dtype=torch.float64)
    whole = fp8_twin.attend(*made, visible, scale=scale, softcap=softcap)
    rounding = 1e-4 if got.out.dtype == torch.float32 else 2.0**-8
    for size, yardstick in ((lambda x: x.square().mean().sqrt(), whole), (lambda x: x.abs().max() / 3, twin or whole)):
        error, allowed = (size(x.out.double() - exact.out) for x in (got, yardstick))
        assert error <= 2 * allowed + rounding * size(exact.out), f"error {error:.2e}, the twin's {allowed:.2e}"
    blind = exact.lse == -torch.inf
    assert got.lse.eq(-torch.inf).equal(blind)
    assert (got.out.transpose(1, 2)[blind] == 0).all()
    logit = min(abs(scale) * float(wide[0].norm(dim=-1).max() * wide[1].norm(dim=-1).max()), softcap or torch.inf)
    if not blind.all():
        assert (got.lse - exact.lse)[~blind].abs().max() <= 2.0**-11 * max(1.0, logit)


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "fp32"])
@pytest.mark.parametrize("block", [128, 0])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
@pytest.mark.parametrize("D", [64, 128])
def test_masks(D: int, mask: str, block: int, wide: bool) -> None:
    made = quantize(*inputs(700, 700, D), block=block, v_order="keys")
    visible = seen(mask, 700, 700)
    out_dtype = torch.float32 if wide else torch.bfloat16
    got = attend(*made, visible, out_dtype=out_dtype, impl="hopper")
    assert got.out.dtype == out_dtype
    close(got, made, visible, D**-0.5)


@pytest.mark.parametrize(
    ("Sq", "Sk", "Hq", "Hkv"),
    [(1, 1, 1, 1), (1, 129, 4, 4), (5, 2000, 8, 1), (129, 77, 2, 2), (300, 100, 4, 2), (1280, 1280, 16, 16)],
)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_shapes(Sq: int, Sk: int, Hq: int, Hkv: int, mask: str) -> None:
    made = quantize(*inputs(Sq, Sk, Hq=Hq, Hkv=Hkv), v_order="keys")
    close(attend(*made, seen(mask, Sq, Sk), impl="hopper"), made, seen(mask, Sq, Sk), 128**-0.5)


@pytest.mark.parametrize("D", [16, 80, 112])
def test_head_dims_between(D: int) -> None:
    made = quantize(*inputs(300, 300, D), v_order="keys")
    close(attend(*made, seen("causal", 300, 300), impl="hopper"), made, seen("causal", 300, 300), D**-0.5)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_sums_of_one_sign_do_not_drift(mask: str, D: int) -> None:
    """The matrix unit adds fp8 products with some 14 bits: on its own it would be 26% off here."""
    S = 16384
    q, k, v = inputs(S, S, D, Hq=2, Hkv=2)
    made = quantize(q, k, 1 + v / 10, v_order="keys" if D <= 128 else "rows")
    got = attend(*made, seen(mask, S, S), impl="hopper" if D <= 128 else "auto")
    assert (got.out.float() - 1)[:, S // 2 :].abs().max() < 0.05
    assert (got.out.float() - 1).mean().abs() < 0.01


@pytest.mark.parametrize(("scale", "softcap"), [(0.0, 0.0), (-0.1, 0.0), (0.1, 15.0), (-0.1, 15.0)])
def test_scale_and_softcap(scale: float, softcap: float) -> None:
    made = quantize(*inputs(400, 400), v_order="keys")
    visible = seen("causal", 400, 400)
    close(attend(*made, visible, scale=scale, softcap=softcap, impl="hopper"), made, visible, scale, softcap)


@pytest.mark.parametrize("last", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 128])
def test_shards_continue_each_other(D: int, last: torch.dtype) -> None:
    q, k, v = quantize(*inputs(500, 1000, D), v_order="keys")
    whole = seen("causal", 500, 1000)
    state = Partial(torch.zeros(2, 500, 4, D, device="cuda"), torch.full((2, 4, 500), -torch.inf, device="cuda"))
    # P of a row's largest score is exact in e4m3 where the whole row is seen at once: the twin's largest error by
    # shards is 1.4 to 3.2 times that (its mean 1.04 to 1.12 times)
    twin = None
    for begin, end in ((512, 1000), (0, 256), (256, 512)):
        part = Visible(*((x - begin).clamp(0, end - begin) for x in (whole.lo, whole.hi)))
        out_dtype = last if begin == 256 else torch.float32
        made = k.rows(begin, end), v.rows(begin, end)
        twin = fp8_twin.attend(q, *made, part, scale=D**-0.5, into=twin)
        state = attend(q, *made, part, into=state, out_dtype=out_dtype, impl="hopper")
    close(state, (q, k, v), whole, D**-0.5, twin=twin)


def test_nan_reaches_the_rows_that_see_it_and_no_others() -> None:
    q, k, v = inputs(700, 700)
    k[1, 300, 1, 5] = torch.nan
    v[0, 450, 0, 7] = torch.inf
    got = attend(*quantize(q, k, v, v_order="keys"), seen("causal", 700, 700), impl="hopper")
    bad = torch.zeros(2, 700, 4, dtype=torch.bool, device="cuda")
    bad[1, 300:, 2:] = bad[0, 450:, :2] = True
    assert got.out.isnan().equal(bad[..., None].expand_as(got.out))
    assert got.lse.isnan().equal(bad.transpose(1, 2))


def test_what_it_does_not_read_is_refused_by_name() -> None:
    q, k, v = inputs(128, 128)
    made = quantize(q, k, v, v_order="rows")
    with pytest.raises(Unsupported, match="in order 'keys'"):
        attend(*made, impl="hopper")
    keys = quantize(q, k, v, v_order="keys")
    heads = replace(keys[0], scale=keys[0].scale[..., :1].contiguous(), block=0)
    with pytest.raises(Unsupported, match="scales of one kind"):
        attend(heads, *keys[1:], impl="hopper")
