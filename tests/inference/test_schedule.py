"""Schedules: whatever comes when, every answer equals the lone answer, and pages go back to where they were."""

from __future__ import annotations

import random

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ringfa3.inference.engine import Engine
from ringfa3.inference.pages import CacheFull
from ringfa3.inference.sampling import Sampling
from ringfa3.inference.schedule import _common
from tests.inference.toy import EOS, VOCAB, Heard, Toy, lone_greedy, steps

LONG = st.integers(1, 60)


def prompt_of(length: int, seed: int) -> list[int]:
    """Not hypothesis's to shrink: which tokens does not matter."""
    return random.Random(seed).choices(range(VOCAB), k=length)


class Schedules(RuleBasedStateMachine):
    """An engine with a small cache; requests, sessions, cancellations and steps in any order."""

    @initialize(
        world=st.sampled_from([1, 2, 3]),
        pages=st.integers(5, 14),
        chunk=st.sampled_from([1, 3, 8, 64]),
        running=st.sampled_from([1, 3, 16]),
        reach=st.sampled_from([None, None, 0, 3, 11, 30]),
    )
    def begin(self, world, pages, chunk, running, reach):
        self.toy = Toy(world=world, pages=pages, page_size=4, reach=reach)
        self.engine = Engine(self.toy, chunk=chunk, max_running=running, eos=[EOS])
        self.asked: dict[int, tuple[Heard, list[int], int]] = {}
        self.cancelled: set[int] = set()
        self.history: dict[str, list[int]] = {}

    @rule(
        length=LONG, seed=st.integers(0, 5), most=st.integers(1, 30), name=st.sampled_from([None, None, "a", "b", "c"])
    )
    def submit(self, length, seed, most, name):
        prompt = prompt_of(length, seed)
        self._submit(prompt, most, name)

    @precondition(lambda self: self.history)
    @rule(data=st.data(), length=st.integers(1, 10), most=st.integers(1, 10), back=st.integers(0, 20))
    def next_turn(self, data, length, most, back):
        """A session goes on from some place of what it was."""
        name = data.draw(st.sampled_from(sorted(self.history)))
        before = self.history[name]
        self._submit(before[: max(0, len(before) - back)] + prompt_of(length, 99), most, name)

    def _submit(self, prompt, most, name):
        heard = Heard()
        try:
            number = self.engine.submit(prompt, Sampling(max_tokens=most), session=name, on_event=heard)
        except ValueError as error:
            world, pages = self.toy.pages.world, self.toy.pages
            room = pages.pages * pages.page_size * world
            chunks = (len(prompt) + most) // self.engine._scheduler.chunk + 2
            if "max_tokens" in str(error) and len(prompt) + most > room - 2 * world * chunks:
                return  # only what may not fit is refused
            raise
        self.asked[number] = heard, prompt, most
        if name is not None:
            self.history[name] = prompt + lone_greedy(prompt, most, self.toy.pages.reach)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data):
        number = data.draw(st.sampled_from(sorted(self.asked)))
        if self.engine.cancel(number):
            self.cancelled.add(number)

    @rule(name=st.sampled_from("abc"))
    def close(self, name):
        self.engine.close_session(name)

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for order in steps(self.engine, count):
            assert len(order.get("prefill", [0, []])[1]) <= self.engine._scheduler.chunk

    @rule(later=st.booleans())
    def spoil(self, later):
        """A computation is refused for want of pages (by all ranks alike), whatever the planning said."""
        self.toy.refuse = [None] * later + [CacheFull(0, 2, 1)]

    @invariant()
    def answers(self):
        """Each is, so far, what it would be alone."""
        if not hasattr(self, "asked"):
            return
        for number, (heard, prompt, most) in self.asked.items():
            lone = lone_greedy(prompt, most, self.toy.pages.reach)
            assert heard.tokens == lone[: len(heard.tokens)]
            if heard.finish == "cancelled":
                assert number in self.cancelled
            elif heard.finish == "error":
                assert heard[-1].error == "cache full on rank 0: wanted 2 more pages, 1 are free"
            elif heard.finish is not None:
                assert heard.tokens == lone
                assert heard.finish == ("stop" if lone[-1] == EOS else "length")

    def teardown(self):
        if not hasattr(self, "asked"):
            return
        for _ in steps(self.engine, 20_000):
            pass
        self.answers()
        assert all(heard.finish for heard, *_ in self.asked.values())
        for name in list(self.engine._scheduler.sessions):
            assert self.engine.close_session(name)
        for _ in steps(self.engine):
            pass
        assert self.toy.empty()
        self.toy.pages.audit()
        stats = self.engine.stats()
        assert stats["pages_used"] == [0] * self.toy.pages.world
        assert sum(stats["finished"].values()) == len(self.asked) == stats["submitted"]
        assert stats["running"] == stats["waiting"] == stats["sessions"] == 0


Schedules.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestSchedules = Schedules.TestCase


@given(
    a=st.lists(st.integers(0, 1), max_size=400),
    b=st.lists(st.integers(0, 1), max_size=400),
    cut=st.integers(0, 400),
    least=st.integers(1, 9),
)
def test_common_beginning(a, b, cut, least):
    a, b = a + b, a[:cut] + b
    same = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert _common(a, b, least) == _common(b, a, least) == (same if same >= least else 0)
