"""Which transport serves a call: the one that was named, or the best for the shards' size and where the ranks are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from ringfa3.plan import Plan
from ringfa3.transport.gather import Gather
from ringfa3.transport.hierarchical import Hierarchical
from ringfa3.transport.place import apart, hosts_of
from ringfa3.transport.pull import DEPTH, Pull
from ringfa3.transport.ring import Ring
from ringfa3.transport.transport import Transport

if TYPE_CHECKING:
    from ringfa3.gang import Gang  # which keeps what transports are made of

NAMES = ("auto", "pull", "ring", "gather", "hierarchical", "ulysses")  # ulysses: has no hops, so no transport here
NUMBERED = {"hierarchical": "ranks a host", "pull": "landing buffers"}  # what a number after the name counts
GATHER_BYTES = 64 << 10  # of a rank's K and V: below, one exchange beats a round a rank (docs/decisions.md)


def check(name: str) -> None:
    """Raise ValueError where no transport has this name."""
    base, colon, number = name.partition(":") if isinstance(name, str) else ("", "", "")
    if base not in NAMES or (colon and (base not in NUMBERED or not number.isdecimal() or int(number) < 1)):
        wanted = ", ".join(map(repr, NAMES))
        more = " or ".join(f"'{base}:' and {what}" for base, what in NUMBERED.items())
        raise ValueError(f"transport: wanted one of {wanted}, {more}, got {name!r}")


def choose(
    name: str, plan: Plan, size: int, device: torch.device, gang: Gang, hosts: tuple[str, ...] = ()
) -> Transport:
    """The transport of this name, the same on every rank. The first call waits for all ranks.

    Args:
        name: "ring", "gather", "pull" (all ranks on one host; "pull:3" lands slices in 3 buffers, not 2),
            "hierarchical" (hosts of equally many ranks each), "hierarchical:2" (every 2 successive ranks are taken for
            a host), or "auto".
        size: bytes of the largest shard's keys and values.
        gang: of the plan's ranks.
        hosts: each rank's host, for messages.

    Raises:
        ValueError: the ranks' places do not allow what was named; it says why, on every rank.
    """
    base, _, number = name.partition(":")
    if plan.world == 1:  # nothing moves, whatever the name
        return Ring(gang.wire(device, hosts))
    if base == "auto":
        base = automatic(size, device, gang)
    if base == "pull":
        everybody = range(plan.world)
        reason = apart(gang.places(device), everybody)
        if reason:
            raise ValueError(f"transport: wanted ranks that can read each other's memory for 'pull', got: {reason}")
        return Pull(gang.pool(device, everybody), depth=int(number or DEPTH))
    if base == "hierarchical":
        declared = tuple(rank // int(number) for rank in range(plan.world)) if number else None
        return Hierarchical.of(gang, device, declared, hosts, called=name if number else base)
    wire = gang.wire(device, hosts)
    return Gather(wire) if base == "gather" else Ring(wire)


def automatic(size: int, device: torch.device, gang: Gang) -> str:
    """What "auto" means: small shards are gathered; on GPUs pull wherever the ranks' places allow, else the ring."""
    if size < GATHER_BYTES:
        return "gather"
    if device.type != "cuda":
        return "ring"
    found = gang.places(device)
    hosts = hosts_of(found)
    members = [[rank for rank, h in enumerate(hosts) if h == host] for host in sorted(set(hosts))]
    if any(apart(found, group) for group in members):
        return "ring"
    if len(members) == 1:
        return "pull"
    counts = set(Counter(hosts).values())
    return "hierarchical" if len(counts) == 1 and counts != {1} else "ring"
