"""ringfa3 bench service: over the toy gang, with answers that are wrong, refused and lost; its judge, and refusals."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ringfa3.inference.text import Transcript
from ringfa3_launch.bench import service, service_judge, service_report
from ringfa3_launch.bench.inference_case import Sizes
from ringfa3_launch.bench.service_case import Level, Overhead, Pair, Played, Program, Service
from ringfa3_launch.bench.service_judge import chosen, judge, rounding
from ringfa3_launch.bench.service_load import Answer, clients
from ringfa3_launch.bench.service_model import prompts_from, write_random
from ringfa3_launch.bench.service_play import play, serving
from ringfa3_launch.cli import main
from tests.launch import toy_gang
from tests.launch.toy_gang import Event, Running, ToyGang

PROGRAM = Program(
    name="toy", random=True, concurrency=(1, 6), prompts=5, length=24, tokens=9, long=300, rounds=2, seed=3
)  # fmt: skip
HERE = Service(2, "cpu", "local", "fp32", Sizes(2, 4, 2, 16))


def played(gang: Any, *, completions: int = 320, bare: bool = True, **changes: Any) -> service_report.Results:
    """The toy gang measured, and judged."""
    program = replace(PROGRAM, **changes)
    with serving(gang, completions=completions) as url, clients(url, "toy", None) as asking:
        cluster, where = (gang, HERE) if bare else (None, Service(2, "cpu"))
        found = play(
            program, where, asking, cluster, prompts_from(256, None, 0), until=None, tell=lambda text, steps: None
        )
    judge(found, device="cpu")
    return service_report.Results(program, found)


def test_the_whole_run(tmp_path: Path) -> None:
    results = played(ToyGang(step=0.002))
    assert not results.wrong, service_report.wrongs(results)
    assert results.played.missing == []
    one, six = results.played.levels
    assert (one.concurrency, six.concurrency) == (1, 6)
    assert (one.equal, six.equal, len(six.answers)) == (5, 12, 12)
    assert [overhead.length for overhead in results.played.overheads] == [24, 300]
    assert [len(overhead.pairs) for overhead in results.played.overheads] == [5, 2]
    assert all(answer.tokens == 9 and 0 < answer.first < answer.total for answer in six.answers)
    assert all(answer.total >= 9 * 0.002 for answer in one.answers)
    assert six.seconds < sum(answer.total for answer in six.answers) / 2  # they were asked at once
    found = service_report.document(results, command="ringfa3 bench service")
    for row in found["rows"]:
        assert row.keys() == {"case", "metric", "ours", "spread", "peer", "theirs", "ratio"}
    got = {(row["case"], row["metric"]): row for row in found["rows"]}
    short = "completion causal D16 H4:2 S24 W2 fp32"
    assert got[f"{short} C6", "right answers"]["ratio"] == 1
    row = got[f"{short} C1", "s to first token"]
    assert row["peer"] == "bare engine"
    assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"], rel=2e-3)
    times = [got[f"{short} C6", f"s to first token {name}"]["ours"] for name in ("p50", "p95", "p99")]
    assert times == sorted(times)
    assert "completion causal D16 H4:2 S300 W2 fp32" in {each["case"] for each in found["verdicts"]}
    paths = service_report.write(results, found, tmp_path, "service")
    assert [path.name for path in paths] == ["service.json", "service.md", "service.png"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(found))
    assert "## What the service adds" in paths[1].read_text()
    assert paths[2].stat().st_size > 10_000


class Confused(ToyGang):
    """Mistakes a token for another, or its text, as soon as it answers several at once."""

    mistake: dict[str, Any]

    def _event(self, request: Running) -> Event:
        event = super()._event(request)
        wrong = self.running > 1 and event.completion_tokens == 4
        return replace(event, **self.mistake) if wrong else event


@pytest.mark.parametrize("mistake", [{"text": "?"}, {"token": 63}], ids=str)
def test_answers_that_are_not_the_lone_one_are_wrong(mistake: dict[str, Any]) -> None:
    gang = Confused(step=0.002)
    gang.mistake = mistake
    results = played(gang, long=None)
    one, six = results.played.levels
    assert (one.wrong, one.equal) == (0, 5)
    assert six.wrong > 0
    assert six.wrong + six.equal == 12
    assert results.wrong
    assert any("neither the lone one nor a tie" in line for line in service_report.wrongs(results))
    assert [v.ok for v in service_report.judge(results) if "neither" in v.what] == [True, False]


def test_429_is_counted_and_asked_again() -> None:
    results = played(ToyGang(step=0.002), completions=2, long=None)
    six = results.played.levels[1]
    assert six.refused > 0
    assert (six.errors, six.equal) == (0, 12)
    assert not results.wrong


class Dying(ToyGang):
    """Loses a rank when it has several to answer."""

    def complete(self, prompt: Sequence[int], sampling: Any, *, session: str | None = None) -> Running:
        request = super().complete(prompt, sampling, session=session)
        if self.running > 3:
            self.fail(1)
        return request


def test_errors_are_answers_too() -> None:
    results = played(Dying(step=0.01), long=None)
    one, six = results.played.levels
    assert one.errors == 0
    assert six.errors > 0
    assert results.wrong
    assert any("rank" in line for line in service_report.wrongs(results))


class Silent(ToyGang):
    """Refuses long prompts, as an engine without room for them."""

    def complete(self, prompt: Sequence[int], sampling: Any, *, session: str | None = None) -> Running:
        if len(prompt) > 100:
            raise ValueError(f"prompt: wanted at most 100 tokens, got {len(prompt)}")
        return super().complete(prompt, sampling, session=session)


def test_a_long_prompt_that_does_not_fit_is_missing() -> None:
    results = played(Silent())
    assert [overhead.length for overhead in results.played.overheads] == [24]
    assert any("S300" in line and "at most 100" in line for line in results.played.missing)
    assert [v.ok for v in service_report.judge(results) if v.what == "requests answered"] == [False]
    assert len(results.played.levels) == 2


def test_a_running_service(capsys: pytest.CaptureFixture[str]) -> None:
    few = [
        "--concurrency",
        "1,3",
        "--prompts",
        "3",
        "--length",
        "16",
        "--tokens",
        "5",
        "--long",
        "200",
        "--rounds",
        "1",
    ]
    with toy_gang.serving(ToyGang()) as (url, _):
        assert main(["bench", "service", "--url", url, *few, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        with pytest.raises(SystemExit):
            main(["bench", "service", "--url", url, "--launcher", "nobody"])
        assert main(["bench", "service", "--url", url, "--length", "5000"]) == 2
    assert "--length: wanted at most" in capsys.readouterr().err
    got = {(row["case"], row["metric"]): row for row in found["rows"]}
    assert got["completion S16 W2 C3", "right answers"]["ratio"] == 1
    assert got["completion S200 W2 C1", "s to first token"]["peer"] == "none"
    assert not any("added" in metric for _, metric in got)
    assert main(["bench", "service", "--url", "http://127.0.0.1:9"]) == 2
    assert "--url: wanted a service" in capsys.readouterr().err


def test_the_judge_can_say_no() -> None:
    exact = torch.zeros(3, 6, dtype=torch.float64)
    exact[:, 1], exact[:, 2], exact[:, 3] = 8.0, 7.9, 5.0
    plain = exact.clone()
    plain[:, 0] += 0.03
    error = rounding(plain, exact)
    assert error.tolist() == pytest.approx([0.03] * 3)
    assert chosen([1, 2, 1], exact, 2 * error)  # the second is 0.1 below the best, allowed are 2 * 2 * 0.03
    assert not chosen([1, 2, 1], exact, error)
    assert not chosen([1, 3, 1], exact, 2 * error)  # 3 below
    assert not chosen([1, 1, 4], exact, 2 * error)
    assert not chosen([1, 2, 1], exact, 0 * error)  # nothing rounded: no ties
    assert chosen([1, 1, 1], exact, 0 * error)
    assert chosen([1, 2, 1], exact, error.max() * 2)
    assert not chosen([1, 1, 1], exact * torch.nan, error)


def test_the_judge_asks_the_model(tmp_path: Path) -> None:
    """Two tokens that the model cannot tell apart are a tie, and what follows has to be right; another one is wrong."""
    folder = write_random(tmp_path / "tiny", "tiny", dtype="float32", device="cpu", seed=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = list(range(20))
    with torch.no_grad():
        best, other, third = model(torch.tensor([prompt])).logits[0, -1].topk(3).indices.tolist()
        model.lm_head.weight[other] = model.lm_head.weight[best]
        nexts = [int(model(torch.tensor([[*prompt, token]])).logits[0, -1].argmax()) for token in (best, other)]
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def answer(*ids: int) -> Answer:
        """As the service tells it: the text goes on from the prompt's, with a space."""
        transcript = Transcript(tokenizer, prompt=prompt)
        return Answer(0, "".join(map(transcript.push, ids)), tokens=len(ids), ids=ids)

    lone, tie = answer(best, nexts[0]), answer(other, nexts[1])
    assert lone.text.startswith(" w")
    wrong = [answer(third, nexts[0]), answer(other, (nexts[1] + 1) % 512), replace(lone, text=tie.text), answer(other)]
    level = Level(3, 1.0, (lone, tie, *wrong))
    found = Played(replace(HERE, folder=folder), [level], lone={0: lone}, prompts=[prompt])
    judge(found, device="cpu")
    assert found.missing == []
    assert (found.levels[0].equal, found.levels[0].ties, found.levels[0].wrong) == (1, 1, 4)
    found.levels, found.lone = [Level(3, 1.0, (tie,))], {0: wrong[0]}  # beside a wrong lone answer nothing is right
    judge(found, device="cpu")
    assert found.levels[0].wrong == 1


