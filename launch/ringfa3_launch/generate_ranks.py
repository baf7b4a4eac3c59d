"""What the ranks of `ringfa3 generate` do: load the model, answer one prompt, and tell how it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfa3_launch.checkpoint import Checkpoint
from ringfa3_launch.options import reading
from ringfa3_launch.rank import RankInfo, pick_device

if TYPE_CHECKING:
    from ringfa3.inference import Event, Sampling

Tell = Callable[[str], None]  # takes text that became readable


@dataclass(frozen=True)
class Asked:
    """What the ranks have to know.

    Args:
        folder: the model's, or a GGUF file.
        name: of the model, for people.
        text: the prompt.
        chat: whether it is a user's message.
        system: what comes before it, in a chat.
        sampling: options of `ringfa3.inference.Sampling`.
        dtype: of weights and cache, as torch names it.
        chunk, page_size, prefill, graphs: see `Engine` and `Runner`; graphs only on GPUs.
        tp: ranks that share the weights; divides their number.
    """

    folder: Path
    name: str
    text: str
    chat: bool
    system: str | None
    sampling: Sampling
    dtype: str
    chunk: int
    page_size: int
    prefill: str
    graphs: bool
    tp: int = 1

    def unpacked(self, scratch: Path) -> Asked:
        """The same with a plain folder in place of a GGUF file, which every rank would take half a minute to read."""
        from dataclasses import replace

        checkpoint = Checkpoint.find(str(self.folder))
        if checkpoint.gguf is None:
            return self
        with reading(self.name):
            folder, tokenizer = checkpoint.unpack(scratch)
        tokenizer.save_pretrained(folder)
        return replace(self, folder=folder)

    def ids(self, tokenizer: Any) -> list[int]:
        """The prompt's tokens.

        Raises:
            ValueError: the model has no tokenizer, or no chat template, or the prompt no tokens.
        """
        if tokenizer is None:
            raise ValueError(f"--model: wanted one with a tokenizer, got {self.name}, which has none")
        if not self.chat:
            ids = list(tokenizer(self.text)["input_ids"])
        elif not tokenizer.chat_template:
            raise ValueError(f"--chat: wanted a model with a chat template, got {self.name}, which has none")
        else:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            turns = [*system, {"role": "user", "content": self.text.rstrip("\n")}]  # a file's last newline is not said
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError("--prompt: wanted at least one token, got none")
        return ids


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Args:
        text: all of it.
        tokens: that were sampled, with one that ended it.
        finish: "stop", "length" or "error".
        error: the reason of an "error".
        prompt_tokens: of the prompt.
        first: seconds from the request to the first token.
        seconds: from the first token to the last.
        pages: per rank, pages of the cache in use at the end, of so many.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    error: str | None
    prompt_tokens: int
    first: float
    seconds: float
    pages: tuple[tuple[int, ...], int]

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first one; None where there is but one."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds > 0 else None


def respond(info: RankInfo, asked: Asked, outbox: connection.Connection | Tell | None) -> Answer | None:
    """A rank's life: load the model, take part; rank 0 returns the answer.

    Args:
        outbox: where rank 0's text goes: sent, or called with.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from ringfa3.inference import Announcer, Engine, Runner, load

    on_gpu = dist.get_backend() == "nccl"
    device = pick_device(info.local_rank, info.local_world, "cuda" if on_gpu else "cpu")
    cp = info.world // asked.tp
    mesh = None if asked.tp == 1 else init_device_mesh(device.type, (cp, asked.tp), mesh_dim_names=("cp", "tp"))
    with reading(asked.name):
        model, tokenizer = load(asked.folder, device=device, dtype=getattr(torch, asked.dtype), group=mesh)
    ids = asked.ids(tokenizer)
    pages = pages_for(len(ids), asked.sampling.max_tokens, cp, asked.chunk, asked.page_size)
    runner = Runner(
        model, group=mesh, pages=pages, page_size=asked.page_size, prefill=asked.prefill,
        graphs=on_gpu and asked.graphs,
    )  # fmt: skip
    engine = Engine(runner, tokenizer, chunk=asked.chunk, announcer=Announcer(timeout=600.0))
    if info.rank > 0:
        engine.serve()
        return None
    tell = outbox.send if isinstance(outbox, connection.Connection) else outbox or unheard
    with _refused_as_option(engine):
        return follow(engine, ids, asked.sampling, tell)


def follow(engine: Any, ids: list[int], sampling: Sampling, tell: Tell) -> Answer:
    """Rank 0: one request from its beginning to its end, after which the engine is closed on all ranks."""
    events: list[Event] = []
    times: list[float] = []
    pages: list[tuple[int, ...]] = []

    def hear(event: Event) -> None:
        events.append(event)
        if event.token is not None:
            times.append(time.perf_counter())
        try:
            if event.text:
                tell(event.text)
        finally:  # also where nobody reads any more
            if event.finish is not None:
                pages.append(tuple(engine.stats()["pages_used"]))
                engine.close()

    begun = time.perf_counter()
    engine.submit(ids, sampling, on_event=hear)
    engine.serve()
    last = events[-1]
    return Answer(
        text="".join(event.text for event in events),
        tokens=tuple(event.token for event in events if event.token is not None),
        finish=str(last.finish),
        error=last.error,
        prompt_tokens=len(ids),
        first=times[0] - begun if times else 0.0,
        seconds=times[-1] - times[0] if times else 0.0,
        pages=(pages[0], engine.runner.pages.pages),
    )


def pages_for(prompt: int, answer: int, world: int, chunk: int, page_size: int) -> int:
    """Pages a rank that the engine wants to see before it takes one such request."""
    from ringfa3.inference import Pages
    from ringfa3.inference.schedule import Scheduler

    tokens, _ = Scheduler(Pages(world, 1, page_size), chunk=chunk).capacity(prompt, answer)
    return -(-(tokens + 1) // page_size)  # one rank alone counts the last token too, which is never held


@contextmanager
def _refused_as_option(engine: Any) -> Iterator[None]:
    """What the engine refuses before it begins: the other ranks are told to end, and the option is named."""
    try:
        yield
    except ValueError as error:
        engine.close()
        raise ValueError(str(error).replace("max_tokens:", "--max-tokens:", 1)) from None


def unheard(text: str) -> None:
    """Where nobody listens."""
