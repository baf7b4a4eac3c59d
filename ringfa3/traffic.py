"""Traffic: what this rank's calls send and receive, counted where the transports hand it over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ringfa3.gang import gangs
from ringfa3.transport.tally import Tally


@contextmanager
def counted() -> Iterator[Tally]:
    """Count the bytes of keys, values, scales and gradients that this rank moves in the block, on every group.

    To be read at the block's end, when the handles of its calls have been waited for. Of a CUDA graph the capture
    counts, and no replay.

    Yields:
        Tally: filled in at the block's end; sum(tally.received.values()) is the whole.
    """
    counted, before = Tally(), _so_far()
    try:
        yield counted
    finally:
        moved = _so_far() - before
        counted.sent.update(moved.sent)
        counted.received.update(moved.received)


def _so_far() -> Tally:
    """Since the groups' first calls."""
    wires = [wire.tally for gang in gangs() for wire in gang.wires()]
    pools = [pool.tally for gang in gangs() for pool in gang.pools()]
    return sum((*wires, *pools), Tally())
