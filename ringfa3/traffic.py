"""Traffic: what this rank's calls send and receive, counted where the transports hand it over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ringfa3.gang import tallies
from ringfa3.transport.tally import Tally


@contextmanager
def counted() -> Iterator[Tally]:
    """Count the bytes of keys, values, scales and gradients that this rank moves in the block, on every group:
    also on one that is destroyed within.

    To be read at the block's end, when the handles of its calls have been waited for. Of a CUDA graph the capture
    counts, and no replay.

    Yields:
        Tally: filled in at the block's end; sum(tally.received.values()) is the whole.
    """
    counted = Tally()
    with tallies() as so_far:
        before = so_far()
        try:
            yield counted
        finally:
            moved = so_far() - before
            counted.sent.update(moved.sent)
            counted.received.update(moved.received)
