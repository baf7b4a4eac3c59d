"""A party: a meeting's members as a group that torch's symmetric memory finds by its name, to trade handles of memory.

Whether they find each other must not depend on what else a rank has done: new_group names a group of some ranks by how
many groups a rank is in, and torch 2.11 to 2.13 number the keys of such trades by how many a rank has made in all its
groups together. Ranks in which these differ would wait for each other for ever.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import finalize

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, _register_process_group, _unregister_process_group

from ringfa3.transport.meeting import Meeting


class Party:
    """See the module. Making one is a round of the meeting; its name is known as long as it lives.

    Args:
        meeting: of the members, in their order.
        store: of a group that they all are in.
    """

    def __init__(self, meeting: Meeting, store: Store) -> None:
        self.name: Any = meeting.exchange(f"ringfa3 {secrets.token_hex(8)}")[0]
        self._store = Renumbered(PrefixStore(self.name, store))  # kept: C++ alone would forget what Python adds
        # no messages can be sent in it: it has no backend
        self._group = dist.ProcessGroup(self._store, meeting.members.index(meeting.rank), len(meeting.members))
        _register_process_group(self.name, self._group)
        finalize(self, _unregister_process_group, self.name).atexit = False


class Renumbered(Store):
    """A store for keys "purpose/number/rank", whose numbers count what came through here.

    Args:
        store: where the values go.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._under = store
        self._numbers: defaultdict[str, dict[str, int]] = defaultdict(dict)  # by purpose, ours for torch's

    def set(self, key: str, value: Any) -> None:
        """See torch's Store."""
        self._under.set(self._renamed(key), value)

    def get(self, key: str) -> bytes:
        """See torch's Store; waits for the key."""
        return self._under.get(self._renamed(key))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """See torch's Store."""
        self._under.wait([self._renamed(key) for key in keys], *(() if timeout is None else (timeout,)))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """See torch's Store; waits for all of them."""
        return [self.get(key) for key in keys]

    def _renamed(self, key: str) -> str:
        purpose, *place = key.rsplit("/", 2)
        if len(place) < 2:  # not of a trade
            return key
        number, rank = place
        known = self._numbers[purpose]
        return f"{purpose}/{known.setdefault(number, len(known))}/{rank}"
