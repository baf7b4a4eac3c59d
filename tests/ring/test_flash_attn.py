"""ringfa3.flash_attn: flash-attn's argument lists, layouts and returns, against plain attention in fp64."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ringfa3 import flash_attn
from ringfa3.flash_attn.recent import Recent
from tests.kernels.oracle import assert_close, plain

# The argument lists that flash-attn 2.7 and 2.8 publish.
OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
PUBLISHED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "flash_attn_func": (["q", "k", "v"], OPTIONS),
    "flash_attn_kvpacked_func": (["q", "kv"], OPTIONS),
    "flash_attn_qkvpacked_func": (["qkv"], OPTIONS),
    "flash_attn_varlen_func": (["q", "k", "v", *LENGTHS], OPTIONS | {"block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *LENGTHS], OPTIONS),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], OPTIONS),
    "flash_attn_with_kvcache": (
        ["q", "k_cache", "v_cache"],
        {
            "k": None,
            "v": None,
            "rotary_cos": None,
            "rotary_sin": None,
            "cache_seqlens": None,
            "cache_batch_idx": None,
            "cache_leftpad": None,
            "block_table": None,
            "softmax_scale": None,
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "rotary_interleaved": True,
            "alibi_slopes": None,
            "num_splits": 0,
            "return_softmax_lse": False,
        },
    ),
}
WINDOWS = [(False, (-1, -1)), (True, (-1, -1)), (True, (4, 0)), (True, (3, 9)), (False, (2, 3)), (False, (-1, 1))]
PARTS = ("out", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize("name", PUBLISHED)
def test_signature_is_the_published_one(name):
    required, options = PUBLISHED[name]
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert list(parameters) == required + list(options)
    assert {p.name: p.default for p in parameters.values() if p.default is not p.empty} == options
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert name in flash_attn.__all__


def seen(Sq: int, Sk: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """bool [Sq, Sk] as flash-attn's documentation says it: rows stand at the end of the keys."""
    ahead = torch.arange(Sk) - (torch.arange(Sq) + Sk - Sq)[:, None]
    left, right = window
    mask = torch.ones(Sq, Sk, dtype=torch.bool)
    if causal:
        mask &= ahead <= 0
    if left != -1:
        mask &= ahead >= -left
    if right != -1:
        mask &= ahead <= right
    return mask


