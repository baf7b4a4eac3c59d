"""The documentation's files, and the code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (.*?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A Python block of a page, and how it is to be run: what the comment before it says.

    `ranks: N`: on N gloo ranks; `ranks: N, checked`: and its out or loss is compared with plain attention's.
    `torchrun`, `script`: as a file, by launch/torchrun.sh or alone. `service`: beside one. `not run: WHY`.
    A block that asks whether it is __main__ is a script.
    """

    page: str
    line: int
    mark: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    """All Python blocks of all pages."""
    for path in PAGES:
        text = path.read_text()
        for found in FENCE.finditer(text):
            if found[1] in ("python", "py", "pycon"):
                before = MARK.search(text, 0, found.start())
                script = "script" if "__main__" in found[2] else ""
                line = text.count("\n", 0, found.start()) + 2
                yield Block(str(path.relative_to(ROOT)), line, before[1] if before else script, found[2])


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
