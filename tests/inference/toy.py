"""A toy model with real pages: its next token follows from all tokens of the sequence, read back out of the pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ringfa3.inference.events import Event
from ringfa3.inference.pages import CacheFull, Pages

VOCAB = 40
EOS = 0
_TABLE = np.random.default_rng(0).standard_normal((9973, VOCAB)).astype(np.float32) * 2


def logits_of(tokens: Sequence[int], reach: int | None = None) -> np.ndarray:
    """fp32 [VOCAB]: of a checksum, which every token and its place changes; or those of the last and `reach` before."""
    checksum = len(tokens)
    for token in tokens if reach is None else tokens[-reach - 1 :]:
        checksum = (checksum * 31 + token + 1) % len(_TABLE)
    return _TABLE[checksum]


def lone_greedy(prompt: Sequence[int], most: int, reach: int | None = None) -> list[int]:
    """What a request for `most` greedy tokens has to yield."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < most and tokens[len(prompt) :][-1:] != [EOS]:
        tokens.append(int(logits_of(tokens, reach).argmax()))
    return tokens[len(prompt) :]


class Toy:
    """A Model (ringfa3.inference.engine); all ranks' slots in one process. What was never written is poison."""

    vocab = VOCAB

    def __init__(
        self, *, world: int = 1, pages: int = 16, page_size: int = 4, max_length: int = 4096, reach: int | None = None
    ) -> None:
        self.pages = Pages(world, pages, page_size, reach=reach)
        self.max_length = max_length
        self.slots = np.full((world, pages * page_size), -(10**6))
        self.calls: list[tuple[str, int]] = []  # what was computed, and how many tokens of it
        self.refuse: list[BaseException | None] = []  # what the next computations raise
        self.gone: Exception | None = None  # why nothing that was computed is to be believed

    def create(self, seq: int) -> None:
        self.pages.create(seq)

    def fork(self, parent: int, child: int) -> None:
        self.pages.fork(parent, child)

    def free(self, seq: int) -> None:
        self.pages.free(seq)

    def truncate(self, seq: int, n: int) -> None:
        self.pages.truncate(seq, n)

    def prefill(self, seq: int, ids: Sequence[int]) -> Tensor:
        self.calls.append(("prefill", len(ids)))
        self._maybe_refuse()
        self._write({seq: ids})
        return torch.from_numpy(self._logits(seq))

    def decode(self, seqs: Sequence[int], ids: Sequence[Sequence[int]]) -> Tensor:
        self.calls.append(("decode", len(seqs)))
        self._maybe_refuse()
        self._write(dict(zip(seqs, ids, strict=True)))
        return torch.from_numpy(np.stack([self._logits(seq) for seq in seqs]))[:, None]

    def _logits(self, seq: int) -> np.ndarray:
        logits = logits_of(self.read(seq), self.pages.reach)
        self.pages.trim(seq)
        return logits

    def check(self) -> None:
        if self.gone is not None:
            raise self.gone

    def read(self, seq: int) -> list[int]:
        """The tokens that the pages hold; -1 for those that are forgotten."""
        tokens = np.full(self.pages.length(seq), -1)
        for rank in range(self.pages.world):
            positions = self.pages.positions(rank, seq)
            table = np.array(self.pages.table(rank, seq), np.int64)
            block, offset = np.divmod(np.arange(len(positions)), self.pages.page_size)
            tokens[positions] = self.slots[rank][table[block] * self.pages.page_size + offset]
        return tokens.tolist()

    def empty(self) -> bool:
        """Whether no sequence is left, and no page used."""
        return not self.pages.sequences and all(self.pages.used(rank) == 0 for rank in range(self.pages.world))

    def _maybe_refuse(self) -> None:
        error = self.refuse.pop(0) if self.refuse else None
        if error is not None:
            raise error

    def _write(self, tokens: dict[int, Sequence[int]]) -> None:
        placed = self.pages.append_all({seq: len(ids) for seq, ids in tokens.items()})
        size = self.pages.page_size
        for rank in range(self.pages.world):
            for each in placed.values():
                for source, target in each.copies[rank]:
                    self.slots[rank, target * size : (target + 1) * size] = self.slots[
                        rank, source * size : (source + 1) * size
                    ]
        for seq, each in placed.items():
            for rank in range(self.pages.world):
                self.slots[rank][each.slots[rank]] = np.asarray(tokens[seq])[each.positions[rank] - each.start]


class Heard(list[Event]):
    """Events of one request, as its callback."""

    def __call__(self, event: Event) -> None:
        assert not self.finish, f"{event} after the end"
        self.append(event)

    @property
    def finish(self) -> str | None:
        return self[-1].finish if self else None

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self if event.token is not None]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self)


def steps(engine, most: int = 10**6) -> Iterator[dict]:
    """Plan and execute until there is nothing to do; the orders."""
    for _ in range(most):
        order = engine.plan()
        if order is None:
            return
        engine.execute(order)
        yield order


__all__ = ["EOS", "VOCAB", "CacheFull", "Heard", "Toy", "logits_of", "lone_greedy", "steps"]
