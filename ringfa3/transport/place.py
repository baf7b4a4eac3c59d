"""Where the ranks of a group are: which of them share a host, and which can read each other's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ringfa3.board import Peer
from ringfa3.transport import cuda
from ringfa3.transport.meeting import Meeting


@dataclass(frozen=True)
class Place:
    """One rank's.

    Args:
        peer: its process.
        gpu: UUID of its GPU; "" on CPU.
        visible, mapped: UUIDs of the GPUs that its process sees, and of those whose memory its GPU can map.
        lacks: what its process lacks for sharing memory, "" where nothing.
    """

    peer: Peer
    gpu: str = ""
    visible: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    lacks: str = ""


def places(meeting: Meeting, device: torch.device) -> tuple[Place, ...]:
    """All members' places, for tensors on such a device. A round of the meeting."""
    mine: dict[str, Any] = {"peer": asdict(Peer.here())}
    if device.type == "cuda":
        gpu, visible, mapped = cuda.reach(device)
        mine |= {"gpu": gpu, "visible": visible, "mapped": mapped, "lacks": cuda.why_not()}
    found = []
    for told in meeting.exchange(mine):
        peer = Peer(**told.pop("peer"))
        for name in {"visible", "mapped"} & told.keys():
            told[name] = tuple(told[name])
        found.append(Place(peer, **told))
    return tuple(found)


def hosts_of(found: Sequence[Place]) -> tuple[int, ...]:
    """Number of each rank's host, in the order in which ranks first name them."""
    machines = list(dict.fromkeys(place.peer.machine for place in found))
    return tuple(machines.index(place.peer.machine) for place in found)


def apart(found: Sequence[Place], members: Sequence[int]) -> str:
    """Why these ranks cannot read each other's memory, for people; "" where they can."""
    for rank in members:
        if found[rank].lacks:
            return f"rank {rank}: {found[rank].lacks}"
    for i, a in enumerate(members):
        for b in members[i + 1 :]:
            one, other = found[a], found[b]
            if one.peer.machine != other.peer.machine:
                return f"rank {a} is on {one.peer.host} and rank {b} on {other.peer.host}, or in another container"
            if one.gpu and one.gpu == other.gpu:
                return f"ranks {a} and {b} share one GPU"
            # a GPU that a process does not see cannot be asked about: the driver refuses it later, if it must
            for x, y in ((one, other), (other, one)):
                if y.gpu in x.visible and y.gpu not in x.mapped:
                    return f"the GPUs of ranks {a} and {b} have no peer access"
    return ""
