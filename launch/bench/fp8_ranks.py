"""Does fp8's error grow with the number of ranks, and what is a gradient worth? Figures against fp64.

    python launch/bench/fp8_ranks.py --out docs/results        CPU ranks, about a minute

Not shipped. Inputs are bf16, normal, and to one element in a thousand one of a normal distribution of deviation 10 is
added (FlashAttention-3's test, arXiv 2407.08608). Forward: RMSE of `ring_attention(fp8=...)` over 1 to 8 ranks, beside
that of one rank. Backward: the relative error of dq, dk and dv by `Fp8(gradients=...)`, beside what the fp8 forward's
own lse and out would give with unrounded scores; for normal inputs, for those with outliers, and for those with q
three times as large. Writes fp8_ranks.json and fp8_ranks.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ringfa3
from ringfa3 import Fp8, Mask, Plan
from ringfa3_kernels import Partial, attend, attend_backward, quantize, row_delta
from ringfa3_launch import machine
from ringfa3_launch.bench.attention import integers
from ringfa3_launch.bench.case import format_size
from ringfa3_launch.bench.report import commit
from ringfa3_launch.local import local
from ringfa3_launch.rank import RankInfo

SCALES = {"block": Fp8(), "block+hadamard": Fp8(rotate=True), "head": Fp8(block=0)}
GRADIENTS = {"exact": Fp8(), "rounded": Fp8(gradients="rounded")}
KINDS = {"normal": (False, 1), "outliers": (True, 1), "outliers,3q": (True, 3)}  # whether there are outliers, q times
LSE = "fp8 forward's lse"
DRAWS = 2


@dataclass(frozen=True)
class Setting:
    """One length, and masks of it."""

    seqlen: int
    Hq: int
    Hkv: int
    D: int

    @property
    def masks(self) -> dict[str, Mask]:
        """By the name that a case has in docs/results."""
        window = self.seqlen // 8
        return {"full": Mask(causal=False), "causal": Mask(), f"window{window}": Mask(window=(window, 0))}

    def case(self, direction: str, mask: str, world: int, more: str) -> str:
        """A case's name."""
        heads = f"H{self.Hq}:{self.Hkv}"
        return f"{direction} {mask} D{self.D} {heads} S{format_size(self.seqlen)} W{world} fp8 {more}"

    def draw(self, draw: int, kind: str = "outliers") -> tuple[Tensor, Tensor, Tensor]:
        """bf16 q, k and v of the whole sequence; the same in every process."""
        g = torch.Generator().manual_seed(draw)
        outliers, times = KINDS[kind]

        def one(heads: int) -> Tensor:
            shape = 1, self.seqlen, heads, self.D
            x, far = torch.randn(shape, generator=g), 10 * torch.randn(shape, generator=g)
            rare = torch.rand(shape, generator=g) < 1e-3
            return (x + far * rare if outliers else x).bfloat16()

        return times * one(self.Hq), one(self.Hkv), one(self.Hkv)


def main() -> int:
    """Measure, print and write; returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--worlds", metavar="LIST", default="1,2,3,4,8", help="the first is what others are held to")
    options.add_argument("--seqlen", type=int, default=2048)
    options.add_argument("--heads", metavar="Q:KV", default="4:2")
    options.add_argument("--head-dim", type=int, default=128)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--out", type=Path, help="folder for fp8_ranks.json and .md")
    args = options.parse_args()
    Hq, Hkv = integers("--heads", args.heads, ":")
    setting = Setting(args.seqlen, Hq, Hkv, args.head_dim)
    worlds = integers("--worlds", args.worlds)
    rows = over_ranks(setting, worlds, args.device) + gradients(setting)
    for row in rows:
        theirs = f"{row['peer']} {row['theirs']:.3e}"
        print(f"{row['case']}: {row['metric']} {row['ours']:.3e} ± {row['spread']:.1e}, {theirs}")
    if args.out is not None:
        found = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "device": machine.device_name(args.device, max(worlds)),
            "versions": machine.version_table(),
            "rows": rows,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "fp8_ranks.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "fp8_ranks.md").write_text(page(found))
    return 0


def over_ranks(setting: Setting, worlds: tuple[int, ...], device: str) -> list[dict[str, Any]]:
    """Forward rows, mask by mask and scales by scales, over the worlds."""
    truths = {
        (draw, name): oracle(setting, mask, draw).out.float()
        for draw in range(DRAWS)
        for name, mask in setting.masks.items()
    }
    errors: dict[tuple[str, str, int], list[float]] = {}
    for world in worlds:
        shards = local(world, attended, setting, device=device)
        for draw, name, scales in shards[0]:
            plan = Plan.build(setting.masks[name], "zigzag", setting.seqlen, world, 0)
            out = plan.join([shard[draw, name, scales] for shard in shards])
            error = (out.float() - truths[draw, name]).square().mean().sqrt()
            errors.setdefault((name, scales, world), []).append(float(error))
    return [
        row(setting.case("fwd", name, world, scales), "RMSE", found, f"W{worlds[0]}", errors[name, scales, worlds[0]])
        for (name, scales, world), found in sorted(errors.items())
    ]


def attended(info: RankInfo, setting: Setting) -> dict[tuple[int, str, str], Tensor]:
    """This rank's rows of out, for every draw, mask and kind of scales."""
    device = "cuda" if torch.cuda.is_available() and torch.distributed.get_backend() == "nccl" else "cpu"
    found = {}
    for draw in range(DRAWS):
        qkv = setting.draw(draw)
        for name, mask in setting.masks.items():
            plan = ringfa3.plan(mask, "zigzag", setting.seqlen, device=device)
            q, k, v = (plan.shard(x.to(device)) for x in qkv)
            for scales, fp8 in SCALES.items():
                found[draw, name, scales] = ringfa3.ring_attention(q, k, v, plan=plan, fp8=fp8).cpu()
    return found


