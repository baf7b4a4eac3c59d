"""Channels: what is sent arrives; what is not a message, too large, or from a stranger does no harm."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfa3_launch.cluster.channel import LENGTHS, Channel, ChannelError, Ended, Message, Refused
from ringfa3_launch.cluster.listener import MAGIC, Listener, connect
from ringfa3_launch.cluster.tensors import SIZES, BadTensors, pack, unpack
from tests.patience import patience

TOKEN = "a token of more than sixteen characters"
LIMIT = 1 << 20  # bytes of a body


class Server:
    """A listener that keeps what comes, and echoes it."""

    def __init__(self) -> None:
        self.got: queue.Queue[Message | ChannelError] = queue.Queue()
        self.listener = Listener("127.0.0.1", TOKEN, self._serve, max_body=LIMIT, handshake=1.0)
        self.port = self.listener.port

    def _serve(self, channel: Channel) -> None:
        try:
            while True:
                message = channel.receive()
                self.got.put(message)
                channel.send(message.header, {name: raw.torch() for name, raw in message.tensors.items()})
        except ChannelError as error:
            self.got.put(error)
            raise

    def alive(self) -> None:
        """Who comes in the right way is served."""
        channel = connect("127.0.0.1", self.port, TOKEN, max_body=LIMIT)
        channel.send({"still": "there"})
        assert channel.receive(timeout=10).header == {"still": "there"}
        channel.close()


@pytest.fixture
def server() -> Iterator[Server]:
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    server = Server()
    yield server
    server.listener.close()
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= files  # other tests' ends may come late, too


@pytest.fixture
def channel(server: Server) -> Iterator[Channel]:
    channel = connect("127.0.0.1", server.port, TOKEN, max_body=LIMIT)
    yield channel
    channel.close()


def raw(port: int, data: bytes, *, then: str = "close") -> bytes:
    """Send bytes to a port as a stranger; what it answered before it hung up."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(data)
        answer = b""
        try:
            if then == "close":
                sock.shutdown(socket.SHUT_WR)
            while got := sock.recv(4096):
                answer += got
        except OSError:  # it has hung up already
            pass
        return answer


ARRAYS: list[Any] = [
    np.arange(6, dtype=np.float32).reshape(1, 2, 3),
    np.arange(5, dtype=">i4"),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.array([True, False]),
    np.zeros((0, 4), np.float16),
    np.array(3.5),
    torch.arange(10).to(torch.bfloat16)[::3],
    torch.tensor(7, dtype=torch.int64),
    torch.zeros(2, 0),
    torch.arange(12.0).reshape(3, 4).T,
]


def test_tensors_arrive_as_they_were(channel: Channel) -> None:
    tensors = {str(i): x for i, x in enumerate(ARRAYS)}
    channel.send({"do": "it", "words": "Zürich\n"}, tensors)
    message = channel.receive(timeout=10)
    assert message.header == {"do": "it", "words": "Zürich\n"}
    for name, x in tensors.items():
        got = message.tensors[name].torch()
        want = x if isinstance(x, torch.Tensor) else torch.from_numpy(x.astype(x.dtype.newbyteorder("="), copy=True))
        assert got.dtype == want.dtype
        assert torch.equal(got, want), name
        if not isinstance(x, torch.Tensor):
            assert np.array_equal(message.tensors[name].numpy(), x)


def test_safetensors_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    from safetensors.torch import load, save

    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "empty": torch.zeros(0, 2)}
    theirs = load(b"".join(pack(tensors)))
    ours = unpack(save(tensors, metadata={"for": "people"}))
    for name, x in tensors.items():
        assert torch.equal(theirs[name], x)
        assert torch.equal(ours[name].torch(), x)


