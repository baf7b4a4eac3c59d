"""Dropout and ALiBi: the mask is one function of places, bit for bit, and what is wrong is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ringfa3_kernels import Dropout, Partial, Unsupported, Visible, aten, attend, attend_backward, dispatch, quantize
from ringfa3_kernels.portable import configs, launch
from ringfa3_kernels.positional import check, random_words
from tests.kernels.places import kept, philox
from tests.kernels.test_portable import CPU_CALL, on_cpu

S = 64  # keys, and head_dim: v is the unit matrix, so that out shows every probability
SEED = 0xFEDCBA9876543210
SERVED = ("reference", "aten", pytest.param("portable", marks=on_cpu))
PLACES = (torch.arange(S) * 3 + 2**31 - 1 - 3 * S, torch.arange(S) * 2)


def test_philox_is_the_papers() -> None:
    """The known answers that its authors publish (Random123, kat_vectors), for 7 and 10 rounds."""
    zero, ones = np.zeros(1, np.uint64), np.full(1, 0xFFFFFFFF, np.uint64)
    assert [int(x) for (x,) in philox((zero,) * 4, 0, 7)] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(x) for (x,) in philox((ones,) * 4, 2**64 - 1, 7)] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    assert [int(x) for (x,) in philox((zero,) * 4, 0, 10)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_the_torch_twin_is_philox_at_any_counter(generator: torch.Generator) -> None:
    counter = [torch.randint(2**32, (1000,), generator=generator) for _ in range(4)]
    seed = int(torch.randint(2**63 - 1, (), generator=generator)) * 2 + 1
    wanted = philox(tuple(x.numpy().astype(np.uint64) for x in counter), seed, 7)[0]  # type: ignore[arg-type]
    assert random_words(*counter, seed).tolist() == wanted.tolist()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_stays_is_1_minus_p(p: float) -> None:
    """Over 4M places the count lies within 6 standard deviations, and so it does in every row, column, head, seed."""
    n, heads, seeds = 512, 4, 4
    q = k = torch.zeros(1, n, heads, 8)
    positions = torch.arange(n) + 1000
    stays = torch.stack(
        [
            check((positions, positions), None, Dropout(p, 17 * seed, 5), q, k).weights(torch.float32)[0] != 0  # type: ignore
            for seed in range(seeds)
        ]
    )
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        draws = stays.numel() // stays.sum(dims).numel()
        far = (stays.sum(dims) - draws * (1 - p)).abs().max() / (draws * p * (1 - p)) ** 0.5
        assert far < 6, (dims, float(far))
    pairs = (stays[..., 1:] == stays[..., :-1]).float().mean()  # neighbours agree as often as strangers would
    alike = p * p + (1 - p) * (1 - p)
    assert abs(float(pairs) - alike) < 6 * (alike * (1 - alike) / stays.numel()) ** 0.5 + 1e-6


def probabilities(impl: str, dropout: Dropout | None, positions: tuple[Tensor, Tensor], B: int = 2, **options: Any):
    """out of attention that gives every key the same weight and has unit vectors for values, times the keys."""
    q, k = torch.zeros(B, positions[0].shape[-1], 4, S), torch.zeros(B, positions[1].shape[-1], 2, S)
    v = torch.eye(S)[: k.shape[1], None].expand(B, -1, 2, -1)
    return attend(q, k, v, positions=positions, dropout=dropout, impl=impl, **options)


@pytest.mark.parametrize("impl", SERVED)
def test_every_implementation_drops_the_same_places(impl: str) -> None:
    dropout = Dropout(0.3, SEED, 7, 2)
    found = probabilities(impl, dropout, PLACES)
    wanted = kept(PLACES[0][None], PLACES[1][None], range(7, 11), range(2, 4), dropout)
    assert torch.equal((found.out != 0).transpose(1, 2), wanted)
    torch.testing.assert_close(found.out[found.out != 0], torch.full((int(wanted.sum()),), 1 / (S * 0.7)))
    torch.testing.assert_close(found.lse, torch.full((2, 4, S), float(np.log(S))))  # of all, dropped or not


@pytest.mark.parametrize("impl", SERVED)
def test_places_alone_decide(impl: str) -> None:
    """Shards of rows, keys, heads and batch rows drop what the whole drops; positions may differ by batch row."""
    dropout = Dropout(0.5, 12345)
    whole = probabilities(impl, dropout, PLACES).out
    q_pos, k_pos = PLACES
    rows, keys = torch.arange(5, S, 3), slice(17, 50)
    shard = probabilities(impl, dropout, (q_pos[rows].int(), k_pos[keys].int())).out
    assert torch.equal(shard[..., :33] != 0, whole[:, rows][..., keys] != 0)
    later = probabilities(impl, replace(dropout, head=2, row=1), PLACES, B=1).out
    assert torch.equal(later[0, :, :2] != 0, whole[1, :, 2:] != 0)
    each = probabilities(impl, dropout, (torch.stack([q_pos, q_pos.flip(0)]), torch.stack([k_pos, k_pos]))).out
    assert torch.equal(each[0] != 0, whole[0] != 0)
    assert torch.equal(each[1] != 0, whole[1].flip(0) != 0)
    other = probabilities(impl, replace(dropout, seed=12345 + 2**32), PLACES).out
    assert not torch.equal(other != 0, whole != 0)


@on_cpu
@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (128, 16)], ids=str)
def test_tiles_do_not_matter(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = Dropout(0.4, 99)
    wanted = probabilities("reference", dropout, PLACES).out != 0
    monkeypatch.setattr(aten, "TILE", tile[0])
    monkeypatch.setattr(launch, "INTERPRETED", replace(configs.INTERPRETED, block_m=tile[0], block_n=tile[1]))
    for impl in ("aten", "portable"):
        assert torch.equal(probabilities(impl, dropout, PLACES).out != 0, wanted), impl


@pytest.mark.parametrize("impl", SERVED)
def test_the_backward_pass_drops_the_same(impl: str) -> None:
    """dv of unit vectors is the transposed probabilities: zero exactly where the forward dropped."""
    dropout = Dropout(0.3, SEED, 1, 4)
    wanted = kept(PLACES[0][None], PLACES[1][None], range(1, 5), range(4, 5), dropout)[0]
    q, k = torch.zeros(1, S, 4, S), torch.zeros(1, S, 4, S)
    dout = torch.eye(S)[None, :, None].expand(1, -1, 4, -1).contiguous()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, k))
    lse, delta = torch.full((1, 4, S), float(np.log(S))), torch.zeros(1, 4, S)
    attend_backward(
        dout, q, k, k, lse, delta, dq=dq, dk=dk, dv=dv, accumulate=False, positions=PLACES, dropout=dropout, impl=impl
    )
    assert torch.equal((dv[0] != 0).permute(1, 2, 0), wanted)


@pytest.mark.parametrize("impl", SERVED)
def test_slopes_of_0_and_dropout_of_0_change_nothing(impl: str, generator: torch.Generator) -> None:
    q, k = (torch.randn(1, S, 2, 16, generator=generator) for _ in "qk")
    bare = attend(q, k, k, impl=impl)
    none = attend(q, k, k, positions=PLACES, dropout=Dropout(0.0, 3), impl=impl)
    flat = attend(q, k, k, positions=PLACES, alibi=torch.zeros(2), impl=impl)
    assert torch.equal(none.out, bare.out)
    torch.testing.assert_close(flat.out, bare.out, rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.lse, bare.lse, rtol=0, atol=1e-5)


@on_cpu
def test_hopper_says_that_it_has_neither() -> None:
    call = replace(CPU_CALL, device="cuda", capability=(9, 0))
    for asked, name in (({"alibi": True}, "ALiBi"), ({"dropout": True}, "dropout")):
        reason = dispatch.why_not("hopper", replace(call, **asked))  # type: ignore[arg-type]
        assert name in (reason or "")
        with pytest.raises(Unsupported, match=f"hopper.*{name}"):
            dispatch.choose(replace(call, **asked), "hopper")  # type: ignore[arg-type]
    assert dispatch.why_not("hopper", call) is None


Q, K = torch.ones(2, 5, 4, 16), torch.ones(2, 7, 2, 16)
AT = (torch.arange(5), torch.arange(7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": AT}, "positions: wanted None, as neither alibi nor dropout needs them"),
        ({"dropout": Dropout(0.1, 0)}, r"positions: wanted \(q_pos, k_pos\) beside alibi or dropout, got None"),
        ({"dropout": 0.1, "positions": AT}, "dropout: wanted a Dropout or None, got float"),
        ({"alibi": torch.ones(4), "positions": AT[0]}, r"positions: wanted \(q_pos, k_pos\) .*, got Tensor"),
        ({"alibi": torch.ones(4), "positions": AT[::-1]}, r"positions\[0\]: wanted .* \[5\] or \[2, 5\] .*got .*\[7\]"),
        ({"alibi": torch.ones(4), "positions": (AT[0], AT[1].float())}, r"positions\[1\]: .*got torch.float32"),
        ({"alibi": torch.ones(4), "positions": (AT[0] - 1, AT[1])}, r"positions\[0\]: wanted .*2\*\*31\), got -1..3"),
        ({"alibi": torch.ones(4), "positions": (AT[0], AT[1] + 2**31 - 6)}, r"positions\[1\]: .*got .*2147483648"),
        ({"alibi": torch.ones(4, dtype=torch.float64), "positions": AT}, "alibi: wanted torch.float32 .*got .*float64"),
        ({"alibi": torch.ones(2), "positions": AT}, r"alibi: wanted .*\[4\] or \[2, 4\], got torch.float32 \[2\]"),
        ({"alibi": torch.ones(4, device="meta"), "positions": AT}, "alibi: wanted q's device cpu, got meta"),
        ({"alibi": torch.ones(4, requires_grad=True), "positions": AT}, "alibi: wanted no requires_grad"),
    ],
    ids=str,
)
def test_the_door_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(Q, K, K, **options)
    lse = torch.zeros(2, 4, 5)
    grads = {"dq": Q.clone(), "dk": K.clone(), "dv": K.clone()}
    with pytest.raises(ValueError, match=message):
        attend_backward(Q, Q, K, K, lse, lse, **grads, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.0}, r"dropout p: wanted a number in \[0, 1\), got 1.0"),
        ({"p": -0.1}, "dropout p: .* got -0.1"),
        ({"p": float("nan")}, "dropout p: .* got nan"),
        ({"seed": -1}, r"dropout seed: wanted an integer in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, "dropout seed: .* got 18446744073709551616"),
        ({"seed": 1.0}, "dropout seed: .* got 1.0"),
        ({"head": -1}, "dropout head: .* got -1"),
        ({"row": 2**31}, "dropout row: .* got 2147483648"),
    ],
    ids=str,
)
def test_dropout_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dropout(**{"p": 0.1, "seed": 0, **arguments})


def test_slopes_that_want_gradients_pass_where_none_is_recorded() -> None:
    slopes = torch.rand(4, requires_grad=True)
    with torch.no_grad():
        found = attend(Q, K, K, positions=AT, alibi=slopes)
    assert torch.equal(found.out, attend(Q, K, K, positions=AT, alibi=slopes.detach()).out)


def test_fp8_is_refused_by_name() -> None:
    q, k, v = quantize(*(torch.randn(1, 128, 2, 64, dtype=torch.bfloat16) for _ in "qkv"))
    with pytest.raises(Unsupported, match="dropout: wanted None for fp8"):
        attend(q, k, v, positions=(torch.arange(128),) * 2, dropout=Dropout(0.1, 0))


def test_a_partial_of_other_keys_goes_on(generator: torch.Generator) -> None:
    """Shards of keys in any order make up the whole, with dropout."""
    q, k, v = (torch.randn(1, S, 2, 16, generator=generator) for _ in "qkv")
    options = {"alibi": torch.tensor([0.02, 0.3]), "dropout": Dropout(0.25, 8)}
    positions = torch.arange(S)
    whole = attend(q, k, v, Visible.full(S, S), positions=(positions, positions), **options)
    state = Partial.empty(q)
    for keys in (slice(40, S), slice(0, 15), slice(15, 40)):
        attend(q, k[:, keys], v[:, keys], positions=(positions, positions[keys]), into=state, **options)
    torch.testing.assert_close(state.out, whole.out, rtol=0, atol=2e-6)
    torch.testing.assert_close(state.lse, whole.lse, rtol=0, atol=2e-6)