def gradients(setting: Setting) -> list[dict[str, Any]]:
    """Backward rows, on one rank: relative errors, beside those of unrounded scores under the fp8 forward's lse."""
    rows = []
    for kind in KINDS:
        errors: dict[tuple[str, str], list[float]] = {}
        for draw in range(DRAWS):
            qkv = setting.draw(draw, kind)
            dout = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(draw)).bfloat16()
            truth = by_hand(*qkv, dout, oracle(setting, Mask(), draw, kind), wide=True)
            visible = Plan.build(Mask(), "contiguous", setting.seqlen, 1, 0).hops[0].visible
            rounded = attend(*quantize(*qkv), visible, out_dtype=torch.bfloat16)
            ways = {LSE: by_hand(*qkv, dout, rounded, wide=False)}
            for name, fp8 in GRADIENTS.items():
                leaves = [x.clone().requires_grad_() for x in qkv]
                ringfa3.ring_attention(*leaves, fp8=fp8).backward(dout)
                ways[name] = tuple(x.grad for x in leaves if x.grad is not None)
            for way, found in ways.items():
                for letter, x, exact in zip("qkv", found, truth, strict=True):
                    errors.setdefault((way, letter), []).append(float((x - exact).norm() / exact.norm()))
        rows += [
            row(
                setting.case("bwd", "causal", 1, f"{way} {kind}"), f"relative error of d{letter}",
                errors[way, letter], LSE, errors[LSE, letter],
            )
            for way in GRADIENTS for letter in "qkv"
        ]  # fmt: skip
    return rows


def oracle(setting: Setting, mask: Mask, draw: int, kind: str = "outliers") -> Partial:
    """out and lse in fp64, of the unrounded q, k and v."""
    visible = Plan.build(mask, "contiguous", setting.seqlen, 1, 0).hops[0].visible
    q, k, v = (x.double() for x in setting.draw(draw, kind))
    return attend(q, k, v, visible, impl="aten")


def by_hand(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, state: Partial, *, wide: bool) -> tuple[Tensor, ...]:
    """Causal attention's dq, dk and dv by this out and lse; in fp64, or in fp32 for inputs as they are."""
    if wide:
        q, k, v, dout = (x.double() for x in (q, k, v, dout))
    visible = Plan.build(Mask(), "contiguous", q.shape[1], 1, 0).hops[0].visible
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    delta = row_delta(dout, state.out)
    attend_backward(dout, q, k, v, state.lse, delta, visible, dq=dq, dk=dk, dv=dv, accumulate=False, impl="aten")
    return dq, dk, dv


def row(case: str, metric: str, ours: list[float], peer: str, theirs: list[float]) -> dict[str, Any]:
    """A row of docs/results, of medians over the draws."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    return {
        "case": case,
        "metric": metric,
        "ours": float(f"{mine:.4g}"),
        "spread": float(f"{(max(ours) - min(ours)) / 2:.2g}"),
        "peer": peer,
        "theirs": float(f"{other:.4g}"),
        "ratio": round(other / mine, 3),
    }


def page(found: dict[str, Any]) -> str:
    """fp8_ranks.md."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [("case", "metric", "", "±", "beside", "", "ratio"), ["---"] * 7]
    lines += [[r[n] for n in ("case", "metric", "ours", "spread", "peer", "theirs", "ratio")] for r in found["rows"]]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return (
        f"# fp8 over ranks, and its gradients\n\n{found['device']}, {found['date']}, commit {found['commit']}; "
        f"{versions}.\n\n    {found['command']}\n\n{table}\n\nMedians over {DRAWS} draws; ± is half their range. "
        "block: a scale for 128 rows of a head; head: one for all that a rank holds of it; hadamard: q and k rotated.\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
