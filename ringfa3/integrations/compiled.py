"""What a Hugging Face model may be asked for where torch.compile takes the whole of it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

from ringfa3.plan import Plan
from ringfa3_kernels import Unsupported

T = TypeVar("T")


class Now(Generic[T]):
    """What is under way in this context, None for nothing: a ContextVar, and an attribute that torch.compile can trace.

    Tracing is one thread's work, and is over before what it made runs.
    """

    def __init__(self, name: str) -> None:
        self._running: ContextVar[T | None] = ContextVar(name, default=None)
        self._traced: T | None = None

    def get(self) -> T | None:
        """What was set last."""
        return self._traced if torch.compiler.is_compiling() else self._running.get()

    def set(self, what: T | None) -> None:
        """From now on it is this."""
        self._traced = what
        if not torch.compiler.is_compiling():
            self._running.set(what)


def special(given: dict[str, Any]) -> tuple[str, ...]:
    """Arguments of a model that change what its layers see, or where."""
    names = ("attention_mask", "past_key_values", "position_ids", "use_cache")
    return tuple(name for name in names if given.get(name) is not None and given.get(name) is not False)


def check_compiled(config: Any, plan: Plan, special: tuple[str, ...]) -> None:
    """Raise Unsupported unless every layer sees what the plan says, all of it.

    Mask functions that transformers makes while it is traced cannot be looked into, so nothing may depend on them.

    Args:
        config: the model's.
        special: those of its arguments.
    """
    for name in special:
        raise Unsupported(_message(name, "none", "it"))
    if config.get_text_config() is not config:
        raise Unsupported(_message("model", "one of text alone", type(config).__name__))
    kinds = set(getattr(config, "layer_types", None) or ())
    windows = [name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None) is not None]
    if not kinds <= {"full_attention"} or (windows and not kinds):
        raise Unsupported(_message("model", "full attention in every layer", ", ".join(windows or sorted(kinds))))
    if not plan.mask.causal:
        raise Unsupported(_message("plan", "a causal mask", "one whose positions see their successors"))


def _message(name: str, wanted: str, got: str) -> str:
    return f"{name}: wanted {wanted} where torch.compile takes a whole model (more where it takes layers), got {got}"
