"""PagedCache: what is written comes back, whatever was forked, cut and freed meanwhile; budgets; refusals."""

import copy
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from ringfa3.inference import CacheFull, PagedCache, Pages
from ringfa3_kernels import Unsupported

LAYERS = 2
SHAPE = {"layers": LAYERS, "kv_heads": 2, "head_dim": 3}


def cache(pages=6, page_size=4, dtype=torch.float32):
    return PagedCache(**SHAPE, pages=pages, page_size=page_size, dtype=dtype, device="cpu")


class Held:
    """Pages and every rank's cache, beside a plain model: a list of numbers a sequence, copied for a fork."""

    def __init__(self, world, pages, page_size, reach=None):
        self.pages = Pages(world, pages, page_size, reach=reach)
        self.roomy = Pages(world, 2000, page_size, reach=reach)  # the same schedule, with room for all of it
        self.dealt = {}  # of each sequence and rank, all positions; and how many of them are forgotten
        self.gone = {}
        self.caches = [cache(pages, page_size) for _ in range(world)]
        for each in self.caches:
            each.k.fill_(torch.nan)
            each.v.fill_(torch.nan)
        self.model = {}
        self.tokens = 0
        self.sequences = 0

    def new(self):
        self.sequences += 1
        return self.sequences

    def create(self):
        sequence = self.new()
        for books in (self.pages, self.roomy):
            books.create(sequence)
        self.model[sequence] = []
        self.dealt[sequence] = [[] for _ in range(self.pages.world)]
        self.gone[sequence] = [0] * self.pages.world
        return sequence

    def fork(self, parent):
        child = self.new()
        for books in (self.pages, self.roomy):
            books.fork(parent, child)
        self.model[child] = list(self.model[parent])
        self.dealt[child] = [list(each) for each in self.dealt[parent]]
        self.gone[child] = list(self.gone[parent])
        return child

    def truncate(self, sequence, length):
        """Whether it may be cut there: iff what its next token will see is kept."""
        reach = self.pages.reach
        forgotten = [
            p for dealt, gone in zip(self.dealt[sequence], self.gone[sequence], strict=True) for p in dealt[:gone]
        ]
        may = length == 0 or reach is None or all(p < length - reach for p in forgotten)
        assert self.pages.cuts(sequence, length) == may
        if not may:
            with pytest.raises(ValueError, match="is forgotten"):
                self.pages.truncate(sequence, length)
            return False
        for books in (self.pages, self.roomy):
            books.truncate(sequence, length)
        del self.model[sequence][length:]
        self.dealt[sequence] = [[p for p in each if p < length] for each in self.dealt[sequence]]
        if length == 0:
            self.gone[sequence] = [0] * self.pages.world
        return True

    def trim(self, sequence):
        for books in (self.pages, self.roomy):
            books.trim(sequence)
        if self.pages.reach is None:
            return
        seen, size = len(self.model[sequence]) - self.pages.reach, self.pages.page_size
        for rank, dealt in enumerate(self.dealt[sequence]):
            self.gone[sequence][rank] = max(self.gone[sequence][rank], sum(p < seen for p in dealt) // size * size)

    def free(self, sequence):
        for books in (self.pages, self.roomy):
            books.free(sequence)
        del self.model[sequence]

    def append(self, appends):
        """Whether there was room; there is iff the roomy books need no more pages than there are."""
        roomy = copy.deepcopy(self.roomy)
        roomy.append_all(appends)
        world = range(self.pages.world)
        fits = all(roomy.used(rank) <= self.pages.pages for rank in world)
        assert self.pages.fits(appends) == fits
        if not fits:
            with pytest.raises(CacheFull) as caught:
                self.pages.append_all(appends)
            assert roomy.used(caught.value.rank) > self.pages.pages
            return False
        self.roomy = roomy
        placed = self.pages.append_all(appends)
        for rank in world:
            self.caches[rank].copy([pair for each in placed.values() for pair in each.copies[rank]])
        for sequence, each in placed.items():
            assert each.start == len(self.model[sequence])
            self.model[sequence] += range(self.tokens, self.tokens + each.count)
            self.tokens += each.count
            for rank in world:
                self.dealt[sequence][rank] += each.positions[rank].tolist()
                self.write(rank, sequence, each.positions[rank], each.slots[rank])
        return True

    def write(self, rank, sequence, positions, slots):
        x = self.expected(sequence, positions)
        for layer in range(LAYERS):
            self.caches[rank].write(layer, torch.from_numpy(slots), x + layer / 4, -x - layer / 4)

    def expected(self, sequence, positions):
        """[n, Hkv, D], every number another: the token's, and within it the place's."""
        inner = torch.arange(6.0).view(1, 2, 3)
        tokens = torch.tensor([float(self.model[sequence][p]) for p in positions])
        return tokens.view(-1, 1, 1) * 8 + inner

    def check(self):
        self.pages.audit()
        assert set(self.pages.sequences) == set(self.model)
        for sequence, tokens in self.model.items():
            assert self.pages.length(sequence) == len(tokens)
            for rank, own in enumerate(self.caches):
                positions = self.pages.positions(rank, sequence)
                assert positions.tolist() == self.dealt[sequence][rank][self.gone[sequence][rank] :]
                table = torch.tensor(self.pages.table(rank, sequence), dtype=torch.int32)
                for layer in range(LAYERS):
                    k, v = own.read(layer, table, len(positions))
                    wanted = self.expected(sequence, positions)[None] + layer / 4
                    assert torch.equal(k, wanted)
                    assert torch.equal(v, -wanted)

    def close(self):
        for sequence in list(self.model):
            self.free(sequence)
        self.pages.audit()
        assert [self.pages.used(rank) for rank in range(self.pages.world)] == [0] * self.pages.world


class Schedules(RuleBasedStateMachine):
    """Any order of create, append, fork, truncate, trim and free."""

    sequences = Bundle("sequences")

    @initialize(
        world=st.integers(1, 4),
        pages=st.integers(1, 12),
        page_size=st.integers(1, 5),
        reach=st.none() | st.integers(0, 20),
    )
    def begin(self, world, pages, page_size, reach):
        self.held = Held(world, pages, page_size, reach)

    @rule(target=sequences, count=st.integers(0, 12))
    def create(self, count):
        sequence = self.held.create()
        if count:
            self.held.append({sequence: count})
        return sequence

    @rule(sequence=sequences, count=st.integers(1, 14))
    def append(self, sequence, count):
        self.held.append({sequence: count})

    @rule(appends=st.dictionaries(sequences, st.integers(1, 3), min_size=1, max_size=4))
    def append_to_several(self, appends):
        self.held.append(appends)

    @rule(target=sequences, parent=sequences, children=st.integers(1, 2))
    def fork(self, parent, children):
        return multiple(*(self.held.fork(parent) for _ in range(children)))

    @rule(sequence=sequences, data=st.data())
    def truncate(self, sequence, data):
        self.held.truncate(sequence, data.draw(st.integers(0, len(self.held.model[sequence]))))

    @rule(sequence=sequences)
    def trim(self, sequence):
        self.held.trim(sequence)

    @rule(sequence=sequences, count=st.integers(1, 14))
    def append_and_trim(self, sequence, count):
        if self.held.append({sequence: count}):
            self.held.trim(sequence)

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.held.free(sequence)

    @invariant()
    def contents(self):
        if hasattr(self, "held"):
            self.held.check()

    def teardown(self):
        if hasattr(self, "held"):
            self.held.close()


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize(("world", "reach"), [(1, None), (3, None), (2, 17)])
def test_a_thousand_sequences_come_and_go(world, reach):
    """Created, forked, grown, cut and freed at random, in a cache that is full now and then: back to the baseline."""
    draw = random.Random(world)
    held = Held(world, 60, 4, reach)
    pointers = [(each.k.data_ptr(), each.nbytes) for each in held.caches]
    full = grown = 0
    while held.sequences < 1000:
        alive = list(held.model)
        action = draw.choice(["create", "fork", "append", "append", "truncate", "free"]) if alive else "create"
        if action == "create":
            alive.append(held.create())
        if action in ("create", "append"):
            some = {s: draw.choice([1, 1, 3, 25]) for s in draw.sample(alive, min(3, len(alive)))}
            fitted = held.append(some)
            for sequence in some if fitted else ():
                held.trim(sequence)
            grown += fitted
            full += not fitted
            if not fitted:
                held.free(draw.choice(alive))
        elif action == "fork":
            held.fork(draw.choice(alive))
        elif action == "truncate":
            sequence = draw.choice(alive)
            held.truncate(sequence, draw.randint(0, len(held.model[sequence])))
        elif action == "free":
            held.free(draw.choice(alive))
        if draw.random() < 0.02:
            held.check()
    assert grown > 200
    assert full > 20
    held.close()
    assert [(each.k.data_ptr(), each.nbytes) for each in held.caches] == pointers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_pages_within_a_budget(dtype):
    one = 2 * LAYERS * 4 * 2 * 3 * dtype.itemsize
    within = {"page_size": 4, "dtype": dtype} | SHAPE
    for budget in (2 * one, 9 * one - 1, 9 * one, 9 * one + 1):
        pages = PagedCache.pages_within(budget, **within)
        own = cache(pages, dtype=dtype)
        assert own.nbytes <= budget < own.nbytes + one
        assert own.k.shape == own.v.shape == (LAYERS, pages, 4, 2, 3)
        assert own.k.dtype == dtype
    with pytest.raises(ValueError, match=f"budget: wanted at least {2 * one} bytes"):
        PagedCache.pages_within(2 * one - 1, **within)


def test_a_fresh_cache_holds_numbers():
    own = cache()
    assert torch.equal(own.k, torch.zeros_like(own.k))
    assert torch.equal(own.v, torch.zeros_like(own.v))


def test_writes_to_scratch_are_lost():
    own = cache()
    before = own.k.clone(), own.v.clone()
    x = torch.full((3, 2, 3), 7.0)
    own.write(1, torch.tensor([own.scratch, own.scratch, own.scratch + 3]), x, x)
    assert torch.equal(own.k, before[0])
    assert torch.equal(own.v, before[1])


def test_read_does_not_look_past_the_end():
    own = cache()
    x = torch.randn(5, 2, 3)
    own.write(0, torch.tensor([8, 9, 10, 11, 4]), x, -x)  # page 2, then page 1
    for table in ([2, 1], [2, 1, -1, -1], [2, 1, 999]):
        for length in range(6):
            k, v = own.read(0, torch.tensor(table), length)
            assert torch.equal(k, x[None, :length])
            assert torch.equal(v, -x[None, :length])


def test_wrong_calls_are_refused():
    own, x, slots = cache(), torch.zeros(2, 2, 3), torch.tensor([0, 1])
    refused = {
        r"slots: wanted int64 \[n\] on cpu, got torch.int32": lambda: own.write(0, slots.int(), x, x),
        r"slots: .* \[1, 2\]": lambda: own.write(0, slots[None], x, x),
        r"k: wanted torch.float32 \[2, 2, 3\] on cpu, got torch.float16": lambda: own.write(0, slots, x.half(), x),
        r"v: wanted torch.float32 \[2, 2, 3\] on cpu, got torch.float32 \[1, 2, 3\]": lambda: own.write(
            0, slots, x, x[:1]
        ),
        "pairs: wanted each destination once and none a source": lambda: own.copy([(0, 1), (1, 2)]),
        "pairs: wanted each destination once": lambda: own.copy([(0, 2), (1, 2)]),
        r"pairs: wanted pages in \[0, 6\)": lambda: own.copy([(0, 6)]),
        "length: wanted at most 2 pages of 4 tokens, got 9": lambda: own.read(0, slots, 9),
        "got -1 tokens": lambda: own.read(0, slots, -1),
        "pages: wanted an int, at least 1, got 0": lambda: cache(pages=0),
        "page_size: wanted an int, at least 1, got 1.5": lambda: cache(page_size=1.5),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(Unsupported, match="float8_e4m3fn"):
        cache(dtype=torch.float8_e4m3fn)


def test_the_package_does_without_transformers():
    program = (
        "import sys; sys.modules['transformers'] = None; import ringfa3.inference as i; print(i.Pages, i.PagedCache)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=".")
    assert done.returncode == 0, done.stderr
