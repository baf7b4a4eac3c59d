"""Orders: what every rank does to its model in one step, as rank 0 has planned it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ringfa3.inference.pages import CacheFull, Pages


class Model(Protocol):
    """What the engine needs of a runner. Collective: all ranks make the same calls in the same order."""

    @property
    def pages(self) -> Pages:
        """Who holds what."""
        ...

    @property
    def vocab(self) -> int:
        """Number of tokens there are."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may have."""
        ...

    def create(self, seq: int, /) -> None:
        """Begin a sequence."""
        ...

    def fork(self, parent: int, child: int, /) -> None:
        """Begin a sequence with another one's tokens."""
        ...

    def free(self, seq: int, /) -> None:
        """Forget a sequence."""
        ...

    def truncate(self, seq: int, n: int, /) -> None:
        """Keep its first n tokens."""
        ...

    def prefill(self, seq: int, ids: Sequence[int], /) -> Tensor:
        """Append a chunk; fp32 logits [vocab] after its last token."""
        ...

    def decode(self, seqs: Sequence[int], ids: Sequence[Sequence[int]], /) -> Tensor:
        """Append the same number of tokens to each sequence; fp32 logits [B, n, vocab]."""
        ...

    def check(self) -> None:
        """Raise where the ranks are known to have failed: what was computed meanwhile is worth nothing."""
        ...


def perform(model: Model, order: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Do it.

    Args:
        order: {"do": "step", "number"} and, in the order in which they are done: "free" [sequence]; "prefill"
            [sequence, ids] and "decode" [sequences, a token for each]; for those who come next, "fork" [[parent,
            child]], "truncate" [[sequence, length]], "create" [sequence].

    Returns:
        fp32 logits [vocab] after the prefill, and [B, vocab] after the decode; None where there is none.

    Raises:
        CacheFull: of the prefill or decode; the rest of the order has been done.
    """
    for sequence in order.get("free", ()):
        model.free(sequence)
    full: CacheFull | None = None
    prefilled = decoded = None
    try:
        if "prefill" in order:
            sequence, ids = order["prefill"]
            prefilled = model.prefill(sequence, ids)
        if "decode" in order:
            sequences, ids = order["decode"]
            decoded = model.decode(sequences, [[token] for token in ids])[:, -1]
    except CacheFull as error:
        full = error
    for parent, child in order.get("fork", ()):
        model.fork(parent, child)
    for sequence, length in order.get("truncate", ()):
        model.truncate(sequence, length)
    for sequence in order.get("create", ()):
        model.create(sequence)
    if full is not None:
        raise full
    return prefilled, decoded
