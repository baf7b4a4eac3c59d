"""A Runner's greedy tokens are transformers' own, for every family, world and chunking; what fails changes nothing."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ringfa3 import Mask, RankFailed
from ringfa3.inference.model import load, reach
from ringfa3.inference.pages import CacheFull
from ringfa3.inference.runner import Runner
from ringfa3_kernels import Unsupported
from tests.inference.families import CONFIGS, build

TURNS = ((29, 6), (9, 6), (1, 6))  # tokens that are asked, tokens that are answered
BATCH = (1, 23, 7, 2, 16, 11, 3, 40)
PROMPT = "Explain in one sentence why the text above repeats itself."
PARAGRAPH = (
    "The harbour town wakes before the sun. Fishermen mend their nets while gulls quarrel over the morning's scraps, "
    "and number {} of the old bell tower's strokes rolls across the water towards the lighthouse. "
)
Script = dict[str, Any]


def asked(number: int, count: int) -> list[int]:
    """A prompt's tokens."""
    return torch.randint(1, 97, (count,), generator=torch.Generator().manual_seed(number)).tolist()


def fill(runner: Runner, sequence: int, ids: Sequence[int], chunk: int) -> Tensor:
    """Prefill in chunks; the logits after the last token."""
    for start in range(0, len(ids), chunk):
        logits = runner.prefill(sequence, ids[start : start + chunk])
    return logits


def answer(runner: Runner, sequences: Sequence[int], first: Tensor, count: int) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens of each, and their logits [B, count, vocab], from logits [B, vocab] on; the last is not cached."""
    steps = [first]
    for _ in range(count - 1):
        steps.append(runner.decode(sequences, steps[-1].argmax(-1)[:, None].tolist())[:, 0])
    logits = torch.stack(steps, 1)
    return logits.argmax(-1).tolist(), logits


def play(rank: int, size: int, name: str, chunk: int) -> Script:
    """A conversation of three turns, a fork of it, a batch of 8: (tokens before, answer, logits) of each."""
    way = "auto" if chunk > 100 else "pass-q"
    runner = Runner(build(name), pages=120 // size + 40, page_size=4, prefill=way)
    said: Script = {}
    held: list[int] = []
    runner.create(5)
    for turn, (count, wanted) in enumerate(TURNS):
        new = asked(turn, count)
        first = fill(runner, 5, [*held[runner.pages.length(5) :], *new], chunk)
        held += new
        (tokens,), logits = answer(runner, [5], first[None], wanted)
        said[f"turn {turn}"] = list(held), tokens, logits[0]
        held += tokens
        if turn == 0:
            runner.fork(5, 6)
            other = [*held[runner.pages.length(6) :], *asked(50, 4)]
    before = said["turn 0"][0] + said["turn 0"][1] + asked(50, 4)
    (tokens,), logits = answer(runner, [6], fill(runner, 6, other, chunk)[None], 6)
    said["fork"] = before, tokens, logits[0]
    sequences = list(range(10, 10 + len(BATCH)))
    for sequence in sequences:
        runner.create(sequence)
    prompts = [asked(sequence, count) for sequence, count in zip(sequences, BATCH, strict=True)]
    first = torch.stack([fill(runner, s, ids, chunk) for s, ids in zip(sequences, prompts, strict=True)])
    answers, logits = answer(runner, sequences, first, 5)
    for b, sequence in enumerate(sequences):
        said[f"batch {sequence}"] = prompts[b], answers[b], logits[b]
    if runner.pages.cuts(5, 20):
        runner.truncate(5, 20)
    else:  # all layers have windows: what is seen from there is forgotten
        with pytest.raises(ValueError, match="what token 20 sees is forgotten"):
            runner.truncate(5, 20)
        runner.truncate(5, 0)
        fill(runner, 5, held[:20], chunk)
    ahead = held[20:28]  # eight tokens at once, after a truncation
    said["eight"] = held[:20] + ahead[:1], None, runner.decode([5], [ahead])[0]
    said["held"] = held
    for sequence in (5, 6, *sequences):
        runner.free(sequence)
    assert [runner.pages.used(r) for r in range(size)] == [0] * size
    return said


@cache
def references(name: str) -> tuple[Any, Any]:
    return build(name), build(name, torch.float64)


def after(model: Any, ids: list[int], count: int) -> Tensor:
    """The model's logits after each of the last tokens: [count, vocab]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -count:]


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, attention_mask=torch.ones(1, len(ids))
    )
    return out[0, len(ids) :].tolist()