def draw(dtype: torch.dtype, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def judge(got: dict[str, Tensor], x: list[Tensor], mask: Tensor, dtype: torch.dtype, **options: Any) -> None:
    """The error rule for what is in got; x is q, k, v, dout, dlse."""
    options = {"scale": options.get("softmax_scale"), "softcap": options.get("softcap", 0.0)}
    truth, yardstick = (plain(*x, mask, dtype=each, **options) for each in (torch.float64, dtype))
    for name, part in got.items():
        assert_close(name, part, getattr(truth, name), getattr(yardstick, name), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("Sq", "Sk"), [(11, 11), (5, 17), (17, 5), (1, 9), (6, 0)])
@pytest.mark.parametrize(("causal", "window"), WINDOWS)
def test_batches(Sq, Sk, causal, window, dtype):
    B, Hq, Hkv, D = 2, 6, 2, 24
    x = draw(dtype, (B, Sq, Hq, D), (B, Sk, Hkv, D), (B, Sk, Hkv, D), (B, Sq, Hq, D), seed=Sq + Sk)
    x.append(torch.randn(B, Hq, Sq, generator=torch.Generator().manual_seed(1)))
    q, k, v = (t.clone().requires_grad_() for t in x[:3])
    out, lse, probabilities = flash_attn.flash_attn_func(
        q, k, v, causal=causal, window_size=window, softmax_scale=0.3, return_attn_probs=True
    )
    assert probabilities is None
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.autograd.backward([out, lse], x[3:])
    mask = seen(Sq, Sk, causal, window).expand(B, -1, -1)
    got = dict(zip(PARTS, (out.detach(), lse.detach(), q.grad, k.grad, v.grad), strict=True))
    judge(got, x, mask, dtype, softmax_scale=0.3)
    alone = flash_attn.flash_attn_func(q, k, v, 0.0, 0.3, causal, window)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("D", [12, 20, 128])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_any_head_dim_and_softcap(D, softcap):
    x = draw(torch.float32, (1, 9, 2, D), (1, 9, 2, D), (1, 9, 2, D), (1, 9, 2, D), (1, 2, 9), seed=D)
    q, k, v = (t.clone().requires_grad_() for t in x[:3])
    out, lse, _ = flash_attn.flash_attn_func(
        q, k, v, causal=True, softcap=softcap, deterministic=True, return_attn_probs=True
    )
    torch.autograd.backward([out, lse], x[3:])
    got = dict(zip(PARTS, (out.detach(), lse.detach(), q.grad, k.grad, v.grad), strict=True))
    judge(got, x, seen(9, 9, True, (-1, -1))[None], torch.float32, softcap=softcap)


def test_only_lse_is_differentiated():
    x = draw(torch.float32, (1, 5, 2, 16), (1, 7, 2, 16), (1, 7, 2, 16), (1, 5, 2, 16), (1, 2, 5))
    x[3].zero_()
    q, k, v = (t.clone().requires_grad_() for t in x[:3])
    _, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    lse.backward(x[4])
    judge({"dq": q.grad, "dk": k.grad, "dv": v.grad}, x, torch.ones(1, 5, 7, dtype=torch.bool), torch.float32)


@pytest.mark.parametrize("packed", ["kvpacked", "qkvpacked"])
@pytest.mark.parametrize("varlen", [False, True])
def test_packed_forms(packed, varlen):
    """The same result and gradients as from three tensors, with the options in their places."""
    (qkv,) = draw(torch.float32, (2, 10, 3, 4, 16))
    lengths = cu([3, 0, 9, 8])
    qkv = qkv.flatten(0, 1) if varlen else qkv
    dim = -3
    options = (0.0, 0.4, True, (5, 0), 2.0, None, True, True)
    apart = [t.clone().requires_grad_() for t in qkv.unbind(dim)]
    extra: tuple[Any, ...] = (lengths, lengths, 9, 9) if varlen else ()
    name = "flash_attn_varlen_" if varlen else "flash_attn_"
    wanted = getattr(flash_attn, name + "func")(*apart, *extra, *options)
    together = qkv.clone().requires_grad_()
    if packed == "qkvpacked":
        given: tuple[Any, ...] = (together, *extra[:1], *extra[2:3])
    else:
        given = (together.select(dim, 0), together.narrow(dim, 1, 2), *extra)
    got = getattr(flash_attn, name + packed + "_func")(*given, *options)
    for mine, theirs in zip(got[:2], wanted[:2], strict=True):
        assert torch.equal(mine, theirs)
    assert got[2] is wanted[2] is None
    (dout,) = draw(torch.float32, tuple(got[0].shape), seed=2)
    got[0].backward(dout)
    wanted[0].backward(dout)
    assert torch.equal(together.grad, torch.stack([t.grad for t in apart], dim))


# --- packed sequences ------------------------------------------------------------------------------------------------


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def block_mask(rows: list[int], keys: list[int], causal: bool, window: tuple[int, int]) -> Tensor:
    """bool [1, total_q, total_k]: each sequence's rows over its own keys."""
    mask = torch.zeros(sum(rows), sum(keys), dtype=torch.bool)
    for i, (a, b) in enumerate(zip(itertools.accumulate(rows), itertools.accumulate(keys), strict=True)):
        mask[a - rows[i] : a, b - keys[i] : b] = seen(rows[i], keys[i], causal, window)
    return mask[None]


PACKS = [
    ([7, 5, 9], [7, 5, 9]),
    ([3, 8, 1, 0], [9, 2, 1, 6]),
    ([4, 0, 0, 6], [0, 5, 0, 6]),
    ([12], [3]),
    ([0, 0], [4, 0]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "window"), WINDOWS)
@pytest.mark.parametrize(("rows", "keys"), PACKS)
def test_packed_sequences(rows, keys, causal, window, dtype):
    Hq, Hkv, D = 4, 2, 16
    total_q, total_k = sum(rows), sum(keys)
    x = draw(dtype, (1, total_q, Hq, D), (1, total_k, Hkv, D), (1, total_k, Hkv, D), (1, total_q, Hq, D))
    x.append(torch.randn(1, Hq, total_q, generator=torch.Generator().manual_seed(1)))
    q, k, v = (t[0].clone().requires_grad_() for t in x[:3])
    lengths = cu(rows), cu(keys), max(rows), max(keys)
    out, lse, probabilities = flash_attn.flash_attn_varlen_func(
        q, k, v, *lengths, causal=causal, window_size=window, return_attn_probs=True
    )
    assert probabilities is None
    torch.autograd.backward([out, lse], [x[3][0], x[4][0]])
    got = (out.detach(), lse.detach(), q.grad, k.grad, v.grad)
    mask = block_mask(rows, keys, causal, window)
    judge({name: part[None] for name, part in zip(PARTS, got, strict=True)}, x, mask, dtype)
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, k, v, *lengths, 0.0, None, causal, window), out)


