"""The page, as a reader meets it: in headless Chromium, over real HTTP."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfa3_launch.service import Access
from tests.launch.chromium import Tab, browser
from tests.launch.toy_gang import ToyGang, answer, serving

PREFILL = {
    "number": 1,
    "tokens": 4096,
    "ranks": [
        {
            "rank": rank,
            "hops": [
                {"source": (rank - hop) % 4, "start_s": hop * 0.011 + rank * 0.001, "stop_s": hop * 0.011 + 0.01}
                for hop in range(4)
            ],
        }
        for rank in range(4)
    ],
}


class Showing(ToyGang):
    """With a prefill to show."""

    def info(self) -> dict[str, Any]:
        return super().info() | {"last_prefill": PREFILL}


@pytest.fixture
def gang() -> Iterator[ToyGang]:
    toy = Showing(step=0.02)
    yield toy
    toy.close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


def ask(tab: Tab, prompt: str, most: int, kind: str = "text") -> None:
    tab.wait("!document.getElementById('send').disabled")
    for name, value in (("prompt", prompt), ("most", most), ("kind", kind)):
        tab.run(f"document.getElementById('{name}').value = {value!r}")
    tab.run("document.getElementById('send').click()")


def test_the_page(gang: ToyGang, tab: Tab, tmp_path: Path) -> None:
    """An answer streams in, ranks and hops are drawn, nothing comes from elsewhere and nothing is complained of."""
    tab.said.clear()
    tab.asked.clear()
    with serving(gang) as (url, _):
        tab.open(url)
        ask(tab, "Once upon", 40)
        whole = answer("Once upon", 40)
        part = tab.wait("document.getElementById('answer').textContent")
        assert len(part) < len(whole)  # it streams
        assert whole.startswith(part)
        tab.wait("document.getElementById('figures').textContent.includes('tokens/s')")
        assert tab.run("document.getElementById('answer').textContent") == whole
        assert "length reached" in tab.run("document.getElementById('figures').textContent")
        ask(tab, "Hello", 8, "chat")
        tab.wait("document.getElementById('figures').textContent.includes('reached')")
        assert tab.run("document.getElementById('answer').textContent") == answer("<user>Hello", 8)
        assert tab.run("document.getElementById('state').textContent") == "ready"
        assert "rank 1" in tab.run("document.getElementById('ranks').innerText")
        assert "3 of 8 pages" in tab.run("document.getElementById('ranks').innerText")
        assert tab.run("document.querySelector('.bar > i').getBoundingClientRect().width") > 20
        assert tab.run("document.querySelectorAll('#hops rect.hop').length") == 16
        for dark in (False, True):
            file = tmp_path / f"page-{'dark' if dark else 'light'}.png"
            tab.picture(file, dark=dark)
            assert file.stat().st_size > 10_000
            if folder := os.environ.get("RINGFA3_SCREENSHOTS"):
                Path(folder, file.name).write_bytes(file.read_bytes())
        assert "ringfa3_hop_seconds_count 16.0" in httpx.get(f"{url}/metrics").text
        assert tab.asked
        assert all(asked.startswith(url) for asked in tab.asked)
        assert [said for said in tab.said if "favicon" not in said] == []


def test_stop_and_errors(gang: ToyGang, tab: Tab) -> None:
    with serving(gang) as (url, _):
        tab.open(url)
        ask(tab, "Once upon", 4000)
        tab.wait("document.getElementById('answer').textContent.length > 3")
        tab.run("document.getElementById('stop').click()")
        tab.wait("document.getElementById('figures').textContent.includes('stopped')")
        until = time.monotonic() + 5
        while gang.running and time.monotonic() < until:
            time.sleep(0.02)
        assert gang.running == 0
        gang.fail(1)
        ask(tab, "Once upon", 10)
        assert "rank 1 on here" in tab.wait("document.querySelector('#answer.error')?.textContent")
        tab.wait("document.getElementById('state').textContent === 'not ready'")
        tab.wait("document.querySelector('#ranks .dead')?.textContent === 'dead'")


def test_a_locked_server_is_unlocked_by_hand(gang: ToyGang, tab: Tab) -> None:
    with serving(gang, access=Access("a-token-of-this-server")) as (url, _):
        tab.open(url)
        tab.wait("!document.getElementById('lock').hidden")
        tab.run("document.getElementById('token').value = 'a-token-of-this-server'")
        tab.run("document.querySelector('#lock button').click()")
        tab.wait("document.getElementById('lock').hidden")
        ask(tab, "Once upon", 5)
        tab.wait("document.getElementById('figures').textContent.includes('reached')")
        assert tab.run("document.getElementById('answer').textContent") == answer("Once upon", 5)
