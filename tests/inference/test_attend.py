"""Attention over the ranks' pages equals plain attention over the whole sequence, however it was cached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringfa3 import Mask
from ringfa3.cost.machine import Link, Machine
from ringfa3.inference.attend import Decode, Prefill, joined
from ringfa3.inference.cache import PagedCache
from ringfa3.inference.chunk import Chunk, _runs, cheaper
from ringfa3.inference.newest import Form, Newest
from ringfa3.inference.pages import Pages
from ringfa3.inference.ranks import Ranks

HQ, HKV, D, PAGE = 6, 2, 16, 4
MASKS = (Mask(), Mask(window=(9, 0)), Mask(window=(2, 0)), Mask(chunk=8))
TURNS = ((23, 1, 40), (2, 3, 1, 30), (1, 64), (17, 16, 15), (5, 1, 1, 1, 50))  # lengths of successive chunks


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float, sinks: Tensor | None, start: int) -> Tensor:
    """Attention by its definition in the inputs' dtype, softmax in fp32 or wider: the last rows of a sequence.

    q [n, Hq, D] from position `start` on; k, v [S, Hkv, D].
    """
    S = k.shape[0]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k)
    s = s.to(torch.promote_types(s.dtype, torch.float32)) * 0.3
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    lo, hi = (torch.from_numpy(x)[:, None] for x in mask.bounds(np.arange(start, start + q.shape[0]), S))
    j = torch.arange(S)
    s = s.masked_fill(~((j >= lo) & (j < hi)), -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(-1, s.shape[1], 1)], -1)
    p = s.softmax(-1)[..., :S]
    return torch.einsum("hij,jhd->ihd", p.to(q.dtype), v)


class Session:
    """Sequences of random q, k, v, alike on all ranks, and this rank's cache of them, for every mask a layer."""

    def __init__(self, rank: int, size: int, dtype: torch.dtype, way: str = "auto", seed: int = 0) -> None:
        self.ranks, self.way, self.dtype = Ranks(None, size, rank), way, dtype
        self.pages = Pages(size, 96, PAGE)
        self.cache = PagedCache(
            layers=len(MASKS), kv_heads=HKV, head_dim=D, pages=96, page_size=PAGE, dtype=dtype, device="cpu"
        )
        for x in (self.cache.k, self.cache.v):
            x.fill_(torch.nan)  # what was never written must not matter
        self.source = torch.Generator().manual_seed(seed)
        self.sinks = torch.randn(HQ, generator=self.source)
        self.whole: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def draw(self, sequence: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [n, H, D] of the sequence's next tokens."""
        new = tuple(torch.randn(count, h, D, generator=self.source).to(self.dtype) for h in (HQ, HKV, HKV))
        if sequence not in self.whole:
            self.pages.create(sequence)
            self.whole[sequence] = tuple(x[:0] for x in new)  # type: ignore[assignment]
        self.whole[sequence] = tuple(torch.cat(pair) for pair in zip(self.whole[sequence], new, strict=True))  # type: ignore[assignment]
        return new  # type: ignore[return-value]

    def judge(self, got: Tensor, sequence: int, positions: Any, mask: Mask, softcap: float, sinks: Any) -> None:
        """The error rule: at most twice that of plain attention in this dtype, both against fp64."""
        if not len(positions):
            return
        q, k, v = (x[: int(positions[-1]) + 1] for x in self.whole[sequence])
        truth = plain(q.double(), k.double(), v.double(), mask, softcap, sinks, 0)[positions]
        yardstick = plain(q, k, v, mask, softcap, sinks, 0)[positions]
        error, usual = ((x.double() - truth).square().mean().sqrt() for x in (got, yardstick))
        assert error <= 2 * usual + 1e-7, (float(error), float(usual), mask, softcap)

    def options(self, layer: int) -> tuple[float, Any]:
        """softcap and sinks of a layer."""
        return (1.5 if layer % 2 else 0.0), (self.sinks if layer >= 2 else None)

    def prefill(self, sequence: int, count: int) -> list[str]:
        """Append a chunk and check all layers; what travelled in each."""
        qkv = self.draw(sequence, count)
        placed = self.pages.append(sequence, count)
        mine = placed.positions[self.ranks.rank]
        step = Prefill(self.cache, self.pages, sequence, placed, self.ranks, way=self.way)
        q, k, v = (x[mine - placed.start][None] for x in qkv)
        q, k, v = (torch.cat([x, x.new_full((1, 1, *x.shape[2:]), torch.nan)], 1) for x in (q, k, v))  # one to ignore
        for layer, mask in enumerate(MASKS):
            softcap, sinks = self.options(layer)
            step.write(layer, k, v)
            out = step.attend(layer, q, mask, scale=0.3, softcap=softcap, sinks=sinks)
            assert out.shape == q.shape
            assert not out[:, step.rows :].any()
            self.judge(out[0, : step.rows], sequence, mine, mask, softcap, sinks)
        return [step.way(mask, HQ) for mask in MASKS]

    def decode(self, sequences: list[int], count: int, *, padded: bool = False) -> Tensor:
        """Append tokens to each and check all layers; the outputs [layers, B, n, Hq, D]."""
        drawn = [self.draw(sequence, count) for sequence in sequences]
        placed = self.pages.append_all(dict.fromkeys(sequences, count))
        newest = Newest.of(self.pages, placed, MASKS, self.ranks.rank, self.cache.scratch)
        form = Form.of(newest, padded=padded)
        ids = np.zeros(newest.positions.shape, np.int64)
        step = Decode(self.cache, self.ranks, form.unpack(form.pack(ids, newest, self.cache.scratch)))
        q, k, v = (torch.stack(x) for x in zip(*drawn, strict=True))
        q, k, v = (torch.cat([x, x.new_full((form.batch - len(x), *x.shape[1:]), torch.inf)]) for x in (q, k, v))
        outs = []
        for layer, mask in enumerate(MASKS):
            softcap, sinks = self.options(layer)
            step.write(layer, k, v)
            out = step.attend(layer, q, mask, scale=0.3, softcap=softcap, sinks=sinks)
            assert not out[len(sequences) :].any()
            for b, sequence in enumerate(sequences):
                self.judge(out[b], sequence, newest.positions[b], mask, softcap, sinks)
            outs.append(out[: len(sequences)])
        return torch.stack(outs)


def turns(rank: int, size: int, way: str, dtype: torch.dtype) -> list[list[str]]:
    session = Session(rank, size, dtype, way)
    return [session.prefill(number, count) for number, chunks in enumerate(TURNS) for count in chunks]


@pytest.mark.parametrize("way", ["pass-kv", "pass-q"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_turn_is_exact(world: Any, size: int, way: str) -> None:
    for ways in world(size)(turns, way, torch.float32):
        assert {way} == {each for turn in ways for each in turn}


def test_bf16_and_the_choice_is_alike_on_all_ranks(world: Any) -> None:
    first, *others = world(3)(turns, "auto", torch.bfloat16)
    assert all(other == first for other in others)


def test_one_rank_alone() -> None:
    turns(0, 1, "auto", torch.float32)


def generation(rank: int, size: int) -> Tensor:
    """Prefills of different lengths, then decode steps of 1, 8 and 3 tokens between further turns."""
    session = Session(rank, size, torch.float32, seed=size)
    for sequence, count in ((4, 37), (9, 1), (2, 2), (7, 12), (11, 50)):
        session.prefill(sequence, count)
    outs = [session.decode([4, 9, 2, 7, 11], 1), session.decode([11, 2], 8)]
    session.prefill(2, 21)
    outs += [session.decode([2, 9, 4], 3, padded=True), session.decode([9], 1), session.decode([13, 9], 1)]  # 13 is new
    return torch.cat([out.flatten() for out in outs])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_decode_is_exact_and_equal_on_all_ranks(world: Any, size: int) -> None:
    first, *others = world(size)(generation)
    assert all(torch.equal(first, other) for other in others)


def test_decode_alone() -> None:
    generation(0, 1)


@pytest.mark.parametrize("sinks", [False, True])
def test_joined(sinks: bool) -> None:
    """Partials of which some have seen nothing in some rows, and none anything in others."""
    partials, logits = torch.randn(3, 4, 2, 5, 9), torch.randn(5) if sinks else None
    for empty in (partials[:, 0], partials[1:, 1], partials[0, 2]):
        empty[..., :-1], empty[..., -1] = 0, -torch.inf
    out, lse = partials[..., :-1].double(), partials[..., -1].double()
    weights = lse.exp()
    total = weights.sum(0) + (0 if logits is None else logits.double().exp())
    wanted = (out * weights[..., None]).sum(0) / torch.where(total == 0, 1, total)[..., None]
    torch.testing.assert_close(joined(partials, logits).double(), wanted, rtol=1e-5, atol=1e-6)
    assert not joined(partials, logits)[0].any()
    assert joined(torch.full((2, 1, 1, 1, 9), torch.nan), None).isnan().all()  # hides no NaN


CHUNKS = st.lists(st.integers(1, 30), min_size=1, max_size=5)
MASK = st.one_of(
    st.just(Mask()),
    st.integers(0, 12).map(lambda n: Mask(window=(n, 0))),
    st.integers(1, 12).map(lambda n: Mask(chunk=n)),
)


def placed_chunks(world: int, sequence: int, chunks: list[int], mask: Mask) -> tuple[Pages, Chunk, int]:
    """Pages after some chunks, and the last one as `Chunk`, with its start."""
    pages = Pages(world, 64, PAGE)
    pages.create(sequence)
    for count in chunks:
        placed = pages.append(sequence, count)
    return pages, Chunk.of(pages, sequence, placed, mask), placed.start


@settings(max_examples=150)
@given(world=st.integers(1, 5), sequence=st.integers(0, 7), chunks=CHUNKS, mask=MASK)
def test_a_chunk_paints_its_mask_once(world: int, sequence: int, chunks: list[int], mask: Mask) -> None:
    """Hops of pass-KV and rows of pass-Q show each row exactly what the mask does."""
    pages, chunk, start = placed_chunks(world, sequence, chunks, mask)
    total = start + chunks[-1]
    lo, hi = mask.bounds(np.arange(start, total), total)
    j = np.arange(total)
    wanted = (j >= lo[:, None]) & (j < hi[:, None])
    pass_kv, pass_q = (np.zeros(wanted.shape, int) for _ in range(2))
    for rank in range(world):
        ranks = Ranks(None, world, rank)
        plan = chunk.plan(ranks, torch.device("cpu"))
        rows = plan.positions.numpy() - start
        for hop in plan.hops:
            size = hop.keys.stop - hop.keys.start
            hop.visible.check(size)
            held = pages.positions(hop.source, sequence)[chunk.skipped[hop.source] :][hop.keys]
            pass_kv[np.ix_(rows, held)] += hop.visible.mask(size).numpy()
        local = chunk.local(rank, torch.device("cpu"))
        if local is not None:
            keys, visible = local
            visible.check(keys.stop - keys.start)
            held = pages.positions(rank, sequence)[chunk.skipped[rank] :][keys]
            pass_q[:, held] += visible.mask(keys.stop - keys.start).numpy()
        assert chunk.skipped[rank] % PAGE == 0
        assert chunk.keys.lengths[rank] == pages.local_length(rank, sequence) - chunk.skipped[rank]
    assert (pass_kv == wanted).all()
    assert (pass_q == wanted).all()


def test_pages_before_a_window_are_not_read() -> None:
    pages, chunk, _ = placed_chunks(2, 0, [40, 30, 20], Mask(window=(3, 0)))
    assert min(chunk.skipped) >= 28
    assert max(chunk.keys.lengths) <= 20 // 2 + 2 * PAGE
    assert sum(chunk.keys.lengths) == pages.length(0) - sum(chunk.skipped)


@given(st.sets(st.integers(0, 200), max_size=40))
def test_runs_are_the_positions(positions: set[int]) -> None:
    runs = _runs(np.array(sorted(positions), np.int64))
    assert [p for run in runs for p in range(*run)] == sorted(positions)
    assert len(runs) <= max(1, (len(positions) + 1) // 2) if positions else not runs


LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128, "itemsize": 2}


def wide(world: int, before: int, count: int) -> Chunk:
    """A chunk after so many cached tokens, in large pages."""
    pages = Pages(world, 1 << 10, 1 << 10)
    pages.create(0)
    if before:
        pages.append(0, before)
    return Chunk.of(pages, 0, pages.append(0, count), Mask())


def test_what_is_cheaper_on_h200() -> None:
    machine = Machine.h200()
    assert cheaper(wide(2, 0, 64 << 10), **LLAMA, machine=machine) == "pass-kv"  # transfers hide behind compute
    assert cheaper(wide(2, 256 << 10, 16), **LLAMA, machine=machine) == "pass-q"  # 0.5 GB of keys against 131 KB
    for world in (2, 4):
        ways = [cheaper(wide(world, 128 << 10, 1 << n), **LLAMA, machine=machine) for n in range(3, 17)]
        assert ways == sorted(ways, reverse=True), ways  # one threshold: pass-q below, pass-kv above
        assert len(set(ways)) == 2


@pytest.mark.parametrize(("count", "way"), [(760, "pass-q"), (860, "pass-kv")])
def test_what_is_cheaper_counts_bytes_where_computing_is_free(count: int, way: str) -> None:
    """2048 keys cached on each of two ranks, bytes that a rank receives in both ways: the lesser wins.

    pass-KV: the other's keys, (2048 + count / 2) * 4096. pass-Q: for count / 2 rows a query of 8192 and a Partial of
    16,512. Equal at 814 tokens.
    """
    line = Link(((1, 1.0),), 0.0, 0.0)
    machine = replace(Machine.h200(), forward=((1.0, 1e9),), pull=((2, line),), sendrecv=((2, line),))
    chunk = wide(2, 4096, count)
    keys = (2048 + count // 2) * 2 * 8 * 128 * 2
    rows = count // 2 * (32 * 128 * 2 + 4 * 32 * 129)
    assert (rows < keys) == (way == "pass-q")
    assert cheaper(chunk, **LLAMA, machine=machine) == way


def test_refusals() -> None:
    session = Session(0, 1, torch.float32)
    session.draw(0, 3)
    placed = session.pages.append(0, 3)
    with pytest.raises(ValueError, match="way: wanted one of 'auto', 'pass-kv', 'pass-q', got 'ring'"):
        Prefill(session.cache, session.pages, 0, placed, session.ranks, way="ring")
