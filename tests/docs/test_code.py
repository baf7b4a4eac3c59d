"""Every Python block of the README and the documentation runs, or says why it cannot."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

import ringfa3
from tests.docs.pages import ROOT, Block, blocks
from tests.launch.toy_gang import ToyGang, serving

BLOCKS = list(blocks())
# What blocks speak of as the reader's own: names that are there before the first line
GIVEN = """
import torch
import torch.distributed as dist
from torch import nn

rank, w, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
torch.manual_seed(0)
ids = torch.randint(32, (1, 96))
q, k, v = (torch.randn(1, 96, heads, 16) for heads in (4, 2, 2))
embed, qkv, head = nn.Embedding(32, 64), nn.Linear(64, 8 * 16), nn.Linear(64, 32)
"""
GIVEN_BESIDE = {
    "docs/training.md": """
from tempfile import TemporaryDirectory

from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=32)
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
dp, cp = 1, w
optimizer = torch.optim.SGD(model.parameters(), 0.1)
loader = [{"input_ids": ids, "labels": ids, "position_ids": torch.arange(96)[None] % 48}]
folder = TemporaryDirectory()
name = folder.name
if w == 1:
    model.save_pretrained(name)
"""
}
URL = "http://127.0.0.1:8000"


def marked(kind: str) -> list[Any]:
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.mark.split(":")[0] == kind]


def test_every_block_is_marked() -> None:
    """None is passed over, and what is not run says why."""
    kinds = ("ranks", "torchrun", "script", "service", "not run")
    unknown = [f"{block.name}: {block.mark!r}" for block in BLOCKS if block.mark.split(":")[0] not in kinds]
    assert not unknown, f"wanted a comment before it, of {kinds}, got {unknown}"
    reasons = [block.mark.partition(":")[2].strip() for block in BLOCKS if block.mark.startswith("not run")]
    assert all(len(reason) > 10 for reason in reasons), reasons
    assert len(reasons) < len(BLOCKS) / 3, "most of it should run"


def execute(rank: int, size: int, code: str, name: str, checked: bool) -> None:
    """Run a block on this rank; where it is to be checked, what it calls loss or out is that of the whole sequence."""
    names: dict[str, Any] = {"__name__": "block"}
    exec(GIVEN + GIVEN_BESIDE.get(name.partition(":")[0], ""), names)
    given = dict(names)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code.replace('"cuda"', '"cpu"'), name, "exec"), names)
    if checked and "loss" in names:
        check_loss(names, given)
    elif checked:
        check_out(names["out"], given)


def check_out(out: Tensor, given: dict[str, Any]) -> None:
    """out [B, n, H, D] or [B, n, H * D] holds a zigzag shard's rows of plain causal attention."""
    wanted = plain(given["q"], given["k"], given["v"])
    mine = ringfa3.plan(ringfa3.Mask(), "zigzag", wanted.shape[1]).shard(wanted)
    torch.testing.assert_close(out.unflatten(2, (4, 16)) if out.ndim == 3 else out, mine)


def check_loss(names: dict[str, Any], given: dict[str, Any]) -> None:
    """The mean over ranks of loss, and of its gradients, is that of one process with the whole sequence."""
    parts = ("embed", "qkv", "head")
    mean = [names["loss"].detach(), *(p.grad for name in parts for p in names[name].parameters())]
    for x in mean:
        dist.all_reduce(x)
        x /= dist.get_world_size()
    got = [x.clone() for x in mean]
    embed, qkv, head = (given[name] for name in parts)
    for part in (embed, qkv, head):
        part.zero_grad()
    x = embed(given["ids"])
    logits = head(x + plain(*qkv(x).unflatten(-1, (-1, 16)).split((4, 2, 2), dim=2)).flatten(2))
    loss = functional.cross_entropy(logits[0, :-1], given["ids"][0, 1:])
    loss.backward()
    for mine, wanted in zip(got, [loss, *(p.grad for m in (embed, qkv, head) for p in m.parameters())], strict=True):
        torch.testing.assert_close(mine, wanted)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one process, [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("block", marked("ranks"))
def test_on_ranks(world: Any, block: Block) -> None:
    ranks, _, checked = block.mark.partition(":")[2].partition(",")
    assert checked.strip() in ("", "checked"), block.mark
    world(int(ranks))(execute, block.code, block.name, bool(checked), timeout=300)


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Callable[..., str]:
    def run(block: Block, *command: str) -> str:
        file = tmp_path / "block.py"
        file.write_text(block.code)
        done = subprocess.run(
            [*command, str(file)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("block", marked("torchrun"))
def test_under_torchrun(run: Callable[..., str], block: Block) -> None:
    run(block, "launch/torchrun.sh", "--nproc", "2")


@pytest.mark.parametrize("block", marked("script"))
def test_as_a_script(run: Callable[..., str], block: Block) -> None:
    run(block, sys.executable)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    gang = ToyGang()
    with serving(gang) as (url, _):
        yield url
    gang.close()


@pytest.mark.parametrize("block", marked("service"))
def test_beside_a_service(url: str, block: Block) -> None:
    assert URL in block.code
    names: dict[str, Any] = {"__name__": "block"}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(block.code.replace(URL, url), block.name, "exec"), names)
    assert said.getvalue().strip()
