"""The backward on one GPU: is it right, and how fast beside FlashAttention-3, cuDNN and portable, all passes included?

PYTHONPATH=kernels python kernels/bench/bench_backward.py [check] [time] [sweep] [--only REGEX] [--quick] [--list]
    [--rounds N] [--out PATH]

`check` compares every combination of flags with fp64 on fresh random inputs, prints PASS or FAIL, exits 1 if any is
wrong. `time` prints ratios and, with --out docs/results/attend_backward, writes JSON, Markdown and a plot: row_delta
and attend_backward into 16-bit gradients against the peers' autograd; beside it what fp32 accumulation, determinism
and the kernel alone take. `sweep` tries tiles other than the table's: each is checked, then timed against
FlashAttention-3 and cuDNN. All compile in parallel first. None named: check and time.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_attend
import cases
import check_backward
import rounds
import torch
from cases import Case
from check_backward import BackwardCheck
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ringfa3_kernels import hopper, portable, row_delta
from ringfa3_kernels.hopper import backward_launch, configs
from ringfa3_kernels.hopper.configs import BackwardConfig
from ringfa3_kernels.hopper.launch import MASKS
from ringfa3_kernels.types import Visible

Calls = dict[str, Callable[[], object]]
K = 1024
TITLE = "Backward attention on one GPU, all passes"
# what is worth trying beside the table, by padded head_dim
CHANGES: dict[int, list[dict[str, Any]]] = {
    64: [{"WRITER": True}, {"WRITER": False}],
    128: [{"WRITER": True}, {"WRITER": False}],
    256: [],
}


def table(*, quick: bool) -> list[Case]:
    """The cases that docs/results/attend_backward shows; `quick` keeps the shape that tells most of each."""
    plan: list[tuple[str, int, int, int, tuple[int, ...]]] = []
    for mask in ("full", "causal"):
        plan += [
            (mask, 128, 16, 16, (8 * K,) if quick else (2 * K, 8 * K, 16 * K)),
            (mask, 128, 32, 8, (8 * K,) if quick else (2 * K, 8 * K, 16 * K)),
            (mask, 64, 32, 32, (8 * K,) if quick else (2 * K, 16 * K)),
            (mask, 256, 8, 8, (8 * K,) if quick else (2 * K, 16 * K)),
        ]
    plan += [("intervals", 128, 16, 16, (8 * K,) if quick else (2 * K, 8 * K, 16 * K))]
    plan += [(mask, 128, 16, 16, (64 * K,)) for mask in ("window4K", "documents")]
    return [Case(m, D, Hq, Hkv, S, max(1, cases.TOKENS // S)) for m, D, Hq, Hkv, lengths in plan for S in lengths]


def name(case: Case) -> str:
    """Tokens in the order that all results share."""
    return case.name.replace("fwd ", "bwd ", 1)


@dataclass(frozen=True)
class Call:
    """A case's tensors, with what its forward gave."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    visible: Visible

    @classmethod
    def draw(cls, case: Case) -> Call:
        """Random normal inputs, out and lse."""
        q, k, v = case.tensors("cuda")
        visible = case.visible("cuda")
        scale = case.D**-0.5
        partial = hopper.attend(q, k, v, visible, scale=scale, softcap=0.0, into=None, out_dtype=q.dtype)
        return cls(case, q, k, v, torch.randn_like(q), partial.out, partial.lse, visible)

    def gradients(self, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (self.q, self.k, self.v)]

    def ours(
        self,
        tile: BackwardConfig | None = None,
        *,
        add: bool = False,
        deterministic: bool = False,
        module: Any = backward_launch,
    ) -> Callable[[], object]:
        """row_delta and attend_backward, in the inputs' dtype or (add) added to fp32."""
        dq, dk, dv = self.gradients(torch.float32 if add else self.q.dtype)
        extra = {} if tile is None else {"tile": tile}

        def run() -> None:
            module.attend_backward(
                self.dout, self.q, self.k, self.v, self.lse, row_delta(self.dout, self.out), self.visible,
                dq=dq, dk=dk, dv=dv, accumulate=add, scale=self.case.D**-0.5, softcap=0.0,
                deterministic=deterministic, **extra,
            )  # fmt: skip

        return run

    def kernel(self, tile: BackwardConfig | None = None) -> Callable[[], object]:
        """The main kernel alone."""
        dq, _, _ = self.gradients(torch.float32)
        _, dk, dv = self.gradients(self.q.dtype)
        delta = row_delta(self.dout, self.out)
        one = backward_launch.prepare(
            self.dout, self.q, self.k, self.v, self.lse, delta, self.visible, dq=dq, dk=dk, dv=dv, accumulate=False,
            scale=self.case.D**-0.5, softcap=0.0, tile=tile,
        )  # fmt: skip
        return one.run

    def peers(self) -> Calls:
        """Who else computes this, all passes included: only full and causal have peers."""
        mask = self.case.mask
        if mask not in ("full", "causal", "intervals"):
            return {}
        causal = mask != "full"
        q, k, v = (x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v))
        calls: Calls = {}

        def backward(out: Tensor, dout: Tensor) -> Callable[[], object]:
            return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

        if importlib.util.find_spec("flash_attn_interface") is not None:
            calls["fa3"] = self._fa3(causal=causal)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            try:
                out = scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]
                )
            except RuntimeError as error:
                print(f"  cudnn does not serve {name(self.case)}: {str(error).splitlines()[0]}", flush=True)
            else:
                calls["cudnn"] = backward(out, self.dout.transpose(1, 2))
        calls["portable"] = self.ours(module=portable)
        return calls

    def _fa3(self, *, causal: bool) -> Callable[[], object]:
        """FlashAttention-3's backward (delta, zeros, products, casts), called as its autograd function does."""
        import flash_attn_interface

        dq, dk, dv = self.gradients(self.q.dtype)
        return lambda: flash_attn_interface._flash_attn_backward(
            self.dout, self.q, self.k, self.v, self.out, self.lse, dq=dq, dk=dk, dv=dv,
            softmax_scale=self.case.D**-0.5, causal=causal,
        )  # fmt: skip

    def passes(self) -> Calls:
        """What is not the main kernel: delta, zeros for dq, its cast."""
        dq, _, _ = self.gradients(torch.float32)
        narrow = torch.empty_like(self.q)
        return {
            "delta": lambda: row_delta(self.dout, self.out),
            "zeros": dq.zero_,
            "cast": lambda: narrow.copy_(dq),
        }


