"""Graphs captured beforehand serve the steps that come; a cluster answers with them as without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ringfa3.inference import Sampling
from ringfa3.inference.runner import Runner
from ringfa3_launch.cluster import RingCluster
from tests.gpu.test_runner_gpu import build, ids, judge


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_steps_find_their_graphs(name: str) -> None:
    runner = Runner(build(name), pages=64, graphs=True)
    runner.warm(6)
    graphs = runner._graphs
    assert graphs is not None
    assert [form.batch for form in graphs._captured] == [1, 2, 4, 8]
    held = [ids(seq, 200 + 50 * seq) for seq in range(5)]
    for seq, tokens in enumerate(held):
        runner.create(seq)
        runner.prefill(seq, tokens)
    for batch in ([0], [3, 1], [0, 2, 4], [4, 3, 2, 1, 0]):
        new = [ids(100 * len(batch) + seq, 1) for seq in batch]
        logits = runner.decode(batch, new).cpu()
        for seq, more in zip(batch, new, strict=True):
            held[seq] = held[seq] + more
        judge(name, [(held[seq], logits[b]) for b, seq in enumerate(batch)])
    assert len(graphs._captured) == 4


@pytest.mark.multigpu(2)
@pytest.mark.xdist_group("ranks, warm")
def test_a_cluster_answers_as_without(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    prompts = [ids(seed, count) for seed, count in ((1, 40), (2, 700), (3, 1300))]
    answers = []
    for graphs in (True, False):
        with RingCluster.local(
            2, device="cuda", model=tmp_path, pages=200, graphs=graphs, max_running=8
        ) as cluster:  # fmt: skip
            sampling = Sampling(max_tokens=24, ignore_eos=True)
            lone = [[event.token for event in cluster.complete(prompt, sampling)] for prompt in prompts]
            together = [cluster.complete(prompt, sampling) for prompt in prompts]
            assert [list(each)[-1].finish for each in together] == ["length"] * 3
            assert [rank.cache_pages for rank in cluster.health()] == [200, 200]
        answers.append(lone)
    assert answers[0] == answers[1]
