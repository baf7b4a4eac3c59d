"""Pages: who keeps what, exactly; a full cache changes nothing; no rank fills first; what a step costs."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfa3 import Mask
from ringfa3.inference import CacheFull, Pages
from ringfa3.inference.newest import Form, Newest
from ringfa3.layout import resolve


def state(pages):
    """All that a caller can see of the books."""
    ranks = range(pages.world)
    tables = {s: [(pages.table(r, s), pages.runs(r, s)) for r in ranks] for s in pages.sequences}
    return tables, [pages.used(r) for r in ranks], [pages.free_pages(r) for r in ranks]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_capture_the_same_graphs(world):
    """A graph holds collectives: a rank that captures one while others replay theirs would be a round ahead of them."""
    pages = Pages(world, 300, 1)
    pages.create(7)
    widths = set()
    for _ in range(150):
        placed = {7: pages.append(7, 1)}
        forms = {Form.of(Newest.of(pages, placed, (Mask(),), r, 300), padded=True) for r in range(world)}
        assert len(forms) == 1
        widths |= {form.blocks for form in forms}
        assert pages.blocks([7]) == max(len(pages.table(r, 7)) for r in range(world))
    assert len(widths) > 1


def grown(pages, sequence, counts):
    pages.create(sequence)
    return [pages.append(sequence, count) for count in counts]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("sequence", [0, 5])
def test_short_appends_go_round_and_long_ones_zigzag(world, sequence):
    pages = Pages(world, 50, 4)
    for placed in grown(pages, sequence, [1, 2 * world - 1, 2 * world, 61, 1, 1]):
        stop = placed.start + placed.count
        for rank in range(world):
            if placed.count < 2 * world:
                wanted = [p for p in range(placed.start, stop) if (p + sequence) % world == rank]
            else:
                unrotated = (rank - placed.start - sequence) % world
                wanted = placed.start + resolve("zigzag").positions(placed.count, world, unrotated)
            np.testing.assert_array_equal(placed.positions[rank], wanted)
            assert placed.positions[rank].dtype == placed.slots[rank].dtype == np.int64
    pages.audit()


@given(st.integers(1, 5), st.integers(1, 9), st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 9))
def test_slots_lie_in_table_order(world, page_size, counts, sequence):
    pages = Pages(world, 400, page_size)
    placed = grown(pages, sequence, counts)
    assert pages.length(sequence) == sum(counts)
    for rank in range(world):
        positions = np.concatenate([each.positions[rank] for each in placed])
        slots = np.concatenate([each.slots[rank] for each in placed])
        table = np.array(pages.table(rank, sequence), np.int64)
        order = (table[:, None] * page_size + np.arange(page_size)).ravel()
        np.testing.assert_array_equal(slots, order[: len(slots)])
        np.testing.assert_array_equal(pages.positions(rank, sequence), positions)
        assert (np.diff(positions) > 0).all()
        assert pages.local_length(rank, sequence) == len(positions)
        assert len(table) == pages.used(rank) == -(-len(positions) // page_size)
    pages.audit()


@given(st.integers(1, 5), st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
def test_below_counts_positions(world, counts, data):
    pages = Pages(world, 400, 4)
    grown(pages, 1, counts)
    if data.draw(st.booleans()):
        pages.truncate(1, data.draw(st.integers(0, pages.length(1))))
    x = np.array(data.draw(st.lists(st.integers(-3, sum(counts) + 3), max_size=8)), np.int64)
    many = np.arange(-40, sum(counts) + 40).reshape(-1, 1)  # by arrays, where few go one by one
    for rank in range(world):
        held = pages.positions(rank, 1)
        for asked in (x, many, x.reshape(1, -1)):
            wanted = (held < asked[..., None]).sum(-1)
            got = pages.below(rank, 1, asked)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, wanted)


def test_what_a_decode_batch_needs():
    pages = Pages(3, 100, 4)
    for sequence, count in ((4, 30), (2, 1), (7, 55)):
        grown(pages, sequence, [count, 1])
    batch = [7, 4, 2]
    asked = np.array([[pages.length(s) - 2, pages.length(s)] for s in batch])
    for rank in range(3):
        tables = pages.block_tables(rank, batch)
        wide = pages.block_tables(rank, batch, 9)
        assert tables.dtype == wide.dtype == np.int32
        assert wide.shape == (3, 9)
        counts = pages.below_each(rank, batch, asked)
        lengths = pages.local_lengths(rank, batch)
        assert counts.dtype == lengths.dtype == np.int32
        for row, sequence in enumerate(batch):
            table = pages.table(rank, sequence)
            assert tables[row].tolist() == table + [-1] * (tables.shape[1] - len(table))
            assert wide[row].tolist() == table + [-1] * (9 - len(table))
            np.testing.assert_array_equal(counts[row], pages.below(rank, sequence, asked[row]))
            assert lengths[row] == pages.local_length(rank, sequence) == counts[row, 1]
        assert tables.shape[1] == max(len(pages.table(rank, s)) for s in batch)
    assert pages.block_tables(0, []).shape == (0, 0)
    with pytest.raises(ValueError, match=r"width: wanted at least the longest table's 5 blocks, got 4"):
        pages.block_tables(0, batch, 4)


def test_fork_copies_the_partly_filled_page_only():
    pages = Pages(2, 20, 4)
    grown(pages, 0, [20])  # 10 tokens a rank: two full pages, and one of two tokens
    before = [pages.table(rank, 0) for rank in range(2)]
    pages.fork(0, 1)
    assert [pages.table(rank, 1) for rank in range(2)] == before
    assert [pages.used(rank) for rank in range(2)] == [3, 3]
    placed = pages.append(1, 2)
    for rank in range(2):
        table = pages.table(rank, 1)
        assert placed.copies[rank] == ((before[rank][2], table[2]),)
        assert table[:2] == before[rank][:2]
        assert pages.table(rank, 0) == before[rank]
        assert pages.used(rank) == 4
    assert pages.append(0, 2).copies == ((), ())  # its last page is its own again
    pages.fork(1, 2)
    pages.free(1)
    assert pages.append(2, 2).copies == ((), ())  # nobody shares it any more
    pages.audit()


def test_full_pages_are_shared_without_a_copy():
    pages = Pages(1, 4, 4)
    grown(pages, 0, [8])
    pages.fork(0, 1)
    assert pages.append(1, 1).copies == ((),)
    assert pages.used(0) == 3
    pages.audit()


def test_truncate_gives_back_whole_pages_and_a_shared_one_is_copied_when_written():
    pages = Pages(1, 10, 4)
    grown(pages, 0, [14])
    pages.truncate(0, 9)
    assert pages.used(0) == 3
    assert pages.append(0, 1).copies == ((),)  # its own page: written in place
    pages.fork(0, 1)
    table = pages.table(0, 0)
    pages.truncate(1, 6)  # in the middle of a page that is full and shared
    assert pages.table(0, 1) == table[:2]
    placed = pages.append(1, 1)
    assert placed.copies == (((table[1], pages.table(0, 1)[1]),),)
    assert placed.slots[0].tolist() == [pages.table(0, 1)[1] * 4 + 2]
    assert pages.table(0, 0) == table
    pages.truncate(0, 0)
    assert pages.table(0, 0) == []
    assert pages.length(0) == 0
    assert pages.used(0) == 2
    pages.audit()


def test_of_several_that_share_a_page_the_last_writes_in_place():
    pages = Pages(1, 3, 4)
    grown(pages, 0, [2])
    pages.fork(0, 1)
    pages.fork(0, 2)
    assert pages.fits({0: 1, 1: 1, 2: 1})
    placed = pages.append_all({2: 1, 0: 1, 1: 1})
    assert [placed[s].copies for s in (2, 0, 1)] == [(((0, 1),),), (((0, 2),),), ((),)]
    assert not pages.fits({0: 3})
    pages.audit()


@pytest.mark.parametrize("full", [0, 1, 2])
def test_full_is_an_error_that_names_the_rank_and_changes_nothing(full):
    pages = Pages(3, 2, 4)
    for sequence in (full, full + 3):  # their first tokens lie on that rank
        grown(pages, sequence, [1])
    grown(pages, 1000, [])
    before = state(pages)
    assert pages.used(full) == 2
    assert not pages.fits({1000: 6})
    with pytest.raises(CacheFull, match=rf"rank {full}: wanted 1 more pages, 0 are free") as caught:
        pages.append(1000, 6)
    assert (caught.value.rank, caught.value.wanted, caught.value.free) == (full, 1, 0)
    assert state(pages) == before
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.rank) == (str(caught.value), full)
    other = next(s for s in range(2000, 2003) if s % 3 != full)
    pages.create(other)
    with pytest.raises(CacheFull):  # the second of the two lacks a page: neither gets any
        pages.append_all({other: 1, 1000: 6})
    pages.free(other)
    assert state(pages) == before
    pages.free(full)
    assert pages.fits({1000: 6})
    pages.append(1000, 6)
    pages.audit()


def test_what_no_token_will_see_is_forgotten_in_whole_pages():
    pages = Pages(2, 9, 4, reach=10)
    pages.create(0)
    most = 0
    for start in range(0, 320, 16):  # 320 tokens through 72 places
        assert pages.append(0, 16).start == start
        pages.trim(0)
        most = max(most, pages.used(0), pages.used(1))
        kept = np.sort(np.concatenate([pages.positions(rank, 0) for rank in range(2)]))
        assert set(range(max(0, start + 6), start + 16)) <= set(kept.tolist())
        assert kept.size < 10 + 2 * 4
        pages.audit()
    assert most <= 5
    assert pages.length(0) == 320
    assert pages.local_length(0, 0) + pages.local_length(1, 0) == kept.size


def test_forks_keep_what_their_parent_forgets():
    pages = Pages(1, 12, 4, reach=4)
    grown(pages, 0, [18])
    pages.fork(0, 1)
    pages.trim(0)  # positions 0 to 13 are not seen by token 18: three pages
    assert pages.positions(0, 0).tolist() == list(range(12, 18))
    assert pages.positions(0, 1).tolist() == list(range(18))
    assert pages.used(0) == 5
    assert pages.cuts(1, 5)
    assert [pages.cuts(0, n) for n in (0, 1, 15, 16, 17, 18)] == [True, False, False, True, True, True]
    assert pages.cuts(1, 9, grown=0)
    assert not pages.cuts(1, 9, grown=1)  # by then it will have been trimmed, too
    with pytest.raises(ValueError, match="what token 15 sees is forgotten, got 15"):
        pages.truncate(0, 15)
    pages.truncate(1, 6)
    assert pages.used(0) == 4  # two pages of its own, and the parent's two
    pages.truncate(0, 0)
    assert (pages.length(0), pages.used(0)) == (0, 2)
    assert pages.append(0, 3).positions[0].tolist() == [0, 1, 2]
    assert pages.below(0, 0, [2]).tolist() == [2]
    pages.free(1)
    pages.audit()
    with pytest.raises(ValueError, match="reach: wanted an int, at least 0, got -1"):
        Pages(1, 1, 1, reach=-1)


def test_wrong_numbers_are_refused():
    pages = Pages(2, 4, 4)
    pages.create(3)
    refused = {
        "sequence: wanted a number not in use, got 3": lambda: pages.create(3),
        "sequence: wanted an int, at least 0, got -1": lambda: pages.create(-1),
        "sequence: wanted an int, at least 0, got True": lambda: pages.create(True),
        "sequence: wanted one of the 1 there are, got 9": lambda: pages.append(9, 1),
        "sequence: wanted one of the 1 there are, got 8": lambda: pages.free(8),
        "sequence: wanted one of the 1 there are, got 7": lambda: pages.fork(7, 9),
        "not in use, got 3": lambda: pages.fork(3, 3),
        "count: wanted an int, at least 1, got 0": lambda: pages.append(3, 0),
        "length: wanted at most the 0 tokens of sequence 3, got 1": lambda: pages.truncate(3, 1),
        "got -1": lambda: pages.truncate(3, -1),
        "world: wanted an int, at least 1, got 0": lambda: Pages(0, 1, 1),
        "page_size: wanted an int, at least 1, got 2.0": lambda: Pages(1, 1, 2.0),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert state(pages) == ({3: [([], []), ([], [])]}, [0, 0], [4, 4])


@pytest.mark.parametrize("spoil", ["reference", "free", "table", "runs", "dropped", "floor"])
def test_audit_sees_what_does_not_add_up(spoil):
    pages = Pages(2, 9, 4, reach=3)
    grown(pages, 0, [20])
    pages.trim(0)
    assert pages._sequences[0][1].dropped == 8
    pages.audit()
    share = pages._sequences[0][1]
    if spoil == "reference":
        pages._references[1][share.table[0]] += 1
    elif spoil == "free":
        pages._free[1].append(share.table[0])
    elif spoil == "table":
        share.table.append(pages._take(1))
    elif spoil == "dropped":
        share.dropped -= 4
    elif spoil == "floor":
        share.floor = 19
    else:
        share.starts[-1] += 1
    with pytest.raises(RuntimeError, match=r"rank|sequence 0"):
        pages.audit()


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_no_rank_fills_first(world):
    """200 sequences: prompts in chunks of 512, then decode side by side. Ranks stay within 1% in pages."""
    random = np.random.default_rng(world)
    pages = Pages(world, 20000, 16)
    for sequence in range(200):
        pages.create(sequence)
        prompt = int(random.integers(1, 3000))
        while prompt:
            pages.append(sequence, min(prompt, 512))
            prompt -= min(prompt, 512)
    left = dict(enumerate(random.integers(1, 300, 200).tolist()))
    worst = 0
    while left:
        pages.append_all(dict.fromkeys(left, 1))
        left = {sequence: count - 1 for sequence, count in left.items() if count > 1}
        used = [pages.used(rank) for rank in range(world)]
        worst = max(worst, max(used) - min(used))
    assert worst <= 0.01 * min(used)
    tokens = [sum(pages.local_length(rank, s) for s in pages.sequences) for rank in range(world)]
    assert max(tokens) - min(tokens) <= 0.001 * min(tokens)
    pages.audit()


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_chunks_of_a_long_prompt_even_out(world):
    pages = Pages(world, 5000, 16)
    for chunk in (512, 500, 514, 2 * world + 1):
        for placed in grown(pages, chunk, [chunk] * 60):
            sizes = [len(each) for each in placed.positions]
            assert max(sizes) - min(sizes) <= 2
        lengths = [pages.local_length(rank, chunk) for rank in range(world)]
        assert max(lengths) - min(lengths) <= 2
        pages.free(chunk)


def test_a_step_costs_less_than_a_millisecond():
    """One token for each of 64 sequences, with all that a decode step asks, beside a sequence of a million tokens."""
    pages = Pages(2, 20000, 64)
    for sequence in range(64):
        grown(pages, sequence, [1000 + sequence])
    grown(pages, 64, [8192] * 128)
    batch = [*range(63), 64]

    def append():
        pages.append_all(dict.fromkeys(batch, 1))

    def ask():
        pages.fits(dict.fromkeys(batch, 1))
        pages.block_tables(0, batch)
        pages.below_each(0, batch, [[1000]] * 64)

    for step in (append, ask):
        seconds = []
        for _ in range(100):
            begun = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begun)
        assert min(seconds) < 1e-3  # the quickest: what the machine does beside is not counted. Measured: 0.3 ms
