"""Transports by themselves: what is sent, what arrives, what comes home, and that a message is under way meanwhile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringfa3
from ringfa3 import Mask, Plan
from ringfa3.gang import Gang
from ringfa3.transport import Gather, Ring
from ringfa3.transport.packing import Piece, add
from ringfa3.transport.route import hull, inbound, last, outbound
from ringfa3.transport.wire import Wire

TRANSPORTS = {"ring": Ring, "two buffers": lambda wire: Ring(wire, buffers=2), "gather": Gather}
MASKS = (Mask(), Mask(causal=False), Mask(window=(3, 0)), Mask(documents=(9, 4, 10)), Mask(causal=False, window=(0, 6)))


class Counting:
    """A wire that writes down what is posted: (round, peer, kind, sent?, number of elements)."""

    def __init__(self, wire):
        self.wire, self.posted = wire, []

    def __getattr__(self, name):
        return getattr(self.wire, name)

    def post(self, messages, hop, after=None):
        self.posted += [(hop, m.peer, m.kind, m.send, m.tensor.numel()) for m in messages]
        return self.wire.post(messages, hop, after)


def numbered(p: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [2, n, 1, 1] that say where they are from: source and index, v negative; batch row 1 is 1000 up."""
    x = 100.0 * p.rank + torch.arange(p.kv_lengths[p.rank]).view(1, -1, 1, 1)
    x = torch.cat([x, x + 1000])
    return x, -x


def everything_arrives(rank: int, size: int, name: str, mask: Mask, layout: str, seqlen: int) -> None:
    p = ringfa3.plan(mask, layout, seqlen)
    wire = Counting(Gang.of(None).wire(torch.device("cpu")))
    kv = numbered(p)
    transport = TRANSPORTS[name](wire)
    seen = []
    for hop, (k, v) in transport.rotate(kv, p):
        seen.append(hop)
        want = 100.0 * hop.source + torch.arange(hop.keys.start, hop.keys.stop)
        assert torch.equal(k[:, :, 0, 0], torch.stack([want, want + 1000]))
        assert torch.equal(v, -k)
    assert tuple(seen) == p.hops
    # what came is what is needed from others here or further on, and no rank gets an empty message
    assert all(number > 0 for *_, number in wire.posted)
    if size == 1:
        assert not wire.posted
    if name == "gather":
        needed = sum(4 * (s.stop - s.start) for source, s in enumerate(p.needs[rank]) if s and source != rank)
        assert sum(number for *_, sent, number in wire.posted if not sent) == needed

    # each rank adds rank + 1 to what it sees: the owner must end with the sum over those who see a key
    rotation = transport.rotate_backward(kv, p)
    first = True
    for hop, (k, v), (dk, dv) in rotation:
        assert dk.is_contiguous()
        assert dv.is_contiguous()
        assert dk.shape == k.shape == v.shape == dv.shape
        if first:
            dk.zero_()
            dv.zero_()
        assert not dk.any()
        assert not dv.any()
        first = False
        assert float(k[0, 0, 0, 0]) == 100.0 * hop.source + hop.keys.start
        dk += rank + 1
        dv -= rank + 1
    want = torch.zeros(p.kv_lengths[rank])
    for reader in range(size):
        for hop in Plan.build(mask, layout, seqlen, size, reader).hops:
            if hop.source == rank:
                want[hop.keys] += reader + 1
    dk, dv = rotation.home()
    assert dk.dtype == torch.float32
    assert torch.equal(dk[:, :, 0, 0], want.expand(2, -1))
    assert torch.equal(dv, -dk)


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_slice_arrives_and_every_gradient_comes_home(world, size, name):
    for mask in MASKS:
        for layout in ("contiguous", "zigzag", "striped"):
            world(size)(everything_arrives, name, mask, layout, 23)
    world(size)(everything_arrives, name, Mask(causal=False), "contiguous", 2)


def only_neighbours(rank: int, size: int) -> None:
    p = ringfa3.plan(Mask(window=(3, 0)), "contiguous", 40)
    wire = Counting(Gang.of(None).wire(torch.device("cpu")))
    kv = numbered(p)
    for _ in Ring(wire).rotate(kv, p):
        pass
    sent = [(0, rank + 1, 0, True, 12)] if rank < size - 1 else []  # three keys: [2, B 2, 3, 1, 1]
    came = [(0, rank - 1, 0, False, 12)] if rank else []
    assert wire.posted == sent + came
    wire.posted.clear()
    rotation = Ring(wire).rotate_backward(kv, p)
    for _, _, (dk, dv) in rotation:
        dk.fill_(1)
        dv.fill_(1)
    rotation.home()
    # the gradient of those three goes straight back, not on round the ring
    back = [(2, rank - 1, 1, True, 12)] if rank else []
    home = [(2, rank + 1, 1, False, 12)] if rank < size - 1 else []
    assert wire.posted == sent + came + back + home


