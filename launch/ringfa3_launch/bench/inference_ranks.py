"""What the ranks of `ringfa3 bench inference` do: answer every load with the engine, and be judged by one device."""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfa3_launch.bench import inference_parts as parts
from ringfa3_launch.bench import inference_peer as peer
from ringfa3_launch.bench.case import DTYPES, format_size
from ringfa3_launch.bench.inference_case import Load, Played, Program, Served, Sizes, Truth
from ringfa3_launch.bench.inference_rounds import Rounds, check, prefill
from ringfa3_launch.bench.shapes import model_of
from ringfa3_launch.bench.timing import Memory
from ringfa3_launch.generate_ranks import pages_for
from ringfa3_launch.options import reading
from ringfa3_launch.rank import RankInfo, pick_device

if TYPE_CHECKING:
    import torch

    from ringfa3.inference import Runner

Tell = Callable[[str, int], None]

PART_SECONDS = 1.0  # for the rounds of a part


@dataclass(frozen=True)
class Task:
    """One world's share of a program.

    Args:
        program: all of it.
        judge: whether transformers runs too, on rank 0, and parts that one device has are timed.
        truths: what an earlier world's judge found.
        until: by the machine's monotonic clock, when no load is begun any more; None: no limit.
        kept: file to which rank 0 writes what it has, load by load; None: none.
    """

    program: Program
    judge: bool
    truths: dict[Load, Truth]
    until: float | None
    kept: Path | None

    @property
    def steps(self) -> int:
        """How many it reports."""
        each = len(self.program.loads)
        return each + (each + len(self.program.kernels) if self.judge else 0)


def perform(info: RankInfo, task: Task, listener: connection.Connection | Tell | None) -> Played:
    """All of a world's measurements. Every rank must call it; what rank 0 returns is whole."""
    stage = _Stage(info, task, _teller(info, listener))
    stage.judge()
    stage.serve()
    return stage.played


