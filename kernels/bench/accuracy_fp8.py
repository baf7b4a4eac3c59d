"""How far from fp64 is attention on fp8, by head_dim, mask and kind of scale? As FlashAttention-3's paper measures it.

PYTHONPATH=kernels python kernels/bench/accuracy_fp8.py [--lengths 8 16] [--dims 64 128 256]
    [--masks full causal window1K] [--heads 16] [--blocks 2] [--device cpu|cuda] [--out docs/results/fp8]

Entries are N(0, 1) + N(0, 100) * Bernoulli(0.001) in bf16 (arXiv 2407.08608, section 4.3). "ours" is one scale per 128
rows and a rotation of q and k; the peers are other ways to scale, and plain PyTorch attention in bf16. RMSE is over
`blocks` random blocks of 128 rows of each head; its spread is half the range of the heads' middle half. Few rows make
most of it (those that an outlier leads), so that single heads differ by factors.
On a GPU `attend` computes it; on the CPU hopper/fp8_twin.py does, the kernel's arithmetic with P rounded to e4m3.
With --out the rows join those that PATH.json has of other cases or metrics: not from the CPU into a GPU's file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

import rounds
import torch
from rounds import Row
from torch import Tensor

from ringfa3_kernels import Quantized, Visible, attend, quantize
from ringfa3_kernels.hopper import fp8_twin
from ringfa3_kernels.quantize_torch import in_keys_order
from ringfa3_kernels.quantized import BLOCK

OURS = "block scales, rotated"
Three = tuple[Quantized, Quantized, Quantized]


def draw(S: int, H: int, D: int, generator: torch.Generator) -> Tensor:
    """bf16 [1, S, H, D]: normal numbers, and in a thousandth of the places another of standard deviation 10 on top."""
    x = torch.randn(1, S, H, D, generator=generator)
    outliers = torch.rand(x.shape, generator=generator) < 1e-3
    return (x + 10 * outliers * torch.randn(x.shape, generator=generator)).bfloat16()


def per_tensor(x: Tensor) -> Quantized:
    """One scale for the whole tensor, amax / 448: the baseline."""
    scale = (x.abs().max().float() / 448).expand(1, x.shape[2], 1).contiguous()
    return Quantized((x.float() / scale[0, 0, 0]).to(torch.float8_e4m3fn), scale, 0, x.shape[1])


def kinds(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Three]]:
    """Ways to scale, ours first."""
    yield OURS, quantize(q, k, v, rotate=True, v_order="keys")
    values = per_tensor(v)
    values = replace(values, data=in_keys_order(values.data), order="keys")
    yield "tensor scales", (per_tensor(q), per_tensor(k), values)
    yield "head scales", quantize(q, k, v, block=0, v_order="keys")
    yield "block scales", quantize(q, k, v, v_order="keys")
    yield "head scales, rotated", quantize(q, k, v, block=0, rotate=True, v_order="keys")


def sight(mask: str, S: int, start: int, device: str) -> Visible:
    """What the 128 rows from `start` on see."""
    rows = torch.arange(start, min(start + BLOCK, S), dtype=torch.int32, device=device)
    if mask == "full":
        return Visible.full(len(rows), S, device)
    lo = torch.zeros_like(rows) if mask == "causal" else (rows + 1 - int(mask[6:-1]) * 1024).clamp(min=0)
    return Visible(lo, rows + 1)


def exact(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dtype: torch.dtype) -> Tensor:
    """Attention by its definition, softmax in fp32 or wider, for q [1, rows, 1, D] and k, v [1, S, 1, D]."""
    q, k, v = (x[0, :, 0].to(dtype) for x in (q, k, v))
    s = (q @ k.T).to(torch.promote_types(dtype, torch.float32)) * q.shape[1] ** -0.5
    p = s.masked_fill(~visible.mask(len(k)), -torch.inf).softmax(-1)
    return (p.to(dtype) @ v).double()


def on_fp8(q: Quantized, k: Quantized, v: Quantized, visible: Visible) -> Tensor:
    """fp64 [rows, D] of what the kernel, or its twin, makes of one head."""
    if q.device.type == "cuda":
        return attend(q, k, v, visible).out[0, :, 0].double()
    return fp8_twin.attend(q, k, v, visible, scale=q.shape[3] ** -0.5).out[0, :, 0].double()


def one_head(x: Quantized, head: int) -> Quantized:
    data = x.data[:, :, head : head + 1] if x.order == "rows" else x.data[:, head : head + 1]
    return replace(x, data=data, scale=x.scale[:, head : head + 1])


def measured(D: int, mask: str, S: int, *, heads: int, blocks: int, device: str) -> list[Row]:
    """Rows of one case: ours against every other kind."""
    generator = torch.Generator().manual_seed(S + D)
    chosen = random.Random(S + D).sample(range(-(-S // BLOCK)), min(blocks, -(-S // BLOCK)))
    starts = [BLOCK * b for b in sorted(chosen)]
    q, k, v = (draw(S, heads, D, generator).to(device) for _ in "qkv")
    sights = [sight(mask, S, start, device) for start in starts]
    errors: dict[str, list[float]] = {}  # kind -> mean squared error of each head
    pieces = [slice(start, start + BLOCK) for start in starts]

    def by_definition(h: int, i: int, dtype: torch.dtype) -> Tensor:
        head = slice(h, h + 1)
        return exact(q[:, pieces[i], head], k[:, :, head], v[:, :, head], sights[i], dtype)

    truths = {(h, i): by_definition(h, i, torch.float64) for h in range(heads) for i in range(len(starts))}

    def judge(kind: str, out: Callable[[int, int], Tensor]) -> None:
        errors[kind] = [
            sum(float((out(h, i) - truths[h, i]).square().mean()) for i in range(len(starts))) / len(starts)
            for h in range(heads)
        ]

    for kind, tensors in kinds(q, k, v):

        def computed(h: int, i: int, tensors: Three = tensors) -> Tensor:
            rows = tensors[0].rows(starts[i], min(starts[i] + BLOCK, S))
            return on_fp8(*(one_head(x, h) for x in (rows, *tensors[1:])), sights[i])

        judge(kind, computed)

    judge("bf16", lambda h, i: by_definition(h, i, torch.bfloat16))
    root = {kind: (sum(e) / len(e)) ** 0.5 for kind, e in errors.items()}
    case = f"fwd {mask} D{D} H{heads}:{heads} S{S // 1024}K W1 e4m3"
    ours, spread = root[OURS], half_range(errors[OURS])
    return [
        Row(case, "RMSE", round(ours, 6), round(spread, 6), kind, round(theirs, 6), round(theirs / ours, 3))
        for kind, theirs in root.items()
        if kind != OURS
    ]


def half_range(squares: list[float]) -> float:
    """Half the range of the middle half of the heads' errors."""
    if len(squares) < 2:
        return 0.0
    low, _, high = quantiles([x**0.5 for x in squares], n=4)
    return (high - low) / 2


