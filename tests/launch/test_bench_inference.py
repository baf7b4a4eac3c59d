"""ringfa3 bench inference: the whole run in small, its checks that can say no, its verdicts, options and refusals."""

from __future__ import annotations

import argparse
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ringfa3.inference import Engine
from ringfa3_launch.bench import inference, inference_peer, inference_report
from ringfa3_launch.bench.inference_case import (
    Attention,
    Checked,
    Kernel,
    Load,
    Played,
    Program,
    Served,
    Sizes,
    Truth,
    case_name,
)
from ringfa3_launch.bench.inference_ranks import prompts_of, sizes_of
from ringfa3_launch.bench.inference_rounds import Rounds, check, prefill
from ringfa3_launch.bench.inference_verdicts import Results, judge
from ringfa3_launch.bench.shapes import SHAPES, random_model
from ringfa3_launch.bench.timing import Memory, Timing
from ringfa3_launch.cli import main
from ringfa3_launch.console import Console
from tests.inference.toy import Toy, lone_greedy
from tests.launch import tiny_model

CPU = torch.device("cpu")
SIZES = Sizes(32, 32, 8, 128)
SMALL = ("--lengths", "48,96", "--tokens", "5", "--rounds", "1", "--chunk", "32", "--kernels", "128x2")


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    inference.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *argv])


def program(**changes: Any) -> Program:
    return replace(inference.asked_from(options(*SMALL), None).program, **changes)


