"""What one rank keeps of one sequence: which positions, in which pages. Accounting only."""

from __future__ import annotations

from array import array
from bisect import bisect_left

import numpy as np

from ringfa3.layout import Run


class Share:
    """What one rank keeps of one sequence: runs of positions (start, step, size; how many before it) and pages.

    `dropped` tokens that came before those, in whole pages, are forgotten; all of them are below position `floor`.
    """

    __slots__ = ("before", "dropped", "floor", "length", "sizes", "starts", "steps", "table")

    def __init__(self) -> None:
        self.length = self.dropped = self.floor = 0
        self.starts: list[int] = []
        self.steps: list[int] = []
        self.sizes: list[int] = []
        self.before: list[int] = []
        self.table = array("i")

    def copy(self) -> Share:
        other = Share()
        other.length, other.dropped, other.floor = self.length, self.dropped, self.floor
        for name in ("starts", "steps", "sizes", "before", "table"):
            setattr(other, name, getattr(self, name)[:])
        return other

    def extend(self, run: Run) -> None:
        """Enter positions past the last one; as part of the last run, where that goes on in equal steps."""
        start, stop, step = run
        size = -(-(stop - start) // step)
        if self.sizes:
            gap = start - (self.starts[-1] + (self.sizes[-1] - 1) * self.steps[-1])
            if (gap == self.steps[-1] or self.sizes[-1] == 1) and (gap == step or size == 1):
                self.steps[-1] = gap
                self.sizes[-1] += size
                self.length += size
                return
        self.starts.append(start)
        self.steps.append(step)
        self.sizes.append(size)
        self.before.append(self.length)
        self.length += size

    def below(self, position: int) -> int:
        """How many lie below that position."""
        run = bisect_left(self.starts, position) - 1
        if run < 0:
            return 0
        inside = -((self.starts[run] - position) // self.steps[run])
        return self.before[run] + min(inside, self.sizes[run])

    def drop(self, count: int) -> None:
        """Forget the first `count` of them; the table stays."""
        whole = bisect_left(self.before, count) - 1  # runs before the one that the last of them is in
        for column in (self.starts, self.steps, self.sizes, self.before):
            del column[:whole]
        inside = count - self.before[0]
        self.floor = self.starts[0] + (inside - 1) * self.steps[0] + 1
        self.starts[0] += inside * self.steps[0]
        self.sizes[0] -= inside
        self.before = [0, *(before - count for before in self.before[1:])]
        if self.sizes[0] == 0:
            for column in (self.starts, self.steps, self.sizes, self.before):
                del column[0]
        self.length -= count
        self.dropped += count

    def truncate(self, position: int) -> None:
        """Forget that position and all after it; the table stays."""
        self.length = self.below(position)
        runs = bisect_left(self.starts, position)
        for column in (self.starts, self.steps, self.sizes, self.before):
            del column[runs:]
        if runs:
            self.sizes[-1] = self.length - self.before[-1]
        if position == 0:
            self.dropped = self.floor = 0

    def audit(self, name: str, page_size: int) -> None:
        if self.before != np.cumsum([0, *self.sizes]).tolist()[:-1] or self.length != sum(self.sizes):
            raise RuntimeError(f"{name}: its runs do not add up to {self.length} tokens")
        if self.dropped % page_size or (self.dropped and self.floor < self.dropped):
            raise RuntimeError(f"{name}: {self.dropped} tokens below {self.floor} forgotten, which are no whole pages")
        if len(self.table) != -(-self.length // page_size):
            raise RuntimeError(f"{name}: {len(self.table)} pages for {self.length} tokens")
