"""mkdocs hooks: every page of results is in the navigation, and links out of docs/ become their text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FOLDERS = "ringfa3|kernels|launch|tests|examples|README|CHANGELOG"
OUTSIDE = re.compile(rf"\[([^\]]+)\]\((?:\.\./)+(?:{FOLDERS})[^)]*\)")


def on_config(config: Any) -> Any:
    """A bench writes its page into docs/results; it follows those that mkdocs.yml names."""
    (pages,) = (entry["Results"] for entry in config.nav if "Results" in entry)
    named = {path for entry in pages for path in ([entry] if isinstance(entry, str) else entry.values())}
    found = sorted(path.relative_to(config.docs_dir) for path in Path(config.docs_dir, "results").glob("*.md"))
    pages += [str(path) for path in found if str(path) not in named]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page as the site shows it, which has none of the repository's other files; on a code host its links stay."""
    return OUTSIDE.sub(r"\1", markdown)
