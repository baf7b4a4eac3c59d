"""How much the service takes on: sizes, lengths, numbers and times, and the gates that count who is inside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from ringfa3_launch.service.errors import Refusal

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What is refused before any work is done.

    Args:
        json_bytes: body of a JSON request.
        json_bytes_together: bodies of JSON that are in memory at once, all requests.
        tensor_bytes: body of one request with tensors.
        tensor_bytes_together: bodies with tensors that are in memory at once, all requests.
        header_bytes: the JSON header of a safetensors body.
        prompt_tokens: of one request; None: what the model takes.
        completion_tokens: the most that a request may ask for; None: what the model takes.
        stops: stop strings, and characters of each.
        completions: completions in flight, waiting ones included.
        attentions: attention calls in flight, waiting ones included.
        attention_flops: floating-point operations of one attention call (4 · B · Hq · Sq · Sk · D).
        sessions: attention sessions that are open at once.
        session_tokens: of one attention session.
        session_idle_s: an attention session that nobody used for so long is closed.
        conversations: named sessions of completions that the service remembers.
        deadline_s: a request's whole time.
        upload_s: time in which a body must have arrived.
        first_event_s: how long a stream waits for news before its headers go; an error until then is a status.
        drain_s: what requests in flight get after SIGTERM.
    """

    json_bytes: int = 4 * MIB
    json_bytes_together: int = 256 * MIB
    tensor_bytes: int = 256 * MIB
    tensor_bytes_together: int = 512 * MIB
    header_bytes: int = 16 * 1024
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    stops: tuple[int, int] = (4, 256)
    completions: int = 320
    attentions: int = 4
    attention_flops: float = 5e12
    sessions: int = 16
    session_tokens: int = 1 << 20
    session_idle_s: float = 900.0
    conversations: int = 256
    deadline_s: float = 600.0
    upload_s: float = 60.0
    first_event_s: float = 2.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for each in () if value is None else value if isinstance(value, tuple) else (value,):
                if not 0 < each < math.inf:
                    raise ValueError(f"{field.name}: wanted more than 0, and a finite number, got {value}")


class Gate:
    """Lets in so many at once, of whatever unit; the others are told to come back. For one event loop, so no lock."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name, self.capacity, self.inside = name, capacity, 0

    @contextmanager
    def held(self, amount: int = 1) -> Iterator[None]:
        """Inside the gate.

        Raises:
            Refusal: 429, it is full.
        """
        self.enter(amount)
        try:
            yield
        finally:
            self.leave(amount)

    @contextmanager
    def counted(self, amount: int) -> Iterator[None]:
        """Inside the gate though it be full: what is there already."""
        self.inside += amount
        try:
            yield
        finally:
            self.leave(amount)

    def check(self, amount: int = 1) -> None:
        """Whether there is room.

        Raises:
            Refusal: 429, there is not.
        """
        if self.inside + amount > self.capacity:
            raise Refusal.busy(f"{self.name}: {self.inside} of {self.capacity} in use")

    def enter(self, amount: int = 1) -> None:
        """As `held`, for those whose leaving is not the end of a block."""
        self.check(amount)
        self.inside += amount

    def leave(self, amount: int = 1) -> None:
        self.inside -= amount


def check_work(wanted: float, most: float) -> None:
    """Refuses a call that would take the ranks for itself."""
    if wanted > most:
        message = f"q: wanted a call of at most {most:.3g} floating-point operations, got {wanted:.3g}"
        raise Refusal(413, message, param="q", code="call_too_large")
