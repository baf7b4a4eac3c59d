"""Link: this process's connection to one rank: what comes is handed on by a thread, what goes waits for another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ringfa3_launch.cluster.channel import Channel, ChannelError, Message
from ringfa3_launch.cluster.launcher import Member
from ringfa3_launch.cluster.listener import connect
from ringfa3_launch.cluster.outbox import Outbox
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.cluster.tensors import Array


class Link:
    """A connection to the worker of one rank.

    Args:
        member: the rank.
        settings: limits, and the token.
        arrived: called with the rank and a message, from this link's thread.
        lost: called with the rank and why, once, from this link's thread; not when this side closed it.

    Raises:
        OSError: it cannot be reached.
    """

    def __init__(
        self,
        member: Member,
        settings: Settings,
        *,
        arrived: Callable[[int, Message], None],
        lost: Callable[[int, str], None],
    ) -> None:
        self.rank = member.rank
        self._arrived, self._lost = arrived, lost
        self._closed = False
        # a rank that has just begun imports for seconds, and answers nobody in between
        self._channel: Channel = connect(
            member.host, member.port, settings.token, max_body=settings.max_message, timeout=settings.start_timeout
        )
        self._outbox = Outbox(self._channel, f"ringfa3 to rank {self.rank}", self._too_large)
        self._thread = threading.Thread(target=self._run, name=f"ringfa3 from rank {self.rank}", daemon=True)
        self._thread.start()

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, Array] | None = None) -> None:
        """Send soon; the tensors must stay as they are until then."""
        self._outbox.put(header, tensors)

    def close(self) -> None:
        """End the connection at once, and both threads. From another thread than its own."""
        self._closed = True
        self._channel.end()
        self._outbox.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                self._arrived(self.rank, self._channel.receive())
        except ChannelError as error:
            if not self._closed:
                self._lost(self.rank, str(error))
        finally:
            self._channel.close()

    def _too_large(self, header: Mapping[str, Any], error: ValueError) -> None:
        refused = {"id": header.get("id"), "error": {"kind": "wrong", "message": str(error)}}
        self._arrived(self.rank, Message(refused))