def test_rows_past_the_last_sequence_see_nothing():
    q, k, v = (t.requires_grad_() for t in draw(torch.float32, (9, 2, 16), (9, 2, 16), (9, 2, 16)))
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, cu([3, 4]), cu([3, 4]), 4, 4, causal=True, return_attn_probs=True
    )
    wanted = flash_attn.flash_attn_varlen_func(q[:7], k[:7], v[:7], cu([3, 4]), cu([3, 4]), 4, 4, causal=True)
    torch.testing.assert_close(out[:7], wanted)
    assert not out[7:].any()
    assert (lse[:, 7:] == -torch.inf).all()
    out.sum().backward()
    for x in (q, k, v):
        assert not x.grad[7:].any()
        assert x.grad[:7].isfinite().all()


def test_lengths_changed_in_place_are_seen():
    q, k, v = draw(torch.float32, (8, 2, 16), (8, 2, 16), (8, 2, 16))
    lengths = cu([4, 4])
    first = flash_attn.flash_attn_varlen_func(q, k, v, lengths, lengths, 8, 8, causal=True)
    lengths[1] = 6
    second = flash_attn.flash_attn_varlen_func(q, k, v, lengths, lengths, 8, 8, causal=True)
    assert torch.equal(second, flash_attn.flash_attn_varlen_func(q, k, v, cu([6, 2]), cu([6, 2]), 8, 8, causal=True))
    assert not torch.equal(first, second)


