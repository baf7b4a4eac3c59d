"""Settings: what the ranks of a cluster are to be, as one value that travels as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class Settings:
    """What every rank of a cluster is told when it starts.

    Args:
        device: "cpu", "cuda" or "auto", as `ringfa3_launch.init`'s.
        model: folder (safetensors) or GGUF file of a causal language model; None: attention and sessions alone.
        dtype: of the model's weights: "auto", "float32", "float16" or "bfloat16".
        memory: bytes of every rank's memory for the model's keys and values; None: most of what a GPU has left once
            the model is loaded, 1 GiB on CPUs.
        pages: the same, in pages.
        page_size: positions of a page, of the model's cache and of sessions.
        prefill: "auto", "pass-kv" or "pass-q".
        graphs: the model decodes under CUDA graphs, on GPUs; on CPUs there are none. The commonest are captured before
            the ranks serve.
        tp: ranks that share the model's weights, of which there are that many in each group; divides their number.
        chunk: prompt tokens of one engine step.
        max_running, max_waiting: requests that the engine decodes together, and that may queue for it.
        timeout: seconds of silence after which a rank counts as failed.
        call_timeout: seconds that ranks wait for each other within a call.
        start_timeout: seconds that a gang may take to start, the model's loading included.
        max_message: bytes of one message to or from a rank.
        max_waiting_bytes: bytes of tensors that wait in one rank for their calls' turn.
        session_memory: bytes of all sessions' keys and values on one rank.

    Raises:
        ValueError: a field is nonsense; names it, what was wanted and what came.
    """

    device: str = "auto"
    model: str | None = None
    dtype: str = "auto"
    memory: int | None = None
    pages: int | None = None
    page_size: int = 64
    prefill: str = "auto"
    graphs: bool = True
    tp: int = 1
    chunk: int = 512
    max_running: int = 64
    max_waiting: int = 256
    timeout: float = 10.0
    call_timeout: float = 300.0
    start_timeout: float = 300.0
    max_message: int = 4 * GIB
    max_waiting_bytes: int = 16 * GIB
    session_memory: int = 4 * GIB
    token: str = field(default="", repr=False)  # the shared secret of this cluster's connections

    def __post_init__(self) -> None:
        for name, wanted in (
            ("device", ("auto", "cpu", "cuda")),
            ("dtype", ("auto", "float32", "float16", "bfloat16")),
            ("prefill", ("auto", "pass-kv", "pass-q")),
        ):
            if getattr(self, name) not in wanted:
                raise ValueError(f"{name}: wanted one of {', '.join(wanted)}, got {getattr(self, name)!r}")
        if not isinstance(self.graphs, bool):
            raise ValueError(f"graphs: wanted True or False, got {self.graphs!r}")
        for name in ("timeout", "call_timeout", "start_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name}: wanted a positive number of seconds, got {value!r}")
        for name in ("page_size", "tp", "chunk", "max_running", "max_waiting", "max_message", "max_waiting_bytes"):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("session_memory", self.session_memory, 0)
        for name in ("memory", "pages"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        if self.memory is not None and self.pages is not None:
            raise ValueError(f"memory: wanted either it or pages, got {self.memory} and {self.pages}")

    def to_json(self) -> str:
        """Its text, the token included."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**fields)


def _check_integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: wanted an integer, {low} or more, got {value!r}")
