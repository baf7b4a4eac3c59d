"""The engine: over a toy model what happens when, and over real ones that every answer is transformers' own."""

from __future__ import annotations

import json
import random
import threading
import time

import numpy as np
import pytest
import torch

from ringfa3 import RankFailed
from ringfa3.inference.engine import Busy, Engine
from ringfa3.inference.events import Completion
from ringfa3.inference.pages import CacheFull
from ringfa3.inference.runner import Runner
from ringfa3.inference.sampling import Sampling
from tests.inference import tiny
from tests.inference.toy import EOS, VOCAB, Heard, Toy, logits_of, lone_greedy, steps


class Letters:
    """A tokenizer: each token a letter, the EOS nothing."""

    eos_token_id = EOS

    def decode(self, tokens, skip_special_tokens=False, clean_up_tokenization_spaces=True):
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return "".join(chr(ord("A") + token) for token in tokens if token != EOS)

    def __call__(self, text):
        return {"input_ids": [ord(letter) - ord("A") for letter in text]}


def prompts(*lengths: int, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Without EOS, which is no matter in a prompt, but makes texts shorter."""
    rng = random.Random(seed)
    return [rng.choices(range(1, vocab), k=length) for length in lengths]


def finished(engine: Engine) -> None:
    for _ in steps(engine):
        pass


def test_a_long_prompt_stops_nobody():
    toy = Toy(pages=200)
    engine = Engine(toy, chunk=8, eos=[])
    short, long, late = Heard(), Heard(), Heard()
    prompt, much, little = prompts(5, 400, 5)
    engine.submit(prompt, Sampling(max_tokens=60), on_event=short)
    for _ in steps(engine, 4):
        pass
    before = len(short)
    engine.submit(much, Sampling(max_tokens=2), on_event=long)
    orders = [order for order in steps(engine, 20)]
    assert sum("prefill" in order for order in orders) >= 19
    assert len(short) == before + 20
    engine.submit(little, Sampling(max_tokens=2), on_event=late)
    for _ in steps(engine, 4):  # prepared, let in; its turn comes after one chunk of the long one
        pass
    assert len(late) >= 1
    assert not long
    finished(engine)
    for heard, ids in ((short, prompt), (long, much), (late, little)):
        assert heard.tokens == lone_greedy_free(ids, len(heard))
        assert heard.finish == "length"
    assert max(count for what, count in toy.calls if what == "prefill") == 8


def lone_greedy_free(prompt, most):
    """As lone_greedy, where EOS is a token like others."""
    tokens = list(prompt)
    out = []
    while len(out) < most:
        out += lone_greedy(tokens + out, most - len(out))
    return out


def test_sessions_go_on_where_they_agree():
    toy = Toy(pages=64)
    engine = Engine(toy, chunk=16, eos=[])
    said, held = prompts(20)[0], [0]
    for turn in range(3):
        heard = Heard()
        engine.submit(said, Sampling(max_tokens=5), session="talk", on_event=heard)
        finished(engine)
        assert heard.tokens == lone_greedy_free(said, 5)
        # all of the last turn but its last token, which was never held
        assert heard[-1].cached_tokens == len(held) - 1
        held = said + heard.tokens
        said = held + prompts(7, seed=turn)[0]
    heard = Heard()
    other = [*held[:13], *prompts(4, seed=9)[0]]
    engine.submit(other, Sampling(max_tokens=5), session="talk", on_event=heard)
    finished(engine)
    assert 13 <= heard[-1].cached_tokens <= 14
    assert heard.tokens == lone_greedy_free(other, 5)
    again = Heard()
    engine.submit(other[:6], Sampling(max_tokens=5), session="talk", on_event=again)  # all of it is held
    finished(engine)
    assert again[-1].cached_tokens == 5
    assert again.tokens == lone_greedy_free(other[:6], 5)
    assert not toy.empty()
    assert engine.close_session("talk")
    assert not engine.close_session("talk")
    finished(engine)
    assert toy.empty()


def test_equal_beginnings_are_prefilled_once():
    toy = Toy(world=2, pages=40, page_size=4)
    engine = Engine(toy, chunk=16, eos=[])
    shared, *ends = prompts(50, 3, 8, 20)
    kept = Heard()
    engine.submit([*shared, 9, 9], Sampling(max_tokens=3), session="talk", on_event=kept)
    four = [Heard() for _ in range(4)]
    for seed, hears in enumerate(four):  # as OpenAI's n has it; they come while the first is prefilled
        engine.submit(shared, Sampling(max_tokens=12, temperature=2.0, seed=seed), on_event=hears)
    finished(engine)
    assert len({tuple(hears.tokens) for hears in four}) == 4
    assert [hears[-1].cached_tokens for hears in four] == [49] * 4
    assert engine.stats()["prefilled_tokens"] == 52  # what they lack is one token, which a decode takes
    for end in ends:  # another prompt with the same beginning as what a session keeps
        heard = Heard()
        engine.submit(shared + end, Sampling(max_tokens=4), on_event=heard)
        finished(engine)
        assert heard.tokens == lone_greedy_free(shared + end, 4)
        assert heard[-1].cached_tokens == 50
    apart = Engine(Toy(world=2, pages=80), chunk=16, share=False, eos=[])
    assert [each.cached_tokens for each in apart.generate([shared] * 3)] == [0] * 3
    engine.submit(shared[:7], on_event=kept)  # less than a page of each rank is not worth it
    kept.clear()
    finished(engine)
    assert kept[-1].cached_tokens == 0
    engine.close_session("talk")
    finished(engine)
    assert toy.empty()


def test_windows_let_prompts_be_longer_than_the_cache():
    """Sessions go on where they ended; where what is seen there is forgotten they begin anew, and answers are right."""
    toy = Toy(world=2, pages=12, page_size=4, reach=20)
    engine = Engine(toy, chunk=8, eos=[])
    said = prompts(700)[0]
    for turn in range(3):
        heard = Heard()
        engine.submit(said, Sampling(max_tokens=40), session="talk", on_event=heard)
        finished(engine)
        assert heard.tokens == windowed(said, 40, 20)
        assert heard[-1].cached_tokens == (len(said) - 6 if turn else 0)
        assert max(engine.stats()["pages_used"]) <= 5
        said = said + heard.tokens + prompts(5, seed=turn)[0]
    for back in (300, 710):
        heard = Heard()
        engine.submit(said[:back], Sampling(max_tokens=4), session="talk", on_event=heard)
        finished(engine)
        assert heard.tokens == windowed(said[:back], 4, 20)
        # then the answer is cut off, three tokens that were held: what is seen before them is in a page still kept
        assert heard[-1].cached_tokens == (0 if back == 300 else 300)
    four = [Heard() for _ in range(4)]
    for hears in four:  # equal prompts, which no fork can begin with
        engine.submit(said[:90], Sampling(max_tokens=30), on_event=hears)
    finished(engine)
    assert all(hears.tokens == windowed(said[:90], 30, 20) for hears in four)
    engine.close_session("talk")
    finished(engine)
    assert toy.empty()
    toy.pages.audit()


def windowed(prompt, most, reach):
    """lone_greedy_free of a toy with a window."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < most:
        tokens.append(int(logits_of(tokens, reach).argmax()))
    return tokens[len(prompt) :]


def test_a_sessions_requests_come_one_after_the_other_and_do_not_stop_others():
    engine = Engine(Toy(pages=64), chunk=16, eos=[])
    first, second, beside = Heard(), Heard(), Heard()
    said, other = prompts(20, 6)
    engine.submit(said, Sampling(max_tokens=30), session="talk", on_event=first)
    engine.submit([*said, 1], Sampling(max_tokens=3), session="talk", on_event=second)
    engine.submit(other, Sampling(max_tokens=3), on_event=beside)
    engine.execute(engine.plan())
    assert engine.close_session("talk")  # while both are under way
    while first.finish is None:
        engine.execute(engine.plan())
        assert not second
    assert beside.finish == "length"
    finished(engine)
    assert second.tokens == lone_greedy_free([*said, 1], 3)
    assert second[-1].cached_tokens == 20
    assert engine.runner.empty()


def test_idle_sessions_are_forgotten_oldest_first_when_pages_are_needed():
    toy = Toy(pages=16, page_size=4)
    engine = Engine(toy, chunk=16, eos=[])
    talks = dict(zip("abc", prompts(15, 15, 15), strict=True))
    for name in "abc":
        engine.submit(talks[name], Sampling(max_tokens=2), session=name, on_event=Heard())
        finished(engine)
    engine.submit(talks["a"], Sampling(max_tokens=2), session="a", on_event=Heard())  # so that b is the oldest
    finished(engine)
    heard = Heard()
    engine.submit(prompts(20, seed=4)[0], Sampling(max_tokens=4), on_event=heard)
    finished(engine)
    assert heard.finish == "length"
    assert engine.stats()["evictions"] == 1
    assert sorted(engine._scheduler.sessions) == ["a", "c"]
    again = Heard()
    engine.submit(talks["b"], Sampling(max_tokens=2), session="b", on_event=again)
    finished(engine)
    assert again[-1].cached_tokens == 0
    assert again.tokens == lone_greedy_free(talks["b"], 2)


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
@pytest.mark.parametrize("name", [None, "talk"])
def test_cancelled_at_the_next_step(when, name):
    toy = Toy(pages=64)
    engine = Engine(toy, chunk=8, max_running=1, eos=[])
    cancelled, other = Heard(), Heard()
    blocker = Heard()
    long, short = prompts(40, 6)
    if when == "waiting":
        blocking = engine.submit(short, Sampling(max_tokens=100), on_event=blocker)
    number = engine.submit(long, Sampling(max_tokens=50), session=name, on_event=cancelled)
    for _ in steps(engine, {"waiting": 3, "prefill": 3, "decode": 12}[when]):
        pass
    assert bool(cancelled) == (when == "decode")
    assert engine.cancel(number)
    before = len(cancelled)
    engine.execute(engine.plan() or {"do": "beat"})
    assert cancelled.finish == "cancelled"
    assert len(cancelled) == before + 1
    assert cancelled[-1].token is None
    assert cancelled[-1].completion_tokens == before
    assert not engine.cancel(number)
    if when == "waiting":
        assert engine.cancel(blocking)
    elif name is None:
        assert toy.empty()
    engine.submit(short, Sampling(max_tokens=4), session=name, on_event=other)
    finished(engine)
    assert other.tokens == lone_greedy_free(short, 4)
    if name:
        engine.close_session(name)
    finished(engine)
    assert toy.empty()


def test_cancelled_while_its_last_token_is_computed():
    toy = Toy()
    engine = Engine(toy, eos=[])
    heard, other = Heard(), Heard()
    number = engine.submit([1, 2], Sampling(max_tokens=2), on_event=heard)
    decode = toy.decode

    def slow(seqs, ids):
        assert engine.cancel(number)
        return decode(seqs, ids)

    toy.decode = slow
    finished(engine)
    assert (heard.finish, len(heard.tokens)) == ("length", 2)  # it was complete before the next step
    assert not engine.cancel(number)
    toy.decode = decode
    engine.submit([1, 2], Sampling(max_tokens=2), on_event=other)
    finished(engine)
    assert other.finish == "length"


def test_preempted_answers_are_unchanged_and_the_oldest_goes_first():
    toy = Toy(pages=10, page_size=4)
    engine = Engine(toy, chunk=16, eos=[])
    sampling = [Sampling(max_tokens=24, temperature=2.0, seed=seed) for seed in range(6)]
    asked = prompts(6, 6, 6, 6, 6, 6)
    alone = [Engine(Toy(pages=64), eos=[]).generate([ids], each)[0] for ids, each in zip(asked, sampling, strict=True)]
    heard = [Heard() for _ in asked]
    for ids, each, hears in zip(asked, sampling, heard, strict=True):
        engine.submit(ids, each, on_event=hears)
    silent = longest = 0  # steps in a row without a token of the oldest, once it has begun
    for _ in steps(engine):
        silent = 0 if len(heard[0]) != longest or heard[0].finish or not heard[0] else silent + 1
        longest = len(heard[0])
        assert silent <= 2  # no more than it takes to give pages back: the oldest is never preempted itself
        over = [hears.finish is not None for hears in heard]
        assert over == sorted(over, reverse=True)  # of equally long ones none overtakes another
    assert engine.stats()["preemptions"] >= 2
    assert [tuple(hears.tokens) for hears in heard] == [each.tokens for each in alone]
    assert len({each.tokens for each in alone}) == 6
    assert toy.empty()


def test_who_samples_what_does_not_depend_on_the_others():
    ids = prompts(9)[0]
    sampling = Sampling(max_tokens=30, temperature=1.5, top_k=20, top_p=0.95, seed=7)
    alone = Engine(Toy(), eos=[]).generate([ids], sampling)[0].tokens
    mates = [Sampling(max_tokens=20, temperature=3.0, seed=seed) for seed in range(3)]
    mates += [Sampling(max_tokens=25), Sampling(max_tokens=12, temperature=1.5, top_k=5, seed=1)]
    among = Engine(Toy(pages=200), chunk=3, eos=[]).generate(
        [*prompts(4, 30, 11, 2, 7, seed=3), ids], [*mates, sampling]
    )
    assert among[-1].tokens == alone
    assert Engine(Toy(), eos=[]).generate([ids], Sampling(30 and 1.5, 20, 0.95, 8, 30))[0].tokens != alone


def test_how_answers_end():
    tokenizer = Letters()
    engine = Engine(Toy(pages=200), tokenizer)
    assert engine.eos == {EOS}
    ids = next(ids for ids in prompts(*[6] * 200) if lone_greedy(ids, 40)[-1] == EOS and len(lone_greedy(ids, 40)) > 8)
    lone = lone_greedy(ids, 40)
    text = tokenizer.decode(lone, True, False)
    whole, ignoring, by_id, by_text, short = engine.generate(
        [ids] * 5,
        [
            Sampling(max_tokens=40),
            Sampling(max_tokens=40, ignore_eos=True),
            Sampling(max_tokens=40, stop_ids=(lone[3],)),
            Sampling(max_tokens=40, stop=(text[4:7], "not in it")),
            Sampling(max_tokens=5, stop=(text[3:8],)),
        ],
    )
    assert whole == Completion(tuple(lone), text, "stop", None, 6, 0)
    assert ignoring.tokens[: len(lone)] == whole.tokens
    assert (len(ignoring.tokens), ignoring.finish) == (40, "length")
    end = lone.index(lone[3])
    assert (by_id.tokens, by_id.text, by_id.finish) == (tuple(lone[: end + 1]), text[:end], "stop")
    at = text.index(text[4:7])
    assert (by_text.tokens, by_text.text, by_text.finish) == (tuple(lone[: at + 3]), text[:at], "stop")
    assert (short.text, short.finish) == (text[:5], "length")  # what was withheld is given at the end
    letters = "".join(chr(ord("A") + token) for token in ids)
    assert engine.generate([letters], Sampling(max_tokens=40))[0] == whole


def test_refused_before_anything_is_queued():
    engine = Engine(Toy(pages=8, page_size=4, max_length=50), max_waiting=2, eos=[])
    for ids, sampling, said in (
        ([], Sampling(), "ids: wanted one token or more, integers, got none"),
        ([1, VOCAB], Sampling(), f"ids: wanted tokens from 0 to {VOCAB - 1}, got {VOCAB}"),
        ([1, 1.0], Sampling(), "got 1.0"),
        ([1, "1"], Sampling(), "got '1'"),
        ([1, -1], Sampling(), "got -1"),
        ([1, True], Sampling(), "got True"),
        ([1, 2], Sampling(max_tokens=49), r"max_tokens: .* model's 50 tokens, got 2 \+ 49"),
        ([1] * 20, Sampling(max_tokens=14), r"max_tokens: .* cache \(32 tokens a rank\), got 20 \+ 14"),
        ([1], Sampling(stop=("x",)), "stop: wanted no strings where there is no tokenizer"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.submit(ids, sampling, on_event=Heard())
    with pytest.raises(ValueError, match=r"session: wanted a name or None, got \['a'\]"):
        engine.submit([1], session=["a"], on_event=Heard())
    with pytest.raises(ValueError, match="prompts: wanted token ids"):
        engine.generate(["text"])
    with pytest.raises(ValueError, match="sampling: wanted one for each of 1 prompts, got 2"):
        engine.generate([[1]], [Sampling(), Sampling()])
    assert engine.plan() is None
    fits = Heard()
    engine.submit([1] * 20, Sampling(max_tokens=13), on_event=fits)
    engine.submit([1], on_event=Heard())
    with pytest.raises(Busy, match="2 requests wait"):
        engine.submit([1], on_event=Heard())
    finished(engine)
    assert len(fits) == 13
    assert engine.stats()["refused"] == 1
    for ids in (np.array([1] * 5), torch.tensor([1] * 5), (np.int32(1),) * 5, [1] * 5):
        assert engine.generate([ids])[0].tokens == tuple(lone_greedy_free([1] * 5, 16))
    for name in ("chunk", "max_running", "max_waiting"):
        with pytest.raises(ValueError, match=f"{name}: wanted an integer, 1 or more, got 0"):
            Engine(Toy(), **{name: 0})


@pytest.mark.parametrize(("world", "most"), [(1, 4096), (1, 20), (2, 4096), (3, 30)])
def test_the_longest_request_is_served_and_a_longer_one_is_not(world, most):
    engine = Engine(Toy(world=world, pages=9, page_size=4, max_length=most), chunk=7, eos=[])
    longest = engine.longest
    assert 2 <= longest <= most
    for prompt in (1, longest - 1, longest // 2):
        engine.submit([1] * prompt, Sampling(max_tokens=longest - prompt), on_event=Heard())
        with pytest.raises(ValueError, match="max_tokens: wanted prompt and answer within"):
            engine.submit([1] * prompt, Sampling(max_tokens=longest - prompt + 1), on_event=Heard())
    finished(engine)


def test_a_full_cache_that_all_ranks_meet_alike_costs_one_step():
    toy = Toy(pages=64)
    engine = Engine(toy, eos=[])
    spoilt, waiting = Heard(), Heard()
    engine.submit([1, 2, 3], session="talk", on_event=spoilt)
    finished(engine)
    spoilt.clear()
    engine.submit([1, 2, 3, 4, 5], session="talk", on_event=spoilt)
    engine.execute(engine.plan())
    toy.refuse = [CacheFull(0, 3, 2)]
    engine.execute(engine.plan())
    assert spoilt.finish == "error"
    assert spoilt[-1].error == "cache full on rank 0: wanted 3 more pages, 2 are free"
    engine.submit([1, 2, 3, 4, 5], session="talk", on_event=waiting)
    finished(engine)
    assert waiting.tokens == lone_greedy_free([1, 2, 3, 4, 5], 16)
    assert waiting[-1].cached_tokens == 0
    engine.close_session("talk")
    finished(engine)
    assert toy.empty()


def test_any_other_error_ends_everything():
    toy = Toy()
    engine = Engine(toy, max_running=1, eos=[])
    heard = [Heard(), Heard()]
    for each in heard:
        engine.submit([1, 2, 3], on_event=each)
    finished_steps = list(steps(engine, 4))
    assert len(finished_steps) == 4
    toy.refuse = [OSError("the device is gone")]
    with pytest.raises(OSError, match="gone"):
        engine.execute(engine.plan())
    for each in heard:
        assert (each.finish, each[-1].error) == ("error", "OSError: the device is gone")
    for call in (lambda: engine.submit([1], on_event=Heard()), engine.plan, engine.serve):
        with pytest.raises(RuntimeError, match="has failed: OSError"):
            call()


def test_what_was_computed_while_a_rank_failed_is_not_told():
    toy = Toy()
    engine = Engine(toy, eos=[])
    heard = Heard()
    engine.submit([1, 2, 3], Sampling(max_tokens=9), on_event=heard)
    for _ in steps(engine, 4):
        pass
    told = len(heard.tokens)
    toy.gone = RankFailed(1, "there", None, "its process has ended")
    with pytest.raises(RankFailed, match="rank 1 on there"):
        engine.execute(engine.plan())
    assert heard.finish == "error"
    assert len(heard.tokens) == told > 0
    assert "its process has ended" in heard[-1].error
    with pytest.raises(RuntimeError, match="has failed: RankFailed"):
        engine.plan()


def test_logits_that_are_no_numbers_end_one_request():
    toy = Toy(pages=64)
    engine = Engine(toy, eos=[])
    heard = [Heard(), Heard()]
    for ids, each in zip(prompts(3, 4), heard, strict=True):
        engine.submit(ids, Sampling(max_tokens=6, temperature=0.5, seed=0), on_event=each)
    for _ in steps(engine, 4):
        pass
    decode = toy.decode

    def broken(seqs, ids):
        logits = decode(seqs, ids).clone()
        logits[0, 0, 3] = float("nan")
        toy.decode = decode
        return logits

    toy.decode = broken
    finished(engine)
    assert sorted(each.finish for each in heard) == ["error", "length"]
    assert "not numbers" in next(each[-1].error for each in heard if each.finish == "error")
    assert toy.empty()


def test_orders_are_executed_once_and_in_turn():
    engine = Engine(Toy(), eos=[])
    engine.submit([1, 2], on_event=Heard())
    order = engine.plan()
    engine.execute({"do": "beat"})
    engine.execute(order)
    with pytest.raises(RuntimeError, match="order: wanted step 2, got step 1"):
        engine.execute(order)
    with pytest.raises(RuntimeError, match="got fly"):
        engine.execute({"do": "fly"})


def test_callbacks_may_call_the_engine_and_may_fail():
    engine = Engine(Toy(pages=64), eos=[])
    second, third = Heard(), Heard()

    def chain(event):
        if event.finish == "length":
            engine.submit([4, 5], Sampling(max_tokens=3), on_event=second)

    def fails(event):
        third(event)
        raise KeyError("mine")

    engine.submit([1, 2], Sampling(max_tokens=2), on_event=chain)
    engine.submit([1, 2], Sampling(max_tokens=9), on_event=fails)
    finished(engine)
    assert second.tokens == lone_greedy_free([4, 5], 3)
    assert third.finish == "cancelled"
    assert len(third.tokens) <= 2
    assert engine.runner.empty()


def test_served_to_many_threads_until_closed():
    engine = Engine(Toy(world=2, pages=40), chunk=8, max_waiting=1000, eos=[])
    loop = threading.Thread(target=engine.serve)
    loop.start()
    wrong: list[str] = []

    def client(seed):
        rng = random.Random(seed)
        for turn in range(12):
            ids = rng.choices(range(VOCAB), k=rng.randrange(1, 30))
            heard, done = Heard(), threading.Event()

            def on_event(event, heard=heard, done=done):
                heard(event)
                if event.finish:
                    done.set()

            number = engine.submit(ids, Sampling(max_tokens=8), session=rng.choice([None, "s"]), on_event=on_event)
            if turn % 4 == 3:
                engine.cancel(number)
            if not done.wait(60) or heard.tokens != lone_greedy_free(ids, 8)[: len(heard.tokens)]:
                wrong.append(f"{ids}: {heard}")
            if (heard.finish == "length") != (len(heard.tokens) == 8):
                wrong.append(f"{ids}: {heard}")
            engine.stats()

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for each in clients:
        each.start()
    batch = engine.generate(prompts(3, 9, 20), Sampling(max_tokens=5))
    assert [each.finish for each in batch] == ["length"] * 3
    for each in clients:
        each.join(120)
    assert not wrong
    cut = Heard()
    engine.submit([1, 2, 3], Sampling(max_tokens=150), on_event=cut)
    engine.close()
    loop.join(30)
    assert not loop.is_alive()
    assert cut.finish in ("cancelled", "length")
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([1], on_event=Heard())
    engine.close()


def test_waiting_for_news():
    engine = Engine(Toy(), eos=[])
    assert engine.plan() is None
    start = time.monotonic()
    assert not engine.wait(0.05)
    assert time.monotonic() - start >= 0.04
    engine.submit([1], on_event=Heard())
    assert engine.wait(0)
    engine.plan()
    assert not engine.wait(0)


def test_a_thousand_sessions_leave_nothing():
    toy = Toy(world=2, pages=30)
    engine = Engine(toy, chunk=16, eos=[EOS])
    rng = random.Random(0)
    heard: list[tuple[Heard, list[int]]] = []
    for number in range(1000):
        hears, ids = Heard(), rng.choices(range(VOCAB), k=rng.randrange(1, 12))
        heard.append((hears, ids))
        while True:
            try:
                asked = engine.submit(ids, Sampling(max_tokens=6), session=f"{number}", on_event=hears)
                break
            except Busy:
                engine.execute(engine.plan())
        if rng.random() < 0.2:
            engine.cancel(rng.randrange(max(1, asked - 3), asked + 1))
        if rng.random() < 0.5:
            engine.close_session(f"{rng.randrange(number + 1)}")
        if rng.random() < 0.5:
            for _ in steps(engine, 4):
                pass
    finished(engine)
    for hears, ids in heard:
        assert hears.finish in ("stop", "length", "cancelled")
        assert hears.tokens == lone_greedy(ids, 6)[: len(hears.tokens)]
        assert hears.finish == "cancelled" or hears.tokens == lone_greedy(ids, 6)
    stats = engine.stats()
    assert stats["finished"]["cancelled"] > 50
    assert stats["evictions"] > 50
    for name in list(engine._scheduler.sessions):
        engine.close_session(name)
    finished(engine)
    assert toy.empty()
    toy.pages.audit()
    assert engine.stats()["pages_used"] == [0, 0]


def test_counters_add_up():
    engine = Engine(Toy(pages=64), chunk=8, eos=[])
    engine.generate(prompts(20, 5), [Sampling(max_tokens=6), Sampling(max_tokens=3)])
    stats = engine.stats()
    assert stats["prompt_tokens"] == stats["prefilled_tokens"] == 25
    assert stats["completion_tokens"] == 9
    assert stats["first_token_seconds"]["count"] == 2
    assert stats["each_token_seconds"]["count"] == 7
    buckets = stats["each_token_seconds"]["buckets"]
    assert json.loads(json.dumps(stats, allow_nan=False))["completion_tokens"] == 9
    assert buckets[-1] == (120.0, 7)
    assert [count for _, count in buckets] == sorted(count for _, count in buckets)
    assert stats["each_token_seconds"]["sum"] > 0


LENGTHS = (1, 3, 17, 33, 40, 5, 16, 29)


def answers_like_transformers(rank: int, size: int, chunk: int) -> None:
    """Eight prompts together, three turns of a session, a cancelled prefill and a cancelled decode."""
    torch.set_num_threads(1)
    model = tiny.llama()
    engine = Engine(Runner(tiny.llama(), pages=64, page_size=4), chunk=chunk)
    if rank != 0:
        engine.serve()
        assert not engine.runner.pages.sequences
        return
    asked = prompts(*LENGTHS, vocab=tiny.VOCAB)
    for ids, answer in zip(asked, engine.generate(asked, Sampling(max_tokens=10)), strict=True):
        tiny.same_greedy(model, ids, answer.tokens, 10)
    said = asked[2]
    for turn in range(3):
        heard = Heard()
        engine.submit(said, Sampling(max_tokens=6), session="talk", on_event=heard)
        while engine.advance():
            pass
        tiny.same_greedy(model, said, heard.tokens, 6)
        assert (heard[-1].cached_tokens > 0) == (turn > 0)
        said = said + heard.tokens + prompts(5, seed=turn, vocab=tiny.VOCAB)[0]
    for steps_before in (2, 20):
        cancelled, beside = Heard(), Heard()
        number = engine.submit(asked[4], Sampling(max_tokens=60), on_event=cancelled)
        engine.submit(asked[3], Sampling(max_tokens=30), on_event=beside)
        for _ in range(steps_before):
            engine.advance()
        assert bool(cancelled) == (steps_before == 20)
        engine.cancel(number)
        engine.advance()
        assert cancelled.finish == "cancelled"
        while engine.advance():
            pass
        tiny.same_greedy(model, asked[3], beside.tokens, 30)
    engine.close_session("talk")
    engine.close()
    assert not engine.runner.pages.sequences
    assert engine.stats()["pages_used"] == [0] * size


@pytest.mark.parametrize("chunk", [7, 512])
def test_alone_as_transformers_does(chunk):
    answers_like_transformers(0, 1, min(chunk, 39))


def test_on_two_ranks_as_transformers_does(world):
    world(2)(answers_like_transformers, 16)


def small_cache(rank: int, size: int) -> int:
    """More answers than the cache holds at once; how often one was preempted."""
    torch.set_num_threads(1)
    model = tiny.llama(1)
    engine = Engine(Runner(tiny.llama(1), pages=12 // size, page_size=4), chunk=8)
    if rank != 0:
        engine.serve()
        return 0
    asked = prompts(9, 12, 4, 10, vocab=tiny.VOCAB)
    for ids, answer in zip(asked, engine.generate(asked, Sampling(max_tokens=20)), strict=True):
        tiny.same_greedy(model, ids, answer.tokens, 20)
    engine.close()
    assert engine.stats()["pages_used"] == [0] * size
    return engine.stats()["preemptions"]


def test_a_cache_too_small_for_all(world):
    assert small_cache(0, 1) > 0
    assert world(2)(small_cache)[0] > 0


def test_the_models_own_end_of_sequence():
    free = tiny.llama()
    ids = prompts(6, vocab=tiny.VOCAB)[0]
    eos = tiny.greedy(free, ids, 12)[4]
    ended = tiny.llama(eos=eos)
    engine = Engine(Runner(tiny.llama(eos=eos), pages=8))
    assert engine.eos == {eos}
    answer = engine.generate([ids], Sampling(max_tokens=12))[0]
    assert list(answer.tokens) == tiny.greedy(ended, ids, 12)
    assert (answer.finish, answer.tokens[-1]) == ("stop", eos)


def test_what_a_models_generation_config_asks_for_in_vain_is_logged(caplog):
    model = tiny.llama()
    Engine(Runner(model, pages=8))
    assert not caplog.records
    model.generation_config.update(repetition_penalty=1.05, no_repeat_ngram_size=0, suppress_tokens=[3], num_beams=1)
    Engine(Runner(model, pages=8))
    (record,) = caplog.records
    assert "asks for repetition_penalty 1.05, suppress_tokens [3], which" in record.getMessage()
