"""Links between the Markdown files lead somewhere, pictures are there, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import FENCE, PAGES, ROOT, prose

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(path: Path) -> set[str]:
    """Of a page's headings, where a code host and the site agree on them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", each).lower() for each in headings]
    host = {re.sub(r"[^\w\- ]", "", each).replace(" ", "-") for each in plain}
    site = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", each).strip()) for each in plain}
    return host & site


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or ROOT not in there.parents:
            broken.append(f"{target}: no such file")
        elif anchor and there.parent.name != "reference" and anchor not in anchors(there):  # mkdocs checks those
            broken.append(f"{target}: no such heading")
    assert not broken


def test_named_files_exist() -> None:
    """What the README's and the documentation's prose names with its path is there."""
    named = re.compile(r"`((?:docs|examples|kernels|launch|ringfa3|tests)/[\w./-]+\.(?:py|sh|sbatch|ya?ml|md|json))`")
    current = [page for page in PAGES if page.name not in ("log.md", "decisions.md")]  # they tell of the past, too
    missing = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in current
        for name in named.findall(page.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing


def test_every_example_is_told_of() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for example in (ROOT / "examples").glob("*.py"):
        assert f"examples/{example.name}" in text, example


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
