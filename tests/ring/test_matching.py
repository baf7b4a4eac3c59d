"""NCCL's matching, simulated: it ignores tags, pairs what two ranks exchange by order alone, and holds whole groups up.

gloo, under which the other tests run, matches by tag, and its rounds hold nobody up: what passes there could cross or
hang here. The model is stricter than NCCL: a rank's next group begins when all of this one is done, and nothing is
sent before its receiver is there.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringfa3 import Mask, Plan
from ringfa3.mesh import line
from ringfa3.transport import Gather, Hierarchical, Ring
from ringfa3.transport.pool import Pool
from ringfa3.transport.wire import Flight, Message
from ringfa3.ulysses import Heads, deal_heads
from tests.ring.masks import masks

LAYOUTS = ("contiguous", "zigzag", "striped")
MASKS = (
    Mask(),
    Mask(causal=False),
    Mask(window=(3, 0)),
    Mask(window=(20, 0)),
    Mask(documents=(9, 4, 37)),
    Mask(causal=False, window=(0, 6)),
    Mask(causal=False, documents=(1, 30, 19)),
)


@dataclass(frozen=True)
class Half:
    """One end of a message."""

    peer: int
    send: bool
    size: int
    dtype: torch.dtype
    kind: int


class Tape:
    """A wire that keeps what is posted, round by round, and delivers nothing."""

    def __init__(self) -> None:
        self.groups: list[list[Half]] = []

    def mark(self) -> None:
        """As `Wire.mark`."""

    def settle(self) -> None:
        """As `Wire.settle`."""

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """As `Wire.beside`."""
        return contextlib.nullcontext()

    def post(self, messages: list[Message], hop: int, after: Any = None) -> Flight:
        """As `Wire.post`."""
        if messages:
            self.groups.append([Half(m.peer, m.send, m.tensor.numel(), m.tensor.dtype, m.kind) for m in messages])
        return Flight(self, (), (), hop, None)  # type: ignore[arg-type]

    @property
    def flying(self) -> set[Flight]:
        """As `Wire.flying`."""
        return set()


class Shelf(Pool):
    """A pool of one process: the hierarchy's neighbours are not there, and nobody waits."""

    number = 0

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._buffers, self._parcels, self._slots = {}, {}, {}

    def buffers(self, channel: int, size: int) -> tuple[torch.Tensor, ...]:
        """As `Pool.buffers`."""
        found = tuple(torch.empty(size, dtype=torch.uint8) for _ in range(self.world))
        self._buffers[channel] = found
        return found

    def begin(self) -> Shelf:
        """Its own queue."""
        return self

    def beside(self, number: int, queue: Shelf) -> Shelf:
        """Its own queue, too."""
        return self

    def nothing(self, *args: Any) -> None:
        """What is done elsewhere."""

    end = vacate = offer = fetch = mark = follow = nothing


def play(tapes: list[Tape]) -> list[str]:
    """What NCCL makes of it: one line for each pair that differs and each rank that is left waiting."""
    wrong: list[str] = []
    left = [deque(tape.groups) for tape in tapes]
    heads: list[list[Half]] = [[] for _ in tapes]
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(left):
            if not heads[rank] and queue:
                heads[rank], moved = list(queue.popleft()), True
        for rank, head in enumerate(heads):
            for half in [half for half in head if half.send]:
                first = next(h for h in head if h.send and h.peer == half.peer)
                other = next((h for h in heads[half.peer] if not h.send and h.peer == rank), None)
                if half is not first or other is None:
                    continue
                if (half.size, half.dtype, half.kind) != (other.size, other.dtype, other.kind):
                    wrong.append(f"rank {rank} sends {half}, rank {half.peer} expects {other}")
                _drop(head, half)
                _drop(heads[half.peer], other)
                moved = True
    return wrong + [f"rank {rank} waits for {head}" for rank, head in enumerate(heads) if head]


def _drop(head: list[Half], half: Half) -> None:
    """By identity: equal halves may stand beside it."""
    head[:] = [h for h in head if h is not half]


