"""Outbox: what is to be sent over a channel waits here, so that who answers, or asks, never waits for the network."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ringfa3_launch.cluster.channel import Channel, ChannelError
from ringfa3_launch.cluster.tensors import Array

_Letter = tuple[Mapping[str, Any], Mapping[str, Array] | None]


class Outbox:
    """A thread that sends, in order, what any thread puts here.

    Args:
        channel: where to.
        name: of the thread.
        too_large: called with a message's header and what was wrong, when the channel's limits refuse it.
    """

    def __init__(
        self, channel: Channel, name: str, too_large: Callable[[Mapping[str, Any], ValueError], None] | None = None
    ) -> None:
        self._channel, self._too_large = channel, too_large
        self._letters: queue.SimpleQueue[_Letter | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, header: Mapping[str, Any], tensors: Mapping[str, Array] | None = None) -> None:
        """Send this soon; the tensors must stay as they are until then. After the connection's end: nothing happens."""
        self._letters.put((header, tensors))

    def close(self, timeout: float = 5.0) -> None:
        """Send what is here, then stop; ends the channel when that takes longer than `timeout` seconds."""
        self._letters.put(None)
        if self._thread is threading.current_thread():
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._channel.end()
            self._thread.join(timeout)

    def _run(self) -> None:
        while (letter := self._letters.get()) is not None:
            try:
                self._channel.send(*letter)
            except ChannelError:
                return  # the channel has ended: its receiver hears of it
            except ValueError as error:
                if self._too_large is not None:
                    self._too_large(letter[0], error)
            del letter  # may hold gigabytes
