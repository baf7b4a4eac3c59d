"""One rank in the process of a Ray actor, where such actors are, and the ranks' numbers that follow from it."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.cluster.worker import Worker
from ringfa3_launch.rank import RankInfo


@dataclass(frozen=True)
class Place:
    """Where an actor runs.

    Args:
        ip: its node's address in the Ray cluster.
        node: Ray's id of the node.
        gpus: what CUDA_VISIBLE_DEVICES calls its GPUs; empty on CPUs.
        pid: of its process.
    """

    ip: str
    node: str
    gpus: tuple[str, ...]
    pid: int

    @property
    def order(self) -> tuple[Any, ...]:
        """Ranks are numbered by it: by node, there by GPU, on CPUs by process."""
        try:
            address = ipaddress.ip_address(self.ip)
            host: tuple[Any, ...] = (address.version, int(address))
        except ValueError:  # a name
            host = (0, self.ip)
        gpus = [(0, int(gpu), "") if gpu.isdigit() else (1, 0, gpu) for gpu in self.gpus]
        return host, self.node, gpus, self.pid


class RankActor:
    """One rank, in the process of a Ray actor. `run` takes as long as the rank lives; CONTROL calls run beside it."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def place(self) -> Place:
        """Where this is. CONTROL."""
        import ray

        here = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in here.get_accelerator_ids().get("GPU", ()))
        return Place(ray.util.get_node_ip_address(), here.get_node_id(), gpus, os.getpid())

    def listen(self, info: RankInfo, settings: str, host: str, gpus: tuple[str, ...], alone: bool) -> int:
        """Be this rank: from now on its worker listens there, at the returned port.

        Args:
            info: which rank.
            settings: as Settings.to_json made them.
            host: address of this node.
            gpus: of all ranks of this node, by rank. Ray shows an actor its own alone; ranks see each other's.
            alone: whether there is no other node.
        """
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if alone and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve, and need not
        self._worker = Worker(info, Settings.from_json(settings), host=host)
        return self._worker.port

    def run(self) -> None:
        """The rank's life."""
        assert self._worker is not None
        self._worker.run()

    def health(self) -> dict[str, Any]:
        """What the rank says of itself. CONTROL."""
        return {"state": "starting", "pid": os.getpid()} if self._worker is None else self._worker.health()


def infos(places: Sequence[Place]) -> list[RankInfo]:
    """Who is who, of ranks at these places: sorted, so that a node's ranks follow each other."""
    size, seen = Counter(place.node for place in places), Counter[str]()
    infos = []
    for rank, place in enumerate(places):
        infos.append(RankInfo(rank, len(places), seen[place.node], size[place.node]))
        seen[place.node] += 1
    return infos


def gpus_of(places: Sequence[Place], rank: int) -> tuple[str, ...]:
    """GPUs of all ranks on this rank's node."""
    return tuple(gpu for place in places if place.node == places[rank].node for gpu in place.gpus)
