"""What the service asks of a gang of ranks: structural types, so that tests may bring a gang of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch


class Event(Protocol):
    """News of one completion: text that became readable, or its end."""

    @property
    def request(self) -> int: ...
    @property
    def token(self) -> int | None: ...
    @property
    def text(self) -> str: ...
    @property
    def finish(self) -> str | None: ...  # None, "stop", "length", "cancelled", "error"
    @property
    def error(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...


class Completing(Protocol):
    """A completion that was accepted: an iterator of its events, the last of which has a finish."""

    def __iter__(self) -> Iterator[Event]: ...
    def cancel(self) -> None: ...  # from any thread, at any time: the gang stops at its next step


class RankHealth(Protocol):
    """One rank, as its launcher sees it."""

    @property
    def rank(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    @property
    def last_collective_age_s(self) -> float | None: ...
    @property
    def cache_used(self) -> int: ...  # pages
    @property
    def cache_pages(self) -> int: ...
    @property
    def state(self) -> str: ...


class Attending(Protocol):
    """An attention session: keys and values that stay sharded on the ranks."""

    @property
    def length(self) -> int: ...
    def append(self, k: torch.Tensor, v: torch.Tensor) -> Any: ...
    def attend(
        self,
        q: torch.Tensor,
        *,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
    ) -> Any: ...
    def close(self) -> None: ...


class Cluster(Protocol):
    """A gang of ranks. Every method may block and is called from threads; RankFailed comes from any of them."""

    @property
    def restarts(self) -> int: ...
    @property
    def model_name(self) -> str | None: ...  # None: attention only
    @property
    def tokenizer(self) -> Any: ...  # a Hugging Face tokenizer, None without a model

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Any: ...
    def session(self, *, heads: int, kv_heads: int, head_dim: int, dtype: str, max_tokens: int) -> Attending: ...
    def complete(self, prompt: Sequence[int], sampling: Any, *, session: str | None = None) -> Completing: ...
    def close_session(self, name: str) -> None: ...  # of completions
    def health(self) -> Sequence[RankHealth]: ...
    def ready(self) -> bool: ...
    def info(self) -> dict[str, Any]: ...
