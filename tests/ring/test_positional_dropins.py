"""dropout_p and alibi_slopes of flash-attn's and ring-flash-attn's functions, against plain attention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringfa3.ring_flash_attn as rfa
from ringfa3 import flash_attn
from ringfa3.places import drawn_seed
from ringfa3_kernels import Dropout
from tests.kernels.places import kept

SLOPES = torch.tensor([[0.5, 0.05, 0.2, 0.01], [0.1, 0.7, 0.02, 0.3], [0.3, 0.02, 0.6, 0.04]])


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def plain(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, slopes: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of one batch of sequences as flash-attn defines them: rows stand at the end of the keys."""
    Sq, Sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * q.shape[3] ** -0.5
    at = torch.arange(Sk - Sq, Sk)[:, None] - torch.arange(Sk)
    if slopes is not None:
        s = s - torch.atleast_2d(slopes).to(s.dtype)[..., None, None] * at.abs()
    s = s.masked_fill(at < 0, -torch.inf) if causal else s
    lse = s.logsumexp(-1)
    p = torch.exp(s - torch.where(lse == -torch.inf, 0, lse)[..., None])
    p = p if weights is None else p * weights
    return torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(group, 2)), lse


def close(name: str, got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")


def compare(
    got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], inputs: list[Tensor], exact: list[Tensor]
) -> None:
    """Results, and the gradients of a sum over them."""
    for name, x, y in zip(("out", "lse"), got, wanted, strict=True):
        close(name, x.detach(), y.detach())
    for out, of in ((got[0], inputs), (wanted[0], exact)):
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        assert all(x.grad is not None for x in of)
    for name, x, y in zip(("dq", "dk", "dv"), inputs, exact, strict=True):
        close(name, x.grad, y.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("Sq", "Sk"), [(20, 20), (9, 23), (23, 9)])
@pytest.mark.parametrize("rows", [False, True], ids=["slopes", "slopes of rows"])
def test_alibi_is_aligned_at_the_end(causal, Sq, Sk, rows):
    inputs = [x.requires_grad_() for x in draw((2, Sq, 4, 20), (2, Sk, 2, 20), (2, Sk, 2, 20))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    slopes = SLOPES[:2] if rows else SLOPES[0]
    out, lse, probabilities = flash_attn.flash_attn_func(
        *inputs, causal=causal, alibi_slopes=slopes, return_attn_probs=True
    )
    assert probabilities is None
    compare((out, lse), plain(*exact, causal=causal, slopes=slopes), inputs, exact)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("Sq", "Sk"), [(20, 20), (9, 23)])
def test_dropout_follows_from_torchs_seed(causal, Sq, Sk):
    inputs = [x.requires_grad_() for x in draw((2, Sq, 4, 16), (2, Sk, 2, 16), (2, Sk, 2, 16))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    torch.manual_seed(7)
    dropout = Dropout(0.3, drawn_seed())
    torch.manual_seed(7)
    out, lse, _ = flash_attn.flash_attn_func(*inputs, 0.3, causal=causal, return_attn_probs=True)
    rows, keys = torch.arange(Sk - Sq, Sk)[None], torch.arange(Sk)[None]
    weights = kept(rows, keys, range(4), range(2), dropout).double() / 0.7
    compare((out, lse), plain(*exact, causal=causal, weights=weights), inputs, exact)
    again = flash_attn.flash_attn_func(*inputs, 0.3, causal=causal)
    assert not torch.equal(again, out)


def test_packed_forms_pass_both_on():
    q, k, v = draw((2, 12, 2, 16), (2, 12, 2, 16), (2, 12, 2, 16))
    options: dict[str, Any] = {"dropout_p": 0.5, "causal": True, "alibi_slopes": SLOPES[0, :2]}
    found = []
    for call, tensors in (
        (flash_attn.flash_attn_func, (q, k, v)),
        (flash_attn.flash_attn_kvpacked_func, (q, torch.stack([k, v], 2))),
        (flash_attn.flash_attn_qkvpacked_func, (torch.stack([q, k, v], 2),)),
    ):
        torch.manual_seed(3)
        found.append(call(*tensors, **options))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("rows", [False, True], ids=["slopes", "slopes of sequences"])
@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
def test_varlen_alibi_counts_in_the_sequence(causal, rows, paged):
    of_q, of_k = [5, 12, 7], [9, 12, 3]
    slopes = SLOPES if rows else SLOPES[0]
    q, k, v = inputs = [
        x.requires_grad_() for x in draw((sum(of_q) + 2, 4, 16), (sum(of_k), 2, 16), (sum(of_k), 2, 16))
    ]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    lengths: dict[str, Any] = {"max_seqlen_q": 13, "max_seqlen_k": 12}
    keys: tuple[Tensor, Tensor] = (k, v)
    if paged:
        numbers = torch.tensor([[4, 2, 0], [1, 3, 6], [5, 7, 7]], dtype=torch.int32)
        keys = tuple(pages_of(x, of_k, numbers) for x in (k, v))  # type: ignore[assignment]
        lengths["block_table"] = numbers
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, *keys, cu(of_q), cu(of_k), causal=causal, alibi_slopes=slopes, return_attn_probs=True, **lengths
    )
    wanted = []
    for i, (a, b) in enumerate(zip(edges(of_q), edges(of_k), strict=True)):
        one = exact[0][None, a], exact[1][None, b], exact[2][None, b]
        wanted.append(plain(*one, causal=causal, slopes=slopes[i] if rows else slopes))
    blind = torch.zeros(2, 4, 16, dtype=torch.float64), torch.full((4, 2), -torch.inf, dtype=torch.float64)
    whole = torch.cat([*(x[0][0] for x in wanted), blind[0]]), torch.cat([*(x[1][0] for x in wanted), blind[1]], 1)
    compare((out, lse), whole, inputs, exact)


