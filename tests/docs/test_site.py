"""The site builds without a warning and without network, asks for nothing from elsewhere, and documents every name."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import ringfa3
import ringfa3.cost
import ringfa3.inference
import ringfa3_kernels
import ringfa3_launch
from tests.docs.pages import ROOT
from tests.launch.chromium import browser

DEAD = "http://127.0.0.1:9"  # nobody answers there: a proxy that makes every request fail


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    proxies = {name: DEAD for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "NO_MKDOCS_2_WARNING": "1"} | proxies,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Assets(HTMLParser):
    """URLs that a browser loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids.add(given.get("id") or "")
        if tag == "link" and given.get("rel") in ("next", "prev", "canonical"):
            return
        names = {"link": ("href",), "a": ()}.get(tag, ("src", "srcset", "data", "poster"))
        self.urls += [given[name] or "" for name in names if name in given]


def read(page: Path) -> Assets:
    assets = Assets()
    assets.feed(page.read_text())
    return assets


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        for url in read(page).urls:
            assert not re.match(r"(https?:)?//", url), f"{page.name}: {url}"
            if not url.startswith("data:"):
                assert (page.parent / url.split("?")[0].split("#")[0]).exists() or url.startswith("/"), url
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style.name


@pytest.mark.parametrize(
    ("page", "package"),
    [
        ("ringfa3", ringfa3),
        ("cost", ringfa3.cost),
        ("inference", ringfa3.inference),
        ("kernels", ringfa3_kernels),
        ("launch", ringfa3_launch),
    ],
)
def test_every_name_is_documented(site: Path, page: str, package: Any) -> None:
    """What a package exports has a place on its page of the reference."""
    ids = read(site / "reference" / f"{page}.html").ids
    missing = [
        name
        for name in package.__all__
        if callable(made := getattr(package, name))
        and not {f"{package.__name__}.{name}", f"{made.__module__}.{name}"} & ids
    ]
    assert not missing


def test_in_a_browser(site: Path, tmp_path: Path) -> None:
    """On a telephone no page is wider than the screen; nothing fails, and no request leaves the folder."""
    with browser(tmp_path) as tab:
        tab("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        for name in ("index", "how-it-works", "choosing", "migration", "service", "reference/ringfa3", "results/ring"):
            tab.open(f"file://{site}/{name}.html")
            assert tab.run("document.documentElement.scrollWidth") <= 390, name
            broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
            assert tab.run(broken) == [], name
        assert tab.said == []
        assert [url for url in tab.asked if not url.startswith(("file:", "data:", "about:"))] == []


def test_links_out_of_the_docs_are_text(site: Path) -> None:
    """The site does not have the repository's other files."""
    for page in site.rglob("*.html"):
        outside = re.findall(r'href="((?:\.\./)+(?:launch|ringfa3|kernels|tests|examples)/[^"]*)"', page.read_text())
        assert not outside, f"{page.name}: {outside}"
