"""Tally: bytes that a wire or a pool has moved, by hop."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tally:
    """Bytes by hop, as each transport numbers its own: what the ring receives in hop 0 is computed with in hop 1.

    Args:
        sent: by this rank, in messages.
        received: by this rank, in messages, or read from another rank's memory.
    """

    sent: Counter[int] = field(default_factory=Counter)
    received: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.sent + other.sent, self.received + other.received)

    def __sub__(self, before: Tally) -> Tally:
        return Tally(self.sent - before.sent, self.received - before.received)
