"""What `ringfa3 bench inference` measures: prompts and batches, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ringfa3_launch.bench.case import format_size
from ringfa3_launch.bench.timing import Timing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, order=True)
class Load:
    """So many prompts at once, each of so many tokens."""

    length: int
    batch: int = 1


@dataclass(frozen=True)
class Program:
    """What the ranks of every world have to know.

    Args:
        loads: in the order in which they are measured.
        tokens: answered by each prompt.
        name: of the model.
        folder: of a model; None: random weights.
        shape: of random weights.
        dtype: of weights and cache: "bf16", "fp16", "fp32".
        device: "cuda" or "cpu".
        chunk, page_size, prefill, graphs: see `Engine` and `Runner`.
        rounds: of every load, after a first that is not counted.
        check: longest prompt whose logits are compared with those in wider precision.
        kernels: (cached tokens, batch) that decode attention is timed alone for.
        seed: of random weights and prompts.
    """

    loads: tuple[Load, ...]
    tokens: int
    name: str
    folder: Path | None
    shape: str | None
    dtype: str
    device: str
    chunk: int
    page_size: int
    prefill: str
    graphs: bool
    rounds: int
    check: int
    kernels: tuple[tuple[int, int], ...]
    seed: int = 0


@dataclass(frozen=True)
class Sizes:
    """The model's, for names and bytes."""

    layers: int
    Hq: int
    Hkv: int
    D: int


@dataclass(frozen=True)
class Served:
    """How a load went, for one who answered it.

    Args:
        first: seconds to a prompt's first token, the mean of a batch; by round.
        each: seconds from a token to the next; by round.
        total: seconds for all tokens of all prompts; by round.
        answers: tokens, by prompt; of the last round.
        memory: bytes at the fullest of the rank that had most; None: unknown.
        pages: most pages of the cache that a rank had in use; 0 where there are none.
        cache: bytes of those pages.
    """

    first: Timing
    each: Timing
    total: Timing
    answers: tuple[tuple[int, ...], ...]
    memory: int | None = None
    pages: int = 0
    cache: int = 0


@dataclass(frozen=True)
class Truth:
    """What one device says of a single prompt, by which others are judged.

    Args:
        answer: its greedy tokens.
        steps: fp32 [n, vocab], the logits that they were chosen by, in the dtype that is measured.
        exact: fp32 [vocab], the first of them in wider precision; None: not computed.
    """

    answer: tuple[int, ...]
    steps: Tensor
    exact: Tensor | None


@dataclass(frozen=True)
class Checked:
    """Ours beside one device's; errors are the largest difference of a logit, as a part of the largest logit.

    Args:
        tokens: whether the greedy tokens are equal, or part at a tie closer than `allowed`.
        same: how many tokens are equal before they part; of so many.
        error: of our logits after the prompt.
        plain: transformers' own error; where that is not known, the largest of shorter prompts.
        allowed: for error.
        by: against what: "wider precision", or "one device" (transformers in the same precision).
    """

    tokens: bool
    same: int
    of: int
    error: float
    plain: float
    allowed: float
    by: str

    @property
    def ok(self) -> bool:
        return self.tokens and self.error <= self.allowed


@dataclass(frozen=True)
class Kernel:
    """Decode attention alone, of one layer.

    Args:
        length, batch: cached tokens of each of so many sequences.
        timing: seconds of a call.
        bytes: of keys and values, that it reads.
        copy: bytes a second of a device copy, reads and writes together.
    """

    length: int
    batch: int
    timing: Timing
    bytes: int
    copy: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.timing.median


@dataclass(frozen=True)
class Attention:
    """Attention within a prefill, of all layers and chunks, with what it waits for; of the slowest rank.

    Args:
        length: tokens of the prompt.
        seconds: that attention took; of `prefill` in all.
        ring: seconds of one causal ring attention over as many tokens, by round.
        layers: how many of those the prefill has.
    """

    length: int
    seconds: float
    prefill: float
    ring: Timing
    layers: int

    @property
    def speed(self) -> float:
        """Over the ring's own."""
        return self.layers * self.ring.median / self.seconds


@dataclass(frozen=True)
class Played:
    """What came of a program on one world, on rank 0."""

    world: int
    sizes: Sizes
    device: str
    served: dict[Load, Served] = field(default_factory=dict)
    peer: dict[Load, Served] = field(default_factory=dict)
    checked: dict[Load, Checked] = field(default_factory=dict)
    truths: dict[Load, Truth] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    merges: dict[int, Timing] = field(default_factory=dict)  # by batch
    attention: Attention | None = None
    missing: list[str] = field(default_factory=list)


def case_name(what: str, load: Load, sizes: Sizes, world: int, dtype: str) -> str:
    """As docs/results writes it: "prefill causal D128 H32:8 S128K W2 bf16"; a batch is named at the end."""
    batch = f" B{load.batch}" if load.batch > 1 else ""
    return f"{what} causal D{sizes.D} H{sizes.Hq}:{sizes.Hkv} S{format_size(load.length)} W{world} {dtype}{batch}"
