"""Does training in fp8 attention lose anything? A small transformer learns Python's library, with and without it.

    python launch/bench/fp8_training.py --out docs/results        two CPU ranks, about 3 minutes

Every run sees the same text in the same order and starts from the same parameters; attention is `ring_attention` over
the ranks on bf16 q, k and v. Runs: bf16, and fp8 with either kind of gradients. Beside them runs bf16 from other
parameters: by how much curves differ that nobody would call different. Writes fp8_training.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import sysconfig
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ringfa3
from ringfa3 import Fp8, Mask, Plan
from ringfa3_launch import machine
from ringfa3_launch.bench.report import commit
from ringfa3_launch.local import local
from ringfa3_launch.rank import RankInfo

BASE, SEED = "bf16", "bf16, another seed"
RUNS: dict[str, Fp8 | None] = {
    BASE: None,
    "fp8, exact gradients": Fp8(rotate=True),
    "fp8, rounded gradients": Fp8(rotate=True, gradients="rounded"),
    SEED: None,
}
SMOOTH = 20  # steps that a curve is averaged over


@dataclass(frozen=True)
class Size:
    """Of the model, in `layers` blocks of `heads` heads, and of a step's batch of B sequences of S bytes."""

    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    B: int = 4
    S: int = 256
    steps: int = 200
    rate: float = 2e-3