def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Worlds of 1 and 2, two lengths and a batch, judged; written as docs/results wants it."""
    argv = ["bench", "inference", "--device", "cpu", *SMALL, "--batches", "1,2", "--out", str(tmp_path), "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "inference.json").read_text())
    assert {"command", "date", "commit", "device", "versions", "rows", "verdicts", "missing"} <= found.keys()
    assert found["missing"] == []
    for row in found["rows"]:
        assert row.keys() == {"case", "metric", "ours", "spread", "peer", "theirs", "ratio"}
    got = {(row["case"], row["metric"], row["peer"]): row for row in found["rows"]}
    for world in (1, 2):
        for length, batch in ((48, ""), (96, ""), (48, " B2")):
            case = f"prefill causal D16 H4:2 S{length} W{world} fp32{batch}"
            row = got[case, "s to first token", "transformers"]
            assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"], rel=2e-3)
            assert got[case.replace("prefill", "decode"), "cache pages", "none"]["ours"] > 0
            if world == 2:
                assert got[case, "s to first token", "one rank"]["theirs"] > 0
            if not batch:
                assert got[case.replace("prefill", "decode"), "equal greedy tokens", "transformers"]["ours"] == 5
                error = got[case, "logits' error (wider precision)", "allowed"]
                assert 0 <= error["ours"] <= error["theirs"] < 1e-4
    assert got["decode-attention causal D16 H4:2 S128 W1 fp32 B2", "GB/s", "device copy"]["ratio"] > 0
    assert got["merge D16 H4:2 W2 fp32 B2", "µs per layer", "none"]["ours"] > 0
    for world in (1, 2):
        case = f"prefill causal D16 H4:2 S96 W{world} fp32"
        row = got[case, "s of attention", "ring attention"]
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"], rel=2e-3)
        assert 0 < row["ours"] < 5 * got[case, "s to first token", "transformers"]["ours"]
    assert "## Attention within a prefill" in (tmp_path / "inference.md").read_text()
    assert "## Checked" in (tmp_path / "inference.md").read_text()
    assert (tmp_path / "inference.png").stat().st_size > 10_000


def rank_prefills(rank: int, size: int, folder: Path, ids: list[int]) -> torch.Tensor:
    from ringfa3.inference import Runner, load

    model, _ = load(folder, device=CPU, dtype=torch.float32)
    runner = Runner(model, pages=20, page_size=4)
    logits = prefill(runner, ids, 16)
    assert not runner.pages.sequences
    return logits


def test_ours_and_theirs_agree(tmp_path: Path, world: Any) -> None:
    """The judge: its tokens and logits are those that the ranks get, and its exact ones lie beside them."""
    folder = tiny_model.write(tmp_path)
    ids = list(range(40))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    served, steps = inference_peer.generate(model, [ids], 6, 2, Memory(CPU))
    assert list(served.answers[0]) == tiny_model.greedy(folder, ids, 6)
    assert steps.shape == (6, len(model.get_input_embeddings().weight))
    assert steps.argmax(-1).tolist() == list(served.answers[0])
    assert len(served.first.seconds) == len(served.each.seconds) == 2
    exact = inference_peer.exact_logits(model, ids, "fp32")
    assert model.dtype == torch.float32
    truth = Truth(served.answers[0], steps, exact)
    for logits in world(2)(rank_prefills, folder, ids):
        assert check(logits, served.answers[0], truth, 0.0).ok


def test_checks_can_say_no() -> None:
    steps = torch.tensor([[0.0, 8.0, 7.0], [0.0, 5.0, 4.999]])
    exact = steps[0] + torch.tensor([0.0, 0.01, -0.02])
    truth = Truth((1, 1), steps, exact)
    right = check(exact + 0.03, (1, 1), truth, 0.0)
    assert right.ok
    assert (right.same, right.of, right.by) == (2, 2, "wider precision")
    assert right.plain == pytest.approx(0.02 / 8.01, rel=1e-3)
    assert right.allowed == pytest.approx(2 * right.plain, rel=1e-2)
    assert not check(exact + torch.tensor([0.0, 0.0, 0.05]), (1, 1), truth, 0.0).ok
    tie = check(exact, (1, 2), truth, 0.0)
    assert (tie.ok, tie.same) == (True, 1)
    assert not check(exact, (2, 1), truth, 0.0).ok
    assert not check(exact, (1, 0), truth, 0.0).tokens
    one = Truth((1, 1), steps, None)
    assert check(steps[0] + 0.03, (1, 1), one, 0.02 / 8).ok
    far = check(steps[0] + 0.08, (1, 1), one, 0.02 / 8)
    assert (far.ok, far.by) == (False, "one device")


def test_rounds_of_an_engine() -> None:
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    rounds = Rounds(Engine(Toy(pages=40), None, chunk=2, eos=()), prompts, 6, 3)
    rounds.run()
    served = rounds.served()
    assert served.answers == tuple(tuple(_without_end(prompt, 6)) for prompt in prompts)
    assert [len(t.seconds) for t in (served.first, served.each, served.total)] == [3, 3, 3]
    assert all(0 < a < b for a, b in zip(served.first.seconds, served.total.seconds, strict=True))
    assert served.pages >= 3 + 2  # of 4 tokens: 10 of the one prompt and its answer, 8 of the other
    failing = Toy(pages=40)
    failing.refuse = [None, None, RuntimeError("the device is gone")]
    with pytest.raises(RuntimeError, match="the device is gone"):
        Rounds(Engine(failing, None, chunk=2, eos=()), prompts, 6, 3).run()


def _without_end(prompt: list[int], most: int) -> list[int]:
    """lone_greedy that does not stop at the toy's end of sequence."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < most:
        tokens += lone_greedy(tokens, 1)
    return tokens[len(prompt) :]


def served(first: float, each: float) -> Served:
    return Served(*(Timing((t, t)) for t in (first, each, first + 32 * each)), ((1,),), 2**30, 3, 2**20)


def on_gpus(
    *, first: float = 0.5, each: float = 0.9, copy: float = 0.9, merge: float = 25e-6, attention: float = 1.0
) -> Results:
    """Two worlds of a Llama-3-8B: what two ranks take of one's time, and the parts."""
    loads = (Load(128 << 10), Load(256 << 10))
    one = Played(1, SIZES, "cuda", served=dict.fromkeys(loads, served(10.0, 0.02)))
    one.kernels.append(Kernel(64 << 10, 1, Timing((1e-3,)), int(copy * 4e9), 4e12))
    two = Played(2, SIZES, "cuda", served=dict.fromkeys(loads, served(10.0 * first, 0.02 * each)))
    two.merges[1] = Timing((merge,))
    two = replace(two, attention=Attention(128 << 10, 3.2, 5.0, Timing((attention * 0.1,)), 32))
    asked = program(loads=loads, shape="llama-3-8b", dtype="bf16", device="cuda", tokens=32)
    return Results(asked, (one, two), ())


