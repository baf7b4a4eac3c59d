"""Which slice of a shard travels on which leg of the ring: hulls of what the ranks need, the same sum on every rank.

A shard goes round: it is with rank source + t at step t. `needs[r][s]` is what rank r needs of rank s's shard.
"""

from __future__ import annotations

from collections.abc import Iterable

Needs = tuple[tuple[slice | None, ...], ...]


def hull(slices: Iterable[slice | None]) -> slice | None:
    """The smallest slice that holds all of them; None where there is nothing to hold."""
    held = [x for x in slices if x is not None and x.start < x.stop]
    return slice(min(x.start for x in held), max(x.stop for x in held)) if held else None


def outbound(needs: Needs, source: int, step: int) -> slice | None:
    """What reaches rank source + step of the shard: what that rank and the ones after it on the ring need."""
    world = len(needs)
    return hull(needs[(source + t) % world][source] for t in range(step, world))


def inbound(needs: Needs, source: int, step: int) -> slice | None:
    """Where the gradients that ranks source + 1 .. source + step computed for the shard are not zero."""
    return hull(needs[(source + t) % len(needs)][source] for t in range(1, step + 1))


def last(needs: Needs, source: int) -> int:
    """The last step at which another rank than the owner needs the shard, where its gradient turns home. 0: never."""
    world = len(needs)
    return max((t for t in range(1, world) if hull([needs[(source + t) % world][source]]) is not None), default=0)


def length(keys: slice | None) -> int:
    """Number of keys in a slice."""
    return 0 if keys is None else keys.stop - keys.start


def inside(keys: slice, held: slice) -> slice:
    """The slice `keys` of a shard, as indices into the piece `held` of it."""
    return slice(keys.start - held.start, keys.stop - held.start)
