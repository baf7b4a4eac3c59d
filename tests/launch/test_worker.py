"""A rank's side: clients that vanish, send nonsense or too much leave nothing behind, and others are served."""

from __future__ import annotations

import dataclasses
import json
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ringfa3.layout import deal, resolve
from ringfa3_launch.cluster import RingCluster
from ringfa3_launch.cluster.arrays import take
from ringfa3_launch.cluster.channel import LENGTHS, Channel, Ended, Refused
from ringfa3_launch.cluster.faults import Overloaded
from ringfa3_launch.cluster.gang import Gang
from ringfa3_launch.cluster.listener import connect
from ringfa3_launch.cluster.local_launcher import LocalLauncher
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.cluster.spawn import Spawned
from ringfa3_launch.rank import RankInfo
from tests.launch.test_cluster import check, inputs
from tests.launch.test_local import children
from tests.patience import patience

WORLD = 2
LIMIT = 8 << 20  # bytes of a message


@pytest.fixture(scope="module")
def cluster() -> Iterator[RingCluster]:
    with RingCluster.local(WORLD, device="cpu", max_message=LIMIT, max_waiting_bytes=3 << 20) as cluster:
        yield cluster


class Client:
    """Somebody else who knows the token, with a connection to each rank."""

    def __init__(self, cluster: RingCluster) -> None:
        self.gang: Gang = cluster._supervisor.gang()
        self.token = cluster.settings.token
        self.ranks: list[Channel] = [
            connect(member.host, member.port, self.token, max_body=LIMIT) for member in self.gang.members
        ]

    def ask(self, rank: int, header: dict[str, Any], tensors: Any = None) -> dict[str, Any]:
        self.ranks[rank].send(header, tensors)
        return self.ranks[rank].receive(timeout=20).header

    def leave(self) -> None:
        for channel in self.ranks:
            channel.close()


@pytest.fixture
def client(cluster: RingCluster) -> Iterator[Client]:
    client = Client(cluster)
    yield client
    client.leave()
    serves(cluster)


def serves(cluster: RingCluster) -> None:
    """The same ranks serve on, and nothing waits in them."""
    qkv = inputs(33, 4, 2, torch.float32)
    check(cluster.attention(*qkv), None, qkv)
    assert cluster.restarts == 0
    deadline = time.monotonic() + patience(30)
    gang = cluster._supervisor.gang()
    while any(_health(gang, rank)["waiting_bytes"] + _health(gang, rank)["session_bytes"] for rank in range(WORLD)):
        assert time.monotonic() < deadline, [_health(gang, rank) for rank in range(WORLD)]
        time.sleep(0.02)


def _health(gang: Gang, rank: int) -> dict[str, Any]:
    return gang.ask(rank, {"do": "health"}, timeout=10)


def part(rank: int, seqlen: int = 24) -> dict[str, Any]:
    x = np.ones((1, seqlen, 2, 16), np.float32)
    mine = take(x, deal(resolve("zigzag"), seqlen, WORLD).runs[rank])
    return {"q": mine, "k": mine, "v": mine}


def attention(number: str, **changed: Any) -> dict[str, Any]:
    return {"do": "attention", "id": number, "seqlen": 24, "causal": True, "softcap": 0.0} | changed


def test_a_call_by_hand(client: Client) -> None:
    assert client.ask(1, attention("a"), part(1)) == {"id": "a", "held": True}
    client.ranks[0].send(attention("a"), part(0))
    for rank in range(WORLD):
        answer = client.ranks[rank].receive(timeout=20)
        assert answer.header == {"id": "a"}
        assert np.array_equal(answer.tensors["out"].numpy(), np.ones((1, 12, 2, 16), np.float32))


@pytest.mark.parametrize("when", ["in a frame", "before the leader was asked", "after the leader was asked", "at work"])
def test_a_client_that_vanishes(client: Client, when: str) -> None:
    if when == "in a frame":
        for channel in client.ranks:
            channel._sock.sendall(LENGTHS.pack(2, LIMIT) + b"{}" + bytes(1000))
    elif when == "before the leader was asked":
        assert client.ask(1, attention("a"), part(1))["held"]
    else:
        assert client.ask(1, attention("a"), part(1))["held"]
        client.ranks[0].send(attention("a"), part(0))
        if when == "at work":
            time.sleep(0.005)
    client.leave()