@pytest.mark.parametrize("long", [False, True])
def test_the_judge_of_long_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """Pairs are judged as levels are; where wider precision takes too long, by the first short prompt's error."""
    monkeypatch.setattr(service_judge, "LONG", 30 if long else 100)
    folder = write_random(tmp_path / "tiny", "tiny", dtype="bfloat16", device="cpu", seed=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    prompts = [[], list(range(20)), list(range(40, 90))]
    with torch.no_grad():
        best, *near_it = model(torch.tensor([prompts[2]])).logits[0, -1].topk(30).indices.tolist()
        for i, token in enumerate(near_it):  # less and less likely, from a tie on
            model.lm_head.weight[token] = model.lm_head.weight[best].float() * (1 - i / 1000)
    model.save_pretrained(folder)
    wider = copy.deepcopy(model).float()

    def logits(of: Any, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return of(torch.tensor([ids])).logits[:, -1].double()

    near, exact = (logits(each, prompts[2])[0] for each in (model, wider))
    best, *others = near.topk(100).indices.tolist()
    first = int(logits(wider, prompts[1]).argmax())
    error = float(rounding(*(logits(each, prompts[1]) for each in (model, wider))) if long
                  else rounding(near[None], exact[None]))  # fmt: skip
    allowed, seen = (6 * error, near) if long else (4 * error, exact)
    lacking = (seen.max() - seen) / allowed
    within = [token for token in others if lacking[token] < 0.99]
    beyond = [token for token in others if lacking[token] > 1.01]
    assert within
    assert beyond
    lone = {1: Answer(1, ids=(first,)), 2: Answer(2, ids=(best,))}  # the first prompt's had failed
    answers = [Answer(2, ids=(token,)) for token in (best, *within, *beyond)]
    over = Overhead(50, tuple(Pair(lone[2], answer) for answer in answers))
    found = Played(replace(HERE, dtype="bf16", folder=folder), [], [Overhead(20, ()), over], lone=lone, prompts=prompts)
    judge(found, device="cpu")
    assert found.missing == []
    judged = found.overheads[1]
    assert (len(judged.parted), judged.ties, judged.wrong) == (len(answers) - 1, len(within), len(beyond))
    results = service_report.Results(replace(PROGRAM, long=50), found)
    assert service_report.wrongs(results) == [f"S50: {len(beyond)} answers neither the bare engine's nor a tie"]
    assert results.wrong


def test_verdicts_hold_the_bounds_on_gpus() -> None:
    bare = Answer(0, "a", first=1.0, total=2.0, tokens=11)
    fast, slow = replace(bare, first=1.004, total=2.0064), replace(bare, first=1.006, total=2.056)
    level = Level(1, 2.0, (fast,), equal=1)
    for served, ok in ((fast, True), (slow, False)):
        over = Overhead(512, (Pair(bare, served),) * 3)
        found = Played(replace(HERE, device="cuda"), [level], [over], lone={0: bare})
        verdicts = service_report.judge(service_report.Results(replace(PROGRAM, long=None), found))
        assert [v.ok for v in verdicts if "added" in v.what] == [ok, ok]
        found.service = HERE  # on CPUs nothing is asked of times
        verdicts = service_report.judge(service_report.Results(replace(PROGRAM, long=None), found))
        assert [v.ok for v in verdicts if "added" in v.what] == [None, None]


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    service.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--shape", "huge"), "--shape: wanted tiny"),
        (("--shape", "tiny", "--model", "x"), "--shape: wanted none beside --model"),
        (("--url", "http://x", "--shape", "tiny"), "--shape: wanted none beside --url"),
        (("--url", "http://x", "--no-graphs"), "--no-graphs: wanted none beside --url"),
        (("--shape", "tiny", "--concurrency", "0,2"), "--concurrency: wanted 1 or more"),
        (("--shape", "tiny", "--concurrency", "two"), "--concurrency: wanted integers"),
        (("--shape", "tiny", "--tokens", "1"), "--tokens: wanted 2 or more"),
        (("--shape", "tiny", "--prompts", "0"), "--prompts: wanted 1 or more"),
        (("--shape", "tiny", "--long", "lots"), "--long: wanted a number of tokens"),
    ],
)
def test_refusals(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        service.program_from(options(*argv), 0)


def test_no_time_left_is_named() -> None:
    with serving(ToyGang(), completions=9) as url, clients(url, "toy", None) as asking:
        found = play(
            PROGRAM, HERE, asking, None, prompts_from(256, None, 0), until=time.monotonic() - 1,
            tell=lambda text, steps: None,
        )  # fmt: skip
    assert [level.concurrency for level in found.levels] == [1]
    assert found.missing == ["concurrency 6: no time left", "a prompt of 300 tokens: no time left"]


@pytest.mark.slow
def test_the_command_with_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "service", "--shape", "tiny", "--device", "cpu", "--prompts", "2", "--concurrency", "1,2"]
    assert main([*argv, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "service.json").read_text())
    assert found["wrong"] == found["missing"] == []
