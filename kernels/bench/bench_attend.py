"""The forward on one GPU: is it right, and how fast beside cuDNN, FlashAttention-2 and FlashAttention-3?

PYTHONPATH=kernels python kernels/bench/bench_attend.py [check] [time] [--only REGEX] [--quick] [--list] [--out PATH]

`check` compares every combination of flags with fp64 on fresh random inputs, prints a table, exits 1 if any is wrong.
`time` prints ratios and, with --out docs/results/attend_forward, writes JSON, Markdown and a plot; FlashAttention-3
takes part where `flash_attn_interface` can be imported. Both compile in parallel first. Neither named: both.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import check_attend
import rounds
import torch
from cases import Case
from plot_attend import plot
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ringfa3_kernels.hopper import configs, launch, schedule
from ringfa3_kernels.types import Partial

Calls = dict[str, Callable[[], object]]


def prepared(case: Case, tile: configs.Config | None = None, *, device: str = "cuda") -> launch.Launch:
    """Our launch for a case, with its own tensors and counter."""
    q, k, v = case.tensors(device)
    return launched(case, q, k, v, tile)


def launched(
    case: Case, q: Tensor, k: Tensor, v: Tensor, tile: configs.Config | None = None, *, result: Partial | None = None
) -> launch.Launch:
    """Our launch on given tensors: out in q's dtype (`result`'s), as the peers', or a fp32 state continued in place."""
    into = None
    if case.state:
        lse = torch.zeros(case.B, case.Hq, case.S, dtype=torch.float32, device=q.device)
        into = Partial(torch.zeros(q.shape, dtype=torch.float32, device=q.device), lse)
    result = result or into or Partial(torch.empty_like(q), torch.empty(case.B, case.Hq, case.S, device=q.device))
    counter = torch.zeros(2, dtype=torch.int32, device=q.device)
    sms = schedule.multiprocessors(q.device) if q.is_cuda else 132
    visible = case.visible(q.device.type)
    return launch.prepare(
        q, k, v, visible, result, into, scale=case.D**-0.5, softcap=0.0, counter=counter, sms=sms, tile=tile
    )


def peers(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Calls:
    """Who else computes this: only full and causal have peers."""
    causal = mask != "full"
    if mask not in ("full", "causal", "intervals"):
        return {}
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def sdpa(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])

    calls: Calls = {
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "fa2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    }
    if importlib.util.find_spec("flash_attn_interface") is not None:
        import flash_attn_interface

        calls = {"fa3": lambda: flash_attn_interface.flash_attn_func(q, k, v, causal=causal), **calls}
    return calls


def baselines(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, tuple[Callable[[], object], float]]:
    """What a case of our own is held against: name -> (callable, its operations)."""
    if case.state:
        plain = replace(case, state=False)
        return {"ours, plain": (launched(plain, q, k, v).run, plain.flops())}
    if case.mask.startswith("window"):
        plain = replace(case, mask="causal")
        return {"ours, causal": (launched(plain, q, k, v).run, plain.flops())}
    if case.mask == "documents":
        mean = cases.mean_document(case.S)
        plain = replace(case, mask="causal", S=mean, B=case.S // mean)
        return {f"ours, causal at the mean length {mean}": (prepared(plain).run, plain.flops())}
    return {}


def timed(case: Case, *, turns: int) -> list[rounds.Row]:
    """Rows of one case: ours against every peer that can serve it."""
    q, k, v = case.tensors("cuda")
    calls: Calls = {"ours": launched(case, q, k, v).run}
    work = {"ours": case.flops()}
    for name, call in peers(q, k, v, case.mask).items():
        try:
            call()
        except RuntimeError as error:
            print(f"  {name} does not serve {case.name}: {str(error).splitlines()[0]}", flush=True)
            continue
        calls[name], work[name] = call, case.flops()
    for name, (call, flops) in baselines(case, q, k, v).items():
        calls[name], work[name] = call, flops
    rows = []
    for pair in rounds.duels(calls, ours="ours", chief="fa3", rounds=turns, ms=20.0).values():
        # rates compare where the work differs (windows, documents): scale every time to our operations
        scaled = {name: rounds.Time(t.ms * work["ours"] / work[name], t.spread) for name, t in pair.items()}
        rows += rounds.compare(case.name, scaled, work["ours"], ours="ours")
    return rows


def precompile(jobs: Sequence[tuple[Case, configs.Config | None]]) -> None:
    """Compile what the cases need, in parallel processes, into Triton's cache on disk (4 to 10 s a kernel)."""
    seen: dict[tuple[Any, ...], tuple[Case, configs.Config | None]] = {}
    for case, tile in jobs:
        with torch.device("meta"):
            found = prepared(replace(case, B=1), tile, device="meta").config
        seen.setdefault((found, case.dtype), (replace(case, B=1, S=min(case.S, 8192)), tile))
    _in_processes(_compile, list(seen.values()))


def _in_processes(work: Callable[[Any], str], jobs: Sequence[Any]) -> None:
    begin = time.perf_counter()
    count = max(1, min(len(jobs), (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        for message in pool.imap_unordered(work, jobs):
            if message:
                print(message, flush=True)
    print(f"{len(jobs)} kernels compiled by {count} processes in {time.perf_counter() - begin:.0f} s", flush=True)


def _compile(job: tuple[Case, configs.Config | None]) -> str:
    case, tile = job
    try:
        prepared(case, tile).warmup()
    except Exception as error:  # any failure to compile is reported by name; the run that needs it fails again
        return f"  {case.name}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="check, time; both if none is named")
    parser.add_argument("--only", default="", help="regular expression on case names")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument(
        "--list", action="store_true", help="print the cases and their tiles, run nothing (needs no GPU)"
    )
    parser.add_argument("--out", type=Path, help="write PATH.json, PATH.md and PATH.png")
    options = parser.parse_args()
    what = options.what or ["check", "time"]
    if not {"check", "time"}.issuperset(what):
        parser.error(f"wanted check or time, got {' '.join(what)}")
    chosen = [c for c in cases.table(quick=options.quick) if re.search(options.only, c.name)]
    checks = [c for c in check_attend.table(quick=options.quick) if re.search(options.only, c.name)]
    if options.list:
        for case in chosen:
            print(case.name, prepared(replace(case, B=1), device="meta").config)
        print(*(c.name for c in checks), sep="\n")
        return
    if "check" in what:
        _in_processes(check_attend.compiled, checks)
        if not check_attend.run(checks):
            raise SystemExit("wrong results: see FAIL above")
    if "time" not in what:
        return
    print(torch.cuda.get_device_name(), rounds.versions(), flush=True)
    precompile([(c, None) for c in [*chosen, *(replace(c, state=False) for c in chosen if c.state)]])
    rows: list[rounds.Row] = []
    for case in chosen:
        rows += timed(case, turns=4 if options.quick else 6)
        print(*(_line(r) for r in rows if r.case == case.name), sep="\n", flush=True)
        torch.cuda.empty_cache()
        if options.out:  # after every case: a run may be cut short
            command = " ".join(["python", "kernels/bench/bench_attend.py", *sys.argv[1:]])
            rounds.save(options.out, rows, command=command, title="Forward attention on one GPU")
    if options.out:
        plot(options.out, rows)


def _line(row: rounds.Row) -> str:
    return f"{row.case:44} {row.ours:7.1f} ± {row.spread:4.1f}  {row.peer:12} {row.theirs:7.1f}  ratio {row.ratio:.3f}"


if __name__ == "__main__":
    main()
