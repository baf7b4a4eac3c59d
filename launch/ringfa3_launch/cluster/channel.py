"""Channels: framed messages over TCP between a cluster and its ranks. JSON and safetensors; nothing is ever unpickled.

A frame is 12 bytes (length of the header, 4, and of the body, 8, big-endian), the header (JSON, an object) and the body
(tensors, `cluster.tensors`; may be empty). Both lengths are compared with limits before room is made for them.

How a connection begins: `ringfa3_launch.cluster.listener`.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ringfa3_launch.cluster.tensors import Array, Raw, pack, unpack

LENGTHS = struct.Struct(">IQ")
MAX_HEADER = 64 << 20  # bytes: token ids of a prompt of 1M tokens are 8 MB of JSON
STALL = 30.0  # seconds that a message which has begun may stand still
CHUNK = 1 << 20  # bytes of one system call: what a message stalls for is looked at between them


class ChannelError(ConnectionError):
    """The connection is of no use any more: broken off, or what came is not a message."""


class Ended(ChannelError):
    """The other side closed the connection between two messages."""


class Refused(ChannelError):
    """The other side does not know the token."""


@dataclass(frozen=True)
class Message:
    """What came in one frame.

    Args:
        header: its JSON.
        tensors: its body.
        nbytes: of the body.
        problem: why the tensors are missing: there was no memory for them. The channel is as good as before.
    """

    header: dict[str, Any]
    tensors: dict[str, Raw] = field(default_factory=dict)
    nbytes: int = 0
    problem: str | None = None


class Channel:
    """One end of a connection. Any thread may send; one thread receives, and closes it; any thread may `end` it.

    Args:
        sock: connected, both sides known to each other.
        max_body: bytes that a message's tensors may have, both ways.
        stall: seconds that a message which has begun may stand still.
    """

    def __init__(self, sock: socket.socket, *, max_body: int, stall: float = STALL) -> None:
        self._sock, self._max_body = sock, max_body
        self._sending = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.settimeout(stall)

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, Array] | None = None) -> None:
        """Send one message.

        Raises:
            ValueError: it is larger than the limits allow.
            ChannelError: the connection is broken, or the other side takes nothing.
        """
        text = json.dumps(header).encode()
        buffers = pack(tensors) if tensors else []
        size = sum(buffer.nbytes for buffer in buffers)
        if len(text) > MAX_HEADER or size > self._max_body:
            raise ValueError(
                f"message: wanted at most {MAX_HEADER} bytes of header and {self._max_body} of tensors, "
                f"got {len(text)} and {size}"
            )
        with self._sending:
            try:
                self._sock.sendall(LENGTHS.pack(len(text), size) + text)
                for buffer in buffers:
                    for at in range(0, buffer.nbytes, CHUNK):
                        self._sock.sendall(buffer[at : at + CHUNK])
            except OSError as error:  # half a message may be out: nothing else can follow it
                self.end()
                raise ChannelError(f"could not send: {said(error)}") from error

    def receive(self, timeout: float | None = None) -> Message:
        """The next message.

        Args:
            timeout: seconds to wait for it to begin; None: for ever.

        Raises:
            TimeoutError: none began in time; the channel is as good as before.
            Ended: the other side closed the connection.
            ChannelError: what came is not a message, is larger than allowed, or stopped in the middle.
        """
        if not self._wait(timeout):
            raise TimeoutError(f"no message within {timeout:g} s")
        head = self._read(LENGTHS.size, begun=False)
        header_size, size = LENGTHS.unpack(head)
        if header_size > MAX_HEADER or size > self._max_body:
            raise ChannelError(
                f"wanted at most {MAX_HEADER} bytes of header and {self._max_body} of tensors, "
                f"got {header_size} and {size}"
            )
        text = self._read(header_size)
        try:
            header = json.loads(bytes(text))
        except (ValueError, RecursionError) as error:
            raise ChannelError(f"wanted a header of JSON, got {error}") from None
        if not isinstance(header, dict):
            raise ChannelError(f"wanted a JSON object, got {type(header).__name__}")
        if not size:
            return Message(header)
        try:
            body = self._read(size)
        except MemoryError:
            self._skip(size)
            return Message(header, problem=f"no memory for {size} bytes of tensors")
        try:
            return Message(header, unpack(body), size)
        except ValueError as error:
            raise ChannelError(str(error)) from None

    def end(self) -> None:
        """Break the connection off; whoever sends or receives hears of it at once."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """`end`, and release the socket. By the thread that receives, or when none does."""
        self.end()
        self._sock.close()

    def _wait(self, timeout: float | None) -> bool:
        if self._sock.fileno() < 0:
            raise Ended("this side is closed")
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(None if timeout is None else max(0, timeout * 1000)))

    def _read(self, size: int, *, begun: bool = True) -> memoryview:
        view, at = np.empty(size, np.uint8).data, 0  # takes memory as it is filled; a bytearray is zeroed first
        while at < size:
            try:
                got = self._sock.recv_into(view[at : at + CHUNK])
            except OSError as error:
                raise ChannelError(f"could not receive: {said(error)}") from error
            if not got:
                if not begun and not at:
                    raise Ended("the other side has closed the connection")
                raise ChannelError(f"the connection ended in the middle of a message, {size - at} bytes short")
            at += got
        return view

    def _skip(self, size: int) -> None:
        """Read a body that there is no room for, so that the next message can be read."""
        while size:
            size -= self._read(min(size, CHUNK)).nbytes


def said(error: OSError) -> str:
    """What went wrong with a socket, in words."""
    return "nothing moved for too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
