"""Messages: how tensors lie in one, what is worked out once and kept, and what is let go again."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch

from ringfa3 import Mask, Plan
from ringfa3.transport import Ring
from ringfa3.transport.cargo import ALIGN, Along, Cargo
from ringfa3.transport.packing import add, room
from ringfa3.transport.pool import GRAIN, VIEWS, Pool
from ringfa3.transport.pull import Routes
from tests.ring.test_matching import Shelf, Tape

F8 = torch.float8_e4m3fn
ROWS, COLUMNS, BLOCKS, WHOLE = Along(), Along(3), Along(2, 4, 1), Along(1, 1, 0)
CARGOES = {
    "16-bit": ((torch.bfloat16, (2, 12, 3, 4), ROWS), (torch.bfloat16, (2, 12, 3, 4), ROWS)),
    "fp8": (
        (F8, (2, 12, 3, 5), ROWS),
        (F8, (2, 3, 5, 12), COLUMNS),
        (torch.float32, (2, 3, 3), BLOCKS),
        (torch.float32, (2, 3), WHOLE),
    ),
    "mixed": ((torch.float32, (1, 12, 1, 3), ROWS), (torch.float64, (1, 12, 2, 1), ROWS)),
    "8-bit": ((F8, (1, 12, 3, 3), ROWS),),
}


def made(name: str) -> Cargo:
    """Tensors of random bytes; those of fp8 hold any of its values but NaN."""
    tensors = []
    for dtype, shape, _ in CARGOES[name]:
        x = torch.randint(0, 127, shape).to(torch.uint8).view(F8) if dtype == F8 else torch.randn(shape, dtype=dtype)
        tensors.append(x)
    return Cargo(tuple(tensors), tuple(along for _, _, along in CARGOES[name]))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("given", [None, "as long", "longer"])
@pytest.mark.parametrize("keys", [slice(0, 12), slice(4, 12), slice(8, 12), slice(4, 8), slice(8, 10)], ids=str)
@pytest.mark.parametrize("name", CARGOES)
def test_a_message_holds_its_tensors_apart_and_aligned(name, keys, given):
    cargo = made(name)
    size = cargo.size(keys)
    bytes_dtype = torch.bfloat16 if name == "16-bit" else torch.uint8
    assert cargo.dtype == bytes_dtype
    arena = torch.zeros(3 + size + 40, dtype=cargo.dtype)  # out begins elsewhere than its storage
    begin = 3 if name == "16-bit" else 16
    out = {None: None, "as long": arena[begin : begin + size], "longer": arena[begin:]}[given]
    parcel = cargo.pack(keys, out)
    assert parcel.keys == keys
    assert parcel.data.shape == (size,)
    assert out is None or parcel.data.data_ptr() == out.data_ptr()
    ends = [0]
    base = parcel.data.data_ptr()
    for x, along, there in zip(cargo.tensors, cargo.along, parcel.cargo.tensors, strict=True):
        groups = slice(keys.start // along.keys, -(-keys.stop // along.keys))
        index = [slice(None)] * x.ndim
        if along.indices:
            index[along.dim] = slice(groups.start * along.indices, groups.stop * along.indices)
        assert there.dtype == x.dtype
        assert there.is_contiguous()
        assert same(there, x[tuple(index)])
        begins = there.data_ptr() - base
        assert begins >= ends[-1]
        assert name == "16-bit" or begins % ALIGN == 0
        ends.append(begins + there.nbytes)
    assert parcel.data.nbytes - ends[-1] in range(ALIGN)
    narrow = slice(max(4, keys.start), keys.stop)
    for a, b in zip(parcel.read(narrow), cargo.read(narrow), strict=True):
        assert same(a, b)
    for a, b in zip(parcel.cut(narrow).cargo.tensors, cargo.read(narrow), strict=True):
        assert same(a, b)


def test_read_gives_no_copies():
    cargo = made("16-bit")
    for keys in (slice(0, 12), slice(4, 8)):
        for x, there in zip(cargo.tensors, cargo.read(keys), strict=True):
            assert there.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            assert there.shape[1] == keys.stop - keys.start


def test_shards_that_differ_in_anything_are_not_alike():
    k = torch.zeros(1, 8, 2, 4)
    cargoes = [
        Cargo.of((k, k)), Cargo.of((k,)), Cargo.of((k.half(), k.half())), Cargo.of((k.bfloat16(), k.bfloat16())),
        Cargo.of((k[:, :4], k[:, :4])), Cargo((k, k), (ROWS, WHOLE)), Cargo((k, k), (ROWS, Along(2))),
    ]  # fmt: skip
    for a, b in itertools.combinations(cargoes, 2):
        assert a.form is not b.form
    assert Cargo.of((k, k)).form is Cargo.of((k + 1, k.clone())).form


def test_views_of_a_buffer_are_kept_until_it_grows():
    shelf = Grown()
    shelf.buffers(0, 100)
    cargo = made("16-bit")
    keys = slice(4, 12)
    first = shelf.parcel(0, 1, cargo, keys)
    assert shelf.parcel(0, 1, made("16-bit"), slice(4, 12)) is first
    assert shelf.parcel(0, 0, cargo, keys).data.data_ptr() != first.data.data_ptr()
    assert shelf.parcel(0, 1, cargo, slice(0, 12)) is not first
    piece = shelf.slot(0, 1, (2, 5), torch.float32, offset=256)
    assert shelf.slot(0, 1, (2, 5), torch.float32, offset=256) is piece
    assert piece.data_ptr() == shelf.buffers(0, 1)[1].data_ptr() + 256
    assert shelf.slot(0, 1, (2, 5), torch.float64, offset=256).dtype == torch.float64
    gone = weakref.ref(first)
    del first, piece
    now = shelf.buffers(0, GRAIN + 1)  # larger
    gc.collect()
    assert gone() is None
    assert shelf.parcel(0, 1, cargo, keys).data.data_ptr() == now[1].data_ptr()


def test_buffers_in_a_graph_stay():
    """Those that a capture has used; what they grew into afterwards is given back, and so are all views."""
    shelf = Grown()
    for expected in (1, 2):
        shelf.buffers(0, 100)
        shelf.capturing = 1
        in_graph = shelf.buffers(0, 100)
        shelf.capturing = 0
        shelf.give_back()
        assert len(shelf._kept) == expected
        assert shelf._kept[-1] is in_graph
    shelf.buffers(0, 100)
    shelf.capturing = 1
    shelf.buffers(0, 100)
    shelf.capturing = 0
    shelf.parcel(0, 1, made("16-bit"), slice(4, 12))
    grown = weakref.ref(shelf.buffers(0, GRAIN + 1)[1])
    shelf.parcel(0, 1, made("16-bit"), slice(4, 12))
    shelf.slot(0, 1, (2, 5), torch.float32, offset=256)
    shelf.give_back()
    gc.collect()
    assert grown() is None
    assert len(shelf._kept) == 3


def test_as_many_views_are_kept_as_said():
    shelf = Grown()
    shelf.buffers(0, 100)
    k = torch.zeros(1, 2 * VIEWS, 1, 1)
    cargo = Cargo.of((k,))
    for i in range(VIEWS + 8):
        assert shelf.parcel(0, 0, cargo, slice(i, i + 1)).data.numel() == 1
        assert shelf.slot(0, 0, (1,), torch.uint8, offset=i).numel() == 1
    assert 0 < len(shelf._parcels) <= VIEWS
    assert 0 < len(shelf._slots) <= VIEWS


def test_what_is_worked_out_of_a_plan_goes_with_it():
    p = Plan.build(Mask(), "zigzag", 64, 4, 1)
    routes = Routes.of(p)
    assert Routes.of(p) is routes
    kv = torch.zeros(1, 16, 1, 1), torch.zeros(1, 16, 1, 1)
    list(Ring(Tape()).rotate(kv, p))
    seen = weakref.ref(p)
    del p
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(("a", "b"), [((0, 4), (0, 4)), ((0, 8), (2, 5)), ((2, 5), (0, 8)), ((0, 3), (2, 6))])
def test_gradients_of_slices_are_summed_where_they_overlap(a, b):
    kv = torch.zeros(2, 8, 1, 3), torch.zeros(2, 8, 1, 3)
    pieces = [room(kv, slice(*keys), gradient=2) for keys in (a, b)]
    want = torch.zeros(2, 2, 8, 1, 3)
    for piece in pieces:
        piece.data.normal_()
        want[:, :, piece.keys] += piece.data
    total = add(*pieces)
    assert total is not None
    assert (total.keys.start, total.keys.stop) == (min(a[0], b[0]), max(a[1], b[1]))
    assert torch.equal(total.data, want[:, :, total.keys])
    dk, dv = total.read(total.keys)
    assert dk.is_contiguous()
    assert torch.equal(dv, want[1, :, total.keys])
    inner = slice(total.keys.start + 1, total.keys.stop)
    assert torch.equal(total.read(inner)[0], want[0, :, inner])


class Grown(Shelf):
    """A pool of one process whose buffers are `Pool`'s: they grow."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.commons = self  # type: ignore[assignment]
        self.meeting = self
        self._graphed, self._kept = set(), []
        self.capturing = 0

    buffers, give_back = Pool.buffers, Pool.give_back

    def capture(self) -> int:
        """As `Commons.capture`."""
        return self.capturing

    def share(self, size: int) -> tuple[torch.Tensor, ...]:
        """As `Commons.share`."""
        return tuple(torch.zeros(size, dtype=torch.uint8) for _ in range(self.world))

    drain = exchange = Shelf.nothing