def test_the_sessions_of_a_client_that_vanishes_are_closed(client: Client) -> None:
    ask = {"do": "open", "session": "s", "heads": 2, "kv_heads": 2, "head_dim": 16, "max_tokens": 100}
    header = ask | {"dtype": "float32", "id": "o"}
    assert client.ask(1, header)["held"]
    assert client.ask(0, header)["pages"] > 0
    assert all(_health(client.gang, rank)["session_bytes"] > 0 for rank in range(WORLD))
    client.leave()


def test_a_part_that_another_rank_lacks_is_skipped_by_all(client: Client) -> None:
    answer = client.ask(0, attention("a"), part(0))
    assert answer["error"]["kind"] == "skipped"
    assert client.ask(1, attention("b"), part(1))["held"]
    client.ranks[0].send(attention("b"))  # without tensors
    assert "q: wanted a tensor" in client.ranks[0].receive(timeout=20).header["error"]["message"]
    assert client.ranks[1].receive(timeout=20).header["error"]["kind"] == "skipped"


WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "too few rows": (attention("a"), part(0, 20), "wanted 12 rows of 24 here, got 10"),
    "no seqlen": (attention("a", seqlen=None), part(0), "seqlen: wanted an integer"),
    "a huge seqlen": (attention("a", seqlen=1 << 40), part(0), "seqlen: wanted an integer"),
    "causal of words": (attention("a", causal="yes"), part(0), "causal: wanted True or False"),
    "a window of words": (attention("a", window=["x", 1]), part(0), "window: wanted"),
    "an endless softcap": (attention("a", softcap=float("inf")), part(0), "softcap: wanted a finite number"),
    "a scale of words": (attention("a", scale="big"), part(0), "scale: wanted a finite number"),
    "vectors": (attention("a"), {x: np.ones(3, np.float32) for x in "qkv"}, r"wanted shards \[B, n, H, D\]"),
    "integers": (attention("a"), {x: y.astype(np.int64) for x, y in part(0).items()}, "q: wanted"),
    "an unknown session": ({"do": "append", "id": "a", "session": "x", "count": 1}, part(0), "session: wanted one"),
    "an unknown dtype": (
        {"do": "open", "id": "a", "session": "x", "heads": 1, "kv_heads": 1, "head_dim": 8, "max_tokens": 1,
         "dtype": "nn"}, None, "dtype: wanted",
    ),
    "no heads": ({"do": "open", "id": "a", "session": "x", "dtype": "float32"}, None, "heads: wanted an integer"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_calls_that_make_no_sense(client: Client, name: str) -> None:
    header, tensors, message = WRONG[name]
    others = part(1) if name not in ("too few rows", "vectors", "integers") else tensors
    assert client.ask(1, header, others if tensors else None)["held"]
    answers = [client.ask(0, header, tensors), client.ranks[1].receive(timeout=20).header]
    errors = [answer["error"] for answer in answers]
    assert all(error["kind"] in ("wrong", "gone", "skipped") for error in errors)
    import re

    assert any(re.search(message, error["message"]) for error in errors), errors


NONSENSE: list[dict[str, Any]] = [
    {},
    {"do": 3, "id": "x"},
    {"do": "health"},
    {"do": "health", "id": ["x"]},
    {"do": "health", "id": "x" * 1000},
    {"do": "nothing of the kind", "id": "x"},
    {"do": "complete", "id": "x", "ids": [1]},
    {"do": "cancel", "id": "x", "request": 1},
    {"do": "end me", "id": "x"},
    {"do": "join", "id": "x"},
    {"do": "join", "id": "x", "address": [], "port": {}},
]


@pytest.mark.parametrize("header", NONSENSE, ids=str)
def test_questions_that_make_no_sense(client: Client, header: dict[str, Any]) -> None:
    for rank in range(WORLD):
        assert client.ask(rank, header)["error"]["kind"] == "wrong"
        assert client.ask(rank, {"do": "health", "id": "h"})["state"] in ("idle", "busy")


def test_a_number_twice(client: Client) -> None:
    assert client.ask(1, attention("a"), part(1))["held"]
    assert "id: wanted one not in use" in client.ask(1, attention("a"), part(1))["error"]["message"]
    client.ranks[1].send({"do": "drop", "id": "d", "call": "a"})
    assert client.ask(1, attention("a"), part(1))["held"]


def test_too_much_waits(client: Client, cluster: RingCluster) -> None:
    x = np.zeros((1, 1 << 14, 1, 16), np.float32)  # 1 MiB
    assert client.ask(1, attention("a"), {"q": x, "k": x})["held"]
    error = client.ask(1, attention("b"), {"q": x, "k": x})["error"]
    assert error["kind"] == "overloaded"
    assert "wanted at most 3145728 bytes in waiting calls, got 2097328 + 2097328" in error["message"]
    with pytest.raises(Overloaded, match="rank 1: wanted at most 3145728 bytes in waiting calls"):
        cluster.attention(*[np.zeros((1, 1 << 14, 1, 16), np.float32)] * 3)
    with pytest.raises(ValueError, match=r"message: wanted at most .* of tensors"):
        cluster.attention(*[np.zeros((1, 1 << 17, 1, 16), np.float32)] * 3)


def test_another_token_gets_nothing(cluster: RingCluster) -> None:
    for member in cluster._supervisor.gang().members:
        with pytest.raises(Refused):
            connect(member.host, member.port, secrets.token_hex(32), max_body=LIMIT)
    serves(cluster)


def test_ranks_listen_on_the_loopback_address_alone(cluster: RingCluster) -> None:
    ports = {member.port for member in cluster._supervisor.gang().members}
    with open("/proc/net/tcp") as table:
        listening = [line.split()[1].split(":") for line in table.readlines()[1:] if line.split()[3] == "0A"]
    found = {int(port, 16): address for address, port in listening if int(port, 16) in ports}
    assert found.keys() == ports
    assert set(found.values()) == {"0100007F"}


def test_a_closed_port_is_closed(cluster: RingCluster) -> None:
    """A listener of a rank that has ended is gone with it."""
    launcher = LocalLauncher(1, device="cpu")
    [member] = launcher.start(Settings(device="cpu", token=secrets.token_hex(32)), 0)
    assert member.ended() is None
    socket.create_connection((member.host, member.port), 5).close()
    launcher.kill()
    assert member.ended() == "signal SIGKILL (out of memory?)"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((member.host, member.port), 5)
    launcher.close()


def test_a_rank_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    launcher = LocalLauncher(2, device="cpu")
    with pytest.raises(ChildProcessError, match="rank 0 ended by exit code 1 before it listened"):
        launcher.start(Settings(device="cpu", token="short"), 0)
    launcher.close()
    assert children() == before


def test_a_rank_ends_when_its_starter_does() -> None:
    settings = Settings(device="cpu", token=secrets.token_hex(32))
    rank = Spawned(RankInfo(0, 1, 0, 1), settings)
    rank.listen(time.monotonic() + 60)
    channel = connect(rank.host, rank.port, settings.token, max_body=LIMIT)
    assert rank._process.stdin is not None
    rank._process.stdin.close()
    with pytest.raises((Ended, OSError)):
        channel.receive(timeout=20)
    channel.close()
    deadline = time.monotonic() + patience(30)
    while rank.ended() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert rank.ended() == "exit code 1"
    rank.kill()


def test_settings_travel_and_do_not_tell_the_token() -> None:
    settings = Settings(device="cpu", model="/a/b", timeout=3.5, token="a secret of many characters")
    assert Settings.from_json(settings.to_json()) == settings
    assert "secret" not in repr(settings)
    assert json.loads(settings.to_json()).keys() == {field.name for field in dataclasses.fields(Settings)}
    for wrong, message in (
        ({"chunk": 0}, "chunk: wanted an integer, 1 or more, got 0"),
        ({"pages": True}, "pages: wanted an integer"),
        ({"timeout": float("nan")}, "timeout: wanted a positive number"),
        ({"prefill": "pass"}, "prefill: wanted one of auto, pass-kv, pass-q"),
        ({"graphs": 1}, "graphs: wanted True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)
