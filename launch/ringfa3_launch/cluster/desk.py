"""Desk: where a rank's callers turn to. Its threads answer questions at once and keep calls until their turn comes.

Every rank has one. A call (attention, sessions) comes to all ranks, each with its own tensors; only the leader, rank 0,
decides when its turn is, and callers ask it last, when all others hold their part. So whatever the leader announces,
the others have it; unless a caller vanished in between, which the ranks notice together (`Roll`).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ringfa3_launch.cluster.channel import Channel, Message
from ringfa3_launch.cluster.listener import Listener
from ringfa3_launch.cluster.outbox import Outbox
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.cluster.tensors import Array, Raw

CALLS = ("attention", "open", "append", "attend", "close")  # what all ranks do together for a caller
STREAMS = ("complete", "cancel", "close_session")  # what goes to the engine
Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Client:
    """A connection to this rank."""

    def __init__(self, channel: Channel) -> None:
        self.gone = threading.Event()
        self.outbox = Outbox(channel, "ringfa3 answers", self._too_large)

    def reply(self, header: Mapping[str, Any], tensors: Mapping[str, Array] | None = None) -> None:
        """Send soon; nobody waits, nobody fails."""
        if not self.gone.is_set():
            self.outbox.put(header, tensors)

    def refuse(self, number: object, kind: str, message: str) -> None:
        """Say that the call with this number came to nothing.

        Args:
            kind: "wrong" (the caller's mistake), "overloaded", "gone" (what it is about is not there any more),
                "failed" or "skipped" (another rank says why).
        """
        self.reply({"id": number, "error": {"kind": kind, "message": message}})

    def _too_large(self, header: Mapping[str, Any], error: ValueError) -> None:
        self.refuse(header.get("id"), "wrong", str(error))


@dataclass(frozen=True, eq=False)
class Call:
    """A call that waits for its turn on this rank."""

    header: dict[str, Any]
    tensors: dict[str, Raw]
    nbytes: int
    client: Client

    def reply(self, header: Mapping[str, Any], tensors: Mapping[str, Array] | None = None) -> None:
        """The answer to it."""
        self.client.reply({"id": self.header["id"], **header}, tensors)

    def refuse(self, kind: str, message: str) -> None:
        """See `Client.refuse`."""
        self.client.refuse(self.header["id"], kind, message)

    def break_off(self, failure: Mapping[str, Any]) -> None:
        """Say that it failed in the middle: the gang is of no use any more; failure: as `blame` makes it."""
        self.reply({"failure": failure})


@dataclass
class _Waiting:
    calls: dict[str, Call] = field(default_factory=dict)
    nbytes: int = 0


class Desk:
    """The server side of a rank.

    Args:
        host: address to listen on, at any free port.
        settings: limits, and the token.
        leader: whether this is rank 0, whose `orders` are filled.
        answer: called with the header of other questions ("health", "join", ...) from the connection's thread, returns
            the reply's.
        stream: called with what is for the engine ("complete", ...), its header and client.
        left: called with a client that has gone.
    """

    def __init__(
        self,
        host: str,
        settings: Settings,
        *,
        leader: bool,
        answer: Answer,
        stream: Callable[[dict[str, Any], Client], None],
        left: Callable[[Client], None],
    ) -> None:
        self._settings, self._leader = settings, leader
        self._answer, self._stream, self._left = answer, stream, left
        self._lock = threading.Lock()
        self._waiting = _Waiting()
        self._clients: set[Client] = set()
        self.orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()  # None: look around
        self._listener = Listener(host, settings.token, self._serve, max_body=settings.max_message)
        self.port = self._listener.port

    @property
    def waiting_bytes(self) -> int:
        """Bytes of tensors that wait here."""
        return self._waiting.nbytes

    def take(self, number: str) -> Call | None:
        """The call of that number, whose turn it is; None: it is not here (any more)."""
        with self._lock:
            call = self._waiting.calls.pop(number, None)
            self._waiting.nbytes -= call.nbytes if call else 0
        return call

    def tell(self, header: Mapping[str, Any]) -> None:
        """Say it to all clients."""
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.reply(header)

    def close(self) -> None:
        """End all connections."""
        self._listener.close()

    def _serve(self, channel: Channel) -> None:
        client = Client(channel)
        with self._lock:
            self._clients.add(client)
        try:
            while True:
                self._handle(channel.receive(), client)
        finally:
            client.gone.set()
            with self._lock:
                self._clients.discard(client)
            self._forget(client)
            self._left(client)
            client.outbox.close()

    def _handle(self, message: Message, client: Client) -> None:
        header = message.header
        do, number = header.get("do"), header.get("id")
        if not isinstance(do, str) or not isinstance(number, str) or len(number) > 100:
            client.refuse(None, "wrong", f"do, id: wanted strings, got {str((do, number))[:80]}")
        elif message.problem is not None:
            client.refuse(number, "overloaded", message.problem)
        elif do in CALLS:
            self._hold(Call(header, message.tensors, message.nbytes, client))
        elif do == "drop":
            self.take(str(header.get("call")))
        else:
            try:
                if do in STREAMS:
                    self._stream(header, client)
                else:
                    client.reply({"id": number, **self._answer(header)})
            except (KeyError, TypeError, ValueError) as error:
                client.refuse(number, "wrong", f"{do}: {type(error).__name__}: {error}")

    def _hold(self, call: Call) -> None:
        """Keep a call until its turn; the leader's part comes last and gives it one."""
        number, limit = call.header["id"], self._settings.max_waiting_bytes
        with self._lock:
            if number in self._waiting.calls:
                call.refuse("wrong", f"id: wanted one not in use, got {number!r}")
                return
            if self._waiting.nbytes + call.nbytes > limit:
                held = self._waiting.nbytes
                call.refuse("overloaded", f"wanted at most {limit} bytes in waiting calls, got {held} + {call.nbytes}")
                return
            self._waiting.calls[number] = call
            self._waiting.nbytes += call.nbytes
        if self._leader:
            self.orders.put(call.header)
        else:
            call.reply({"held": True})

    def _forget(self, client: Client) -> None:
        """Drop what a client that has gone left here."""
        with self._lock:
            numbers = [number for number, call in self._waiting.calls.items() if call.client is client]
        for number in numbers:
            with contextlib.suppress(KeyError):
                self.take(number)
