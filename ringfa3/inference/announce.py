"""Announcing: rank 0 tells all ranks what to do next, by one small broadcast over a gloo group of its own."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_process_group_store

from ringfa3.board import Peer, await_keys
from ringfa3.errors import RankFailed

FIRST = 8192  # bytes of the one broadcast that nearly every order fits: a chunk of 512 tokens and a decode of 64
LENGTH = 8  # of them say how long the order is
ENDING = 0.5  # seconds that a dying process may take from its connections' end to its own


class Announcer:
    """Orders, from rank 0 to all ranks. Making it is collective; alone, rank 0 has nobody to tell.

    Beside NCCL too the orders travel by gloo: they are for the host, and no stream waits for them.

    Args:
        group: the ranks; None: all of them.
        timeout: seconds that a rank waits for an order (rank 0 therefore says something now and then), and rank 0 for
            the others to take one.

    Raises:
        RankFailed: a rank did not come in time.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout: float = 60.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout: wanted a positive number of seconds, got {timeout!r}")
        self.rank, self.world, self.timeout = 0, 1, timeout
        self._group: Any = None
        self._first = torch.zeros(FIRST, dtype=torch.uint8)
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        store = _get_process_group_store(group or dist.distributed_c10d._get_default_group())
        arrived = store.add("ringfa3/announcers", 1)  # a group may have several, one after the other
        store = PrefixStore(f"ringfa3/announcer/{(arrived - 1) // self.world}", store)
        self._peers = _meet(store, self.rank, self.world, timeout)
        # not by new_group: that names groups by how many this process has made, in which ranks may differ
        self._group = dist.ProcessGroupGloo(store, self.rank, self.world, timedelta(seconds=timeout))

    def say(self, order: dict[str, Any]) -> None:
        """Tell the others. Returns once the order is sent, which may be before they hear it.

        Args:
            order: what JSON can say.

        Raises:
            RankFailed: a rank died, or does not take orders any more.
        """
        if self.rank != 0:
            raise RuntimeError(f"order: wanted it from rank 0, got one from rank {self.rank}")
        if self._group is None:
            return
        text = json.dumps(order, separators=(",", ":")).encode()
        room = FIRST - LENGTH
        head = len(text).to_bytes(LENGTH, "little") + text[:room]
        self._first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._broadcast(self._first)
        if len(text) > room:
            self._broadcast(torch.frombuffer(bytearray(text[room:]), dtype=torch.uint8))

    def hear(self) -> dict[str, Any]:
        """The next order of rank 0.

        Raises:
            RankFailed: rank 0 or one between here and there died, or said nothing within the timeout.
        """
        if self.rank == 0:
            raise RuntimeError("order: wanted to hear one from rank 0, which is this rank")
        self._broadcast(self._first)
        first = self._first.numpy().tobytes()
        length = int.from_bytes(first[:LENGTH], "little")
        text = first[LENGTH : LENGTH + length]
        if length > len(text):
            rest = torch.empty(length - len(text), dtype=torch.uint8)
            self._broadcast(rest)
            text += rest.numpy().tobytes()
        order: dict[str, Any] = json.loads(text)
        return order

    def close(self) -> None:
        """Leave the group; the announcer is of no use any more."""
        self._group = None

    def _broadcast(self, message: torch.Tensor) -> None:
        try:
            self._group.broadcast(message, 0).wait()
        except RuntimeError as error:
            raise self._failure(error) from error

    def _failure(self, error: RuntimeError) -> RankFailed:
        """Who failed: a process that is known to have ended, else rank 0, or the one after it."""
        deadline = time.monotonic() + ENDING
        said = re.sub(r"^\[[^]]*\] *|\. .*", "", str(error).partition("\n")[0])  # gloo's first sentence, not where
        while True:
            for rank, peer in enumerate(self._peers):
                if rank != self.rank and peer.dead():
                    return RankFailed(rank, peer.host, None, "its process has ended")
            if time.monotonic() > deadline:
                rank = 0 if self.rank else 1
                message = f"no order passes between it and rank {self.rank} (timeout {self.timeout:g} s): {said}"
                return RankFailed(rank, self._peers[rank].host, None, message)
            time.sleep(0.01)


def _meet(store: Store, rank: int, world: int, timeout: float) -> tuple[Peer, ...]:
    """Who the ranks are."""
    keys = {other: f"peer/{other}" for other in range(world)}
    store.set(keys[rank], json.dumps(asdict(Peer.here())))
    await_keys(store, keys, time.monotonic() + timeout, timeout)
    return tuple(Peer(**json.loads(store.get(key))) for key in keys.values())