def save(path: Path, rows: list[Row], command: str, device: str) -> None:
    """Write path.json and path.md: these rows after those of other cases or metrics that are there already."""
    found = path.with_suffix(".json")
    kept = [Row(**row) for row in json.loads(found.read_text())["rows"]] if found.exists() else []
    options = {"command": command, "title": "Attention on fp8"}
    if device == "cpu":
        options |= {"device": "CPU, the kernel's arithmetic emulated (hopper/fp8_twin.py)"}
        options |= {"method": "Against fp64, with outliers as in FlashAttention-3's paper; ratio > 1: ours is closer."}
    anew = {(row.case, row.metric) for row in rows}
    rounds.save(path, [*(row for row in kept if (row.case, row.metric) not in anew), *rows], **options)


def line(r: Row) -> str:
    return f"{r.case:40} {r.ours:.5f} ± {r.spread:.5f}  {r.peer:22} {r.theirs:.5f}  ratio {r.ratio:.2f}"


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8], help="in units of 1024")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--masks", nargs="+", default=["full", "causal", "window1K"])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=2, help="of 128 rows that each head is judged by")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md")
    options = parser.parse_args()
    rows: list[Row] = []
    for S in options.lengths:
        for D in options.dims:
            for mask in options.masks:
                found = measured(D, mask, S * 1024, heads=options.heads, blocks=options.blocks, device=options.device)
                print(*map(line, found), sep="\n", flush=True)
                rows += found
                if options.out:
                    save(
                        options.out,
                        rows,
                        " ".join(["python", "kernels/bench/accuracy_fp8.py", *sys.argv[1:]]),
                        options.device,
                    )


if __name__ == "__main__":
    main()
