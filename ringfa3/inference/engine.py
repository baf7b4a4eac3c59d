"""The engine: a model on all ranks that answers requests, in batches, step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from ringfa3.inference.announce import Announcer
from ringfa3.inference.batching import Batching, Busy
from ringfa3.inference.events import Completion, Event
from ringfa3.inference.orders import Model
from ringfa3.inference.ranks import Axes
from ringfa3.inference.sampling import Sampling
from ringfa3.inference.text import Tokenizer, Transcript
from ringfa3.shards import Group

__all__ = ["Busy", "Engine"]

BEAT = 1.0  # seconds without work after which the leader says something, so that all know of each other


class Engine(Batching):
    """Answers requests on all ranks of a group. Making it is collective; options are equal on all ranks.

    Rank 0 leads: it takes requests (from any thread), and one thread of it plans step by step, announces and executes;
    the other ranks execute what they hear. `serve` and `generate` do that by themselves; whoever has an announcer of
    his own calls `plan` and `execute`.

    A session's sequence stays in the cache after a request; the next one continues it after the longest common
    beginning. When pages are needed, idle sessions are forgotten, the least recently used first: their next request is
    prefilled from its first token (cached_tokens tells), and is none the wiser otherwise. Requests of one session are
    answered one after the other. Where all layers of the model have windows, what no later token would see is forgotten
    at once: prompts may be longer than the cache, and a session whose next prompt does not go on where it ended is
    prefilled from its first token, too.

    A request without such a sequence that begins like another one, under way or idle, takes that one's pages (a fork)
    instead of computing them again; one that comes while the other's prompt is prefilled waits for it. So of n requests
    with the same prompt one is prefilled.

    Args:
        runner: the model on this rank.
        tokenizer: None: events have no text, and stop strings are refused.
        chunk: prompt tokens a step: the more, the faster a prefill, and the longer a step that others wait for.
        max_running: requests under way at once.
        max_waiting: requests in the queue.
        share: False: no forks.
        eos: tokens that end an answer; None: those of the model's generation config, else the tokenizer's.
        group: the ranks, as the runner's; None: all of them.
        announcer: whose `timeout` bounds waits of `serve`; None: a new one.
    """

    def __init__(
        self,
        runner: Model,
        tokenizer: Tokenizer | None = None,
        *,
        chunk: int = 512,
        max_running: int = 64,
        max_waiting: int = 256,
        share: bool = True,
        eos: Iterable[int] | None = None,
        group: Group = None,
        announcer: Announcer | None = None,
    ) -> None:
        self.announcer = Announcer(Axes.of(group).all.group) if announcer is None else announcer
        super().__init__(
            runner,
            tokenizer,
            rank=self.announcer.rank,
            chunk=chunk,
            max_running=max_running,
            max_waiting=max_waiting,
            share=share,
            eos=eos,
        )
        self._looping = threading.RLock()  # held by the thread that plans and executes
        self._serving = False

    def serve(self) -> None:
        """Answer requests until `close`, on rank 0; obey until told to end, on the others.

        Raises:
            RankFailed: a rank died or stays away.
            Exception: see `execute`.
        """
        if not self.leads:
            while (order := self.announcer.hear())["do"] != "end":
                self.execute(order)
            return
        with self._lock:
            self._check_alive()
            if self._serving:
                raise RuntimeError("serve: wanted one thread, got a second one")
            self._serving = True
        try:
            with self._looping:
                while not self._closing:
                    if not self.advance() and not self.wait(BEAT):
                        self.announcer.say({"do": "beat"})
                with self._lock:
                    self._cancelled.update(self._answers)
                while self.advance():
                    pass
                self.announcer.say({"do": "end"})
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._serving = False

    def close(self) -> None:
        """End `serve` on all ranks: what is under way is cancelled, and nothing is taken any more. From any thread."""
        with self._lock:
            if self._closing or not self.leads:
                return
            self._closing = True
            serving, failed = self._serving, self._failure is not None
            self._news.set()
        if not serving and not failed:
            self.serve()

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Answers to several prompts, batched; on rank 0, while the others `serve`.

        Between calls nobody says anything to them, and they give up after the announcer's timeout; while a thread of
        rank 0 serves, too, they do not.

        Args:
            prompts: texts, or token ids; more than max_waiting are taken too.
            sampling: for all, or for each.

        Raises:
            ValueError: an argument is wrong; nothing was begun.
        """
        every = [sampling] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else list(sampling)
        if len(every) != len(prompts):
            raise ValueError(f"sampling: wanted one for each of {len(prompts)} prompts, got {len(every)}")
        samplings = [Sampling() if each is None else each for each in every]
        tokens = [self._checked(self._encode(prompt), each) for prompt, each in zip(prompts, samplings, strict=True)]
        transcripts = [
            Transcript(self.tokenizer, prompt=ids, stop=each.stop, known=self._known)
            for ids, each in zip(tokens, samplings, strict=True)
        ]
        events: list[list[Event]] = [[] for _ in prompts]
        done = threading.Semaphore(0)

        def hear(at: int) -> Callable[[Event], None]:
            def on_event(event: Event) -> None:
                events[at].append(event)
                if event.finish is not None:
                    done.release()

            return on_event

        with self._lock:
            self._check_open()
            for at, (ids, each, transcript) in enumerate(zip(tokens, samplings, transcripts, strict=True)):
                self._enter(ids, each, transcript, None, hear(at))
        for _ in prompts:
            self._loop_until(done)
        return [Completion.of(each) for each in events]

    def advance(self) -> bool:
        """One step on all ranks: plan, announce, execute. False: there was nothing to do."""
        order = self.plan()
        if order is None:
            return False
        try:
            self.announcer.say(order)
        except RuntimeError as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise
        self.execute(order)
        return True

    def _loop_until(self, done: threading.Semaphore) -> None:
        """Go on until somebody is done; where another thread's loop goes on, let it."""
        while not done.acquire(blocking=False):
            if not self._looping.acquire(blocking=False):
                if done.acquire(timeout=0.02):
                    return
                continue
            try:
                while not done.acquire(blocking=False):
                    self.advance()
                return
            finally:
                self._looping.release()

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise ValueError("prompts: wanted token ids where there is no tokenizer, got a text")
        return list(self.tokenizer(prompt)["input_ids"])
