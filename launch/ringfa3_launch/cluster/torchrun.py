"""Ranks of a torchrun job as a gang: every process of the job keeps one rank's process, and starts it anew when told.

The job's processes themselves compute nothing, so that torchrun, which ends a job whose process dies, does not notice
when a rank does. Rank 0's process holds the cluster; the others connect to it, where and with which secret they read
from torchrun's store, and do what it says until it closes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from ringfa3 import RankFailed
from ringfa3_launch.cluster.channel import Channel, ChannelError
from ringfa3_launch.cluster.launcher import Member
from ringfa3_launch.cluster.listener import Listener, connect
from ringfa3_launch.cluster.processes import Forked, Processes, Spawned
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.cluster.spawn import LOOPBACK
from ringfa3_launch.rank import TORCHRUN, RankInfo, pick_device

KEY = "ringfa3/cluster"
LOOK = 0.1  # seconds between a keeper's looks at its rank
ANSWER = 10.0  # seconds that a keeper may take to kill a rank
SMALL = 1 << 20  # bytes of a message's body; keepers send none


class _Kept:
    """A rank that another process of the job keeps, seen from rank 0's: a `Member`."""

    def __init__(self, info: RankInfo, channel: Channel) -> None:
        self.info, self.rank, self.host, self.port = info, info.rank, "", 0
        self._channel = channel
        self._changed = threading.Condition()
        self._attempt = -1
        self._how: str | None = None
        self._gone = False
        self._killed = True

    def tell(self, settings: Settings, attempt: int) -> None:
        """Have it started."""
        with self._changed:
            self._attempt, self._how, self._killed, self.port = attempt, None, False, 0
        self._send({"do": "start", "settings": dataclasses.asdict(settings), "attempt": attempt})

    def listen(self, deadline: float) -> None:
        """See `Spawned.listen`."""
        with self._changed:
            while not self.port:
                if (how := self.ended()) is not None:
                    raise ChildProcessError(f"rank {self.rank} ended by {how} before it listened")
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise TimeoutError(f"rank {self.rank}: wanted it to listen in time, got nothing")

    def ended(self) -> str | None:
        """See `Member.ended`."""
        return "the end of its torchrun process" if self._gone else self._how

    def kill(self) -> None:
        """See `Spawned.kill`; waits for it."""
        self._send({"do": "kill"})
        with self._changed:
            self._changed.wait_for(lambda: self._killed or self._gone, ANSWER)

    def dismiss(self) -> None:
        """The cluster has closed."""
        self._send({"do": "end"})

    def hear(self) -> None:
        """What its keeper says, until that goes."""
        try:
            while True:
                said = self._channel.receive().header
                with self._changed:
                    if said.get("attempt") == self._attempt:
                        self.host, self.port = str(said.get("host", self.host)), int(said.get("port", self.port))
                        self._how = said.get("ended", self._how)
                        self._killed = self._killed or bool(said.get("killed"))
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._gone = True
                self._changed.notify_all()

    def _send(self, header: dict[str, Any]) -> None:
        try:
            self._channel.send(header)
        except ChannelError:
            with self._changed:
                self._gone = True