def scattered(x: Tensor, lengths: list[int], page: int, blocks: int, table: Tensor) -> Tensor:
    """The packed keys [total, H, D] in pages, with NaN wherever no key is."""
    pages = torch.full((int(table.max()) + 2, page, *x.shape[1:]), torch.nan, dtype=x.dtype)
    for b, (stop, n) in enumerate(zip(itertools.accumulate(lengths), lengths, strict=True)):
        for j in range(n):
            pages[table[b, j // page], j % page] = x[stop - n + j]
    return pages


@pytest.mark.parametrize("page", [16, 24])
@pytest.mark.parametrize(("rows", "keys"), [([5, 0, 3], [40, 7, 0]), ([1, 1, 1], [33, 1, 16]), ([1, 0, 1], [5, 9, 48])])
@pytest.mark.parametrize(("causal", "window"), WINDOWS[:3])
def test_packed_sequences_over_pages(rows, keys, causal, window, page):
    blocks = 4
    g = torch.Generator().manual_seed(page)
    table = torch.randperm(3 * blocks, generator=g).view(3, blocks).int()
    x = draw(torch.float32, (1, sum(rows), 4, 16), (1, sum(keys), 2, 16), (1, sum(keys), 2, 16), (1, sum(rows), 4, 16))
    x.append(torch.zeros(1, 4, sum(rows)))
    k_pages, v_pages = (scattered(t[0], keys, page, blocks, table) for t in x[1:3])
    for b, n in enumerate(keys):  # past the end the table may hold anything
        table[b, -(-n // page) :] = -1
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        x[0][0], k_pages, v_pages, cu(rows), cu(keys), max(rows), max(keys), causal=causal, window_size=window,
        return_attn_probs=True, block_table=table,
    )  # fmt: skip
    judge({"out": out[None], "lse": lse[None]}, x, block_mask(rows, keys, causal, window), torch.float32)


def test_gradients_through_pages():
    rows, keys, page = [2, 3], [5, 20], 16
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    x = draw(torch.float32, (1, 5, 2, 16), (1, 25, 2, 16), (1, 25, 2, 16), (1, 5, 2, 16))
    x.append(torch.zeros(1, 2, 5))
    q = x[0][0].clone().requires_grad_()
    k_pages, v_pages = (scattered(t[0], keys, page, 2, table).nan_to_num(0).requires_grad_() for t in x[1:3])
    out = flash_attn.flash_attn_varlen_func(
        q, k_pages, v_pages, cu(rows), cu(keys), 3, 20, causal=True, block_table=table
    )
    out.backward(x[3][0])
    dk, dv = (
        torch.cat([grad[table.long()][b].flatten(0, 1)[:n] for b, n in enumerate(keys)])
        for grad in (k_pages.grad, v_pages.grad)
    )
    judge(
        {"dq": q.grad[None], "dk": dk[None], "dv": dv[None]}, x, block_mask(rows, keys, True, (-1, -1)), torch.float32
    )


# --- caches ----------------------------------------------------------------------------------------------------------


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: list[int], interleaved: bool) -> Tensor:
    """Rotary embedding of x [S, H, D] pair by pair, in fp64."""
    x = x.double().clone()
    half = cos.shape[1]
    for i, p in enumerate(positions):
        for d in range(half):
            a, b = (2 * d, 2 * d + 1) if interleaved else (d, d + half)
            c, s = cos[p, d].double(), sin[p, d].double()
            x[i, :, a], x[i, :, b] = (x[i, :, a] * c - x[i, :, b] * s).clone(), (x[i, :, a] * s + x[i, :, b] * c)
    return x


class Cache:
    """A cache of known content with NaN where nothing was written, plain or in pages, and what is to be appended."""

    def __init__(
        self, *, lengths: list[int], new: int, Sq: int, page: int | None = None, capacity: int = 64,
        leftpad: bool = False, rows: list[int] | None = None, dtype: torch.dtype = torch.float32, Hq: int = 4,
        Hkv: int = 2, D: int = 16,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(capacity + new + Sq)
        B = len(lengths)
        self.lengths, self.new, self.page, self.capacity = lengths, new, page, capacity
        self.q = torch.randn(B, Sq, Hq, D, generator=g).to(dtype)
        self.k, self.v = (torch.randn(B, new, Hkv, D, generator=g).to(dtype) for _ in "kv")
        self.leftpad = [n // 3 for n in lengths] if leftpad else [0] * B
        self.rows = rows or list(range(B))
        shape = (max(self.rows) + 2 if rows else B, capacity, Hkv, D)
        if page is not None:
            blocks = capacity // page
            self.table = torch.randperm(B * blocks + 1, generator=g)[: B * blocks].view(B, blocks).int()
            shape = (B * blocks + 1, page, Hkv, D)
        self.k_cache, self.v_cache = (torch.full(shape, torch.nan, dtype=dtype) for _ in "kv")
        self.content = {}
        for name, cache in (("k", self.k_cache), ("v", self.v_cache)):
            self.content[name] = [torch.randn(n, Hkv, D, generator=g).to(dtype) for n in lengths]
            for b, known in enumerate(self.content[name]):
                for j in range(self.leftpad[b], lengths[b]):
                    cache[self.place(b, j)] = known[j]
        self.before = self.k_cache.clone(), self.v_cache.clone()

    def place(self, b: int, j: int) -> tuple[int, int]:
        """Where key j of sequence b lies."""
        if self.page is None:
            return self.rows[b], j
        return int(self.table[b, j // self.page]), j % self.page

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32)}
        if any(self.leftpad):
            options["cache_leftpad"] = torch.tensor(self.leftpad, dtype=torch.int32)
        if self.page is not None:
            options["block_table"] = self.table
        elif self.rows != list(range(len(self.lengths))):
            options["cache_batch_idx"] = torch.tensor(self.rows, dtype=torch.int32)
        if self.new:
            options |= {"k": self.k.clone(), "v": self.v.clone()}
        return options

    def check(self, causal: bool = False, window: tuple[int, int] = (-1, -1), **options: Any) -> None:
        """Call, and compare the result, and every key in the cache, with what should be."""
        given = self.options() | options
        out, lse = flash_attn.flash_attn_with_kvcache(
            self.q, self.k_cache, self.v_cache, causal=causal, window_size=window, return_softmax_lse=True, **given
        )
        cos, sin, interleaved = (options.get(n) for n in ("rotary_cos", "rotary_sin", "rotary_interleaved"))
        dtype, Sq = self.q.dtype, self.q.shape[1]
        wanted = [x.clone() for x in self.before]
        for b, n in enumerate(self.lengths):
            q, k = self.q[b], self.k[b]
            if cos is not None:
                local = causal or window != (-1, -1)
                q = turned(q, cos, sin, [n + i if local else n for i in range(Sq)], interleaved is not False)
                k = turned(k, cos, sin, [n + i for i in range(self.new)], interleaved is not False)
            for j in range(self.new):
                wanted[0][self.place(b, n + j)] = k[j].to(dtype)
                wanted[1][self.place(b, n + j)] = self.v[b, j]
            left = self.leftpad[b]
            keys, values = (
                torch.cat([self.content[name][b], new.to(dtype)])[None, left:]
                for name, new in (("k", k), ("v", self.v[b]))
            )
            mask = seen(Sq, n + self.new, causal, window)[None, :, left:]
            x = [q.to(dtype)[None], keys, values, torch.zeros_like(self.q[b : b + 1]), torch.zeros_like(lse[b : b + 1])]
            judge({"out": out[b : b + 1], "lse": lse[b : b + 1]}, x, mask, dtype, **options)
        for got, want in zip((self.k_cache, self.v_cache), wanted, strict=True):
            torch.testing.assert_close(
                got, want, equal_nan=True, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5
            )


LAYOUTS = [
    {},
    {"page": 16},
    {"page": 24, "capacity": 72},
    {"capacity": 50},
    {"rows": [3, 0, 2]},
    {"leftpad": True},
    {"leftpad": True, "page": 32},
]


@pytest.mark.parametrize("Sq", [1, 5, 20])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_caches(layout, Sq):
    for new, (causal, window) in zip((0, Sq, 3, 1), (WINDOWS[0], WINDOWS[1], WINDOWS[2], WINDOWS[4]), strict=True):
        Cache(lengths=[9, 0, 27], new=new, Sq=Sq, **layout).check(causal, window)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("causal", "window"), [WINDOWS[0], WINDOWS[1], WINDOWS[4]])
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_rotary_embedding(interleaved, causal, window, rotary_dim):
    cache = Cache(lengths=[4, 0, 11], new=3, Sq=3, page=16)
    angles = torch.rand(64, rotary_dim // 2, generator=torch.Generator().manual_seed(5)) * 6
    cache.check(causal, window, rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=interleaved)


def test_options_of_caches():
    Cache(lengths=[20, 3], new=2, Sq=2).check(True, softcap=2.0, softmax_scale=0.7, num_splits=3)
    Cache(lengths=[20, 3], new=2, Sq=2, dtype=torch.bfloat16, Hq=8, Hkv=1).check(True)
    angles = torch.rand(64, 8) * 6
    Cache(lengths=[5, 6], new=4, Sq=4, dtype=torch.bfloat16, leftpad=True).check(
        True, rotary_cos=angles.cos().bfloat16(), rotary_sin=angles.sin().bfloat16()
    )


@pytest.mark.parametrize("Sq", [2, 20])
def test_one_length_for_all_and_none(Sq):
    cache = Cache(lengths=[30, 30], new=2, Sq=Sq)
    cache.check(True, cache_seqlens=30)
    for layout in ({"rows": [2, 0]}, {"leftpad": True}, {"page": 16}):
        Cache(lengths=[30, 30], new=2, Sq=Sq, **layout).check(True, cache_seqlens=30)
    full = Cache(lengths=[64, 64], new=0, Sq=Sq)
    full.check(True, cache_seqlens=None)


def test_a_strided_cache_is_updated_in_place():
    """Keys and values in one tensor, and a cache that is the middle of a larger one."""
    both = torch.randn(2, 64, 2, 2, 16)
    k_cache, v_cache = both[:, 8:56].unbind(2)
    outside = both.clone()
    q, k, v = torch.randn(3, 2, 1, 2, 16)
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=10, causal=True)
    again = flash_attn.flash_attn_with_kvcache(
        q, k_cache.contiguous(), v_cache.contiguous(), cache_seqlens=11, causal=True
    )
    torch.testing.assert_close(out, again)
    outside[:, 18, 0], outside[:, 18, 1] = k[:, 0], v[:, 0]
    assert torch.equal(both, outside)


# --- refusals --------------------------------------------------------------------------------------------------------


def call(name: str, **options: Any) -> Any:
    q, k, v = draw(torch.float32, (2, 4, 4, 16), (2, 4, 2, 16), (2, 4, 2, 16))
    given: dict[str, Any] = {"q": q, "k": k, "v": v}
    if "varlen" in name:
        given = {n: t.flatten(0, 1) for n, t in given.items()}
        given |= {"cu_seqlens_q": cu([3, 5]), "cu_seqlens_k": cu([4, 4]), "max_seqlen_q": 5, "max_seqlen_k": 4}
    if "kvcache" in name:
        given |= {"k_cache": torch.randn(2, 32, 2, 16), "v_cache": torch.randn(2, 32, 2, 16), "cache_seqlens": 3}
    return getattr(flash_attn, name)(**(given | options))


CACHE, VARLEN = "flash_attn_with_kvcache", "flash_attn_varlen_func"
TABLE = torch.tensor([[0], [1]], dtype=torch.int32)
ANGLES = torch.zeros(32, 8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flash_attn_func", {"causal": 2}, "^causal: wanted True or False, got 2"),
        ("flash_attn_func", {"deterministic": "no"}, "^deterministic: wanted True or False, got 'no'"),
        ("flash_attn_func", {"return_attn_probs": "no"}, "^return_attn_probs: wanted True or False"),
        (VARLEN, {"causal": "no"}, "^causal: wanted True or False"),
        (VARLEN, {"deterministic": None}, "^deterministic: wanted True or False, got None"),
        (VARLEN, {"return_attn_probs": 0.5}, "^return_attn_probs: wanted True or False"),
        (CACHE, {"rotary_interleaved": "no"}, "^rotary_interleaved: wanted True or False"),
        (CACHE, {"return_softmax_lse": "no"}, "^return_softmax_lse: wanted True or False"),
        ("flash_attn_func", {"window_size": (3, -2)}, "^window_size: wanted -1"),
        ("flash_attn_func", {"window_size": 3}, "^window_size: wanted"),
        ("flash_attn_func", {"q": torch.randn(4, 4, 16)}, "^q: wanted"),
        ("flash_attn_func", {"k": None}, "^k: wanted a Tensor"),
        ("flash_attn_func", {"softcap": -1.0}, "^softcap: wanted"),
        (VARLEN, {"cu_seqlens_q": cu([3, 5]).long()}, "^cu_seqlens_q: wanted torch.int32"),
        (VARLEN, {"cu_seqlens_q": cu([3, 6])}, "^cu_seqlens_q: wanted at most the 8 rows"),
        (VARLEN, {"cu_seqlens_k": cu([8])}, "^cu_seqlens_k: wanted cu_seqlens_q's 3"),
        (VARLEN, {"cu_seqlens_k": cu([5, -1])}, "^cu_seqlens_k: wanted 0 first"),
        (VARLEN, {"max_seqlen_q": 4}, "^max_seqlen_q: wanted at least"),
        (VARLEN, {"max_seqlen_k": 4.0}, "^max_seqlen_k: wanted an integer"),
        (VARLEN, {"block_table": TABLE, "k": torch.randn(2, 16, 2, 16)}, "^v: wanted"),
        (CACHE, {"v": None}, "^v: wanted a Tensor beside k"),
        (CACHE, {"k": torch.randn(2, 3, 2, 16)}, "^v: wanted shape"),
        (CACHE, {"cache_seqlens": None}, "^cache_seqlens: wanted it beside k and v"),
        (CACHE, {"cache_seqlens": 29}, "^cache_seqlens: wanted 0 to 32 - 4"),
        (CACHE, {"cache_seqlens": True}, "^cache_seqlens: wanted"),
        (CACHE, {"cache_seqlens": torch.tensor([3, 29])}, "^cache_seqlens: wanted at most"),
        (CACHE, {"cache_seqlens": torch.tensor([3])}, "^cache_seqlens: wanted torch.int32"),
        (CACHE, {"cache_seqlens": torch.tensor([3, -1])}, "^cache_seqlens: wanted at least 0"),
        (CACHE, {"cache_leftpad": torch.tensor([8, 1])}, "^cache_leftpad: wanted"),
        (CACHE, {"cache_batch_idx": torch.tensor([0, 2])}, "^cache_batch_idx: wanted"),
        (CACHE, {"cache_batch_idx": torch.tensor([0, 1]), "block_table": TABLE}, "^cache_batch_idx: wanted None"),
        (CACHE, {"block_table": TABLE + 1}, "^block_table: wanted pages"),
        (CACHE, {"block_table": TABLE.long()}, "^block_table: wanted torch.int32"),
        (CACHE, {"k_cache": torch.randn(3, 32, 2, 16), "v_cache": torch.randn(3, 32, 2, 16)}, "^k_cache: wanted q's"),
        (CACHE, {"v_cache": torch.randn(2, 31, 2, 16)}, "^v_cache: wanted k_cache's shape"),
        (CACHE, {"v_cache": torch.randn(2, 32, 2, 16).bfloat16()}, "^v_cache: wanted q's"),
        (CACHE, {"q": torch.randn(2, 4, 3, 16)}, "^q: wanted k_cache's head_dim"),
        (CACHE, {"rotary_cos": ANGLES}, "^rotary_sin: wanted a Tensor"),
        (CACHE, {"rotary_cos": ANGLES[:31], "rotary_sin": ANGLES[:31]}, "^rotary_cos: wanted a row for each"),
        (CACHE, {"rotary_cos": ANGLES, "rotary_sin": ANGLES, "k": None, "v": None}, "^rotary_cos: wanted None"),
        (CACHE, {"num_splits": -1}, "^num_splits: wanted"),
        (CACHE, {"softcap": -1.0}, "^softcap: wanted"),
        (CACHE, {"q": torch.randn(2, 4, 4, 16, requires_grad=True)}, "^q: wanted no requires_grad"),
    ],
)
def test_wrong_arguments_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        call(name, **options)


@pytest.mark.parametrize(("on", "off"), [(1, 0), (np.True_, np.False_)])
def test_flags_may_be_numbers_and_numpys_as_flash_attns(on, off):
    q, k, v = torch.randn(3, 1, 4, 2, 16)
    causal = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, causal=on, deterministic=on, return_attn_probs=off), causal)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=off, deterministic=off, return_attn_probs=on)
    assert torch.equal(out, flash_attn.flash_attn_func(q, k, v))
    assert lse.shape == (1, 2, 4)


