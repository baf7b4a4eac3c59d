"""How channels begin: `connect` at one end, a `Listener` at the other; both prove that they know the cluster's token.

    client -> server   MAGIC, 32 random bytes c
    server -> client   32 random bytes s, HMAC-SHA256(token, "server" c s)
    client -> server   HMAC-SHA256(token, "client" c s)
    server -> client   WELCOME

The token itself never travels. This keeps strangers out; it does not encrypt, nor does it protect what follows from who
can alter packets on their way.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import threading
import time
from collections.abc import Callable

from ringfa3_launch.cluster.channel import Channel, Refused, said

MAGIC = b"ringfa3\x01"
WELCOME = b"\x01"
HANDSHAKE = 5.0  # seconds that it may take
STRANGERS = 32  # connections at a time that have not proved themselves; more are turned away


def connect(host: str, port: int, token: str, *, max_body: int, timeout: float = HANDSHAKE) -> Channel:
    """A channel to who listens there.

    Raises:
        Refused: it does not know the token, or does not speak this way.
        OSError: it cannot be reached.
    """
    deadline = time.monotonic() + timeout
    sock = socket.create_connection((host, port), timeout)
    try:
        ours = os.urandom(32)
        sock.sendall(MAGIC + ours)
        theirs, proof = _exactly(sock, 32, deadline), _exactly(sock, 32, deadline)
        if not hmac.compare_digest(proof, _proof(token, b"server", ours, theirs)):
            raise Refused(f"{host}:{port} does not know the token of this cluster")
        sock.sendall(_proof(token, b"client", ours, theirs))
        if _exactly(sock, 1, deadline) != WELCOME:
            raise Refused(f"{host}:{port} refused the token")
        return Channel(sock, max_body=max_body)
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError) and not isinstance(error, Refused):
            raise Refused(f"{host}:{port}: {said(error)}") from error
        raise


class Listener:
    """Accepts channels: `serve(channel)` runs in a thread of its own for each that proved to know the token.

    Args:
        host: address to bind; port: 0 for any free one.
        serve: may return or raise ChannelError when the connection is over; the channel is closed then.
    """

    def __init__(
        self,
        host: str,
        token: str,
        serve: Callable[[Channel], None],
        *,
        max_body: int,
        port: int = 0,
        handshake: float = HANDSHAKE,
    ) -> None:
        if len(token) < 16:
            raise ValueError(f"token: wanted 16 characters or more, got {len(token)}")
        self._token, self._serve, self._max_body, self._handshake = token, serve, max_body, handshake
        self._sock = socket.create_server((host, port), family=_family(host), backlog=128)
        self.port: int = self._sock.getsockname()[1]
        self._strangers = threading.Semaphore(STRANGERS)
        self._channels: set[Channel] = set()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, name=f"ringfa3 listener {self.port}", daemon=True)
        self._accepting.start()

    def close(self, timeout: float = 5.0) -> None:
        """Listen no more, end all channels, wait for their threads."""
        with self._lock:
            self._closed = True
            channels, threads = list(self._channels), list(self._threads)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes accept()
        for channel in channels:
            channel.end()
        for thread in (self._accepting, *threads):
            if thread is not threading.current_thread():
                thread.join(timeout)
        self._sock.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                if self._closed:
                    return
                threading.Event().wait(0.1)  # out of file descriptors: not for ever
                continue
            if not self._strangers.acquire(blocking=False):
                sock.close()
                continue
            thread = threading.Thread(target=self._meet, args=(sock,), name="ringfa3 connection", daemon=True)
            with self._lock:
                self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # no thread is to be had now
                with self._lock:
                    self._threads.discard(thread)
                self._strangers.release()
                sock.close()

    def _meet(self, sock: socket.socket) -> None:
        try:
            try:
                channel = self._welcome(sock)
            finally:
                self._strangers.release()
            with self._lock:
                self._channels.add(channel)
                closed = self._closed
            try:
                if not closed:
                    self._serve(channel)
            finally:
                channel.close()
                with self._lock:
                    self._channels.discard(channel)
        except OSError:  # a stranger, or a connection that broke: its server has seen to what hung on it
            sock.close()
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _welcome(self, sock: socket.socket) -> Channel:
        """The handshake, within `handshake` seconds in all."""
        deadline = time.monotonic() + self._handshake
        if _exactly(sock, len(MAGIC), deadline) != MAGIC:
            raise Refused("not a client of a cluster")
        theirs, ours = _exactly(sock, 32, deadline), os.urandom(32)
        sock.sendall(ours + _proof(self._token, b"server", theirs, ours))
        if not hmac.compare_digest(_exactly(sock, 32, deadline), _proof(self._token, b"client", theirs, ours)):
            raise Refused("a client with another token")
        sock.sendall(WELCOME)
        return Channel(sock, max_body=self._max_body)


def _proof(token: str, side: bytes, client: bytes, server: bytes) -> bytes:
    return hmac.digest(token.encode(), side + client + server, "sha256")


def _exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    """So many bytes, by then (of the monotonic clock): who sends them one by one has no more time."""
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Refused("the handshake took too long")
        sock.settimeout(left)
        got = sock.recv(size - len(data))
        if not got:
            raise Refused("the connection ended in the handshake: another token, or another protocol")
        data += got
    return data


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
