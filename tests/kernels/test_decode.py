"""Decode on the CPU: all implementations keep tests/kernels/decode_contract.py; what the door refuses; the dealing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfa3_kernels import Partial, Unsupported, Visible, aten, attend, decode, dispatch, merge, portable
from ringfa3_kernels.portable import configs, decode_launch
from ringfa3_kernels.portable.decode import deal
from tests.kernels.decode_contract import CASES, Case, Inputs, check
from tests.kernels.test_door import call

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTERPRETED = (torch.float16, torch.float64)  # the second is refused, as is bfloat16
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run on the GPU: tests/gpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sequences of 50 keys have several blocks."""
    monkeypatch.setattr(aten, "KEYS", 16)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        pytest.param(impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}")
        for impl in ("portable", "aten", "reference")
        for dtype in (INTERPRETED if impl == "portable" else DTYPES)
    ],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(impl: str, case: Case, dtype: torch.dtype, generator: torch.Generator) -> None:
    if impl == "portable" and torch.cuda.is_available():
        pytest.skip("portable runs on the GPU of this machine: tests/gpu/test_decode_gpu.py")
    check(impl, case, dtype, "cpu", generator)


@on_cpu
@pytest.mark.parametrize("name", ["window", "8 tokens"])
def test_portable_in_fp32(name: str, generator: torch.Generator) -> None:
    (case,) = (case for case in CASES if case.name == name)
    check("portable", case, torch.float32, "cpu", generator)


@on_cpu
def test_bfloat16_is_refused_in_the_interpreter() -> None:
    x = torch.zeros(1, 16, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match=r"portable: .*bfloat16"):
        decode(x[:, :1], x, x, TABLE[:1, :1], Visible.full(1, 16), impl="portable")


@pytest.mark.parametrize("impl", ["aten", "reference", pytest.param("portable", marks=on_cpu)])
def test_one_row_of_bounds_serves_all_sequences(impl: str, generator: torch.Generator) -> None:
    case = Case("", (40, 40, 40), Sq=2, Hq=4, Hkv=2)
    x = Inputs.draw(case, torch.float32, "cpu", generator)
    one = Visible(x.visible.lo[0], x.visible.hi[0])
    wanted = x.decode(impl, 3)
    found = decode(x.q, x.k_pages, x.v_pages, x.block_table, one, splits=3, impl=impl)
    assert torch.equal(found.out, wanted.out)
    assert torch.equal(found.lse, wanted.lse)


@pytest.mark.parametrize("impl", ["aten", "reference", pytest.param("portable", marks=on_cpu)])
def test_ranks_that_each_hold_some_keys_merge_to_what_one_holds(impl: str, generator: torch.Generator) -> None:
    """Each of three ranks has every third key of a sequence in its pages."""
    q, k, v = (torch.randn(1, S, 2, 16, generator=generator) for S in (1, 60, 60))
    partial = Partial.empty(q)
    for rank in range(3):
        mine = [x[0, rank::3].unflatten(0, (-1, 20)) for x in (k, v)]
        pages = [torch.cat([x, torch.full((1, 12, 2, 16), torch.nan)[:, :12]], 1) for x in mine]
        found = decode(q, *pages, torch.zeros(1, 1, dtype=torch.int32), Visible(BOUND * 0, BOUND * 20), impl=impl)
        partial = merge(partial, found)
    wanted = attend(q, k, v, impl="reference")
    torch.testing.assert_close(partial.out, wanted.out)
    torch.testing.assert_close(partial.lse, wanted.lse)