class Block(nn.Module):
    """Causal attention over all ranks' positions, then a network on each; both see their input normalised."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.heads * size.head_dim
        self.heads = size.heads
        self.qkv, self.home = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, plan: Plan, fp8: Fp8 | None) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).bfloat16() for y in self.qkv(F.rms_norm(x, x.shape[-1:])).chunk(3, -1)
        )
        x = x + self.home(ringfa3.ring_attention(q, k, v, plan=plan, fp8=fp8).float().flatten(2))
        y: Tensor = x + self.network(F.rms_norm(x, x.shape[-1:]))
        return y


class Model(nn.Module):
    """Bytes in, logits of the next byte out; positions are learnt."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.heads * size.head_dim
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(size.S, width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.out = nn.Linear(width, 256)

    def forward(self, tokens: Tensor, plan: Plan, fp8: Fp8 | None) -> Tensor:
        x = self.bytes(tokens) + self.positions(plan.positions)
        for block in self.blocks:
            x = block(x, plan, fp8)
        y: Tensor = self.out(F.rms_norm(x, x.shape[-1:]))
        return y


@cache
def text() -> Tensor:
    """uint8: the sources of the standard library, in the order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def train(size: Size, fp8: Fp8 | None, *, seed: int = 0, world: int = 1) -> list[float]:
    """The loss of every step, in nats a byte over all ranks. All ranks must call.

    Args:
        seed: of the parameters; the text comes in one order always.
    """
    torch.manual_seed(seed)
    model, plan = Model(size), ringfa3.plan(Mask(), "zigzag", size.S)
    optimizer = torch.optim.AdamW(model.parameters(), size.rate)
    draws, data, losses = torch.Generator().manual_seed(0), text(), []
    for step in range(size.steps):
        starts = torch.randint(len(data) - size.S - 1, (size.B,), generator=draws).tolist()
        batch = torch.stack([data[i : i + size.S + 1] for i in starts]).long()
        logits = model(plan.shard(batch[:, :-1]), plan, fp8)
        # every rank's share of the mean over all positions: gradients and losses are summed
        loss = F.cross_entropy(logits.flatten(0, 1), plan.shard(batch[:, 1:]).flatten(), reduction="sum")
        loss = loss / (size.B * size.S)
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        if world > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            dist.all_reduce(total)
        for group in optimizer.param_groups:
            group["lr"] = size.rate * min(1.0, (step + 1) / 20)
        optimizer.step()
        losses.append(float(total))
    return losses


def work(info: RankInfo, size: Size) -> dict[str, list[float]]:
    """Every run, one after another, on this rank."""
    curves = {}
    for name, fp8 in RUNS.items():
        began = time.monotonic()
        curves[name] = train(size, fp8, seed=int(name == SEED), world=info.world)
        if info.rank == 0:
            print(f"{name}: loss {curves[name][-1]:.3f} after {size.steps} steps, {time.monotonic() - began:.0f} s")
    return curves


def main() -> int:
    """Train, print and write; returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--world", type=int, default=2, help="ranks (default 2)")
    options.add_argument("--steps", type=int, default=Size.steps)
    options.add_argument("--device", choices=("cpu",), default="cpu")
    options.add_argument("--out", type=Path, help="folder for fp8_training.json, .md and .png")
    args = options.parse_args()
    size = Size(steps=args.steps)
    curves = local(args.world, work, size, device=args.device)[0]
    command = shlex.join(["python", *sys.argv])
    found = document(curves, size, args.world, command)
    for row in found["rows"]:
        print(f"{row['case']}: {row['ours']:.4f}, {row['peer']} {row['theirs']:.4f}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "fp8_training.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(curves, args.out / "fp8_training.png", f"{len(text()) // 1000} kB of Python, {args.world} ranks")
        (args.out / "fp8_training.md").write_text(page(found))
    return 0


def document(curves: dict[str, list[float]], size: Size, world: int, command: str) -> dict[str, Any]:
    """What fp8_training.json holds; the curves are beside the rows."""
    base = averaged(curves[BASE])
    shape = f"causal D{size.head_dim} H{size.heads}:{size.heads} S{size.S} W{world}"
    rows = []
    for name in list(RUNS)[1:]:
        mine = averaged(curves[name])
        apart = max(abs(a - b) for a, b in zip(mine[SMOOTH:], base[SMOOTH:], strict=True))
        figures = (("nats a byte", mine[-1], base[-1]), ("largest difference, nats a byte", apart, 0.0))
        for metric, ours, theirs in figures:
            ratio = round(theirs / ours, 4) if theirs else None
            rows.append({
                "case": f"training {shape} {name.replace(', ', '-').replace(' ', '-')}", "metric": metric,
                "ours": round(ours, 5), "spread": None, "peer": BASE, "theirs": round(theirs, 5), "ratio": ratio,
            })  # fmt: skip
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": machine.device_name("cpu", world),
        "versions": machine.version_table(),
        "rows": rows,
        "losses": {name: [round(loss, 4) for loss in losses] for name, losses in curves.items()},
    }


def averaged(losses: list[float]) -> list[float]:
    """Every step's mean with the steps before it."""
    return [sum(part) / len(part) for part in (losses[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(losses)))]


def draw(curves: dict[str, list[float]], path: Path, title: str) -> None:
    """The curves, and below what lies between them and bf16's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(RUNS, ("#444444", "#1f5fbf", "#e07b00", "#bbbbbb"), strict=True))
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 2))
    base = averaged(curves[BASE])
    for name, losses in curves.items():
        mine = averaged(losses)
        style = {"color": colours[name], "label": name, "lw": 3.5 if name == BASE else 1.4}
        above.plot(mine, **style)
        if name != BASE:
            below.plot([a - b for a, b in zip(mine, base, strict=True)], **style)
    above.set(ylabel="nats a byte", title=f"Loss with and without fp8 attention: {title}")
    below.set(xlabel="step", ylabel="less that of bf16")
    below.axhline(0, color=colours[BASE], lw=0.8)
    above.legend()
    for panel in (above, below):
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def page(found: dict[str, Any]) -> str:
    """fp8_training.md."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    head = ("case", "metric", "with fp8, or the seed", found["rows"][0]["peer"])
    lines = [head, ["---"] * 4, *([r["case"], r["metric"], r["ours"], r["theirs"]] for r in found["rows"])]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return (
        f"# Training with fp8 attention\n\n{found['device']}, {found['date']}, commit {found['commit']}; {versions}."
        f"\n\n    {found['command']}\n\n{table}\n\n![curves](fp8_training.png)\n\n"
        f"Losses are means over {SMOOTH} steps. All runs see the same text in the same order; all but the last start "
        "from the same parameters.\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