def timed(case: Case, *, turns: int) -> list[rounds.Row]:
    """Rows of one case: ours against every peer that can serve it, and against variants of our own call."""
    call = Call.draw(case)
    calls: Calls = {"ours": call.ours(), **_served(call.peers(), case)}
    calls["ours, added to fp32"] = call.ours(add=True)
    calls["ours, deterministic"] = call.ours(deterministic=True)
    calls["ours, main kernel"] = call.kernel()
    pairs = rounds.duels(calls, ours="ours", chief="fa3", rounds=turns, ms=20.0).values()
    return [row for pair in pairs for row in rounds.compare(name(case), pair, 2.5 * case.flops(), ours="ours")]


def _served(peers: Calls, case: Case) -> Calls:
    """Those that run."""
    found: Calls = {}
    for peer, run in peers.items():
        try:
            run()
        except RuntimeError as error:
            print(f"  {peer} does not serve {name(case)}: {str(error).splitlines()[0]}", flush=True)
            continue
        found[peer] = run
    return found


def tiles(case: Case) -> dict[str, BackwardConfig]:
    """The table's tile and the alternatives, by what differs."""
    D = configs.padded_head_dim(case.D)
    base = configs.BACKWARD_TABLE[D, MASKS[case.visible("cpu").kind]]
    labels = {" ".join(f"{k}={v}" for k, v in change.items()): replace(base, **change) for change in CHANGES[D]}
    return {"table": base, **{label: tile for label, tile in labels.items() if tile != base}}


def sweep(chosen: list[Case], *, turns: int) -> None:
    """Check each alternative on a small call, then time it: a table of ratios to the peers, a line a tile."""
    for case in chosen:
        right: dict[str, BackwardConfig] = {}
        call = Call.draw(case)
        for label, tile in tiles(case).items():
            print(f"checking {name(case)} {label}", flush=True)  # the last line, should it hang
            small = BackwardCheck(_check_mask(case), case.D, Sq=700, Sk=700)
            try:
                ratios, complaint = check_backward.measure(small, tile)
            except Exception as error:  # a tile that cannot be compiled or launched leaves the others
                ratios, complaint = "", f"{type(error).__name__}: {str(error)[:200]}"
            if complaint:
                print(f"FAIL {name(case)} {label} {ratios} {complaint}", flush=True)
            else:
                right[label] = tile
        peers = _served({x: run for x, run in call.peers().items() if x != "portable"}, case)
        calls: Calls = {f"all {label}": call.ours(tile) for label, tile in right.items()}
        calls |= {f"main {label}": call.kernel(tile) for label, tile in right.items()}
        times = rounds.interleaved({**calls, **peers, **call.passes()}, rounds=turns, ms=30.0)
        _print_table(case, list(right), list(peers), times)
        del call, calls, peers
        torch.cuda.empty_cache()