def judge(single: Any, exact: Any, before: list[int], tokens: list[int], logits: Tensor) -> None:
    """Tokens are those of generate, but where its best two lie closer than rounding; logits within 2x of rounding."""
    everything = [*before, *tokens[:-1]]
    truth, usual = after(exact, everything, len(tokens)), after(single, everything, len(tokens))
    error, rounding = ((x.double() - truth) for x in (logits, usual))
    assert error.square().mean().sqrt() <= 2 * rounding.square().mean().sqrt() + 1e-6
    wanted = generated(single, before, len(tokens))
    if tokens != wanted:
        i = next(i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1])
        best = truth[i].topk(2)
        assert {tokens[i], wanted[i]} == set(best.indices.tolist()), (tokens, wanted)
        assert best.values[0] - best.values[1] <= 2 * rounding.abs().max(), (tokens, wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_transformers(world: Any, name: str, size: int) -> None:
    chunk = (1 << 20, 8)[(size + list(CONFIGS).index(name)) % 2]  # half of the families in chunks, by turns
    said, *others = world(size)(play, name, chunk) if size > 1 else [play(0, 1, name, chunk)]
    single, exact = references(name)
    held = said.pop("held")
    _, _, logits = said.pop("eight")
    truth = after(exact, held[:28], 8)
    rounding = (after(single, held[:28], 8) - truth).square().mean().sqrt()
    assert (logits - truth).square().mean().sqrt() <= 2 * rounding + 1e-6
    for before, tokens, logits in said.values():
        judge(single, exact, before, tokens, logits)
    for other in others:  # bitwise: any rank could sample
        for key, (_, tokens, logits) in said.items():
            assert other[key][1] == tokens
            assert torch.equal(other[key][2], logits)


def read_far(rank: int, size: int, name: str, chunk: int) -> tuple[list[Any], int, int]:
    """Turns of a conversation longer than the cache: (tokens before, answer, logits), most pages used, reach."""
    runner = Runner(build(name), pages=24 // size, page_size=4, prefill="pass-q" if chunk == 5 else "pass-kv")
    runner.create(0)
    held: list[int] = []
    said, most = [], 0
    for turn, count in enumerate((70, 1, 22)):
        held = held + asked(turn, count)
        first = fill(runner, 0, held[runner.pages.length(0) :], chunk)
        (tokens,), logits = answer(runner, [0], first[None], 8)
        said.append((held, tokens, logits[0]))
        held = held + tokens
        most = max(most, *(runner.pages.used(r) for r in range(size)))
        runner.pages.audit()
    runner.fork(0, 1)
    runner.free(0)
    first = runner.decode([1], [held[-1:]])[0]
    (tokens,), logits = answer(runner, [1], first, 3)
    said.append((held, tokens, logits[0]))
    runner.free(1)
    assert [runner.pages.used(r) for r in range(size)] == [0] * size
    assert runner.pages.reach is not None
    return said, most, runner.pages.reach


@pytest.mark.parametrize("size", [1, 2, 3])
def test_windows_read_further_than_the_cache_holds(world: Any, size: int) -> None:
    """Each rank has room for 24 / size pages of 4 tokens, the conversation has 117 tokens."""
    chunk = 5 if size == 3 else 8
    said, most, reach = (world(size)(read_far, "mistral", chunk) if size > 1 else [read_far(0, 1, "mistral", chunk)])[0]
    assert reach == 6
    assert most <= -(-(reach + 1) // (4 * size)) + 1  # pages of the window, and one that is half in it
    single, exact = references("mistral")
    for before, tokens, logits in said:
        judge(single, exact, before, tokens, logits)


def test_where_some_layer_sees_all_nothing_is_forgotten() -> None:
    for name, seen in (("gemma2", None), ("llama", None), ("mistral", 6)):
        runner = Runner(build(name), pages=20, page_size=4)
        assert runner.pages.reach == seen
        assert runner.max_length == (128 if seen else 80)
    assert reach([Mask(window=(4, 0)), Mask(chunk=9)]) == 8
    assert reach([Mask(window=(4, 0), chunk=9)]) == 4
    assert reach([Mask(window=(4, 0)), Mask()]) is None
    assert reach([Mask(window=(-1, 0))]) is None


def wander(rank: int, size: int, name: str, seed: int) -> tuple[int, list[tuple[list[int], Tensor]]]:
    """Anything in any order, in a cache that is often full: how often it was, and tokens with their last logits."""
    chance = random.Random(seed)
    runner = Runner(
        build(name), pages=4 if name == "mistral" else 7, page_size=4, prefill=chance.choice(["pass-kv", "pass-q"])
    )
    held: dict[int, list[int]] = {}
    said: list[tuple[list[int], Tensor]] = []
    full = 0
    for number in range(60):
        known = sorted(held)
        do = chance.choice(["create", "prefill", "prefill", "fork", "truncate", "free", "decode", "decode", "decode"])
        try:
            if do == "create" or not known:
                runner.create(number)
                held[number] = []
            elif do == "prefill":
                which, new = chance.choice(known), asked(number, chance.randint(1, 11))
                logits = runner.prefill(which, new)
                held[which] = held[which] + new
                said.append((held[which], logits[None]))
            elif do == "decode":
                batch, count = chance.sample(known, chance.randint(1, min(3, len(known)))), chance.randint(1, 3)
                tokens = [asked(100 * number + b, count) for b in range(len(batch))]
                logits = runner.decode(batch, tokens)
                for which, new, each in zip(batch, tokens, logits, strict=True):
                    held[which] = held[which] + new
                    said.append((held[which], each))
            elif do == "fork":
                which = chance.choice(known)
                runner.fork(which, number)
                held[number] = held[which]
            elif do == "truncate":
                which = chance.choice(known)
                length = chance.randint(0, len(held[which]))
                length = length if runner.pages.cuts(which, length) else 0
                runner.truncate(which, length)
                held[which] = held[which][:length]
            else:
                which = chance.choice(known)
                runner.free(which)
                del held[which]
        except CacheFull:
            full += 1
            which = chance.choice(known)
            runner.free(which)
            del held[which]
        runner.pages.audit()
    return full, said


@pytest.mark.parametrize(
    ("name", "seed"), [("gemma2", 0), ("gemma2", 1), ("gemma2", 2), ("mistral", 3), ("mistral", 4)]
)
def test_sequences_are_never_mixed_up(world: Any, name: str, seed: int) -> None:
    (full, said), *others = world(3)(wander, name, seed)
    assert len(said) > 20
    assert full, "the cache was to be full at times"
    single, exact = references(name)
    errors, roundings = [], []
    for tokens, logits in said:
        truth = after(exact, tokens, len(logits))
        errors.append(logits.double() - truth)
        roundings.append(after(single, tokens, len(logits)) - truth)
    error, rounding = (torch.cat(x).square().mean().sqrt() for x in (errors, roundings))
    assert error <= 2 * rounding + 1e-6
    assert max(x.abs().max() for x in errors) <= 100 * rounding  # of a single sequence, too
    for _, other in others:
        assert all(torch.equal(a[1], b[1]) for a, b in zip(said, other, strict=True))


def read(model: Any, ids: list[int], chunk: int) -> tuple[list[int], Tensor]:
    """The real model's answer to a prompt, and the logits that it was chosen by."""
    runner = Runner(model, memory=100 << 20)
    runner.create(0)
    (tokens,), logits = answer(runner, [0], fill(runner, 0, ids, chunk)[None], 8)
    return tokens, logits[0]


def read_together(rank: int, size: int, folder: Path, ids: list[int]) -> tuple[list[int], Tensor]:
    model, tokenizer = load(folder, device="cpu", dtype=torch.float32)
    assert tokenizer.decode(ids[:4]).startswith("<|im_start|>")
    return read(model, ids, 1 << 20)


def test_a_real_model_reads_a_thousand_tokens(world: Any, smollm2: tuple[Path, Any]) -> None:
    folder, tokenizer = smollm2
    text = "".join(PARAGRAPH.format(i) for i in range(22)) + PROMPT
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
    assert 900 < len(ids) < 1200
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=8, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    usual = torch.cat(wanted.logits)
    for got, logits in (*world(2)(read_together, folder, ids), read(model, ids, 400)):
        assert got == wanted.sequences[0, len(ids) :].tolist(), tokenizer.decode(got)
        # fp32 rounding through 30 layers: transformers' sdpa and eager attention differ by as much
        assert (logits - usual).abs().max() < 2e-3


def small_runner(**options: Any) -> Runner:
    runner = Runner(build("llama"), **({"pages": 6, "page_size": 4} | options))
    runner.create(0)
    return runner


def state(runner: Runner) -> list[Any]:
    """All that the books say."""
    pages = runner.pages
    pages.audit()
    ranks = range(pages.world)
    return [
        (s, pages.length(s), [pages.table(r, s) for r in ranks], [pages.runs(r, s) for r in ranks])
        for s in pages.sequences
    ] + [pages.free_pages(r) for r in ranks]


def overfill(rank: int, size: int) -> None:
    """A full cache is the same error on all ranks, and nothing has changed; then things go on."""
    runner = small_runner()
    runner.create(1)
    ids = asked(0, 24 * size + 1)
    runner.prefill(0, ids[: 12 * size])
    logits = runner.prefill(1, ids[:3])
    before = state(runner)
    full: list[Any] = []
    for call in (
        lambda: runner.prefill(1, ids[3 : 17 * size + 3]),
        lambda: [runner.decode([0, 1], [ids[:8], ids[:8]]) for _ in range(size + 1)],
    ):
        with pytest.raises(CacheFull) as caught:
            call()
        full.append((caught.value.rank, caught.value.wanted, caught.value.free))
        runner.truncate(0, 12 * size)
        runner.truncate(1, 3)
        assert state(runner) == before
    again = runner.decode([1], [ids[3:4]])
    runner.free(0)
    runner.free(1)
    runner.create(2)
    torch.testing.assert_close(runner.prefill(2, ids[:3]), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(runner.prefill(2, ids[3:4]), again[0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_a_full_cache_changes_nothing(world: Any, size: int) -> None:
    if size == 1:
        overfill(0, 1)
    else:
        world(size)(overfill)


def test_a_failed_pass_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = small_runner()
    runner.prefill(0, asked(0, 7))
    wanted, before = runner.decode([0], [[5]]), state(runner)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr(runner._model._model.model.layers[1], "forward", fail)
        for call in (lambda: runner.decode([0], [[9]]), lambda: runner.prefill(0, [9, 9, 9])):
            with pytest.raises(MemoryError):
                call()
            assert state(runner) == before
    runner.truncate(0, 7)
    assert torch.equal(runner.decode([0], [[5]]), wanted)


class Alarmed:
    """The agreement of a rank that has not yet heard what another one has already told."""

    others, failure = (), None

    def agree(self, *_: Any) -> None:
        pass

    def heard(self) -> RankFailed:
        return RankFailed(1, "there", None, "no room on this rank")

    def abandon(self, error: BaseException) -> RankFailed | None:
        return error if isinstance(error, RankFailed) else None


def test_connections_may_end_before_the_alarm_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = small_runner()

    def breaks_off(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(runner._model._model.model.layers[1], "forward", breaks_off)
    runner._agreement = Alarmed()  # type: ignore[assignment]
    with pytest.raises(RankFailed, match="no room on this rank"):
        runner.decode([0], [[4]])


def differ(rank: int, size: int) -> list[str]:
    """What ranks hear that were not given the same; afterwards they go on."""
    runner = small_runner()
    heard = []
    for call in (
        lambda: runner.prefill(0, [1, 2, 3 + rank]),
        lambda: runner.decode([0], [[1]]) if rank else runner.prefill(0, [1]),
        lambda: runner.decode([0], [[1 if rank else 97]]),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            call()
        heard.append(str(caught.value))
    assert runner.pages.length(0) == 0
    runner.prefill(0, [1, 2, 3])
    return heard


def test_ranks_that_differ_hear_of_it(world: Any) -> None:
    first, second = world(2)(differ)
    for heard in (first, second):
        assert "ids (digest)" in heard[0]
        assert "call: rank 0 has prefill, rank 1 has decode" in heard[1]
        assert "ids: wanted tokens in [0, 97), got 97 to 97" in heard[2]


def bereaved(rank: int, size: int) -> float:
    """Rank 1 dies in the middle of a forward pass. Seconds until rank 0 hears of it."""
    runner = small_runner()
    runner.prefill(0, [1, 2, 3])
    if rank == 1:
        runner._model._model.model.layers[1].forward = lambda *_, **__: os._exit(3)
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        runner.decode([0], [[4]])
    assert caught.value.rank == 1
    with pytest.raises(RankFailed):
        runner.prefill(0, [4])
    return time.monotonic() - start


def test_a_dead_rank_is_named(world: Any) -> None:
    seconds, _ = world(2)(bereaved, dying=(1,))
    assert seconds < 5


def test_refusals_of_calls() -> None:
    runner = small_runner()
    for match, call in (
        ("ids: wanted 1 to 24 tokens for sequence 0, got \\[\\]", lambda: runner.prefill(0, [])),
        ("ids: wanted 1 to 24 tokens", lambda: runner.prefill(0, [1] * 25)),
        ("ids: wanted 1 to 24 tokens", lambda: runner.prefill(0, [[1]])),  # type: ignore[list-item]
        ("ids: wanted 1 to 24 tokens", lambda: runner.prefill(0, [0.5])),  # type: ignore[list-item]
        ("ids: wanted 1 to 8 tokens", lambda: runner.decode([0], [[1] * 9])),
        ("ids: wanted tokens in", lambda: runner.prefill(0, [-1])),
        ("seqs: wanted sequences, each once", lambda: runner.decode([0, 0], [[1], [1]])),
        ("seqs: wanted sequences, each once", lambda: runner.decode([], [])),
        ("seqs: wanted sequences, each once", lambda: runner.decode([0], [])),
        ("sequence: wanted one of", lambda: runner.decode([4], [[1]])),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    runner.create(1)
    with pytest.raises(ValueError, match="equally many"):
        runner.decode([0, 1], [[1], [1, 2]])
    assert runner.max_length == 24  # six pages, less than the model's 128
    assert runner.vocab == 97


def test_refusals_of_runners() -> None:
    with pytest.raises(ValueError, match="memory: wanted either it or pages"):
        Runner(build("llama"))
    with pytest.raises(ValueError, match="memory: wanted either it or pages"):
        Runner(build("llama"), memory=1 << 20, pages=3)
    with pytest.raises(ValueError, match="prefill: wanted one of"):
        Runner(build("llama"), pages=3, prefill="ring")
    with pytest.raises(ValueError, match="model: wanted a transformers causal LM"):
        Runner(torch.nn.Linear(1, 1), pages=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="impl: wanted"):
        Runner(build("llama"), pages=3, impl="flash")
    with pytest.raises(Unsupported, match="'portable' was named"):
        Runner(build("llama", torch.float64), pages=3, impl="portable")
    with pytest.raises(ValueError, match="graphs: wanted False on cpu"):
        Runner(build("llama"), pages=3, graphs=True)
    with pytest.raises(ValueError, match="pages: wanted fewer than"):
        Runner(build("llama"), pages=1 << 20, page_size=1 << 10)
    with pytest.raises(ValueError, match="budget: wanted at least"):
        Runner(build("llama"), memory=100)


def test_memory_is_what_was_stated() -> None:
    runner = Runner(build("llama"), memory=1 << 20, page_size=16)
    page = 2 * 2 * 16 * 2 * 16 * 4  # k and v, layers, tokens, heads, head_dim, bytes
    assert (1 << 20) - page < runner.cache.nbytes <= 1 << 20
    assert runner.pages.pages == (1 << 20) // page - 1