def tensors(p: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v of a rank: [1, n, 1, 1] bf16, so that gradients have another dtype."""
    return torch.zeros(2, 1, p.kv_lengths[p.rank], 1, 1, dtype=torch.bfloat16).unbind(0)


def passes(transport: Any, p: Plan) -> None:
    """A forward and a backward pass, and a forward pass again."""
    kv = tensors(p)
    list(transport.rotate(kv, p))
    turn = transport.rotate_backward(kv, p)
    list(turn)
    turn.home()
    list(transport.rotate(kv, p))


def posted(name: str, mask: Mask, layout: str, seqlen: int, world: int) -> list[Tape]:
    """What each rank posts."""
    tapes = [Tape() for _ in range(world)]
    for rank, tape in enumerate(tapes):
        p = Plan.build(mask, layout, seqlen, world, rank)
        if name == "ring":
            passes(Ring(tape), p)  # type: ignore[arg-type]
        elif name == "gather":
            passes(Gather(tape), p)  # type: ignore[arg-type]
        else:
            L = int(name.partition(":")[2])
            hosts = [r // L for r in range(world)]
            passes(Hierarchical(Shelf(rank % L, L), tape, hosts), p)  # type: ignore[arg-type]
    return tapes


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["ring", "gather", "hierarchical:1"])
def test_nccl_would_match_what_is_posted(name: str, world: int) -> None:
    all_masks(name, world)


@pytest.mark.parametrize(("world", "ranks"), [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)])
def test_nccl_would_match_hosts_of_several_ranks(world: int, ranks: int) -> None:
    all_masks(f"hierarchical:{ranks}", world)


def all_masks(name: str, world: int) -> None:
    for mask in MASKS:
        for layout in LAYOUTS:
            assert play(posted(name, mask, layout, 50, world)) == [], (mask, layout)


@given(st.data())
def test_nccl_would_match_the_ring_under_any_mask(data: st.DataObject) -> None:
    world = data.draw(st.integers(2, 6))
    seqlen = data.draw(st.integers(0, 40))
    mask, layout = data.draw(masks(seqlen)), data.draw(st.sampled_from(LAYOUTS))
    assert play(posted("ring", mask, layout, seqlen, world)) == []


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("heads", [(8, 8), (16, 2), (9, 3), (8, 1)])
def test_nccl_would_match_ulysses(heads: tuple[int, int], world: int) -> None:
    tapes = [Tape() for _ in range(world)]
    shares = deal_heads(*heads, world)
    for rank, tape in enumerate(tapes):
        p = Plan.build(Mask(), "contiguous", 50, world, rank, axes=line(world))
        one = Heads(tape, rank, tuple(range(world)), shares, p.lengths, p.kv_lengths)  # type: ignore[arg-type]
        q = torch.zeros(1, p.lengths[rank], heads[0], 8, dtype=torch.bfloat16)
        k = q[:, :, : heads[1]]
        whole, keys, _ = one.spread(q, k, k)
        one.home(whole, torch.zeros(1, whole.shape[2], whole.shape[1]))
        one.spread_gradients(q, torch.zeros(1, heads[0], q.shape[1]))
        one.home_gradients(whole.float(), keys.float(), keys.float(), torch.bfloat16)
    assert play(tapes) == []


def test_the_model_sees_what_would_cross_and_what_would_hang() -> None:
    tapes = posted("ring", Mask(causal=False), "contiguous", 50, 4)
    both = next(group for group in tapes[1].groups if sum(half.send for half in group) == 2)
    sends = [i for i, half in enumerate(both) if half.send]
    both[sends[0]], both[sends[1]] = both[sends[1]], both[sends[0]]
    assert "rank 1 sends" in play(tapes)[0]  # a gradient into a shard's room
    tapes = posted("ring", Mask(causal=False), "contiguous", 50, 4)
    tapes[2].groups.insert(0, tapes[2].groups.pop(1)[:1])  # a round that is only half there
    assert any("waits" in line for line in play(tapes))
