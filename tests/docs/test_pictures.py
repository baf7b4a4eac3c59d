"""The documentation's pictures can be made, and those that are committed show what the code says today."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.docs.pages import PAGES, ROOT

COMMITTED = ROOT / "docs" / "pictures"
STALE = "the code has moved on: python docs/pictures.py"


@pytest.fixture(scope="module")
def pictures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("pictures")


def assert_same(now: Any, then: Any, where: str) -> None:
    """Equal but for rounding; what is an error of fp32 need only be small."""
    if isinstance(now, dict) and isinstance(then, dict):
        assert now.keys() == then.keys(), f"{where}: {STALE}"
        for name in now:
            assert_same(now[name], then[name], f"{where}.{name}")
    elif isinstance(now, list) and isinstance(then, list):
        assert len(now) == len(then), f"{where}: {STALE}"
        for i, (a, b) in enumerate(zip(now, then, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(now, float):
        assert now == pytest.approx(then, rel=1e-3, abs=1e-4), f"{where}: {STALE}"
    else:
        assert now == then, f"{where}: {STALE}"


def test_pictures(pictures: Any, tmp_path: Path) -> None:
    found = pictures.figures()
    assert_same(json.loads(json.dumps(found)), json.loads((COMMITTED / "figures.json").read_text()), "figures")
    pictures.write(found, tmp_path)
    text = "".join(page.read_text() for page in PAGES)
    names = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert names == sorted(path.name for path in COMMITTED.glob("*.svg"))
    for name in names:
        assert ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")
        assert f"pictures/{name})" in text, f"{name} is on no page"


def test_the_softmax_ends_exact(pictures: Any) -> None:
    hops = importlib.import_module("figures").softmax()["hops"]
    assert hops[-1]["error"] < 1e-5 < min(hop["error"] for hop in hops[:-1])
