"""Events: what the caller of a request is told, token by token, and all of it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened to a request; the last one says how it finished.

    Args:
        request: its number.
        token: what was sampled; None: nothing, it was cancelled or failed.
        text: what became readable: whole characters, no part of a stop string.
        finish: "stop" (end of sequence, stop id, stop string), "length" (max_tokens), "cancelled", "error"; None: it
            goes on.
        error: the reason of an "error".
        prompt_tokens, completion_tokens: so far.
        cached_tokens: prompt tokens that its session, or another sequence, had in the cache.
    """

    request: int
    token: int | None
    text: str
    finish: Finish | None
    error: str | None = None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Completion:
    """All events of a request together; see Event. tokens are all that were sampled, with one that ended it."""

    tokens: tuple[int, ...]
    text: str
    finish: Finish
    error: str | None
    prompt_tokens: int
    cached_tokens: int

    @classmethod
    def of(cls, events: Sequence[Event]) -> Completion:
        """Of a request that has finished."""
        last = events[-1]
        if last.finish is None:
            raise ValueError(f"events: wanted all of a request's, got {len(events)} without the last")
        tokens = tuple(event.token for event in events if event.token is not None)
        text = "".join(event.text for event in events)
        return cls(tokens, text, last.finish, last.error, last.prompt_tokens, last.cached_tokens)