def test_nothing_is_written_before_an_argument_is_refused():
    cache = torch.zeros(2, 32, 2, 16)
    for wrong in ({"softcap": -1.0}, {"window_size": 4}, {"cache_leftpad": torch.tensor([40, 0])}):
        with pytest.raises(ValueError, match="wanted"):
            call(CACHE, k_cache=cache, v_cache=cache, **wrong)
    assert not cache.any()


# --- Recent ----------------------------------------------------------------------------------------------------------


def test_recent_makes_again_what_changed_or_fell_out(monkeypatch):
    made: list[int] = []

    def make() -> int:
        made.append(0)
        return len(made)

    recent: Recent[int] = Recent(2)
    cpu = torch.device("cpu")
    x, y = torch.zeros(2), torch.zeros(2)
    assert recent.get((x, y), 1, cpu, make) == recent.get((x, y), 1, cpu, make) == 1
    assert recent.get((y, x), 1, cpu, make) == 2
    x.add_(1)
    assert recent.get((x, y), 1, cpu, make) == 3
    assert recent.get((x, y), 2, cpu, make) == 4
    assert recent.get((y, x), 1, cpu, make) == 5
    for number in range(6, 12):  # tensors that take each other's place in memory
        assert recent.get((torch.zeros(2),), 1, cpu, make) == number
    with torch.inference_mode():
        z = torch.zeros(2)
    assert recent.get((z,), 1, cpu, make) != recent.get((z,), 1, cpu, make)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert recent.get((), 3, cpu, make) != recent.get((), 3, cpu, make)
