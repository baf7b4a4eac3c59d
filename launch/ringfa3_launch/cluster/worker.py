"""Worker: the life of one rank of a cluster, the same under every launcher.

It listens (`Desk`), joins the other ranks when it is told where they meet, loads the model where there is one, and then
does what rank 0, the leader, announces, order by order, together with all others: calls of the cluster's callers, steps
of the engine, and, when there is nothing to do, a beat every second, so that everybody knows that all are there. It
ends when the leader says so; when something failed in the middle it waits, telling why, to be killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ringfa3_launch.cluster.desk import CALLS, Client, Desk
from ringfa3_launch.cluster.faults import blame
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.options import refuses
from ringfa3_launch.rank import RankInfo, init

if TYPE_CHECKING:
    import torch

    from ringfa3.inference.announce import Announcer
    from ringfa3_launch.cluster.calls import Calls
    from ringfa3_launch.cluster.roll import Roll
    from ringfa3_launch.cluster.texts import Texts

BEAT = 1.0  # seconds between collectives when idle
PAUSE = 0.005  # seconds before the engine is asked again, when it has requests and nothing to do for them
FAREWELL = 30.0  # seconds that a rank which failed waits to be asked why, and killed


class Worker:
    """One rank. Listens from the start; `run` does all the rest, in the thread that calls it.

    Args:
        info: which rank. Its file, if any, is where the ranks meet; else rank 0 opens a port for it.
        settings: the cluster's.
        host: address to listen on, and for ranks to meet at: only this one.
    """

    def __init__(self, info: RankInfo, settings: Settings, *, host: str = "127.0.0.1") -> None:
        self.info, self._settings, self._host = info, settings, host
        self.state = "starting"
        self.failure: dict[str, Any] | None = None  # as `blame` makes it
        self._device: torch.device | None = None
        self._roll: Roll | None = None
        self._calls: Calls | None = None
        self._texts: Texts | None = None
        self._announcer: Announcer | None = None
        self._step = 0  # orders begun
        self._callers_turn = False
        self._store: Any = None
        self._lock = threading.Lock()
        self._meeting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._joined = threading.Event()  # or failed to
        self._imported = threading.Event()  # torch: two threads that import it at once abort the process (2.13)
        self._desk = Desk(
            host, settings, leader=info.rank == 0, answer=self._answer, stream=self._stream, left=self._left
        )
        self._orders = self._desk.orders
        self.port = self._desk.port

    def run(self) -> None:
        """Join, load, serve until the cluster ends this rank.

        Raises:
            BaseException: what made this rank fail; the cluster was told, if it asked.
        """
        try:
            with self._member():
                self.state = "idle"
                self._joined.set()
                self._serve()
            self.state = "ended"
        except BaseException as error:
            self.failure = blame(error, self.info.rank)
            refused = self.state == "loading" and isinstance(error, ValueError) and refuses(error)
            if self.failure["sure"] and not refused:  # here and now: soon it is killed
                traceback.print_exception(error)
            self.state = "failed"
            self._desk.tell({"failure": self.failure})
            self._joined.set()
            time.sleep(FAREWELL)
            raise
        finally:
            self._desk.close()

    def health(self) -> dict[str, Any]:
        """How this rank is; answered at any time."""
        used, pages = self._texts.cache if self._texts else (0, 0)
        return {
            "rank": self.info.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": str(self._device) if self._device else None,
            "state": self.state,
            "step": self._step,
            "age": self._roll.age if self._roll else None,
            "cache_used": used,
            "cache_pages": pages,
            "session_bytes": self._calls.session_bytes if self._calls else 0,
            "waiting_bytes": self._desk.waiting_bytes,
            "failure": self.failure,
        }

    @contextmanager
    def _member(self) -> Iterator[None]:
        """A member of the process group, with everything made that calls need."""
        import torch

        from ringfa3.inference.announce import Announcer
        from ringfa3_launch.cluster.calls import Calls
        from ringfa3_launch.cluster.roll import Roll
        from ringfa3_launch.local import cores

        self._imported.set()
        torch.set_num_threads(max(1, cores() // self.info.local_world))
        info, timeout = self.info, self._settings.call_timeout
        address, port = self._meeting.get()
        if info.file is None:
            info = dataclasses.replace(info, master_addr=address, master_port=port)
        self.state = "joining"
        with init(info, device=self._settings.device, timeout=timeout, store=self._store) as device, torch.no_grad():
            self._device = device
            self._roll = Roll(timeout=timeout)
            self._calls = Calls(self._settings, device, self._roll, self._desk)
            self._announcer = Announcer(timeout=timeout)
            if self._settings.model is not None:
                self.state = "loading"
                from ringfa3_launch.cluster.texts import Texts

                self._texts = Texts(self._settings, device, self._announcer, wake=self._wake)
            self._roll.all_can(True)
            yield

    def _serve(self) -> None:
        announcer = self._announcer
        assert announcer is not None
        while True:
            if self.info.rank == 0:
                order = self._next()
                announcer.say(order)
            else:
                order = announcer.hear()
            if order["do"] == "end":
                return
            self._execute(order)

    def _next(self) -> dict[str, Any]:
        """The leader's next order: callers and the engine in turns; a beat when all ranks have not met for a second."""
        assert self._roll is not None
        nothing = False  # to plan, though requests wait
        while (due := BEAT - self._roll.age) > 0:
            busy = self._texts is not None and self._texts.busy and not nothing
            self._callers_turn = not self._callers_turn
            if self._callers_turn or not busy:
                with contextlib.suppress(queue.Empty):
                    wait = PAUSE if nothing else due
                    order = self._orders.get_nowait() if busy else self._orders.get(timeout=min(wait, due))
                    if order is not None:
                        return order
            step = self._texts.plan() if self._texts else None
            if step is not None:
                return {"do": "step", "step": step}
            nothing = busy
        return {"do": "beat"}

    def _execute(self, order: dict[str, Any]) -> None:
        assert self._roll is not None
        assert self._calls is not None
        self._step += 1
        if order["do"] == "beat":
            self._roll.all_can(True)
            return
        self.state = "busy"
        if order["do"] in CALLS:
            self._calls.execute(order)
        elif order["do"] == "forget":
            self._calls.forget(order["session"])
        else:
            assert self._texts is not None
            self._texts.execute(order["step"])
        self.state = "idle"

    def _answer(self, header: dict[str, Any]) -> dict[str, Any]:
        """From a connection's thread: what is not a call."""
        do = header["do"]
        if do == "health":
            return self.health()
        if do == "meet":
            return {"port": self._open_store()}
        if do == "join":
            self._meeting.put((str(header["address"]), int(header["port"])))
            self._joined.wait()
            return self.health()
        if do == "info":
            return self._texts.info() if self._texts else {}
        if do == "hops":
            return self._texts.hops() if self._texts else {}
        if do == "end" and self.info.rank == 0:
            self._orders.put({"do": "end"})
            return {}
        return {"error": {"kind": "wrong", "message": f"do: wanted something to do, got {str(do)[:80]!r}"}}

    def _open_store(self) -> int:
        """Where the ranks will meet: a port of this rank, on its own address alone. 0: they meet in a file."""
        if self.info.file is not None:
            return 0
        self._imported.wait()
        import torch.distributed as dist

        listening = socket.create_server((self._host, 0))
        port: int = listening.getsockname()[1]
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            self._host, port, self.info.world, is_master=True, wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )  # fmt: skip
        return port

    def _stream(self, header: dict[str, Any], client: Client) -> None:
        """From a connection's thread: completions."""
        if self._texts is None or self.info.rank != 0:
            client.refuse(header["id"], "wrong", "model: wanted a cluster with a model, got one without")
        else:
            self._texts.handle(header, client)

    def _left(self, client: Client) -> None:
        """From a connection's thread, as its client goes: so does what it left."""
        if self.info.rank != 0:
            return
        if self._texts is not None:
            self._texts.left(client)
        if self._calls is not None:
            for name in self._calls.sessions_of(client):
                self._orders.put({"do": "forget", "session": name})

    def _wake(self) -> None:
        self._orders.put(None)