def test_many_threads_send_whole_messages(channel: Channel, server: Server) -> None:
    def send(i: int) -> None:
        for j in range(10):
            channel.send({"i": i, "j": j}, {"x": torch.full((1000 + i,), i * 100 + j)})

    threads = [threading.Thread(target=send, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    seen = set()
    for _ in range(80):
        message = channel.receive(timeout=20)
        i, j = message.header["i"], message.header["j"]
        assert torch.equal(message.tensors["x"].torch(), torch.full((1000 + i,), i * 100 + j))
        seen.add((i, j))
    assert len(seen) == 80
    for thread in threads:
        thread.join()


def test_waiting_for_a_message_may_end(channel: Channel) -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no message within 0\.1 s"):
        channel.receive(timeout=0.1)
    assert time.monotonic() - begin < patience(5)
    channel.send({"after": "that"})
    assert channel.receive(timeout=10).header == {"after": "that"}


def test_a_message_over_the_limits_is_not_sent_and_does_no_harm(channel: Channel) -> None:
    with pytest.raises(ValueError, match=f"at most .* {LIMIT} of tensors, got .* {LIMIT + 80}"):
        channel.send({}, {"x": np.zeros(LIMIT, np.uint8)})
    channel.send({"small": 1})
    assert channel.receive(timeout=10).header == {"small": 1}


@pytest.mark.parametrize("token", ["another token of many characters", TOKEN[:-1], TOKEN + "x"])
def test_another_token_is_refused_on_both_sides(server: Server, token: str) -> None:
    with pytest.raises(Refused, match="does not know the token"):
        connect("127.0.0.1", server.port, token, max_body=LIMIT)
    nonce = os.urandom(32)
    answer = raw(server.port, MAGIC + nonce + bytes(32), then="wait")
    assert len(answer) == 64, "a proof that is none got in"
    server.alive()


def test_a_server_that_does_not_know_the_token_gets_no_proof() -> None:
    """It could hand that on to the real one."""
    with socket.create_server(("127.0.0.1", 0)) as fake:
        said: list[bytes] = []

        def serve() -> None:
            sock, _ = fake.accept()
            with sock:
                sock.settimeout(10)
                said.append(sock.recv(1000))
                sock.sendall(os.urandom(64))
                said.append(sock.recv(1000))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(Refused, match="does not know the token"):
            connect("127.0.0.1", fake.getsockname()[1], TOKEN, max_body=LIMIT)
        thread.join()
    assert said[0].startswith(MAGIC)
    assert said[1] == b""


def test_the_token_does_not_travel_and_a_recorded_handshake_opens_nothing(server: Server) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    passed: list[bytes] = []

    def pump(source: socket.socket, sink: socket.socket, mine: bool) -> None:
        while data := source.recv(4096):
            passed.append(data if mine else b"")
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def between() -> None:
        client, _ = listener.accept()
        with client, socket.create_connection(("127.0.0.1", server.port)) as upstream:
            back = threading.Thread(target=pump, args=(upstream, client, False))
            back.start()
            pump(client, upstream, True)
            back.join()

    thread = threading.Thread(target=between)
    thread.start()
    channel = connect("127.0.0.1", listener.getsockname()[1], TOKEN, max_body=LIMIT)
    channel.send({"hello": 1})
    assert channel.receive(timeout=10).header == {"hello": 1}
    channel.close()
    thread.join()
    listener.close()
    spoken = b"".join(passed)
    assert TOKEN.encode() not in spoken
    assert len(raw(server.port, spoken)) in (0, 64)  # the challenge is another one, so the rest is worth nothing
    assert isinstance(server.got.get(timeout=10), Message)
    assert isinstance(server.got.get(timeout=10), Ended)
    assert server.got.empty(), "the second of the two was heard"


def framed(header: bytes, body: bytes = b"", *, lengths: tuple[int, int] | None = None) -> bytes:
    return LENGTHS.pack(*(lengths or (len(header), len(body)))) + header + body


DEEP = b"[" * 100_000 + b"]" * 100_000
BAD_FRAMES = {
    "header not JSON": framed(b"{not json"),
    "header not UTF-8": framed(b"\xff\xfe"),
    "header not an object": framed(b"[1, 2]"),
    "header of nested arrays": framed(DEEP),
    "header length huge": framed(b"{}", lengths=((1 << 32) - 1, 0)),
    "body length huge": framed(b"{}", lengths=(2, (1 << 64) - 1)),
    "body just too long": framed(b"{}", lengths=(2, LIMIT + 1)),
    "body not tensors": framed(b"{}", os.urandom(100)),
    "half a length": b"\x00\x00\x00",
    "half a header": framed(b"{}", lengths=(20, 0)),
    "half a body": framed(b"{}", bytes(10), lengths=(2, 20)),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_what_is_no_message_ends_the_connection_and_nothing_else(name: str, channel: Channel, server: Server) -> None:
    sock = channel._sock
    sock.sendall(BAD_FRAMES[name])
    with contextlib.suppress(OSError):  # it may have hung up already
        sock.shutdown(socket.SHUT_WR)
    error = server.got.get(timeout=10)
    assert isinstance(error, ChannelError), error
    assert not isinstance(error, Ended)
    with pytest.raises(ChannelError):
        channel.receive(timeout=10)
    server.alive()


def test_declared_lengths_take_no_memory(server: Server) -> None:
    """Half a gigabyte is declared within the limit of 1 GiB, and never comes; more than the limit is not waited for."""
    before = _resident()
    listener = Listener("127.0.0.1", TOKEN, lambda channel: channel.receive() and None, max_body=1 << 30)
    channels = [connect("127.0.0.1", listener.port, TOKEN, max_body=LIMIT) for _ in range(8)]
    for channel in channels:
        channel._sock.sendall(framed(b"{}", bytes(100), lengths=(2, 1 << 29)))
    time.sleep(0.3)
    assert _resident() - before < 200 << 20
    for channel in channels:
        channel.close()
    listener.close()
    server.alive()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_garbage_from_strangers(server: Server) -> None:
    rng = random.Random(0)
    for _ in range(200):
        data = rng.randbytes(rng.choice((0, 1, 7, 8, 40, 72, 73, 500)))
        if rng.random() < 0.5:
            data = MAGIC + data
        assert len(raw(server.port, data)) in (0, 64)
    server.alive()


def test_a_stranger_who_says_nothing_is_hung_up_on(server: Server) -> None:
    """Many of them do not keep others out for longer than the handshake may take; nor does who sends byte by byte."""
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    slow = silent[0]
    slow.settimeout(10)
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"reset|Broken pipe|closed"):  # noqa: PT012  # which of the two says it
        for byte in MAGIC + bytes(64):
            slow.sendall(bytes([byte]))
            time.sleep(0.05)
        while slow.recv(100):
            pass
        raise ConnectionError("closed")
    assert time.monotonic() - begin < patience(8)
    time.sleep(max(0.0, 1.2 - (time.monotonic() - begin)))
    server.alive()
    for sock in silent:
        sock.close()


def test_who_stops_in_the_middle_of_a_message_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
    channel = Channel(ours, max_body=1 << 30, stall=0.3)
    theirs.sendall(framed(b"{}", bytes(10), lengths=(2, 20)))
    with pytest.raises(ChannelError, match="nothing moved"):
        channel.receive()
    with pytest.raises(ChannelError, match="nothing moved"):  # nor can one send to who does not read
        channel.send({}, {"x": np.zeros(64 << 20, np.uint8)})
    channel.close()
    theirs.close()


def test_ending_a_channel_wakes_who_waits(server: Server) -> None:
    channel = connect("127.0.0.1", server.port, TOKEN, max_body=LIMIT)
    heard: list[BaseException] = []

    def wait() -> None:
        try:
            channel.receive()
        except BaseException as error:
            heard.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    channel.end()
    thread.join(5)
    assert not thread.is_alive()
    assert isinstance(heard[0], Ended)
    channel.close()
    with pytest.raises(ChannelError):
        channel.send({})
    with pytest.raises(ChannelError):
        channel.receive()


def test_no_memory_for_a_body_leaves_the_channel_usable(
    channel: Channel, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Channel, size: int, *, begun: bool = True, read: Any = Channel._read) -> memoryview:
        if size > 500_000:
            raise MemoryError
        data: memoryview = read(self, size, begun=begun)
        return data

    monkeypatch.setattr("ringfa3_launch.cluster.channel.CHUNK", 100_000)
    monkeypatch.setattr(Channel, "_read", refuses)
    channel.send({"id": 1}, {"x": np.zeros(600_000, np.uint8)})
    channel.send({"id": 2}, {"x": np.ones(10, np.uint8)})
    first, second = server.got.get(timeout=10), server.got.get(timeout=10)
    assert isinstance(first, Message)
    assert isinstance(second, Message)
    assert first.header == {"id": 1}
    assert first.problem is not None
    assert "no memory for 600" in first.problem
    assert second.tensors["x"].torch().sum() == 10


def test_a_short_token_is_refused() -> None:
    with pytest.raises(ValueError, match="token: wanted 16 characters or more, got 3"):
        Listener("127.0.0.1", "abc", lambda channel: None, max_body=LIMIT)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_BODIES = {
    "no length": b"\x01\x02",
    "header longer than all": struct.pack("<Q", 100) + b"{}",
    "header over its limit": struct.pack("<Q", 1 << 40) + b"{}",
    "not JSON": struct.pack("<Q", 2) + b"{]",
    "nested": struct.pack("<Q", len(DEEP)) + DEEP,
    "a list": struct.pack("<Q", 2) + b"[]",
}
BAD_ENTRIES: dict[str, Any] = {
    "a dtype that there is not": ENTRY | {"dtype": "F31"},
    "a dtype that is a list": ENTRY | {"dtype": ["F32"]},
    "a negative size": ENTRY | {"shape": [-2]},
    "sizes whose product overflows": ENTRY | {"shape": [1 << 62, 4]},
    "sizes that cancel": ENTRY | {"shape": [0, 1 << 62]},
    "a size that is true": ENTRY | {"shape": [True, 2]},
    "a size that is a float": ENTRY | {"shape": [2.0]},
    "too many sizes": ENTRY | {"shape": [1] * 100 + [2]},
    "offsets past the end": ENTRY | {"data_offsets": [0, 16]},
    "offsets the other way round": ENTRY | {"data_offsets": [8, 0]},
    "a hole": ENTRY | {"shape": [1], "data_offsets": [4, 8]},
    "too little": ENTRY | {"shape": [1], "data_offsets": [0, 4]},
    "another field": ENTRY | {"file": "/etc/passwd"},
    "a missing field": {"dtype": "F32", "shape": [2]},
    "no object": 5,
}


@pytest.mark.parametrize("name", [*BAD_BODIES, *BAD_ENTRIES])
def test_bytes_that_are_no_tensors(name: str) -> None:
    import json

    if name in BAD_BODIES:
        body = BAD_BODIES[name]
    else:
        header = json.dumps({"x": BAD_ENTRIES[name]}).encode()
        body = struct.pack("<Q", len(header)) + header + bytes(8)
    with pytest.raises(BadTensors, match=r"^tensors: wanted .*, got "):
        unpack(body)


def test_overlapping_and_repeated_tensors() -> None:
    import json

    def body(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode() + bytes(8)

    with pytest.raises(BadTensors, match="to begin at byte 8, got 0"):
        unpack(body(json.dumps({"x": ENTRY, "y": ENTRY})))
    with pytest.raises(BadTensors, match="a name twice"):
        unpack(body(f'{{"x": {json.dumps(ENTRY)}, "x": {json.dumps(ENTRY)}}}'))


@settings(max_examples=300)
@given(data=st.data())
def test_altered_tensors_are_refused_or_within_their_bytes(data: st.DataObject) -> None:
    body = bytearray(b"".join(pack({"a": np.arange(4, dtype=np.float32), "b": torch.zeros(3, 2).bfloat16()})))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))]
    try:
        found = unpack(body)
    except BadTensors:
        return
    total = sum(each.data.nbytes for each in found.values())
    assert total <= len(body) - 8
    for each in found.values():
        assert each.torch().numel() * SIZES[each.dtype] == each.data.nbytes