def test_only_what_a_window_needs_is_sent(world):
    world(4)(only_neighbours)


def under_way(rank: int, size: int, name: str) -> None:
    p = ringfa3.plan(Mask(causal=False), "contiguous", 12)
    wire = Counting(Gang.of(None).wire(torch.device("cpu")))
    rounds = []
    for _ in TRANSPORTS[name](wire).rotate(numbered(p), p):
        rounds.append(max(hop for hop, *_ in wire.posted))  # looks while the loop is in its body
    # when a hop is handed out, the message of its round, with the next shard, has been posted
    assert rounds == ([0, 0, 0] if name == "gather" else [0, 1, 1])
    assert len({(hop, peer) for hop, peer, _, sent, _ in wire.posted if sent}) == 2
    assert sum(sent for *_, sent, _ in wire.posted) == 2  # K and V in one message


@pytest.mark.parametrize("name", TRANSPORTS)
def test_the_next_shard_is_under_way(world, name):
    world(3)(under_way, name)


def given_up(rank: int, size: int, name: str) -> None:
    p = ringfa3.plan(Mask(causal=False), "contiguous", 12)
    wire = Gang.of(None).wire(torch.device("cpu"))

    def attend():
        for _ in TRANSPORTS[name](wire).rotate(numbered(p), p):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        attend()


@pytest.mark.parametrize("name", ["ring", "gather"])
def test_an_error_in_a_hop_ends_the_rotation(world, name):
    world(2)(given_up, name)
    world(2).close(patient=False)  # messages were left hanging


slices = st.none() | st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda x: slice(x[0], x[0] + x[1]))


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(slices, min_size=n, max_size=n), min_size=n, max_size=n)))
def test_routes(needs):
    needs = tuple(map(tuple, needs))
    size = len(needs)
    for source in range(size):
        readers = [needs[(source + t) % size][source] for t in range(1, size)]
        assert outbound(needs, source, 1) == hull(readers) == inbound(needs, source, size - 1)
        assert outbound(needs, source, size) is None
        assert inbound(needs, source, 0) is None
        end = last(needs, source)
        assert all(x is None for x in readers[end:])
        assert end == 0 or readers[end - 1] is not None
        for t in range(1, size):
            here = set() if outbound(needs, source, t) is None else set(range(20)[outbound(needs, source, t)])
            for reader in readers[t - 1 :]:
                assert reader is None or set(range(20)[reader]) <= here


@given(a=slices, b=slices)
def test_sums_of_pieces(a, b):
    def piece(keys, value):
        return None if keys is None else Piece(keys, torch.full((2, 1, keys.stop - keys.start, 1, 1), value))

    total = add(piece(a, 1.0), piece(b, 2.0))
    want = torch.zeros(20)
    for keys, value in ((a, 1.0), (b, 2.0)):
        if keys is not None:
            want[keys] += value
    keys = hull([a, b])
    if keys is None:
        assert total is None
    else:
        assert total is not None
        assert total.keys == keys
        assert torch.equal(total.data[1, 0, :, 0, 0], want[keys])


def test_a_ring_needs_two_buffers():
    with pytest.raises(ValueError, match="buffers: wanted at least 2"):
        Ring(Gang.of(None).wire(torch.device("cpu")), buffers=1)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "[/__w/pytorch/third_party/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2700. "
            "This is typically caused by a remote worker crashing. Check the logs",
            "Connection closed by peer [127.0.0.1]:2700",
        ),
        (
            "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, remote process exited, NCCL version 2.27\n"
            "ncclRemoteError: ...",
            "NCCL error in: remote process exited, NCCL version 2.27",
        ),
        ("the group's messages were ended", "the group's messages were ended"),
        ("", "RuntimeError"),
    ],
    ids=["gloo", "nccl", "ours", "nothing"],
)
def test_a_failed_message_says_what_went_wrong_and_not_where_in_the_backend(said: str, kept: str) -> None:
    failed = Wire(None, torch.device("cpu")).failed(1, 2, RuntimeError(said))
    assert str(failed) == f"rank 1 in hop 2: no longer exchanges messages: {kept}"
