"""counted: what a rank moves is counted on every group, whenever it was made and whether or not it is still there."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

import ringfa3
from ringfa3 import Mask
from ringfa3.traffic import counted
from ringfa3.transport.tally import Tally

ROWS, WIDTH = 4, 2 * 1 * 16 * 4  # keys a rank; bytes of one of them, K and V in fp32


def attend(size: int, group: dist.ProcessGroup, transport: str) -> None:
    """One forward pass in which every rank reads every key."""
    p = ringfa3.plan(Mask(causal=False), "contiguous", ROWS * size, group)
    x = torch.randn(1, ROWS, 1, 16)
    ringfa3.ring_attention(x, x, x, plan=p, transport=transport)


def total(moved: Tally) -> int:
    return sum(moved.received.values())


def forget() -> None:
    """Let go of groups that plans made before still hold."""
    for seqlen in range(100, 120):
        ringfa3.plan(Mask(), "contiguous", seqlen)
    gc.collect()


def destroyed(rank: int, size: int, transport: str) -> list[int]:
    """Bytes received: on a group made and destroyed within; one made before; within a block in a block; afterwards."""
    found = []
    before = dist.new_group(range(size))
    attend(size, before, transport)
    kept = dist.new_group(range(size))
    attend(size, kept, transport)  # what other groups moved before must not make up for it
    with counted() as outer:
        with counted() as moved:
            within = dist.new_group(range(size))
            attend(size, within, transport)
            gone = weakref.ref(within)
            dist.destroy_process_group(within)
            del within
            forget()
            assert gone() is None
        found.append(total(moved))
        with counted() as moved:
            attend(size, before, transport)
            gone = weakref.ref(before)
            dist.destroy_process_group(before)
            del before
            forget()
            assert gone() is None
        found.append(total(moved))
        attend(size, kept, transport)
    found.append(total(outer))
    with counted() as moved:
        pass
    found.append(total(moved))
    dist.destroy_process_group(kept)
    return found


@pytest.mark.parametrize("transport", ["ring", "pull"])
def test_a_group_that_is_destroyed_is_counted(world, transport):
    once = 2 * ROWS * WIDTH  # from each of two other ranks
    for found in world(3)(destroyed, transport):
        assert found == [once, once, 3 * once, 0]


def failing(rank: int, size: int) -> int:
    """Bytes that a block moved which ended in an error."""
    kept = []
    with pytest.raises(KeyError, match="a caller's"):
        with_an_error(size, kept)
    return total(kept[0])


def with_an_error(size: int, kept: list[Tally]) -> None:
    with counted() as moved:
        kept.append(moved)
        attend(size, dist.group.WORLD, "ring")
        raise KeyError("a caller's")


def test_a_block_that_fails_has_counted(world):
    assert world(2)(failing) == [ROWS * WIDTH] * 2