@pytest.mark.parametrize(
    ("slower", "wrong"),
    [
        ({}, []),
        ({"first": 0.6}, ["prefill S128K W2"]),
        ({"each": 1.1}, ["decode S256K W2"]),
        ({"copy": 0.8}, ["decode attention S64K B1"]),
        ({"merge": 31e-6}, ["merge W2 B1"]),
        ({"attention": 0.94}, ["prefill S128K W2"]),
    ],
    ids=lambda x: str(x),
)
def test_what_is_asked_of_two_gpus(slower: dict[str, float], wrong: list[str]) -> None:
    verdicts = judge(on_gpus(**slower))
    assert [v.case for v in verdicts if v.ok is False] == wrong
    assert sum(v.ok is not None for v in verdicts) == 5


def test_wrong_answers_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1; and so where a world breaks off or is interrupted, of which what it had is kept."""
    load = Load(48)
    played = Played(1, SIZES, "cpu", served={load: served(1.0, 0.1)}, peer={load: served(2.0, 0.1)})
    played.checked[load] = Checked(False, 1, 5, 1e-7, 1e-7, 1e-5, "wider precision")
    monkeypatch.setattr(inference, "in_ranks", lambda *_, **__: played)
    argv = ["bench", "inference", "--device", "cpu", *SMALL, "--worlds", "1"]
    assert main(argv) == 1
    assert "WRONG" in capsys.readouterr().out
    monkeypatch.setattr(inference, "in_ranks", lambda *_, **__: Played(1, SIZES, "cpu", missing=["ours: no time left"]))
    assert main(argv) == 1
    assert "missing: ours: no time left (world 1)" in capsys.readouterr().out
    monkeypatch.setattr(inference, "in_ranks", lambda *_, **__: played)
    played.checked[load] = replace(played.checked[load], tokens=True)
    assert main(argv) == 0
    capsys.readouterr()

    def dies(perform: Any, task: Any, *_: Any, **__: Any) -> Any:
        task.kept.write_bytes(pickle.dumps(played))
        raise ChildProcessError("rank 0 ended by signal SIGKILL")

    monkeypatch.setattr(inference, "in_ranks", dies)
    assert main(argv) == 1
    told = capsys.readouterr()
    assert "ours FAILED on 1 ranks: ChildProcessError: rank 0 ended by signal SIGKILL" in told.out
    assert "1 of 5 equal, tie" in told.out

    def is_interrupted(perform: Any, task: Any, steps: int, world: int, *_: Any, **__: Any) -> Any:
        if world == 1:
            return played
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "in_ranks", is_interrupted)
    assert main([*argv[:-1], "1,2,3"]) == 1
    told = capsys.readouterr()
    assert "ours FAILED on 2 ranks: interrupted" in told.out
    assert "3 ranks" not in told.out
    assert "1 of 5 equal, tie" in told.out


def test_tables_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    results = on_gpus()
    lines = inference_report.table(results)
    assert all(len(line) == len(inference_report.COLUMNS) for line in lines)
    assert lines[1] == ["128K", "1", "2", "5", "0", "2.00", "", "18", "0", "1.11", "", "5.739", "0.000977", "1"]
    assert inference_report.part_table(results)[0][-2:] == ["3600", "0.90"]
    inference_report.show(results, {"device": "2 x H200"}, Console(rich=False))
    assert "NOT REACHED" not in capsys.readouterr().out
    inference_report.show(on_gpus(first=0.6), {"device": "2 x H200"}, Console(rich=False))
    assert "NOT REACHED: prefill S128K W2: speed over one rank >= 1.85, got 1.667" in capsys.readouterr().out
    assert case_name("decode", Load(1 << 20, 4), SIZES, 2, "bf16") == "decode causal D128 H32:8 S1M W2 bf16 B4"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shape", "gpt-9"], "--shape: wanted tiny, smollm2-135m, llama-3-1b, llama-3-8b, got 'gpt-9'"),
        (["--shape", "tiny", "--model", "x"], "--shape: wanted none beside --model, got 'tiny'"),
        (["--lengths", "1x"], "--lengths: wanted a number of tokens such as 4096, 4K or 1M, got '1x'"),
        (["--batches", "0"], "--batches: wanted 1 or more, got 0"),
        (["--tokens", "0"], "--tokens: wanted 1 or more, got 0"),
        (["--chunk", "-1"], "--chunk: wanted 1 or more, got -1"),
        (["--worlds", "0,1"], "--worlds: wanted 1..any ranks on this machine, got 0,1"),
        (["--kernels", "64K"], "--kernels: wanted TOKENSxBATCH such as 64Kx16, or none, got '64K'"),
        (["--check", "x"], "--check: wanted a number of tokens"),
        (["--model", "/nowhere"], "--model: wanted a GGUF file, or a folder"),
        (["--out", "/dev/null/x"], "--out: wanted a folder that can be made and written to"),
    ],
)
def test_wrong_options_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "inference", "--device", "cpu", *argv]) == 2
    assert message in capsys.readouterr().err


def test_options() -> None:
    asked = inference.asked_from(options("--lengths", "2K,1K", "--batches", "4,1", "--kernels", "none"), None)
    assert asked.program.loads == (Load(1024), Load(2048), Load(1024, 4))
    assert (asked.program.kernels, asked.program.shape, asked.worlds, asked.peer) == ((), "tiny", (1, 2), True)
    assert not asked.program.graphs  # on CPUs
    assert asked.program.name == "tiny"


def test_a_model_of_files_is_called_by_its_name(tmp_path: Path) -> None:
    folder = tiny_model.write(tmp_path / "llama-of-mine")
    asked = inference.asked_from(options("--model", str(folder)), None).program
    assert (asked.folder, asked.shape) == (folder, None)
    assert Results(asked, (), ()).title.startswith("inference, llama-of-mine, fp32")


def test_files_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model.write(tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "torn.gguf").write_bytes(b"torn" * 64)
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    argv = ["bench", "inference", "--device", "cpu", *SMALL, "--worlds", "1", "--no-peer", "--model"]
    for model in (folder, tmp_path / "torn.gguf", tmp_path / "short.gguf"):  # in a rank, and before ranks start
        capfd.readouterr()
        assert main([*argv, str(model)]) == 2
        told = capfd.readouterr().err
        last = told.splitlines()[-1]
        assert last.startswith(f"ringfa3: --model: wanted one whose files can be read, got {model.stem} ("), told
        assert "Traceback" not in told


def test_random_models_are_alike() -> None:
    models = [random_model("tiny", seed=seed, dtype=torch.bfloat16, device=CPU) for seed in (1, 1, 2)]
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.bfloat16
    assert {buffer.dtype for buffer in models[0].buffers()} == {torch.float32}  # of RoPE
    assert sizes_of(models[0].config) == Sizes(2, 4, 2, 16)
    assert SHAPES["llama-3-8b"].config().max_position_embeddings >= 1 << 20


def test_prompts(tmp_path: Path) -> None:
    load = Load(300, 3)
    drawn = prompts_of(load, program(), 512, None)
    assert [len(prompt) for prompt in drawn] == [300] * 3
    assert drawn[0] != drawn[1]
    assert drawn == prompts_of(load, program(), 512, None)
    assert 0 <= min(map(min, drawn)) <= max(map(max, drawn)) < 512
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model.write(tmp_path))
    read = prompts_of(replace(load, length=100_000), program(), 104, tokenizer)
    assert [len(prompt) for prompt in read] == [100_000] * 3