class _Stage:
    """This rank's model, and what it has found so far."""

    def __init__(self, info: RankInfo, task: Task, tell: Tell) -> None:
        import torch
        import torch.distributed as dist

        self.info, self.task, self.program, self.tell = info, task, task.program, tell
        self.device = pick_device(info.local_rank, info.local_world, task.program.device)
        self.waiting = dist.new_group(timeout=timedelta(days=1), backend="gloo")  # sleep while one works, however long
        self.memory = Memory(self.device)
        self.dtype: torch.dtype = getattr(torch, DTYPES[task.program.dtype])
        tell("loading the model", 0)
        with reading(self.program.name):
            self.model, tokenizer = model_of(
                self.program.folder, self.program.shape, seed=self.program.seed, dtype=self.dtype, device=self.device
            )
        self.sizes = sizes_of(self.model.config)
        self.prompts = {load: prompts_of(load, self.program, self.model.config.vocab_size, tokenizer)
                        for load in self.program.loads}  # fmt: skip
        self.played = Played(info.world, self.sizes, self.device.type, truths=dict(task.truths))

    def judge(self) -> None:
        """transformers on rank 0, and the parts that one device has; the others wait."""
        import torch.distributed as dist

        if self.task.judge and self.info.rank == 0:
            for load in self.program.loads:
                where = f"S{format_size(load.length)} B{load.batch}"
                if self._late():
                    self._lack(f"transformers: {where}: no time left", 1)
                    continue
                self.tell(f"transformers, {where}", 0)
                try:
                    self._judge_one(load)
                except Exception as error:  # out of memory, most often: the table has to say so
                    self._lack(f"transformers: {where}: {_line(error)}", 1)
                else:
                    self.tell(f"transformers, {where}: {self.played.peer[load].first.median:.3g} s", 1)
                self._tidy()
            self._time_kernels()
        dist.barrier(self.waiting)

    def serve(self) -> None:
        """Every load by the engine, and the merge of this world's ranks."""
        import torch.distributed as dist

        from ringfa3.inference import Announcer, Runner
        from ringfa3.inference.ranks import Ranks

        program = self.program
        if self.info.world > 1:
            ranks = Ranks.of()
            for batch in sorted({load.batch for load in program.loads}):
                self.played.merges[batch] = parts.time_merge(
                    self.sizes, batch, ranks, device=self.device, seconds=PART_SECONDS
                )
        pages = max(
            load.batch * pages_for(load.length, program.tokens, self.info.world, program.chunk, program.page_size)
            for load in program.loads
        )
        runner = Runner(
            self.model, pages=pages, page_size=program.page_size, prefill=program.prefill, graphs=program.graphs
        )
        announcer = Announcer(timeout=600.0)
        worst = 0.0  # one device's error in the longest prompt that was judged exactly
        done: list[Load] = []
        for load in program.loads:
            where = f"S{format_size(load.length)} B{load.batch} on {self.info.world} ranks"
            told = [self._late(), load in self.played.truths]
            dist.broadcast_object_list(told, 0, group=self.waiting)
            late, judged = told
            if late:
                self._lack(f"ours: {where}: no time left", 1)
                continue
            self.tell(where, 0)
            logits = prefill(runner, self.prompts[load][0], program.chunk) if judged else None
            served = self._serve_one(runner, announcer, load)
            if self.info.rank == 0:
                self.played.served[load] = served
                if logits is not None:
                    checked = check(logits.cpu(), served.answers[0], self.played.truths[load], worst)
                    worst = max(worst, checked.plain)
                    self.played.checked[load] = checked
                self._keep()
            self.tell(f"{where}: {served.first.median:.3g} s, {1e3 * served.each.median:.3g} ms a token", 1)
            done.append(load)
        announcer.close()
        longest = max((load for load in done if load.batch == 1), default=None)
        if longest is not None and program.shape is not None:  # other models may have windows, or no plain softmax
            told = [self._late()]
            dist.broadcast_object_list(told, 0, group=self.waiting)
            where = f"attention within the prefill, S{format_size(longest.length)} on {self.info.world} ranks"
            if told[0]:
                self._lack(f"{where}: no time left", 0)
                return
            self.tell(where, 0)
            try:
                attention = parts.time_attention(
                    runner, self.prompts[longest][0], program.chunk, self.sizes, dtype=self.dtype, device=self.device,
                    seconds=PART_SECONDS,
                )  # fmt: skip
            except Exception as error:  # out of memory, most often: what was measured is not to be lost
                self._lack(f"{where}: {_line(error)}", 0)
            else:
                self.played = replace(self.played, attention=attention)

    def _judge_one(self, load: Load) -> None:
        prompts = self.prompts[load]
        with peer.plain_attention(self.model):
            served, steps = peer.generate(self.model, prompts, self.program.tokens, self.program.rounds, self.memory)
            self.played.peer[load] = served
            if load.batch == 1:
                exact = None
                if load.length <= self.program.check:
                    exact = peer.exact_logits(self.model, prompts[0], self.program.dtype)
                self.played.truths[load] = Truth(served.answers[0], steps, exact)

    def _time_kernels(self) -> None:
        for length, batch in self.program.kernels:
            where = f"decode attention alone, S{format_size(length)} B{batch}"
            self.tell(where, 0)
            try:
                kernel = parts.time_kernel(
                    self.sizes, length, batch, page_size=self.program.page_size, dtype=self.dtype, device=self.device,
                    seconds=PART_SECONDS,
                )  # fmt: skip
            except Exception as error:
                self._lack(f"{where}: {_line(error)}", 1)
            else:
                self.played.kernels.append(kernel)
                self.tell(f"{where}: {kernel.rate / kernel.copy:.2f} of a device copy", 1)
            self._tidy()

    def _serve_one(self, runner: Runner, announcer: Any, load: Load) -> Served:
        """One load, its rounds one after the other; whole on rank 0."""
        import torch.distributed as dist

        from ringfa3.inference import Engine

        engine = Engine(runner, None, chunk=self.program.chunk, max_running=load.batch, announcer=announcer)
        rounds = Rounds(engine, self.prompts[load], self.program.tokens, self.program.rounds)
        _, most, _ = self.memory.peak(rounds.run)
        fullest: list[Any] = [None] * self.info.world
        dist.all_gather_object(fullest, most, group=self.waiting)
        known = [each for each in fullest if each is not None]
        page = runner.cache.nbytes // (runner.pages.pages + 1)
        return replace(rounds.served(), memory=max(known, default=None), cache=rounds.pages * page)

    def _late(self) -> bool:
        return self.task.until is not None and time.monotonic() > self.task.until

    def _lack(self, what: str, steps: int) -> None:
        if self.info.rank == 0:
            self.played.missing.append(what)
        self.tell(what, steps)

    def _keep(self) -> None:
        if self.task.kept is not None:
            self.task.kept.write_bytes(pickle.dumps(self.played))

    def _tidy(self) -> None:
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def prompts_of(load: Load, program: Program, vocab: int, tokenizer: Any) -> list[list[int]]:
    """Random tokens for random weights; else prose, each prompt from another place of it."""
    import numpy as np

    if tokenizer is None:
        random = np.random.default_rng((program.seed, load.length, load.batch))
        drawn: list[list[int]] = random.integers(0, vocab, (load.batch, load.length)).tolist()
        return drawn
    from ringfa3_launch import haystack

    ids: list[int] = tokenizer("\n\n".join(haystack.document()), add_special_tokens=False)["input_ids"]
    begins = [i * len(ids) // load.batch for i in range(load.batch)]
    repeated = ids * (2 + load.length // len(ids))
    return [repeated[begin : begin + load.length] for begin in begins]


def sizes_of(config: Any) -> Sizes:
    """The model's, by its config."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Sizes(config.num_hidden_layers, heads, config.num_key_value_heads, D)


def _teller(info: RankInfo, listener: connection.Connection | Tell | None) -> Tell:
    if info.rank > 0 or listener is None:
        return lambda text, steps: None
    if isinstance(listener, connection.Connection):
        outbox = listener
        return lambda text, steps: outbox.send((text, steps))
    return listener


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]