def edges(lengths: list[int]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(itertools.accumulate(lengths, initial=0))]


def pages_of(x: Tensor, lengths: list[int], numbers: Tensor) -> Tensor:
    """The packed keys in pages of 4, NaN where none is."""
    pages = torch.full((8, 4, *x.shape[1:]), torch.nan)
    for row, part in zip(numbers.tolist(), edges(lengths), strict=True):
        for number, rows in zip(row, x[part].split(4), strict=False):
            pages = pages.index_put((torch.tensor(number), torch.arange(len(rows))), rows)
    return pages


@pytest.mark.parametrize("rows", [False, True], ids=["slopes", "slopes of sequences"])
@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
def test_varlen_dropout_shows_in_unit_vectors(rows, paged):
    """Places are dropped at their rate, sequences see their own keys alone, and gradients drop the same."""
    lengths = [24, 16, 24]
    q, k = torch.zeros(64, 4, 64), torch.zeros(64, 4, 64)
    v = torch.eye(64)[:, None].repeat(1, 4, 1).requires_grad_()
    options: dict[str, Any] = {"alibi_slopes": torch.zeros(3, 4) if rows else None}
    keys: tuple[Tensor, Tensor] = (k, v)
    if paged:
        numbers = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 0, 0], [10, 11, 12, 13, 14, 15]], dtype=torch.int32)
        keys = k.view(16, 4, 4, 64), v.view(16, 4, 4, 64)
        options["block_table"] = numbers
    torch.manual_seed(1)
    out = flash_attn.flash_attn_varlen_func(q, *keys, cu(lengths), cu(lengths), 24, 24, 0.25, **options)
    own = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    stays = out.detach().transpose(0, 1) != 0
    assert not (stays & ~own).any()
    share = stays.sum() / (4 * own.sum())
    assert abs(float(share) - 0.75) < 6 * (0.25 * 0.75 / (4 * float(own.sum()))) ** 0.5
    out.backward(torch.eye(64)[:, None].expand(-1, 4, -1))
    assert v.grad is not None
    assert torch.equal((v.grad != 0).permute(1, 2, 0), stays)


@pytest.mark.parametrize("rows", [1, 3, 40], ids=["decode", "a few rows", "more rows than keys"])
@pytest.mark.parametrize("of_rows", [False, True], ids=["slopes", "slopes of rows"])
@pytest.mark.parametrize("lengths", [30, torch.tensor([30, 11], dtype=torch.int32)], ids=["one length", "lengths"])
def test_a_cache_has_alibi(rows, of_rows, lengths):
    q, k_cache, v_cache = draw((2, rows, 4, 16), (2, 48, 2, 16), (2, 48, 2, 16))
    slopes = SLOPES[:2] if of_rows else SLOPES[0]
    found, lse = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, causal=True, alibi_slopes=slopes, return_softmax_lse=True
    )
    for b in range(2):
        n = lengths if isinstance(lengths, int) else int(lengths[b])
        one = (x[b : b + 1, :n].double() for x in (k_cache, v_cache))
        out, wanted = plain(q[b : b + 1].double(), *one, causal=True, slopes=slopes[b] if of_rows else slopes)
        close("out", found[b : b + 1], out)
        close("lse", lse[b : b + 1], wanted)


BATCHED = (
    ("ring_flash_attn_func", lambda x, w, r: x.chunk(w, 1)[r]),
    ("zigzag_ring_flash_attn_func", lambda x, w, r: torch.cat([x.chunk(2 * w, 1)[i] for i in (r, 2 * w - 1 - r)], 1)),
    ("stripe_flash_attn_func", lambda x, w, r: x[:, r::w]),
)


