"""Answers over long contexts: a key/value cache sharded over the ranks, decode attention over it, and an engine.

`Runner` and `load` need transformers, which is imported when they are first asked for; the rest does without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ringfa3.inference.announce import Announcer
from ringfa3.inference.cache import PagedCache
from ringfa3.inference.engine import Busy, Engine
from ringfa3.inference.events import Completion, Event
from ringfa3.inference.pages import CacheFull, Pages, Placed
from ringfa3.inference.sampling import Sampling

if TYPE_CHECKING:
    from ringfa3.inference.model import load
    from ringfa3.inference.runner import Runner

__all__ = [
    "Announcer",
    "Busy",
    "CacheFull",
    "Completion",
    "Engine",
    "Event",
    "PagedCache",
    "Pages",
    "Placed",
    "Runner",
    "Sampling",
    "load",
]

_LATER = {"Runner": "ringfa3.inference.runner", "load": "ringfa3.inference.model"}  # name -> the module that has it


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