def _print_table(case: Case, labels: list[str], peers: list[str], times: dict[str, rounds.Time]) -> None:
    """A line a tile: TFLOP/s of all passes and of the main kernel, and both as ratios to each peer."""
    work = 2.5 * case.flops() / 1e9
    passes = " ".join(f"{x} {1e3 * times[x].ms:.0f}" for x in ("delta", "zeros", "cast"))
    rates = " ".join(f"{x} {work / times[x].ms:.0f}" for x in peers)
    print(f"\n{name(case)}: TFLOP/s {rates}; us {passes}; columns: all passes [main kernel]", flush=True)
    for label in labels:
        whole, main = times[f"all {label}"], times[f"main {label}"]
        ratios = "  ".join(f"{x} {times[x].ms / whole.ms:.3f} [{times[x].ms / main.ms:.3f}]" for x in peers)
        noise = 100 * whole.spread / whole.ms
        print(f"  {label:44} {work / whole.ms:6.0f} [{work / main.ms:4.0f}] +-{noise:.1f}%  {ratios}", flush=True)


def _check_mask(case: Case) -> str:
    return {"intervals": "documents", "window4K": "window"}.get(case.mask, case.mask)


def precompile(chosen: list[Case], *, alternatives: bool) -> None:
    """Compile what the cases need into Triton's cache on disk, in parallel processes."""
    jobs: dict[tuple[Any, ...], tuple[BackwardCheck, BackwardConfig | None]] = {}
    for case in chosen:
        found: list[BackwardConfig | None] = [*tiles(case).values()] if alternatives else [None]
        for tile in found:
            for size in (768, 700) if alternatives else (768,):
                for kind in ({}, {"wide": True, "add": True}, {"deterministic": True}):
                    if kind and alternatives:
                        continue
                    check = BackwardCheck(_check_mask(case), case.D, Sq=size, Sk=size, **kind)  # type: ignore[arg-type]
                    jobs[check, tile] = (check, tile)
    bench_attend._in_processes(check_backward.compiled, list(jobs.values()))


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="check, time, sweep; check and time if none is named")
    parser.add_argument("--only", default="", help="regular expression on case names")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--rounds", type=int, help="turns of each pair that are timed (6; sweep 7; with --quick 4)")
    parser.add_argument("--list", action="store_true", help="print the cases and their tiles, run nothing (no GPU)")
    parser.add_argument("--out", type=Path, help="write PATH.json, PATH.md and PATH.png")
    options = parser.parse_args()
    what = options.what or ["check", "time"]
    if not {"check", "time", "sweep"}.issuperset(what):
        parser.error(f"wanted check, time or sweep, got {' '.join(what)}")
    chosen = [c for c in table(quick=options.quick) if re.search(options.only, name(c))]
    checks = [c for c in check_backward.table(quick=options.quick) if re.search(options.only, c.title)]
    if options.list:
        for case in chosen:
            print(name(case), *tiles(case), sep="\n    ")
        print(*(c.title for c in checks), sep="\n")
        return
    right = True
    print(torch.cuda.get_device_name(), rounds.versions(), flush=True)
    if "check" in what:
        bench_attend._in_processes(check_backward.compiled, [(c, None) for c in checks])
        right = check_backward.run(checks)
    if "sweep" in what:
        precompile(chosen, alternatives=True)
        sweep(chosen, turns=options.rounds or (4 if options.quick else 7))
    if "time" in what:
        precompile(chosen, alternatives=False)
        rows: list[rounds.Row] = []
        for case in chosen:
            rows += timed(case, turns=options.rounds or (4 if options.quick else 6))
            print(*(bench_attend._line(r) for r in rows if r.case == name(case)), sep="\n", flush=True)
            torch.cuda.empty_cache()
            if options.out:  # after every case: a run may be cut short
                command = " ".join(["python", "kernels/bench/bench_backward.py", *sys.argv[1:]])
                rounds.save(options.out, rows, command=command, title=TITLE)
        if options.out:
            bench_attend.plot(options.out, rows)
    if not right:
        raise SystemExit("wrong results: see FAIL above")


if __name__ == "__main__":
    main()