class TorchrunLauncher:
    """The ranks of this torchrun job: a `Launcher`, in the process of rank 0. Made by `join`."""

    def __init__(self, info: RankInfo, store: Any, host: str, processes: Processes) -> None:
        self.world = info.world
        self._info, self._host, self._processes = info, host, processes
        self._own: Spawned | Forked | None = None
        self._kept: dict[int, _Kept] = {}
        self._changed = threading.Condition()
        token = secrets.token_hex(32)
        self._listener = Listener(host, token, self._keeper, max_body=SMALL)
        store.set(KEY, json.dumps({"host": host, "port": self._listener.port, "token": token}))

    @staticmethod
    def join(*, device: str = "auto") -> TorchrunLauncher | None:
        """On rank 0 the launcher; on others None, when the cluster has closed: they keep their rank meanwhile.

        Raises:
            ValueError: torchrun did not start this process, or there are fewer GPUs than ranks.
            RankFailed: rank 0's process has gone.
        """
        missing = [name for name in TORCHRUN if not os.environ.get(name)]
        if missing:
            raise ValueError(f"environment: wanted torchrun's {', '.join(missing)}, got none: start it with torchrun")
        from torch.distributed.rendezvous import rendezvous

        info = RankInfo.from_env()
        place = device if device == "cpu" else pick_device(info.local_rank, info.local_world, device).type
        processes = Processes(place, alone=info.world == info.local_world)
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=300)))
        host = LOOPBACK if info.world == info.local_world else _own_address(info)
        if info.rank == 0:
            return TorchrunLauncher(info, store, host, processes)
        try:
            _keep(info, host, processes, json.loads(store.get(KEY)))
        finally:
            processes.close()
        return None

    def start(self, settings: Settings, attempt: int) -> Sequence[Member]:
        """See `Launcher.start`."""
        self.kill()
        deadline = time.monotonic() + settings.start_timeout
        with self._changed:
            while len(self._kept) < self.world - 1:
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    absent = ", ".join(str(rank) for rank in range(1, self.world) if rank not in self._kept)
                    raise TimeoutError(f"rank {absent} of {self.world}: wanted its process to call, it did not")
        try:
            for kept in self._kept.values():
                kept.tell(settings, attempt)
            self._own = self._processes.start(self._info, settings, host=self._host)
            members: list[Member] = [self._own]
            self._own.listen(deadline)
            for rank in range(1, self.world):
                self._kept[rank].listen(deadline)
                members.append(self._kept[rank])
        except BaseException:
            self.kill()
            raise
        return members

    def kill(self) -> None:
        """See `Launcher.kill`."""
        for kept in self._kept.values():
            kept.kill()
        if self._own is not None:
            self._own.kill()
            self._own = None

    def close(self) -> None:
        """See `Launcher.close`."""
        self.kill()
        for kept in self._kept.values():
            kept.dismiss()
        self._listener.close()
        self._processes.close()

    def _keeper(self, channel: Channel) -> None:
        """One other process of the job, from its connection's thread."""
        info = RankInfo(**channel.receive(timeout=ANSWER).header)
        kept = _Kept(info, channel)
        with self._changed:
            self._kept[info.rank] = kept
            self._changed.notify_all()
        kept.hear()


def _keep(info: RankInfo, host: str, processes: Processes, where: dict[str, Any]) -> None:
    """Keep this process's rank, as rank 0's process says, until the cluster closes."""
    channel = connect(where["host"], where["port"], where["token"], max_body=SMALL)
    channel.send(dataclasses.asdict(info))
    rank: Spawned | Forked | None = None
    attempt, told = -1, True  # told: how the rank ended
    try:
        while True:
            if rank is not None and not told and (how := rank.ended()) is not None:
                told = True
                channel.send({"attempt": attempt, "ended": how})
            try:
                said = channel.receive(timeout=LOOK).header
            except TimeoutError:
                continue
            if said["do"] == "end":
                return
            if rank is not None:
                rank.kill()
                rank = None
            if said["do"] == "kill":
                channel.send({"attempt": attempt, "killed": True})
                continue
            attempt, told, settings = said["attempt"], False, Settings(**said["settings"])
            try:
                rank = processes.start(info, settings, host=host)
                rank.listen(time.monotonic() + settings.start_timeout)
                channel.send({"attempt": attempt, "host": host, "port": rank.port})
            except (OSError, TimeoutError) as error:
                channel.send({"attempt": attempt, "ended": str(error)})
    except ChannelError as error:
        raise RankFailed(0, str(where["host"]), None, f"its torchrun process has gone: {error}") from error
    finally:
        if rank is not None:
            rank.kill()
        channel.close()


def _own_address(info: RankInfo) -> str:
    """This host's address on the way to the job's master."""
    family, kind, _, _, address = socket.getaddrinfo(info.master_addr, info.master_port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        own: str = probe.getsockname()[0]
    return own
