"""Flags: words in memory that all ranks of one host map; the ranks' queues wait on them and write them.

One word a channel, owner and reader says whose turn it is with the owner's buffer: EMPTY, the owner may fill it; FULL,
the reader may read. Only the one whose turn it is writes the word, and the turns alternate: no numbers that grow, so
a CUDA graph may be replayed, and a word is right from the beginning, where the memory is zero. A reader that a call
does not need is not offered anything, and its word stays EMPTY: who reads may change from call to call.

One more word a rank and queue says on whom that queue waits, for people and for the watchdog.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import NamedTuple

CHANNELS = 4  # shards (two, for the hierarchy), gradients, gradients between holders
QUEUES = 4  # of a rank: the caller's, and those beside it
STRIDE = 16  # words of 4 bytes from flag to flag: a cache line, so that ranks do not disturb each other
EMPTY, FULL = 0, 1


class Op(NamedTuple):
    """Wait until a word has this value, or write it."""

    wait: bool
    word: int
    value: int


class Flags:
    """The words, as this process sees them.

    Args:
        memory: zeros at first; see `size`.
        world: number of ranks that share it; rank: this one's number among them.
    """

    def __init__(self, memory: mmap.mmap, world: int, rank: int) -> None:
        self.memory, self.world, self.rank = memory, world, rank
        self.words = memoryview(memory).cast("I")

    @staticmethod
    def size(world: int) -> int:
        """Bytes, whole pages."""
        words = STRIDE * (CHANNELS * world * world + QUEUES * world)
        return -(-4 * words // mmap.PAGESIZE) * mmap.PAGESIZE

    def turn(self, channel: int, owner: int, reader: int) -> int:
        """The word for this pair."""
        return STRIDE * ((channel * self.world + owner) * self.world + reader)

    def emptied(self, queue: int, channel: int, readers: Sequence[int], hop: int) -> list[Op]:
        """Wait until the readers have read this rank's buffer."""
        words = [self.turn(channel, self.rank, reader) for reader in readers]
        return self._noted(queue, channel, self.rank, hop, [Op(True, word, EMPTY) for word in words])

    def filled(self, queue: int, channel: int, owner: int, hop: int) -> list[Op]:
        """Wait until the owner's buffer may be read."""
        return self._noted(queue, channel, owner, hop, [Op(True, self.turn(channel, owner, self.rank), FULL)])

    def fill(self, channel: int, readers: Sequence[int]) -> list[Op]:
        """Say that the readers may read this rank's buffer."""
        return [Op(False, self.turn(channel, self.rank, reader), FULL) for reader in readers]

    def empty(self, channel: int, owner: int) -> list[Op]:
        """Say that this rank has read the owner's buffer."""
        return [Op(False, self.turn(channel, owner, self.rank), EMPTY)]

    def waiting(self, rank: int) -> tuple[int, int] | None:
        """(rank waited for, hop) of one of this rank's queues that waits; None where none does."""
        for queue in range(QUEUES):
            code = self.words[self._where(rank, queue)]
            if not code:
                continue
            code, owner = divmod(code - 1, self.world)
            hop, channel = divmod(code, CHANNELS)
            if owner != rank:
                return owner, hop
            for reader in range(self.world):
                if self.words[self.turn(channel, rank, reader)] != EMPTY:
                    return reader, hop
        return None

    def release(self) -> None:
        """End every wait of this rank's queues, now."""
        for channel in range(CHANNELS):
            for other in range(self.world):
                self.words[self.turn(channel, other, self.rank)] = FULL
                self.words[self.turn(channel, self.rank, other)] = EMPTY

    def _noted(self, queue: int, channel: int, owner: int, hop: int, waits: list[Op]) -> list[Op]:
        """The waits, and beside them the word that says where this queue is."""
        where = self._where(self.rank, queue)
        code = (hop * CHANNELS + channel) * self.world + owner + 1
        return [Op(False, where, code), *waits, Op(False, where, 0)]

    def _where(self, rank: int, queue: int) -> int:
        return STRIDE * (CHANNELS * self.world * self.world + rank * QUEUES + queue)
