"""What `ringfa3 bench service` measures: answers over HTTP at each concurrency, and beside them the bare engine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ringfa3_launch.bench.case import format_size
from ringfa3_launch.bench.inference_case import Sizes
from ringfa3_launch.bench.service_load import Answer
from ringfa3_launch.bench.timing import Timing

Said = tuple[int, tuple[int, ...], str]  # an answer's prompt, tokens and text
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Program:
    """What is asked of the service.

    Args:
        name: of the model, or of random weights' shape.
        random: whether its weights are.
        concurrency: numbers of clients at once, ascending; 1 is the first.
        prompts: different ones; each is asked once at concurrency 1, and at others as often as keeps all clients busy.
        length: tokens of a prompt.
        tokens: answered to each.
        long: tokens of the prompt of the long case; None: none.
        rounds: of the long case.
        seed: of prompts.
    """

    name: str
    random: bool
    concurrency: tuple[int, ...]
    prompts: int
    length: int
    tokens: int
    long: int | None
    rounds: int
    seed: int = 0

    def asked(self, concurrency: int) -> int:
        """Requests of a level: every prompt, and of each client two."""
        return max(self.prompts, 2 * concurrency)


@dataclass(frozen=True)
class Pair:
    """One prompt, answered by the bare engine and by the service, one right after the other."""

    bare: Answer
    served: Answer


@dataclass(frozen=True)
class Overhead:
    """What the service adds to the bare engine at concurrency 1.

    Args:
        length: tokens of the prompts.
        pairs: answered without an error.
        ties: of the pairs that are not one answer, those that part at a tie.
    """

    length: int
    pairs: tuple[Pair, ...]
    ties: int = 0

    @property
    def parted(self) -> list[Pair]:
        """Pairs that are not one answer."""
        return [pair for pair in self.pairs if not pair.bare.error and said(pair.bare) != said(pair.served)]

    @property
    def wrong(self) -> int:
        return len(self.parted) - self.ties

    @property
    def first(self) -> Timing:
        """Seconds that are added to the first token, pair by pair; some are negative."""
        return Timing(tuple(pair.served.first - pair.bare.first for pair in self.pairs))

    @property
    def each(self) -> Timing:
        """What is added to the time per token, as a part of it, pair by pair."""
        return Timing(tuple(pair.served.each / pair.bare.each - 1 for pair in self.pairs if pair.bare.each))

    def of(self, who: str, figure: str) -> Timing:
        """first or each, of bare or served."""
        return Timing(tuple(getattr(getattr(pair, who), figure) for pair in self.pairs))


@dataclass(frozen=True)
class Level:
    """So many clients at once, each asking again as soon as it has its answer.

    Args:
        concurrency: clients.
        seconds: from the first request to the last answer.
        answers: all, with those that failed.
        equal, ties: answers that are the lone one, or leave it at a tie.
    """

    concurrency: int
    seconds: float
    answers: tuple[Answer, ...]
    equal: int = 0
    ties: int = 0

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.error]

    @property
    def errors(self) -> int:
        return len(self.answers) - len(self.good)

    @property
    def refused(self) -> int:
        return sum(answer.refused for answer in self.answers)

    @property
    def wrong(self) -> int:
        return len(self.good) - self.equal - self.ties

    @property
    def requests_s(self) -> float:
        return len(self.good) / self.seconds

    @property
    def tokens_s(self) -> float:
        return sum(answer.tokens for answer in self.good) / self.seconds

    def quantiles(self, of: Callable[[Answer], float]) -> dict[str, float]:
        """Over the answers: QUANTILES' names and figures; none where all failed."""
        timing = Timing(tuple(map(of, self.good)))
        return {name: timing.quantile(q) for name, q in QUANTILES.items()} if self.good else {}


@dataclass(frozen=True)
class Service:
    """Where it was measured.

    Args:
        world, device: of its ranks.
        launcher: who started them; "" another process did (--url).
        dtype: of the model; "" not known.
        sizes: None: not known.
        folder: of the model, for the judge of ties; None: not known.
    """

    world: int
    device: str
    launcher: str = ""
    dtype: str = ""
    sizes: Sizes | None = None
    folder: Path | None = None

    def case(self, what: str, length: int) -> str:
        """As docs/results writes it: "completion causal D128 H32:8 S512 W2 bf16"; what is not known is left out."""
        shape = f"causal D{self.sizes.D} H{self.sizes.Hq}:{self.sizes.Hkv} " if self.sizes else ""
        return f"{what} {shape}S{format_size(length)} W{self.world} {self.dtype}".rstrip()


@dataclass
class Played:
    """What came of a program."""

    service: Service
    levels: list[Level] = field(default_factory=list)
    overheads: list[Overhead] = field(default_factory=list)
    lone: dict[int, Answer] = field(default_factory=dict)  # by prompt
    prompts: list[list[int]] = field(default_factory=list)  # the long ones last
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # what broke off


def said(answer: Answer) -> Said:
    """What was answered to what. Tokens, as texts may hide them: random bytes are no characters, as many others."""
    return answer.prompt, answer.ids, answer.text


def differing(played: Played) -> list[Answer]:
    """Answers that are not the lone one, each once."""
    answers = [answer for level in played.levels for answer in level.good]
    answers += [pair.served for overhead in played.overheads for pair in overhead.pairs]
    lone = played.lone
    found = {said(a): a for a in answers if a.prompt in lone and said(a) != said(lone[a.prompt])}
    return list(found.values())
