"""How an answer is written down: text or chat, whole or in parts, as OpenAI's API has them.

Choices have token ids only where `ids` are given.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ringfa3_launch.service.contract import Event

Ids = list[int] | None


class Form(Protocol):
    """One of the two kinds of completion."""

    def whole(self, text: str, ids: Ids, last: Event) -> dict[str, Any]:
        """The answer in one piece."""

    def opening(self, *, usage: bool) -> list[dict[str, Any]]:
        """What comes before the first part of a stream."""

    def part(self, text: str, ids: Ids, finish: str | None, *, usage: bool) -> dict[str, Any]:
        """A part of a stream. With usage the field is there, and null but in the last."""

    def ending(self, last: Event) -> dict[str, Any]:
        """What comes after the last part: usage."""


def used(last: Event) -> dict[str, Any]:
    """Tokens read and written, as OpenAI's API has them."""
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }


@dataclass(frozen=True)
class _Signed:
    """What all parts of an answer begin with."""

    id: str
    created: int
    model: str

    def _signed(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | bool) -> dict[str, Any]:
        """usage: False leaves it out, True is null."""
        body: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        body["choices"] = choices
        if usage is not False:
            body["usage"] = None if usage is True else usage
        return body


@dataclass(frozen=True)
class TextForm(_Signed):
    """/v1/completions."""

    @classmethod
    def new(cls, model: str) -> Self:
        return cls(f"cmpl-{secrets.token_hex(12)}", int(time.time()), model)

    def whole(self, text: str, ids: Ids, last: Event) -> dict[str, Any]:
        return self._signed("text_completion", [_text(text, ids, last.finish)], used(last))

    def opening(self, *, usage: bool) -> list[dict[str, Any]]:
        return []

    def part(self, text: str, ids: Ids, finish: str | None, *, usage: bool) -> dict[str, Any]:
        return self._signed("text_completion", [_text(text, ids, finish)], usage)

    def ending(self, last: Event) -> dict[str, Any]:
        return self._signed("text_completion", [], used(last))


@dataclass(frozen=True)
class ChatForm(_Signed):
    """/v1/chat/completions."""

    @classmethod
    def new(cls, model: str) -> Self:
        return cls(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model)

    def whole(self, text: str, ids: Ids, last: Event) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": last.finish, "logprobs": None} | _of(ids)
        return self._signed("chat.completion", [choice], used(last))

    def opening(self, *, usage: bool) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""}, None, None, usage)]

    def part(self, text: str, ids: Ids, finish: str | None, *, usage: bool) -> dict[str, Any]:
        return self._chunk({"content": text} if text else {}, ids, finish, usage)

    def ending(self, last: Event) -> dict[str, Any]:
        return self._signed("chat.completion.chunk", [], used(last))

    def _chunk(self, delta: dict[str, Any], ids: Ids, finish: str | None, usage: bool) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None} | _of(ids)
        return self._signed("chat.completion.chunk", [choice], usage)


def _text(text: str, ids: Ids, finish: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": finish, "logprobs": None} | _of(ids)


def _of(ids: Ids) -> dict[str, Any]:
    return {} if ids is None else {"token_ids": ids}