@triton.jit
def deal_kernel(lo, hi, out, B, Sq, shares, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    b = tl.arange(0, BLOCK_B)
    pieces, _, _ = deal(lo, hi, B, Sq, 1, shares, BLOCK_B, BLOCK_N)
    tl.store(out + b, pieces)


@on_cpu
@settings(max_examples=60)
@given(
    st.lists(st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 5000)), min_size=1, max_size=20),
    st.integers(1, 40),
)
def test_a_sequence_gets_pieces_by_its_length_and_all_fit_the_slots(lengths: list[int], shares: int) -> None:
    hi = torch.tensor(lengths, dtype=torch.int32)[:, None]
    dealt = torch.full((32,), -1, dtype=torch.int32)
    deal_kernel[(1,)](torch.zeros_like(hi), hi, dealt, len(lengths), 1, shares, BLOCK_B=32, BLOCK_N=16)
    pieces, tiles = dealt[: len(lengths)].tolist(), [-(-length // 16) for length in lengths]
    assert not dealt[len(lengths) :].any()
    assert sum(pieces) <= shares + len(lengths) - 1
    for n, own in zip(pieces, tiles, strict=True):
        assert min(own, 1) <= n <= own
        if own:  # no piece is longer than one and a half shares, and a tile
            assert -(-own // n) <= 1.5 * -(-sum(tiles) // shares) + 1
    if len(lengths) == 1:
        assert pieces[0] == tiles[0] or pieces[0] * 2 > min(shares, tiles[0])


def test_shares_are_as_many_as_run_at_once_but_have_a_tile_each() -> None:
    assert decode_launch.choose_shares(1, heads=8, tiles=10_000, resident=396) == 49
    assert decode_launch.choose_shares(3, heads=8, tiles=5, resident=396) == 5
    assert decode_launch.choose_shares(1, heads=512, tiles=10_000, resident=396) == 1
    assert decode_launch.choose_shares(1000, heads=1, tiles=10_000, resident=396) == 1


def test_every_head_dim_has_a_config_on_every_device() -> None:
    for capability in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)):
        for head_dim in range(8, 257, 8):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for rows in (1, 16, 17, 64, 500):
                    config = configs.pick_decode(head_dim, dtype, capability, rows)
                    assert 16 <= decode_launch.rows_of_tile(config, rows) <= config.block_m
                    held = 2 * config.block_n * configs.padded(head_dim) * dtype.itemsize * (config.num_stages - 1)
                    assert held < configs.SHARED[configs.family(capability)]


Q = torch.ones(2, 3, 4, 16)
PAGES = torch.ones(5, 16, 2, 16)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
BOUND = torch.ones(1, 1, dtype=torch.int32)
SEEN = Visible.full(3, 48)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": None}, "q: wanted a Tensor, got NoneType"),
        ({"k_pages": PAGES[0]}, r"k_pages: wanted 4 dimensions \[P, page, H, D\], got shape \[16, 2, 16\]"),
        ({"q": Q.int()}, "q: wanted dtype .*, got torch.int32"),
        ({"v_pages": PAGES[1:]}, r"v_pages: wanted k_pages' shape \[5, 16, 2, 16\], got \[4, 16, 2, 16\]"),
        ({"v_pages": PAGES.half()}, "v_pages: wanted q's dtype torch.float32, got torch.float16"),
        ({"k_pages": PAGES.to("meta")}, "k_pages: wanted q's device cpu, got meta"),
        ({"k_pages": PAGES[..., :8], "v_pages": PAGES[..., :8]}, "k_pages: wanted q's head_dim 16, got 8"),
        ({"v_pages": PAGES.transpose(1, 3)}, r"v_pages: wanted head_dim contiguous, got strides \(512, 1, 16, 32\)"),
        ({"k_pages": PAGES[:, :0], "v_pages": PAGES[:, :0]}, "k_pages: wanted at least one key a page"),
        ({"k_pages": PAGES[:, :, :0], "v_pages": PAGES[:, :, :0]}, "k_pages: wanted at least one .* head"),
        ({"q": Q[:, :, :3]}, "q: wanted a number of heads that is a multiple of k_pages' 2, got 3"),
        ({"q": Q[..., :4], "k_pages": PAGES[..., :4], "v_pages": PAGES[..., :4]}, "q: wanted a head_dim .*, got 4"),
        ({"q": Q.repeat(1, 6, 1, 1)}, "q: wanted at most 16 rows a sequence, got 18"),
        ({"q": Q.clone().requires_grad_()}, "q: wanted no requires_grad"),
        ({"v_pages": PAGES.clone().requires_grad_()}, "v_pages: wanted no requires_grad"),
        ({"block_table": None}, "block_table: wanted a Tensor, got NoneType"),
        ({"block_table": TABLE[:1]}, r"block_table: wanted shape \[2, blocks\], got \[1, 3\]"),
        ({"block_table": TABLE[0]}, r"block_table: wanted shape \[2, blocks\], got \[3\]"),
        ({"block_table": TABLE.long()}, "block_table: wanted torch.int32 on cpu, got torch.int64 on cpu"),
        (
            {"block_table": TABLE - 1},
            r"block_table: wanted numbers in \[0, 5\) for keys 0..47 of sequence 0, got -1..-1",
        ),
        ({"block_table": TABLE + 5}, r"block_table: wanted numbers in \[0, 5\) .*, got 5..5"),
        ({"block_table": TABLE[:, :2]}, r"Visible hi: wanted values in \[0, 32\], got 48..48"),
        ({"visible": None}, "visible: wanted a Visible, got NoneType"),
        ({"visible": "causal"}, "visible: wanted a Visible or None, got str"),
        ({"visible": Visible.full(2, 48)}, r"visible: wanted bounds \[3\] or \[2, 3\], got \[2\]"),
        ({"softcap": -1.0}, "softcap: wanted"),
        ({"scale": float("nan")}, "scale: wanted a finite number"),
        ({"splits": 0}, "splits: wanted None or a whole number from 1 to 1024, got 0"),
        ({"splits": 1.5}, "splits: wanted None or a whole number from 1 to 1024, got 1.5"),
        ({"splits": True}, "splits: wanted None or a whole number from 1 to 1024, got True"),
        ({"impl": "magic"}, "impl: wanted 'auto' or one of"),
    ],
    ids=str,
)
def test_decode_refuses(changed: dict[str, Any], message: str) -> None:
    arguments = {"q": Q, "k_pages": PAGES, "v_pages": PAGES, "block_table": TABLE, "visible": SEEN, **changed}
    with pytest.raises(ValueError, match=message):
        decode(**arguments)


@pytest.mark.parametrize("impl", ["auto", "aten", "reference"])
@pytest.mark.parametrize(("rows", "blocks"), [(0, 3), (3, 0)])
def test_nothing_is_asked_and_nothing_happens(rows: int, blocks: int, impl: str) -> None:
    found = decode(Q[:, :rows], PAGES, PAGES, TABLE[:, :blocks], Visible.full(rows, blocks * 16), impl=impl)
    assert found.out.shape == (2, rows, 4, 16)
    assert not found.out.any()
    assert (found.lse == -torch.inf).all()


def test_auto_takes_aten_on_the_cpu_and_portable_on_a_gpu() -> None:
    asked = {"direction": "decode", "page": 64, "dtype": torch.bfloat16}
    assert dispatch.choose(call(**asked)).NAME == "aten"
    on_gpu = call(**asked, device="cuda", capability=(9, 0))
    assert dispatch.why_not("hopper", on_gpu) == "it has no decode"
    if torch.cuda.is_available():
        assert dispatch.choose(on_gpu).NAME == "portable"


def test_portable_says_which_pages_it_takes() -> None:
    asked = {"direction": "decode", "dtype": torch.float16}
    assert portable.unsupported(call(**asked, page=16)) is None or torch.cuda.is_available()
    for page in (8, 48):
        assert f"got {page}" in (portable.unsupported(call(**asked, page=page)) or "")
