"""Tunes the portable kernels on this GPU: checks every candidate tile config, times it against cuDNN, prints the best.

    PYTHONPATH=kernels python kernels/bench/tune_portable.py --json docs/results/portable_tuning.json

(--dims 128 --lengths 16384 --rounds 4: one shape, within a minute on 16 cores.) First every candidate is compiled (in
parallel, into Triton's cache) and held to the error rule: at most twice plain PyTorch's error against fp64. Then the
candidates of a case and cuDNN take turns, round by round, in this process. The winners go into
ringfa3_kernels/portable/configs.py by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rounds import interleaved
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringfa3_kernels import Visible, reference, row_delta
from ringfa3_kernels.portable.configs import TileConfig, family, pick
from ringfa3_kernels.portable.launch import run_backward, run_forward

TOKENS = 32768  # batch x length of every timed case
HEADS = {64: 32, 128: 16, 256: 8}
PRODUCTS = {"forward": 2, "keys": 4, "queries": 3}  # matrix products that a kernel does per score tile

# (block_m, block_n, num_warps, num_stages[, 0: no TMA]) worth trying on sm_90
CANDIDATES: dict[tuple[str, int], list[tuple[int, ...]]] = {
    ("forward", 64): [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3),
                      (128, 64, 8, 3), (128, 64, 8, 3, 0)],
    ("forward", 128): [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2),
                       (64, 64, 4, 3), (128, 64, 8, 4), (128, 128, 8, 2, 0)],
    ("forward", 256): [(128, 64, 8, 2), (128, 64, 8, 2, 0), (64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 3)],
    ("keys", 64): [(64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 3)],
    ("keys", 128): [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2),
                    (64, 128, 8, 2, 0)],
    ("keys", 256): [(64, 64, 8, 2), (32, 64, 8, 2)],
    ("queries", 64): [(128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3),
                      (128, 64, 4, 2)],
    ("queries", 128): [(128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 3),
                       (128, 64, 8, 3, 0), (128, 128, 8, 2, 0)],
    ("queries", 256): [(64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One timed problem: self-attention of `length` tokens in batches of TOKENS."""

    head_dim: int
    length: int
    causal: bool

    def inputs(self, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        """q, k, v, dout [B, S, H, D], random normal."""
        shape = (TOKENS // self.length, self.length, HEADS[self.head_dim], self.head_dim)
        return [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4)]

    def visible(self) -> Visible:
        make = Visible.causal if self.causal else Visible.full
        return make(self.length, self.length, "cuda")

    def flops(self, backward: bool) -> float:
        """4 S^2 H D, half of it if causal, 2.5 times it backward."""
        pairs = self.length * TOKENS * HEADS[self.head_dim]
        return 4 * pairs * self.head_dim * (0.5 if self.causal else 1) * (2.5 if backward else 1)

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = HEADS[self.head_dim]
        return f"{mask} D{self.head_dim} H{heads}:{heads} S{self.length // 1024}K"


def candidates(kernel: str, head_dim: int) -> list[TileConfig]:
    """Configs to try: on sm_90 those above, elsewhere variations on the table's."""
    capability = torch.cuda.get_device_capability()
    if family(capability) == "sm90":
        return [TileConfig(m, n, w, s, tma=not rest) for m, n, w, s, *rest in CANDIDATES[kernel, head_dim]]
    best = pick(kernel, head_dim, torch.bfloat16, capability)
    sides = {
        (best.block_m, best.block_n),
        (max(32, best.block_m // 2), best.block_n),
        (best.block_m, max(32, best.block_n // 2)),
    }
    return [TileConfig(m, n, w, s) for m, n in sorted(sides) for w in (4, 8) for s in (2, 3)]


def name(config: TileConfig) -> str:
    """A config as the printed table shows it."""
    tma = "tma" if config.tma else "ptr"
    return f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages} {tma}"


def check(job: tuple[str, int, TileConfig]) -> str | None:
    """Compile one candidate and hold it to the error rule, causal and full; None, or what is wrong with it."""
    kernel, head_dim, config = job
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 700, 2, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    try:
        for make in (Visible.causal, Visible.full):
            visible = make(700, 700, "cuda")
            errors = partial(_errors, (q, k, v, dout), visible, head_dim**-0.5)
            worst = max(ours / (2 * plain + 1e-6) for ours, plain in errors(kernel, config))
            if not worst <= 1:
                return f"error {worst:.2f} of what is allowed"
    except Exception as error:  # a candidate that does not fit is reported, not fatal: the others go on
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


def _errors(
    inputs: tuple[torch.Tensor, ...], visible: Visible, scale: float, kernel: str, config: TileConfig
) -> list[tuple[float, float]]:
    """(ours, plain PyTorch's) largest error against fp64, for each output of a kernel."""
    q, k, v, dout = inputs
    exact_q, exact_k, exact_v, exact_dout = (x.double() for x in inputs)
    options: dict[str, Any] = {"scale": scale, "softcap": 0.0}
    start = options | {"into": None}
    exact = reference.attend(exact_q, exact_k, exact_v, visible, out_dtype=torch.float64, **start)
    if kernel == "forward":
        plain = reference.attend(q, k, v, visible, out_dtype=q.dtype, **start)
        ours = run_forward(q, k, v, visible, out_dtype=q.dtype, config=config, **start)
        return [
            (_far(ours.out, exact.out), _far(plain.out, exact.out)),
            (_far(ours.lse, exact.lse), _far(plain.lse, exact.lse)),
        ]
    delta = row_delta(exact_dout, exact.out)
    stats = exact.lse.float(), delta.float()
    wanted = [torch.zeros_like(x) for x in (exact_q, exact_k, exact_v)]
    plains, got = ([torch.zeros_like(x) for x in (q, k, v)] for _ in range(2))
    options["accumulate"] = False
    grads = ("dq", "dk", "dv")
    reference.attend_backward(
        exact_dout, exact_q, exact_k, exact_v, exact.lse, delta, visible, deterministic=True, **options,
        **dict(zip(grads, wanted, strict=True)),
    )  # fmt: skip
    reference.attend_backward(
        dout, q, k, v, *stats, visible, deterministic=True, **options, **dict(zip(grads, plains, strict=True))
    )
    run_backward(dout, q, k, v, *stats, visible, **options, **_only(kernel, config, got))
    chosen = (0,) if kernel == "queries" else (1, 2)
    return [(_far(got[i], wanted[i]), _far(plains[i], wanted[i])) for i in chosen]


def _only(kernel: str, config: TileConfig, grads: list[torch.Tensor]) -> dict[str, Any]:
    """Arguments of run_backward that launch one of its kernels, with one config."""
    dq, dk, dv = grads
    if kernel == "queries":
        return {"dq": dq, "dk": None, "dv": None, "queries": config}
    return {"dq": None, "dk": dk, "dv": dv, "keys": config}


def _far(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x.double() - exact).abs().max().item()


def contenders(
    case: Case, alive: dict[tuple[str, int], list[TileConfig]]
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(kernel or "cudnn ...", config name, what to run) for everything timed on a case."""
    q, k, v, dout = case.inputs()
    visible, scale = case.visible(), case.head_dim**-0.5
    options: dict[str, Any] = {"scale": scale, "softcap": 0.0}
    result = run_forward(q, k, v, visible, into=None, out_dtype=q.dtype, **options)
    delta = row_delta(dout, result.out)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    forward = partial(run_forward, q, k, v, visible, into=None, out_dtype=q.dtype, **options)
    backward = partial(run_backward, dout, q, k, v, result.lse, delta, visible, accumulate=False, **options)
    yield "cudnn forward", "", partial(_cudnn, q, k, v, case.causal)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = _cudnn(*leaves, case.causal)
    yield "cudnn backward", "", partial(torch.autograd.grad, out, leaves, dout.transpose(1, 2), retain_graph=True)
    yield "delta", "row_delta", partial(row_delta, dout, result.out)
    for config in alive["forward", case.head_dim]:
        yield "forward", name(config), partial(forward, config=config)
    for kernel in ("keys", "queries"):
        for config in alive[kernel, case.head_dim]:
            yield kernel, name(config), partial(backward, **_only(kernel, config, grads))


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal
        )


def time_case(case: Case, alive: dict[tuple[str, int], list[TileConfig]], rounds: int) -> list[dict[str, Any]]:
    """Time everything on one case, print it, and return a row for each contender and one for the best backward."""
    calls = {(kind, label): run for kind, label, run in contenders(case, alive)}
    times = interleaved({" ".join(key): run for key, run in calls.items()}, rounds=rounds, ms=1)
    median = {key: times[" ".join(key)].ms for key in calls}
    rows = []
    for (kind, label), ms in median.items():
        row: dict[str, Any] = {
            "case": str(case),
            "kernel": kind,
            "config": label,
            "ms": ms,
            "spread_ms": times[f"{kind} {label}"].spread,
        }
        if kind in PRODUCTS:  # the rate of the matrix products that the kernel really does
            row["TFLOP/s of its products"] = case.flops(False) / 2 * PRODUCTS[kind] / ms / 1e9
        if kind == "forward":
            row["ratio to cudnn"] = median["cudnn forward", ""] / ms
        rows.append(row)
    best = {kind: min((ms, label) for (k, label), ms in median.items() if k == kind) for kind in PRODUCTS}
    total = best["keys"][0] + best["queries"][0] + median["delta", "row_delta"]
    for direction, ours, peer in (
        ("forward", best["forward"][0], median["cudnn forward", ""]),
        ("backward", total, median["cudnn backward", ""]),
    ):
        label = (
            best["forward"][1]
            if direction == "forward"
            else f"keys {best['keys'][1]}, queries {best['queries'][1]}, delta"
        )
        rate = case.flops(direction == "backward") / 1e9
        rows.append({"case": str(case), "kernel": f"best {direction}", "config": label, "ms": ours,
                     "TFLOP/s": rate / ours, "cudnn TFLOP/s": rate / peer, "ratio to cudnn": peer / ours})  # fmt: skip
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="write all rows to this file")
    arguments.add_argument("--dims", type=int, nargs="+", default=[128, 64, 256], choices=sorted(HEADS))
    arguments.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    asked = arguments.parse_args()
    begin = time.time()
    device = torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}, triton {triton.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}, bfloat16"
    )
    jobs = [(kernel, D, config) for D in asked.dims for kernel in PRODUCTS for config in candidates(kernel, D)]
    with ProcessPoolExecutor(asked.workers, mp_context=get_context("spawn")) as pool:
        verdicts = list(pool.map(check, jobs))
    alive: dict[tuple[str, int], list[TileConfig]] = {}
    for (kernel, D, config), wrong in zip(jobs, verdicts, strict=True):
        print(f"{kernel} D{D} {name(config)}: {wrong or 'right'}")
        if wrong is None:
            alive.setdefault((kernel, D), []).append(config)
    print(f"compiled and checked in {time.time() - begin:.0f} s", flush=True)
    cases = [Case(D, length, causal) for D in asked.dims for length in asked.lengths for causal in (False, True)]
    rows = [row for case in cases for row in time_case(case, alive, asked.rounds)]
    if asked.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
        refused = {f"{k} D{D} {name(c)}": w for (k, D, c), w in zip(jobs, verdicts, strict=True) if w}
        tried = sorted({name(c): asdict(c) for _, _, c in jobs}.items())
        report = {"device": device, "versions": versions, "rows": rows, "refused": refused, "configs": dict(tried)}
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"done in {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
