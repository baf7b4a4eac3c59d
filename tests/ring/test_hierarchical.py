"""The hierarchical transport on gloo ranks whose hosts are declared: what arrives, what comes home, what is refused."""

from __future__ import annotations

import pytest
import torch

import ringfa3
from ringfa3 import Mask
from ringfa3.gang import Gang
from ringfa3.transport import Hierarchical
from tests.ring.test_pull import MASKS, backward, forward

CPU = torch.device("cpu")


def everything(rank: int, size: int, hosts: tuple[int, ...], depth: int) -> None:
    """Masks of which each has other readers, one after another in the same buffers."""
    of = Hierarchical.of(Gang.of(None), CPU, hosts)
    transport = Hierarchical(of.pool, of.wire, hosts, depth=depth)
    call = 0
    for mask in MASKS:
        for layout in ("contiguous", "zigzag", "striped"):
            p = ringfa3.plan(mask, layout, 23)
            for do in (forward, backward, backward, forward):
                call += 1
                do(transport, p, call % 7)
    forward(transport, ringfa3.plan(Mask(causal=False), "contiguous", 2), 1)
    backward(transport, ringfa3.plan(Mask(causal=False), "contiguous", 2), 1)
    assert transport.pool.waiting() is None


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "hosts", [(0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 1), (0, 1, 2, 3), (0, 0, 0, 0), (0, 1), (0, 1, 2)], ids=str
)
def test_every_slice_arrives_and_every_gradient_comes_home(world, hosts, depth):
    world(len(hosts))(everything, hosts, depth)


def uneven(rank: int, size: int) -> None:
    x = torch.zeros(1, 4, 1, 16)
    with pytest.raises(ValueError, match="the same number of ranks on every host for 'hierarchical:2', got 2 and 1"):
        ringfa3.ring_attention(x, x, x, transport="hierarchical:2")


def test_uneven_hosts_are_refused(world):
    world(3)(uneven)


class Counting:
    """A wire that writes down what is posted: (round, peer, kind, sent?, number of elements)."""

    def __init__(self, wire):
        self.wire, self.posted = wire, []

    def __getattr__(self, name):
        return getattr(self.wire, name)

    def post(self, messages, hop, after=None):
        self.posted += [(hop, m.peer, m.kind, m.send, m.tensor.numel()) for m in messages]
        return self.wire.post(messages, hop, after)


def across(rank: int, size: int) -> None:
    """Between two hosts of two ranks a shard travels once, and its gradient once; only as much as is needed there."""
    of = Hierarchical.of(Gang.of(None), CPU, (0, 0, 1, 1))
    wire = Counting(of.wire)
    transport = Hierarchical(of.pool, wire, (0, 0, 1, 1))
    forward(transport, ringfa3.plan(Mask(causal=False), "contiguous", 12))
    peer = (rank + 2) % 4
    shard = 2 * 2 * 3  # K and V, two batch rows, three keys
    assert wire.posted == [(0, peer, 0, True, shard), (0, peer, 0, False, shard)]
    wire.posted.clear()
    backward(transport, ringfa3.plan(Mask(causal=False), "contiguous", 12))
    assert wire.posted[2:] == [(2, peer, 1, True, shard), (2, peer, 1, False, shard)]
    wire.posted.clear()
    p = ringfa3.plan(Mask(window=(2, 0)), "contiguous", 12)  # over the hosts' edge: two keys of rank 1, for rank 2
    forward(transport, p)
    assert wire.posted == {1: [(0, 3, 0, True, 8)], 3: [(0, 1, 0, False, 8)]}.get(rank, [])


def test_what_crosses_between_hosts(world):
    world(4)(across)
