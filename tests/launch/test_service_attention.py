"""Attention and its sessions over HTTP, by our client: right numbers, and hostile bodies refused before they cost."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.numpy import save

from ringfa3_launch.client import Busy, Client, DeadlineExceeded, Refused, SessionGone, Unavailable
from ringfa3_launch.service import Limits
from tests.launch.toy_gang import ToyGang, plain, serving
from tests.patience import patience

LIMITS = Limits(tensor_bytes=1 << 20, tensor_bytes_together=3 << 19, sessions=2, attention_flops=1e9)
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def gang() -> Iterator[ToyGang]:
    toy = ToyGang()
    yield toy
    toy.close()


@pytest.fixture(scope="module")
def url(gang: ToyGang) -> Iterator[str]:
    with serving(gang, limits=LIMITS) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def qkv(S: int, Hq: int, Hkv: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, S, heads, D).to(dtype) for heads in (Hq, Hkv, Hkv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_of_torch_tensors(client: Client, dtype: torch.dtype) -> None:
    q, k, v = qkv(40, 4, 2, 16, dtype)
    options: dict[str, Any] = {"causal": True, "window": (7, 0), "softcap": 5.0, "scale": 0.3}
    out, lse = client.attention(q, k, v, **options, return_lse=True)
    want, want_lse = plain(q, k, v, **options)
    assert out.dtype == dtype
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert torch.equal(client.attention(q, k, v, causal=False), plain(q, k, v, causal=False)[0])


def test_attention_of_numpy_arrays(client: Client) -> None:
    q, k, v = (x.numpy() for x in qkv(24, 2, 1, 8))
    out = client.attention(q, k, v)
    assert isinstance(out, np.ndarray)
    assert np.array_equal(out, plain(*(torch.from_numpy(x) for x in (q, k, v)))[0].numpy())


def test_a_session(client: Client, gang: ToyGang) -> None:
    q, k, v = qkv(30, 4, 2, 16)
    with client.session(heads=4, kv_heads=2, head_dim=16, max_tokens=30) as session:
        for part in (slice(0, 11), slice(11, 30)):
            session.append(k[:, part], v[:, part])
        assert session.length == 30
        assert torch.equal(session.attend(q[:, 25:]), plain(q[:, 25:], k, v)[0])
        assert torch.equal(session.attend(q, window=(3, 0)), plain(q, k, v, window=(3, 0))[0])
        with pytest.raises(Refused, match="at most 0 tokens more, got 1") as refused:
            session.append(k[:, :1], v[:, :1])
        assert refused.value.code == "session_full"
        with pytest.raises(Refused, match="q: wanted"):
            session.attend(q[:, :, :2])
        with pytest.raises(Refused, match="dtype"):
            session.attend(q.half())
        assert session.length == 30
    assert gang.opened[-1].closed
    with pytest.raises(SessionGone):
        session.attend(q)


def test_sessions_are_so_many_and_end(client: Client, gang: ToyGang, url: str) -> None:
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": 8, "max_tokens": 8}
    with client.session(**sizes), client.session(**sizes), pytest.raises(Busy) as busy, client.session(**sizes):
        pass
    assert busy.value.retry_after == 1
    assert httpx.get(f"{url}/v1/sessions/nobody").status_code == 404
    idle = Limits(session_idle_s=0.2)
    with serving(gang, limits=idle) as (other, _), Client(other) as short, short.session(**sizes) as session:
        until = time.monotonic() + 10
        while not gang.opened[-1].closed and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(SessionGone):
            _ = session.length


def test_a_session_that_was_lost_is_gone(client: Client, gang: ToyGang) -> None:
    _, k, v = qkv(4, 2, 1, 8)
    with client.session(heads=2, kv_heads=1, head_dim=8, max_tokens=8) as session:
        gang.sessions_lost = True
        try:
            with pytest.raises(SessionGone, match="410: the session is lost") as gone:
                session.append(k, v)
        finally:
            gang.sessions_lost = False
        assert gone.value.code == "session_lost"


def test_sessions_that_were_lost_take_no_place(client: Client, gang: ToyGang) -> None:
    """Nobody has to close what the gang took along."""
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": 8, "max_tokens": 8}
    with client.session(**sizes) as first, client.session(**sizes):
        with pytest.raises(Busy), client.session(**sizes):
            pass
        gang.restarts += 1
        with client.session(**sizes) as later:
            assert later.length == 0
            with pytest.raises(SessionGone) as gone:
                _ = first.length
            assert gone.value.code == "session_lost"


def test_opening_has_a_deadline(gang: ToyGang) -> None:
    """A session that comes too late for who asked for it is closed."""
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": 8, "max_tokens": 8}
    opened = len(gang.opened)
    with serving(gang, limits=Limits(attentions=1)) as (url, server), Client(url) as client:
        gang.attending.clear()
        first = threading.Thread(target=client.attention, args=qkv(4, 2, 1, 8))
        first.start()
        try:
            while not server._app.state.service.attentions.inside:
                time.sleep(0.005)
            began = time.monotonic()
            reply = httpx.post(f"{url}/v1/sessions", json=sizes, headers={"X-Deadline-S": "0.3"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert time.monotonic() - began < patience(10)
        finally:
            gang.attending.set()
            first.join()
        until = time.monotonic() + patience(30)
        while not (len(gang.opened) > opened and gang.opened[-1].closed) and time.monotonic() < until:
            time.sleep(0.01)
        assert gang.opened[-1].closed


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda q, k, v: (q * float("nan"), k, v), "q: wanted finite"),
        (lambda q, k, v: (q, k, v / 0), "v: wanted finite"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "wanted 'k' of one of F32|wanted 'q' of one of F32"),
        (lambda q, k, v: (q, k.half(), v), "k: wanted q's dtype"),
        (lambda q, k, v: (q[0], k, v), "q: wanted .B, S, H, D"),
        (lambda q, k, v: (q[:, :0], k, v), "q: wanted .B, S, H, D"),
        (lambda q, k, v: (q[..., :3], k[..., :3], v[..., :3]), "head_dim"),
        (lambda q, k, v: (q[:, :, :3], k, v), "H dividing 3"),
        (lambda q, k, v: (q, k, v[:, 1:]), "v: wanted k's shape"),
        (lambda q, k, v: (x[:, :1].expand(4097, -1, -1, -1) for x in (q[..., :2, :], k, v)), "q: wanted at most 4096"),
    ],
)
def test_wrong_tensors(client: Client, spoil: Any, match: str) -> None:
    with pytest.raises(Refused, match=match) as refused:
        client.attention(*spoil(*qkv(16, 4, 2, 8)))
    assert refused.value.status == 400


def test_too_much(client: Client, gang: ToyGang, url: str) -> None:
    with pytest.raises(Refused, match=r"at most 1e.09 floating-point operations") as refused:
        client.attention(*qkv(4096, 4, 1, 8))
    assert (refused.value.status, refused.value.code) == (413, "call_too_large")
    with pytest.raises(Refused, match="413: body: wanted at most 1048576 bytes") as refused:
        client.attention(*qkv(16384, 4, 2, 8))
    gang.attending.clear()  # the ranks are at work on a first call, of 0.78 MiB; 1.5 MiB is the most together
    large = qkv(800, 16, 8, 8)
    first = threading.Thread(target=lambda: client.attention(*large))
    try:
        first.start()
        time.sleep(0.3)
        with pytest.raises(Busy, match="bytes of tensors in memory"):
            client.attention(*large)
        with Client(url, timeout=0.2) as hurried, pytest.raises(DeadlineExceeded):
            hurried.attention(*qkv(4, 2, 1, 8))
    finally:
        gang.attending.set()
        first.join()


def test_a_rank_that_failed(gang: ToyGang) -> None:
    toy = ToyGang()
    with serving(toy) as (url, _), Client(url) as client:
        assert client.ready()
        toy.fail(1)
        with pytest.raises(Unavailable, match="rank 1 on here: died") as failed:
            client.attention(*qkv(4, 2, 1, 8))
        assert (failed.value.status, failed.value.code, failed.value.retry_after) == (503, "rank_failed", 5)
        assert not client.ready()
        assert "rank 1 on here is dead" in httpx.get(f"{url}/ready").json()["error"]["message"]
    toy.close()


def body(header: object, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    shape = [1, (end - begin) // 32, 1, 8] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"q": entry(0, 64), "k": entry(64, 128), "v": entry(128, 192)}
DATA = bytes(192)
HOSTILE = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "no header": body(b"", DATA),
    "a header beyond the body": body(GOOD, DATA, 10_000),
    "a header of 2^64 - 1": body(GOOD, DATA, (1 << 64) - 1),
    "a header of 2^63": body(GOOD, DATA, 1 << 63),
    "no JSON": body(b"\xff" * 40, DATA),
    "a list": body([GOOD], DATA),
    "deep": body(b"[" * 16000, DATA),
    "deep objects": body(b'{"q":' * 3000, DATA),
    "a number of 10,000 digits": body(b'{"q": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b"]}}", DATA),
    "NaN": body(b'{"q": NaN}', DATA),
    "a name twice": body(b'{"q": %b, "q": %b}' % ((json.dumps(GOOD["q"]).encode(),) * 2), DATA),
    "no tensors": body({}, b""),
    "other names": body({"x": entry(0, 192)}, DATA),
    "one more": body(GOOD | {"x": entry(192, 256)}, bytes(256)),
    "one less": body({"q": entry(0, 96), "k": entry(96, 192)}, DATA),
    "an unknown dtype": body(GOOD | {"q": entry(0, 64, dtype="F8_E4M3")}, DATA),
    "a dtype that is no text": body(GOOD | {"q": entry(0, 64, dtype=["F32"])}, DATA),
    "overlapping": body(GOOD | {"k": entry(32, 96)}, DATA),
    "the same bytes": body(dict.fromkeys("qkv", entry(0, 192)), DATA),
    "a hole": body(GOOD | {"v": entry(132, 196)}, bytes(196)),
    "beyond the end": body(GOOD | {"v": entry(128, 256)}, DATA),
    "backwards": body(GOOD | {"v": entry(192, 128, [1, 2, 1, 8])}, DATA),
    "negative offsets": body(GOOD | {"q": entry(-64, 0, [1, 2, 1, 8])}, DATA),
    "negative sizes": body(GOOD | {"q": entry(0, 64, [-1, -2, 1, 8])}, DATA),
    "a size of true": body(GOOD | {"q": entry(0, 64, [True, 2, 1, 8])}, DATA),
    "a size of 2.0": body(GOOD | {"q": entry(0, 64, [1, 2.0, 1, 8])}, DATA),
    "a product beyond 2^64": body(GOOD | {"q": entry(0, 64, [1 << 40, 1 << 40, 1, 8])}, DATA),
    "sizes that wrap": body(GOOD | {"q": entry(0, 64, [1 << 62, 4, 1, 8])}, DATA),
    "a shape of 5,000 sizes": body(GOOD | {"q": entry(0, 64, [1] * 5000)}, DATA),
    "a dtype of deep lists": body(
        b'{"q": {"dtype": %b%b, "shape": [], "data_offsets": [0, 0]}}' % (b"[" * 800, b"]" * 800), DATA
    ),
    "a name of 9,000 letters": body({"q" * 9000: 5}, DATA),
    "a shape that is text": body(GOOD | {"q": entry(0, 64, "1,2,1,8")}, DATA),
    "a field more": body(GOOD | {"q": entry(0, 64) | {"strides": [1]}}, DATA),
    "a field less": body(GOOD | {"q": {"dtype": "F32", "shape": [1, 2, 1, 8]}}, DATA),
    "metadata that is no text": body(GOOD | {"__metadata__": {"a": 1}}, DATA),
    "data that go on": body(GOOD, bytes(193)),
    "data that end early": body(GOOD, bytes(191)),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "a zip, as torch.save makes": b"PK\x03\x04" + bytes(200),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies(url: str, name: str) -> None:
    reply = httpx.post(f"{url}/v1/attention", content=HOSTILE[name], headers=BINARY)
    assert reply.status_code in (400, 413), reply.text
    assert reply.json()["error"]["code"] in ("invalid_safetensors", "header_too_large"), reply.text


def test_other_peoples_files_are_read(url: str) -> None:
    """As the safetensors package writes them, metadata included; and one byte at a time."""
    parts = {name: np.random.default_rng(0).standard_normal((1, 8, 2, 8), dtype=np.float32) for name in "qkv"}
    whole = save(parts, metadata={"format": "np"})
    assert httpx.post(f"{url}/v1/attention", content=whole, headers=BINARY).status_code == 200
    headers = BINARY | {"Content-Length": str(len(whole))}
    slowly = (whole[at : at + 1] for at in range(len(whole)))
    assert httpx.post(f"{url}/v1/attention", content=slowly, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "query",
    [
        *("causal=maybe", "window=1", "window=1,2,3", "window=-2,0", "window=99999999999,0", "softcap=-1"),
        *("softcap=nan", "scale=0", "scale=inf", "dropout=1"),
    ],
)
def test_options_are_checked(url: str, query: str) -> None:
    reply = httpx.post(f"{url}/v1/attention?{query}", content=body(GOOD, DATA), headers=BINARY)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    "more", [{"head_dim": 12}, {"heads": 3}, {"dtype": "float64"}, {"max_tokens": 1 << 30}, {"x": 1}]
)
def test_sessions_are_checked(url: str, more: dict[str, Any]) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "max_tokens": 8}
    reply = httpx.post(f"{url}/v1/sessions", json=sizes | more)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == next(iter(more))
