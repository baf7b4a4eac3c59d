"""Presets: named sets of ring_attention's options, `ring_attention(q, k, v, **long_context.options())`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Preset", "long_context", "memory_efficient", "short_context"]


@dataclass(frozen=True)
class Preset:
    """Options of `ringfa3.ring_attention` that go together; `dataclasses.replace` makes a variant.

    Args:
        layout: who holds which positions; shard what goes in with the same.
        transport: how keys and values reach the ranks.
        deterministic: gradients bitwise equal from run to run.
    """

    layout: str
    transport: str
    deterministic: bool = False

    def options(self) -> dict[str, str | bool]:
        """The options as keyword arguments."""
        return asdict(self)


# One exchange and no hop to wait for; during a call every rank holds the keys and values of the whole sequence.
short_context = Preset(layout="zigzag", transport="gather")

# The fastest transport that this group has; keys and values of a few ranks at a time.
long_context = Preset(layout="zigzag", transport="auto")

# Neighbour to neighbour: beside its own shard a rank holds the one it computes with and the one that is on its way.
memory_efficient = Preset(layout="zigzag", transport="ring")
