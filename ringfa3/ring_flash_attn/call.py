"""One call of ring_attention behind all of ring-flash-attn's functions, and errors that the other ranks hear of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ringfa3.attention import ring_attention
from ringfa3.entrance import checked_flag
from ringfa3.gang import Gang
from ringfa3.shards import Group, axes, members


@dataclass(frozen=True, eq=False)
class Common:
    """The arguments that all the functions share; see `ring_flash_attn_func`."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool
    group: Group

    def __post_init__(self) -> None:
        with heard(self.group):
            for name in ("causal", "deterministic", "return_attn_probs"):
                object.__setattr__(self, name, checked_flag(name, getattr(self, name)))  # the dataclass is frozen

    def run(self, prepare: Callable[[], tuple[Tensor, Tensor, Tensor, dict[str, Any]]]) -> Any:
        """The functions' result for batched tensors: out [B, n, Hq, D], or (out, lse [B, Hq, n], None).

        Args:
            prepare: checks what this rank was given; returns q, k, v and what else `ring_attention` is to be told.
        """
        with heard(self.group):
            if axes(self.group) is not None:
                raise ValueError(f"group: wanted a ProcessGroup or a 1-D DeviceMesh, as pieces are, got {self.group}")
            q, k, v, options = prepare()
        result = ring_attention(
            q, k, v, scale=self.softmax_scale, deterministic=self.deterministic, group=self.group,
            dropout_p=self.dropout_p, alibi_slopes=self.alibi_slopes, return_lse=self.return_attn_probs, **options,
        )  # fmt: skip
        return (*result, None) if self.return_attn_probs else result

    def run_packed(self, prepare: Callable[[], tuple[Tensor, Tensor, Tensor, dict[str, Any]]]) -> Any:
        """As `run`, for packed rows: prepare returns [n, H, D]; out [n, Hq, D], or (out, lse [Hq, n], None)."""

        def batched() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
            q, k, v, options = prepare()
            return q[None], k[None], v[None], options

        result = self.run(batched)
        return (result[0][0], result[1][0], None) if self.return_attn_probs else result[0]


@contextmanager
def heard(group: Group) -> Iterator[None]:
    """Arguments are checked in here: what is wrong on this rank alone is a ValueError on the others, not a hang."""
    try:
        yield
    except Exception as error:
        process_group, world, _ = members(group)
        if world > 1:
            Gang.of(process_group).agreement().agree((), 0, error)
        raise
