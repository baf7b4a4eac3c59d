"""Continuous batching: requests come at any time, and each step all that are under way get on."""

from __future__ import annotations

import logging
import operator
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from ringfa3.inference.answer import Answer
from ringfa3.inference.counters import Counters
from ringfa3.inference.events import Event, Finish
from ringfa3.inference.orders import Model, perform
from ringfa3.inference.pages import CacheFull
from ringfa3.inference.sampling import Sampling, choose
from ringfa3.inference.schedule import Request, Scheduler, Step
from ringfa3.inference.text import Tokenizer, Transcript

_log = logging.getLogger(__name__)
# Of a model's generation config: what changes its greedy answers, and the numbers with which it does not
UNHEEDED: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("stop_strings", "watermarking_config"), ()),
}


class Busy(RuntimeError):
    """The queue is full: come again later."""


class Batching:
    """Requests, and what becomes of them: rank 0 plans orders, all ranks execute them. `Engine` lets it run by itself.

    Args: see `Engine`; rank is 0 on the leader.
    """

    def __init__(
        self,
        runner: Model,
        tokenizer: Tokenizer | None,
        *,
        rank: int,
        chunk: int,
        max_running: int,
        max_waiting: int,
        share: bool,
        eos: Iterable[int] | None,
    ) -> None:
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 1:
            raise ValueError(f"max_waiting: wanted an integer, 1 or more, got {max_waiting!r}")
        self.runner, self.tokenizer, self.max_waiting = runner, tokenizer, max_waiting
        self.eos = frozenset(_eos(runner, tokenizer) if eos is None else eos)
        self.rank, self.leads = rank, rank == 0
        if self.leads and (unheeded := _unheeded(runner)):
            _log.warning("the model's generation config asks for %s, which answers do not heed", ", ".join(unheeded))
        self._scheduler = Scheduler(runner.pages, chunk=chunk, max_running=max_running, share=share)
        self._counters = Counters()
        self._answers: dict[int, Answer] = {}
        self._cancelled: set[int] = set()
        self._happened: list[tuple[Answer, Event]] = []  # to be told once the order has been executed
        self._step = Step()  # the last one planned
        self._orders = self._requests = 0
        self._known: dict[int, str] = {}  # texts of single tokens
        self._closing = False
        self._failure: str | None = None
        self._used = self._pages_used()
        self._lock = threading.Lock()  # of all of these; never held while the model computes, or a callback runs
        self._news = threading.Event()

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        session: str | None = None,
        on_event: Callable[[Event], None],
    ) -> int:
        """Queue a request.

        Args:
            ids: the whole prompt, also of a session's later turns.
            session: name of the session to continue or begin; None: nothing is kept.
            on_event: called by the loop's thread for each token, and when the request ends; must not block.

        Returns:
            The request's number.

        Raises:
            ValueError: an argument is wrong, or the request would never fit; names it.
            Busy: the queue is full.
        """
        if session is not None and not isinstance(session, str):
            raise ValueError(f"session: wanted a name or None, got {session!r}")
        sampling = Sampling() if sampling is None else sampling
        tokens = self._checked(ids, sampling)
        transcript = Transcript(self.tokenizer, prompt=tokens, stop=sampling.stop, known=self._known)
        with self._lock:
            self._check_open()
            if len(self._scheduler.waiting) >= self.max_waiting:
                self._counters.refused += 1
                raise Busy(f"{len(self._scheduler.waiting)} requests wait already, which is all that may")
            return self._enter(tokens, sampling, transcript, session, on_event)

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer may have together, by the model and by the cache."""
        totals = range(2, self.runner.max_length + 1)
        return 1 + bisect_left(totals, True, key=lambda total: operator.gt(*self._scheduler.capacity(1, total - 1)))

    def cancel(self, request: int) -> bool:
        """End a request at the next step; its pages are free then. False: it has ended already."""
        with self._lock:
            if request not in self._answers:
                return False
            self._cancelled.add(request)
            self._news.set()
            return True

    def close_session(self, name: str) -> bool:
        """Forget a session at the next step, or when the requests that it was given have ended. False: no such one."""
        with self._lock:
            self._news.set()
            return self._scheduler.close(name)

    def stats(self) -> dict[str, Any]:
        """Numbers of this moment, and counters (see Counters) since the beginning."""
        with self._lock:
            scheduler, pages = self._scheduler, self.runner.pages
            prefilling = sum(not request.decodes for request in scheduler.active)
            return {
                "running": len(scheduler.active),
                "prefilling": prefilling,
                "waiting": len(scheduler.waiting),
                "sessions": len(scheduler.sessions),
                "idle_sessions": sum(session.idle for session in scheduler.sessions.values()),
                "pages": pages.pages,
                "page_size": pages.page_size,
                "pages_used": list(self._used),
                "pages_free": [pages.pages - used for used in self._used],
                "preemptions": scheduler.preemptions,
                "evictions": scheduler.evictions,
                **self._counters.read(),
            }

    def wait(self, timeout: float) -> bool:
        """Wait until something was submitted, cancelled or closed since the last plan. False: not in that time."""
        return self._news.wait(timeout)

    def plan(self) -> dict[str, Any] | None:
        """The next order, to be executed by all ranks before the next plan; None: there is nothing to do."""
        if not self.leads:
            raise RuntimeError(f"plan: wanted rank 0, got rank {self.rank}")
        with self._lock:
            self._check_alive()
            self._news.clear()
            for number in sorted(self._cancelled):
                self._end(number, "cancelled")
            self._cancelled.clear()
            while True:
                step = self._step = self._scheduler.plan()
                order = step.order()
                for request, reason in step.failed:
                    self._end(request.number, "error", reason, lost=True)
                if order is not None or not step.failed:
                    break
            if order is not None:
                order["number"] = self._orders + 1
        if order is None:
            self._tell()
        return order

    def execute(self, order: dict[str, Any]) -> None:
        """Do one step, on every rank.

        Raises:
            RuntimeError: not the order whose turn it is.
            Exception: what the model raised, after which the ranks may differ: every request has ended with "error",
                and the engine takes no more. Only of a full cache, which all ranks meet alike, the requests of this
                step alone know.
        """
        if order["do"] == "beat":
            return
        if order["do"] != "step" or order["number"] != self._orders + 1:
            raise RuntimeError(f"order: wanted step {self._orders + 1}, got {order['do']} {order.get('number')}")
        self._orders += 1
        try:
            prefilled, decoded = perform(self.runner, order)
        except CacheFull as error:
            if self.leads:
                self._spoil(str(error))
            return
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise
        if self.leads:
            self._lead(prefilled, decoded)

    def fail(self, reason: str) -> None:
        """The ranks cannot go on: every request ends with "error", and no more are taken. By the loop's thread."""
        with self._lock:
            self._failure = self._failure or reason
            for number in list(self._answers):
                self._end(number, "error", reason)
            self._news.set()
        self._tell()

    def _lead(self, prefilled: Tensor | None, decoded: Tensor | None) -> None:
        """Choose the tokens that follow from a step, and tell; unless the ranks turn out to have failed."""
        step, self._step = self._step, Step()
        try:
            requests, tokens = self._sample(step, prefilled, decoded)
            self.runner.check()
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise
        with self._lock:
            self._used = self._pages_used()
            self._counters.steps += step.prefill is not None or bool(step.decode)
            self._counters.prefilled_tokens += 0 if step.prefill is None else len(step.prefill[1])
            now = time.monotonic()
            for request, token in zip(requests, tokens, strict=True):
                self._take(self._answers[request.number], token, now)
        self._tell()

    def _sample(
        self, step: Step, prefilled: Tensor | None, decoded: Tensor | None
    ) -> tuple[list[Request], list[int | None]]:
        """The requests that get a token by this step, and these tokens."""
        requests: list[Request] = []
        tokens: list[int | None] = []
        if prefilled is not None and step.prefill is not None and step.prefill[0].missing == 0:
            requests.append(step.prefill[0])
            tokens += self._choose(requests, prefilled.unsqueeze(0))
        if decoded is not None:
            requests += step.decode
            tokens += self._choose(step.decode, decoded)
        return requests, tokens

    def _choose(self, requests: Sequence[Request], logits: Tensor) -> list[int | None]:
        answers = [self._answers[request.number] for request in requests]  # which only this thread takes out
        return choose(logits, [answer.sampling for answer in answers], [answer.generator for answer in answers])

    def _take(self, answer: Answer, token: int | None, now: float) -> None:
        """Enter a request's next token; it may be its last."""
        if token is None:
            self._end(answer.request.number, "error", "its logits are not numbers")
            return
        self._counters.sampled(answer, now)
        answer.since = now
        event = answer.take(token, self.eos)
        if event.finish is None:
            self._happened.append((answer, event))
        else:
            self._end(event.request, event.finish, event=event)

    def _spoil(self, reason: str) -> None:
        """The step was refused alike by all ranks: its requests end, and what their sequences hold is given back."""
        with self._lock:
            step, self._step = self._step, Step()
            for request in step.requests():
                self._end(request.number, "error", reason, lost=True)
            self._used = self._pages_used()
        self._tell()

    def _end(
        self, number: int, finish: Finish, error: str | None = None, *, event: Event | None = None, lost: bool = False
    ) -> None:
        """Take a request out; `_tell` will tell. lost: what its sequence holds is not what it should be."""
        answer = self._answers.pop(number)
        self._cancelled.discard(number)
        self._happened.append((answer, answer.event(finish, error=error) if event is None else event))
        self._scheduler.end(answer.request, lost=lost)
        self._counters.finished[finish] += 1

    def _tell(self) -> None:
        """Call back what happened; without the lock, for a callback may submit or cancel."""
        with self._lock:
            happened, self._happened = self._happened, []
        for answer, event in happened:
            try:
                answer.on_event(event)
            except Exception:  # the caller's; the other requests go on
                _log.exception("request %d: its callback failed, so it is cancelled", event.request)
                self.cancel(event.request)

    def _enter(
        self,
        tokens: list[int],
        sampling: Sampling,
        transcript: Transcript,
        session: str | None,
        on_event: Callable[[Event], None],
    ) -> int:
        self._requests += 1
        request = Request(self._requests, tokens, len(tokens), sampling.max_tokens)
        self._answers[request.number] = Answer(
            request, sampling, sampling.generator(), transcript, on_event, time.monotonic()
        )
        self._scheduler.add(request, session)
        self._counters.submitted += 1
        self._news.set()
        return request.number

    def _checked(self, ids: Sequence[int], sampling: Sampling) -> list[int]:
        """The prompt, if it and its answer may be served. Raises ValueError."""
        given = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        vocab, longest = self.runner.vocab, self.runner.max_length
        kinds = set(map(type, given))  # one by one in C: a prompt may have a million tokens
        if kinds != {int}:
            wrong = next((x for x in given if isinstance(x, bool) or not hasattr(x, "__index__")), None)
            if not given or wrong is not None:
                raise ValueError(f"ids: wanted one token or more, integers, got {repr(wrong) if given else 'none'}")
        tokens = given if kinds == {int} else [operator.index(token) for token in given]
        if min(tokens) < 0 or max(tokens) >= vocab:
            wrong = next(token for token in tokens if not 0 <= token < vocab)
            raise ValueError(f"ids: wanted tokens from 0 to {vocab - 1}, got {wrong}")
        total = len(tokens) + sampling.max_tokens
        if total > longest:
            raise ValueError(
                f"max_tokens: wanted prompt and answer within the model's {longest} tokens, "
                f"got {len(tokens)} + {sampling.max_tokens}"
            )
        needed, there = self._scheduler.capacity(len(tokens), sampling.max_tokens)
        if needed > there:
            raise ValueError(
                f"max_tokens: wanted prompt and answer within the cache ({there} tokens a rank), "
                f"got {len(tokens)} + {sampling.max_tokens}, which may take {needed} on one"
            )
        return tokens

    def _check_open(self) -> None:
        if not self.leads:
            raise RuntimeError(f"submit: wanted rank 0, which takes requests, got rank {self.rank}")
        self._check_alive()
        if self._closing:
            raise RuntimeError("submit: the engine is closed")

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the engine has failed: {self._failure}")

    def _pages_used(self) -> tuple[int, ...]:
        pages = self.runner.pages
        return tuple(pages.used(rank) for rank in range(pages.world))


def _unheeded(runner: Any) -> list[str]:
    """What the model's generation config asks for, that transformers' generate would do and this package does not."""
    config = getattr(getattr(runner, "model", None), "generation_config", None)
    given = {name: getattr(config, name, None) for name in UNHEEDED}
    return [f"{name} {value}" for name, value in given.items() if value and value not in UNHEEDED[name]]


def _eos(runner: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer, as the model says; as the tokenizer does, where it says nothing."""
    model = getattr(runner, "model", None)
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, Iterable) else (ids,)
    return ()
