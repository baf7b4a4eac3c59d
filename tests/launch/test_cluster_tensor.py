"""A cluster whose ranks share the model's weights answers as transformers does; wrong numbers are named."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest
import transformers

from ringfa3.inference import Sampling
from ringfa3_launch import serve
from ringfa3_launch.cluster import RingCluster
from tests.launch import tiny_model


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(argv)


def test_ranks_that_share_the_weights(tmp_path: Path) -> None:
    folder = tiny_model.write(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(tiny_model.prompt(50))["input_ids"]
    args = options("--model", str(folder), "--ranks", "2", "--tp", "2", "--pages", "20", "--chunk", "16")
    with serve.start(args, tmp_path, 0) as cluster:
        events = list(cluster.complete(ids, Sampling(max_tokens=10)))
        tokens = [event.token for event in events if event.token is not None]
        assert tokens == tiny_model.greedy(folder, ids, 10)
        deadline = time.monotonic() + 120  # pages go back by an order of their own, after the last event
        while any(rank.cache_used for rank in cluster.health()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [rank.cache_pages for rank in cluster.health()] == [20, 20]


def test_graphs_are_an_option(tmp_path: Path) -> None:
    folder = tiny_model.write(tmp_path)
    for i, words in enumerate(((), ("--no-graphs",))):
        scratch = tmp_path / str(i)
        scratch.mkdir()
        _, made = serve.cluster_options(options("--model", str(folder), *words), scratch, 0)
        assert made["graphs"] is not bool(words)


def test_wrong_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tp: wanted a divisor of the number of ranks, 3, got 2"):
        serve.start(options("--ranks", "3", "--tp", "2"), tmp_path, 0)
    for name, value in (
        ("--tp", "2"),
        ("--model", "m"),
        ("--model-name", "m"),
        ("--pages", "3"),
        ("--dtype", "float16"),
        ("--chunk", "5"),
    ):
        with pytest.raises(ValueError, match=f"--attention-only: wanted no {name} beside it, got '?{value}"):
            serve.cluster_options(options("--ranks", "2", name, value, "--attention-only"), tmp_path, 0)
    with pytest.raises(ValueError, match="--attention-only: wanted no --no-graphs beside it, got True"):
        serve.cluster_options(options("--no-graphs", "--attention-only"), tmp_path, 0)
    with pytest.raises(ValueError, match="--model-name: wanted a name, got none"):
        serve.cluster_options(options("--model-name", ""), tmp_path, 0)
    for n, tp, model in ((2, 2, None), (2, 3, tmp_path)):
        with pytest.raises(ValueError, match=f"tp: wanted 1 without a model, else a divisor of 2 ranks, got {tp}"):
            RingCluster.local(n, device="cpu", model=model, tp=tp)


def test_weights_that_cannot_be_read_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (scratch := tmp_path / "scratch").mkdir()
    folder = tiny_model.write(tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    why = (
        r"rank 0 on .*: ValueError: --model: wanted one whose files can be read, got torn \(SafetensorError: [^\n]*\)$"
    )
    with pytest.raises(ValueError, match=f"^the ranks could not be started: {why}"):
        serve.start(options("--model", str(folder), "--ranks", "1"), scratch, 0)
    told = capfd.readouterr()
    assert "Traceback" not in told.err
    assert "starting 1 CPU ranks" in told.out
    (folder / "config.json").write_text("{")
    (scratch := tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match=r"^--model: wanted one whose files can be read, got torn \(OSError: "):
        serve.start(options("--model", str(folder), "--ranks", "1"), scratch, 0)


def test_a_model_that_is_not_served_is_refused_before_ranks_start(tmp_path: Path) -> None:
    (scratch := tmp_path / "scratch").mkdir()
    transformers.MambaConfig().save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match=r"--model: wanted one that can be served, got mamba \(model 'mamba'"):
        serve.start(options("--model", str(tmp_path / "mamba")), scratch, 0)