def ring_of(rank: int, size: int, number: int) -> list[Tensor]:
    """This rank's out, lse and gradients; what the whole sequence would give on one device, at its places."""
    name, deal = BATCHED[number]
    whole = [x.requires_grad_() for x in draw((2, 24, 4, 16), (2, 24, 2, 16), (2, 24, 2, 16), seed=number)]
    mine = [deal(x.detach(), size, rank).requires_grad_() for x in whole]
    options: dict[str, Any] = {"dropout_p": 0.4, "causal": True, "return_attn_probs": True, "alibi_slopes": SLOPES[:2]}
    torch.manual_seed(21)
    out, lse, _ = getattr(rfa, name)(*mine, **options)
    torch.manual_seed(21)
    expected, expected_lse, _ = flash_attn.flash_attn_func(*whole, **options)
    out.square().sum().backward()
    expected.square().sum().backward()
    got = [out, lse.transpose(1, 2), *(x.grad for x in mine)]
    wanted = [expected, expected_lse.transpose(1, 2), *(x.grad for x in whole)]
    return [t.detach() for x, y in zip(got, wanted, strict=True) for t in (x, deal(y, size, rank))]  # type: ignore


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("number", range(3), ids=[name for name, _ in BATCHED])
def test_rings_drop_what_one_device_drops(world, size, number):
    for found in world(size)(ring_of, number):
        for x, y in zip(found[::2], found[1::2], strict=True):
            close("", x, y)


def packed_ring_of(rank: int, size: int, name: str) -> list[Tensor]:
    """out and gradients with ALiBi, of documents, and what one device gives; pieces of documents, or of the whole."""
    lengths = [8, 24, 16]
    whole = [x.requires_grad_() for x in draw((48, 4, 16), (48, 2, 16), (48, 2, 16))]

    def deal(x: Tensor) -> Tensor:
        if name.startswith("llama3"):
            return x.chunk(size)[rank]
        parts = (rank, 2 * size - 1 - rank) if name.startswith("zigzag") else (2 * rank, 2 * rank + 1)
        return torch.cat([part for row in edges(lengths) for i in parts for part in [x[row].chunk(2 * size)[i]]])

    mine = [deal(x.detach()).requires_grad_() for x in whole]
    if name.startswith("llama3"):
        cu_q, cu_k, most_q, most_k, keys = rfa.llama3_flash_attn_prepare_cu_seqlens(cu(lengths), True, rank, size)
        given: tuple[Any, ...] = (cu_q, cu_k, most_q, most_k, 1, keys)
    else:
        given = (cu([n // size for n in lengths]), 24)
    out = getattr(rfa, name)(*mine, *given, causal=True, alibi_slopes=SLOPES[0])
    expected = flash_attn.flash_attn_varlen_func(
        *whole, cu(lengths), cu(lengths), 24, 24, causal=True, alibi_slopes=SLOPES[0]
    )
    out.square().sum().backward()
    expected.square().sum().backward()
    got, wanted = [out, *(x.grad for x in mine)], [expected, *(x.grad for x in whole)]
    return [t.detach() for x, y in zip(got, wanted, strict=True) for t in (x, deal(y))]  # type: ignore


@pytest.mark.parametrize(
    "name", ["ring_flash_attn_varlen_func", "zigzag_ring_flash_attn_varlen_func", "llama3_flash_attn_varlen_func"]
)
def test_rings_of_documents_have_alibi(world, name):
    for found in world(2)(packed_ring_of, name):
        for x, y in zip(found[::2], found[1::2], strict=True):
            close("", x, y)


def differing(rank: int, size: int) -> str:
    torch.manual_seed(rank)
    q = torch.randn(1, 8, 2, 8)
    with pytest.raises(ValueError, match="dropout_seed") as caught:
        rfa.ring_flash_attn_func(q, q, q, 0.1)
    assert dist.get_world_size() == size
    return str(caught.value)


def test_ranks_whose_generators_differ_hear_of_it(world):
    assert len({*world(2)(differing)}) == 1


Q, K = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16)


@pytest.mark.parametrize("call", [flash_attn.flash_attn_func, rfa.ring_flash_attn_func], ids=["flash", "ring"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 1.0}, r"^dropout_p: wanted a number in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, "^dropout_p: .*got -0.1"),
        ({"alibi_slopes": torch.ones(3)}, r"^alibi_slopes: wanted torch.float32 \[4\] or \[2, 4\], got .*\[3\]"),
        ({"alibi_slopes": torch.ones(4).half()}, "^alibi_slopes: wanted torch.float32 .*got torch.float16"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "^alibi_slopes: wanted no requires_grad"),
    ],
    ids=str,
)
def test_wrong_ones_are_refused_by_name(call, options, message):
    with pytest.raises(ValueError, match=message):
        call(Q, K, K, **options)


def test_slopes_of_documents_are_refused_in_a_ring():
    x = torch.randn(8, 4, 16)
    with pytest.raises(ValueError, match=r"^alibi_slopes: wanted torch.float32 \[4\] or \[1, 4\], got .*\[2, 4\]"):
        rfa.ring_flash_attn_varlen_func(x, x, x, cu([4, 4]), 4, alibi_slopes=torch.ones(2, 4))
