"""ringfa3 generate: transformers' answer at every number of ranks, streamed; prompts, options and refusals."""

from __future__ import annotations

import argparse
import io
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ringfa3.inference import Pages, Sampling
from ringfa3_kernels import Unsupported
from ringfa3_launch import generate, serve
from ringfa3_launch.cli import main
from ringfa3_launch.generate_ranks import Answer, Asked, pages_for, respond
from ringfa3_launch.local import _ended_in_order
from ringfa3_launch.rank import RankInfo
from tests.launch import tiny_model

TEXT = tiny_model.prompt(50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("tiny"))


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return parser.parse_args(argv)


def asked(folder: Path, sampling: Sampling, **changes: Any) -> Asked:
    chosen = {"text": TEXT, "chat": False, "system": None, "chunk": 16, "page_size": 4, "prefill": "auto"} | changes
    return Asked(folder=folder, name="tiny", sampling=sampling, dtype="float32", graphs=True, **chosen)


def rank_responds(rank: int, size: int, question: Asked) -> tuple[Answer | None, list[str]]:
    heard: list[str] = []
    return respond(RankInfo(rank, size, rank, size), question, heard.append if rank == 0 else None), heard


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_answer_is_transformers(folder: Path, size: int, world: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = asked(folder, Sampling(max_tokens=12))
    (answer, heard), *others = world(size)(rank_responds, question)
    expected = tiny_model.greedy(folder, question.ids(tokenizer), 12)
    assert list(answer.tokens) == expected
    assert answer.text == "".join(heard)
    assert answer.text.split() == tokenizer.decode(expected, skip_special_tokens=True).split()
    assert len(heard) > 1  # as it came
    assert (answer.prompt_tokens, answer.finish, answer.error) == (50, "length", None)
    assert answer.first > 0 < answer.seconds
    assert answer.rate == pytest.approx((len(expected) - 1) / answer.seconds)
    assert others == [(None, [])] * (size - 1)
    used, there = answer.pages
    assert len(used) == size
    assert 0 < max(used) <= there


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_may_share_the_weights(folder: Path, size: int, world: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = asked(folder, Sampling(max_tokens=12), tp=2)
    (answer, _), *others = world(size)(rank_responds, question)
    assert list(answer.tokens) == tiny_model.greedy(folder, question.ids(tokenizer), 12)
    assert others == [(None, [])] * (size - 1)
    used, there = answer.pages
    assert len(used) == size // 2  # the cache is shared by those who have the same heads
    assert 0 < max(used) <= there


def test_sampling_reaches_the_engine(folder: Path, world: Any) -> None:
    warm = Sampling(max_tokens=20, temperature=1.5, seed=3)
    answers = [world(2)(rank_responds, asked(folder, warm))[0][0] for _ in range(2)]
    assert answers[0].tokens == answers[1].tokens
    greedy = world(2)(rank_responds, asked(folder, Sampling(max_tokens=20)))[0][0]
    assert greedy.tokens != answers[0].tokens
    stop = greedy.text.split()[5]
    stopped = world(2)(rank_responds, asked(folder, Sampling(max_tokens=20, stop=(stop,))))[0][0]
    assert stopped.finish == "stop"
    assert stop not in stopped.text
    assert greedy.text.startswith(stopped.text)


def test_what_the_engine_refuses_is_named_as_the_option(folder: Path, world: Any) -> None:
    """On rank 0, and the others end, too: the ranks can be used again."""
    with pytest.raises(AssertionError, match="--max-tokens: wanted prompt and answer within the model's 512 tokens"):
        world(2)(rank_responds, asked(folder, Sampling(max_tokens=1000)))


def test_chat(folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = asked(folder, Sampling(), text="w3 w4", chat=True, system="w9")
    assert tokenizer.decode(question.ids(tokenizer)) == "system w9 user w3 w4 assistant"
    plain = transformers.AutoTokenizer.from_pretrained(tiny_model.write(tmp_path, chat=False))
    with pytest.raises(ValueError, match="--chat: wanted a model with a chat template, got tiny"):
        question.ids(plain)
    with pytest.raises(ValueError, match="--model: wanted one with a tokenizer, got tiny"):
        question.ids(None)
    with pytest.raises(ValueError, match="--prompt: wanted at least one token"):
        asked(folder, Sampling(), text=" ").ids(tokenizer)


def test_ranks_of_this_machine(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command: the answer on stdout, how fast it was on stderr."""
    file = tmp_path / "prompt"
    file.write_text(TEXT, "utf-8")
    argv = ["generate", "--model", str(folder), "--prompt-file", str(file), "--max-tokens", "6", "--device", "cpu"]
    assert main([*argv, "--ranks", "2"]) == 0
    told = capsys.readouterr()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = tiny_model.greedy(folder, tokenizer(TEXT)["input_ids"], 6)
    assert told.out.split() == tokenizer.decode(expected).split()
    assert told.out.endswith("\n")
    assert "prompt 50 tokens, first token after" in told.err
    assert "6 tokens, length; 2 ranks" in told.err


@pytest.mark.slow
def test_under_a_launcher(folder: Path, environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "ringfa3_launch", "generate", "--model", str(folder), "--prompt", TEXT]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [*argv, "--max-tokens", "6", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    outcome = json.loads(told[0][0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert outcome["tokens"] == tiny_model.greedy(folder, tokenizer(TEXT)["input_ids"], 6)
    assert (outcome["ranks"], outcome["finish"], outcome["prompt_tokens"]) == (2, "length", 50)
    assert told[1][0] == ""


def test_a_model_that_is_not_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def respond_locally(*_: Any) -> None:
        raise Unsupported("model 'gpt2': served are llama")

    monkeypatch.setattr(generate, "respond_locally", respond_locally)
    assert main(["generate", "--model", str(folder), "--prompt", "a", "--device", "cpu"]) == 2
    assert "--model: wanted one that can be served, got" in capsys.readouterr().err


def test_weights_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model.write(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    capfd.readouterr()
    argv = ["generate", "--model", str(folder), "--prompt", "a", "--device", "cpu", "--ranks", "1"]
    assert main(argv) == 2
    first, line = capfd.readouterr().err.splitlines()
    assert first == "empty on 1 ranks (cpu)"
    assert line.startswith("ringfa3: --model: wanted one whose files can be read, got empty (OSError: ")


def test_a_reader_that_leaves_ends_the_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ringfa3 generate | head`: nobody computes an answer that nobody reads."""

    def waits(world: int, respond: Any, question: Asked, writer: Any, *, device: str) -> None:
        with _ended_in_order():  # as local does
            writer.send("some text")
            for _ in range(1200):  # in pieces: a signal that comes right before a sleep does not shorten it
                time.sleep(0.1)

    def tell(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(generate, "local", waits)
    monkeypatch.setattr(generate.os, "dup2", lambda *_: None)
    begun = time.monotonic()
    with pytest.raises(SystemExit) as leaving:
        generate.respond_locally(2, asked(folder, Sampling()), "cpu", tell)
    assert leaving.value.code == 128 + 15
    assert time.monotonic() - begun < 100


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--prompt: wanted either it or --prompt-file, got neither"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt: wanted either it or --prompt-file, got both"),
        (["--prompt-file", "/nowhere"], "--prompt-file: wanted a text file in UTF-8, got /nowhere (No such file"),
        (["--prompt", "a", "--ranks", "0"], "--ranks: wanted 1 or more, got 0"),
        (["--prompt", "a", "--ranks", "3", "--tp", "2"], "--tp: wanted a divisor of the number of ranks, 3, got 2"),
        (["--prompt", "a", "--tp", "0"], "--tp: wanted a divisor of the number of ranks, 2, got 0"),
        (["--prompt", "a", "--chunk", "0"], "--chunk: wanted 1 or more, got 0"),
        (["--prompt", "a", "--page-size", "-1"], "--page-size: wanted 1 or more, got -1"),
        (["--prompt", "a", "--system", "b"], "--system: wanted it beside --chat only, got 'b'"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens: wanted an integer, 1 or more, got 0"),
        (["--prompt", "a", "--top-p", "2"], "--top-p: wanted a number above 0, at most 1, got 2.0"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: wanted a finite number, 0 or more, got -1.0"),
        (["--prompt", "a", "--stop", ""], "--stop: wanted strings that are not empty, got ''"),
        (["--prompt", "a", "--model", "/nowhere"], "--model: wanted a GGUF file, or a folder"),
    ],
)
def test_wrong_options_are_named(
    argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in argv else ["--model", str(folder)]
    assert main(["generate", "--device", "cpu", *model, *argv]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = RankInfo(0, 2, 0, 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert generate.prompt_of(options("--prompt-file", "-"), None) == "from a pipe"
    with pytest.raises(ValueError, match="--prompt-file: wanted a file that all ranks of a launcher can read"):
        generate.prompt_of(options("--prompt-file", "-"), info)
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        generate.prompt_of(options("--prompt-file", str(tmp_path / "bad")), None)
    with pytest.raises(ValueError, match="--ranks: wanted none beside a launcher, which started 2, got 3"):
        generate.asked_from(options("--prompt", "a", "--ranks", "3"), info)


def test_a_dtype_has_two_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = argparse.ArgumentParser()
    serve.add_arguments(service)
    for long, short in (("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")):
        for name in (long, short):
            given = options("--prompt", "a", "--device", "cpu", "--model", str(folder), "--dtype", name)
            assert generate.asked_from(given, None)[0].dtype == long
            assert service.parse_args(["--dtype", name]).dtype == long
    for parse in (options, lambda *argv: service.parse_args(argv)):
        with pytest.raises(SystemExit):
            parse("--dtype", "int8")
        assert "choose from" in capsys.readouterr().err


def test_options_become_a_sampling() -> None:
    given = options(
        "--prompt", "a", "--temperature", "0.7", "--top-k", "5", "--top-p", "0.9", "--seed", "4", "--max-tokens", "9",
        "--stop", "x", "--stop", "y", "--ignore-eos",
    )  # fmt: skip
    wanted = Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=4, max_tokens=9, stop=("x", "y"), ignore_eos=True)
    assert generate.sampling_of(given) == wanted


@given(
    st.integers(1, 300),
    st.integers(1, 60),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(0, 9),
)
def test_there_are_pages_enough(
    prompt: int, answer: int, world: int, chunk: int, page_size: int, sequence: int
) -> None:
    pages = Pages(world, pages_for(prompt, answer, world, chunk, page_size), page_size)
    assert pages.pages * page_size * world >= prompt + answer  # which the runner asks for
    pages.create(sequence)
    for begin in range(0, prompt, chunk):
        pages.append(sequence, min(chunk, prompt - begin))
    for _ in range(answer - 1):  # the last one is never held
        pages.append(sequence, 1)
    assert pages.pages <= 2 + (prompt + answer + 4 * world * (2 + (prompt + answer) // chunk)) / (world * page_size)


def test_a_failure_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer("", (), "error", "its logits are not numbers", 3, 0.0, 0.0, ((0,), 1))
    generate.report(answer, 1, as_json=False)
    told = capsys.readouterr()
    assert told.out == ""
    assert "ringfa3: its logits are not numbers" in told.err
