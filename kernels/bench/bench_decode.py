"""Decode on one GPU: is it right, and how much of the bandwidth of a device copy does it reach?

PYTHONPATH=kernels python kernels/bench/bench_decode.py [check] [time] [tune] [--only REGEX] [--quick] [--list]
    [--rounds 7] [--out PATH]

`check` holds our answers (split as chosen, in 1 and in 7 pieces) to fp64: the timed cases and small ones with edges;
exits 1 if any is wrong. `time` prints GB/s of keys and values over a device copy that moves as many bytes, and over
torch's own split decode on contiguous keys where it serves the case; with --out it writes JSON and Markdown. `tune`
checks and times other configs and splits on the cases that --only names (without it: the four that we are judged by);
copy the best into ringfa3_kernels/portable/configs.py. Neither named: check and time.

Everything runs as a CUDA graph of calls on different caches, 1 GiB or more of them, so that neither launches nor the
L2 cache count. The copy writes a cache's keys over its values.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import rounds
import torch
from decode_cases import Cache, Case, checks, table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ringfa3_kernels import Partial
from ringfa3_kernels.portable.configs import DecodeConfig, padded, pick_decode
from ringfa3_kernels.portable.decode_launch import run_decode

GRAPH_BYTES = 1 << 30  # of different keys and values in a graph, at least
FINALISTS = 7  # candidates that are timed thoroughly
SHARED = 227 << 10  # bytes of shared memory that the programs of a multiprocessor have together on sm_90


def ours(cache: Cache, *, splits: int | None = None, config: DecodeConfig | None = None) -> Partial:
    """Our answer for a cache."""
    return run_decode(
        cache.q, cache.k, cache.v, cache.table, cache.visible,
        scale=cache.case.D**-0.5, softcap=cache.case.softcap, splits=splits, config=config,
    )  # fmt: skip


def copy(cache: Cache) -> object:
    """A kernel that reads the cache's keys and writes its values, which are lost.

    Not `copy_`: in a CUDA graph it is a memcpy node, which from 1 GiB on moves 2.7 TB/s where 4.2 can be had.
    """
    return torch.neg(cache.k, out=cache.v)


def torch_decode(cache: Cache) -> object:
    """torch's flash attention, which splits keys too, on the same memory read as contiguous keys."""
    case = cache.case
    q, k, v = (x.view(case.B, -1, *x.shape[2:]).transpose(1, 2) for x in (cache.q, cache.k, cache.v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, enable_gqa=case.Hq != case.Hkv)


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The calls as one CUDA graph: what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def caches(case: Case) -> list[Cache]:
    """Different caches of a case, GRAPH_BYTES or more in all."""
    return [Cache.draw(case) for _ in range(max(1, -(-GRAPH_BYTES // case.nbytes())))]


def contenders(case: Case, drawn: Sequence[Cache]) -> dict[str, Callable[[], object]]:
    """Name -> graph of all that is timed on a case."""
    calls = {"ours": captured([partial(ours, cache) for cache in drawn])}
    calls["copy"] = captured([partial(copy, cache) for cache in drawn])
    if case.Sq == 1 and case.window is None and not case.softcap and not case.ragged and case.S % case.page == 0:
        try:
            torch_decode(drawn[0])
        except RuntimeError as error:
            print(f"  torch does not serve {case.name}: {str(error).splitlines()[0]}", flush=True)
        else:
            calls["torch"] = captured([partial(torch_decode, cache) for cache in drawn])
    return calls


def timed(case: Case, *, turns: int) -> list[rounds.Row]:
    """Rows of one case: GB/s of ours against the copy and torch."""
    drawn = caches(case)
    times = rounds.interleaved(contenders(case, drawn), rounds=turns, ms=20.0)
    return rounds.compare(case.name, _each(case, times, drawn), 1e3 * case.nbytes(), ours="ours", metric="GB/s")


def _each(case: Case, times: dict[str, rounds.Time], drawn: Sequence[Cache]) -> dict[str, rounds.Time]:
    """Times of one call; the copy's as if it moved as many bytes as decode must read."""
    moved = 2 * drawn[0].k.numel() * drawn[0].k.element_size()
    part = {name: (case.nbytes() / moved if name == "copy" else 1.0) / len(drawn) for name in times}
    return {name: rounds.Time(t.ms * part[name], t.spread * part[name]) for name, t in times.items()}


def candidates(case: Case) -> list[tuple[DecodeConfig, int | None]]:
    """The table's config, variations that fit a multiprocessor, and other numbers of pieces for the table's."""
    rows = case.Sq * case.Hq // case.Hkv
    here = pick_decode(case.D, torch.bfloat16, torch.cuda.get_device_capability(), rows)
    found: list[tuple[DecodeConfig, int | None]] = [(here, None)]
    for block_n in (32, 64, 128):
        for warps, stages, programs in ((w, s, p) for w in (2, 4, 8) for s in (2, 3, 4) for p in (1, 2, 3, 4, 6)):
            held = (stages - 1) * 2 * block_n * padded(case.D) * 2  # bytes of K and V
            registers = min(255, 65536 // (programs * warps * 32) // 8 * 8)
            if (held + 8192) * programs > SHARED or registers < 96 or held * programs < 48 << 10:
                continue
            cap = None if registers == 255 else registers
            found.append(
                (
                    replace(here, block_n=block_n, num_warps=warps, num_stages=stages, programs=programs, maxnreg=cap),
                    None,
                )
            )
    base = here.programs * torch.cuda.get_device_properties(0).multi_processor_count / case.Hkv
    return list(dict.fromkeys(found)) + [(here, max(1, round(base * f))) for f in (0.5, 0.67, 1.33, 2, 3, 4)]


def label(config: DecodeConfig, splits: int | None) -> str:
    """A candidate as the printed table shows it."""
    pieces = "" if splits is None else f" splits{splits}"
    return f"n{config.block_n} w{config.num_warps} s{config.num_stages} p{config.programs} r{config.maxnreg}{pieces}"


def verdict(job: tuple[Case, DecodeConfig | None, int | None]) -> str | None:
    """What is wrong with our answer on a case, or None. Compiles into Triton's cache on the way."""
    case, config, splits = job
    torch.manual_seed(0)
    try:
        cache = Cache.draw(case)
        return cache.wrong(ours(cache, config=config, splits=splits))
    except Exception as error:  # a candidate that does not fit is reported, not fatal: the others go on
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


def verdicts(jobs: Sequence[tuple[Case, DecodeConfig | None, int | None]], workers: int) -> list[str | None]:
    """`verdict` of every job, by several processes, since compiling takes seconds."""
    with get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        return list(pool.imap(verdict, jobs))


def tune(case: Case, *, turns: int, workers: int) -> list[dict[str, object]]:
    """Time the candidates that are right on a short form of the case, best first."""
    asked = candidates(case)
    short = replace(case, B=min(case.B, 2), S=min(case.S, 5000), ragged=True)
    answers = verdicts([(short, config, splits) for config, splits in asked], workers)
    for (config, splits), wrong in zip(asked, answers, strict=True):
        if wrong:
            print(f"  {label(config, splits)}: {wrong}", flush=True)
    drawn = caches(case)
    graphs = {
        label(config, splits): captured([partial(ours, cache, config=config, splits=splits) for cache in drawn])
        for (config, splits), wrong in zip(asked, answers, strict=True)
        if wrong is None
    }
    copying = captured([partial(copy, cache) for cache in drawn])
    # all against the copy in a few rounds, then the best and the table's by turns: 60 by turns would take 60 rounds
    first = {
        name: rounds.interleaved({"copy": copying, name: graph}, rounds=2, ms=3.0)[name].ms
        for name, graph in graphs.items()
    }
    best = dict.fromkeys(sorted(first, key=lambda name: first[name])[:FINALISTS])
    best |= {name: None for name in (label(*asked[0]),) if name in graphs}
    last = {"copy": copying} | {name: graphs[name] for name in best}
    times = _each(case, rounds.interleaved(last, rounds=turns, ms=10.0), drawn)
    rows = [
        {"case": case.name, "config": name, "us": round(1e3 * t.ms, 2), "spread_us": round(1e3 * t.spread, 2),
         "GB/s": round(case.nbytes() / t.ms / 1e6, 1), "of copy": round(times["copy"].ms / t.ms, 3)}
        for name, t in times.items()
    ]  # fmt: skip
    rows.sort(key=lambda row: -float(str(row["GB/s"])))
    print(*("  ".join(f"{k} {v}" for k, v in row.items()) for row in rows), sep="\n", flush=True)
    print(f"in the table: {label(*asked[0])}", flush=True)
    return rows


def check(cases: Sequence[Case], workers: int) -> bool:
    """Whether all answers are right; prints a line each."""
    small: list[tuple[Case, DecodeConfig | None, int | None]] = [(c, None, s) for c in checks() for s in (None, 1, 7)]
    large: list[tuple[Case, DecodeConfig | None, int | None]] = [(c, None, None) for c in cases]
    answers = verdicts(small, workers) + [verdict(job) for job in large]  # these fill the memory: one at a time
    for (case, _, splits), wrong in zip(small + large, answers, strict=True):
        print(f"{'FAIL' if wrong else 'ok  '} {case.name} splits {splits} {wrong or ''}", flush=True)
    return not any(answers)


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="check, time, tune; the first two if none is named")
    parser.add_argument("--only", default="", help="regular expression on case names")
    parser.add_argument("--quick", action="store_true", help="two cases, fewer rounds")
    parser.add_argument("--list", action="store_true", help="print the cases, run nothing (needs no GPU)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md (time), PATH_tune.json (tune)")
    options = parser.parse_args()
    what = options.what or ["check", "time"]
    if not {"check", "time", "tune"}.issuperset(what):
        parser.error(f"wanted check, time or tune, got {' '.join(what)}")
    chosen = [c for c in table(quick=options.quick) if re.search(options.only, c.name)]
    if options.list:
        print(*(f"{c.name:60} {c.nbytes() / 1e9:.2f} GB" for c in [*chosen, *checks()]), sep="\n")
        return
    turns = 4 if options.quick else options.rounds
    print(torch.cuda.get_device_name(), rounds.versions(), flush=True)
    if "check" in what and not check(chosen, options.workers):
        raise SystemExit("wrong results: see FAIL above")
    if "time" in what:
        rows = []
        for case in chosen:
            rows += (found := timed(case, turns=turns))
            print(*(_line(row) for row in found), sep="\n", flush=True)
            torch.cuda.empty_cache()
            if options.out:  # after every case: a run may be cut short
                command = " ".join(["python", "kernels/bench/bench_decode.py", *sys.argv[1:]])
                title = "Decode attention on one GPU"
                rounds.save(options.out, rows, command=command, title=title, method=rounds.TOGETHER)
    if "tune" in what:
        tuned = []
        for case in chosen if options.only else chosen[:4]:
            tuned += tune(case, turns=turns, workers=options.workers)
            torch.cuda.empty_cache()
        if options.out:
            document = {"device": torch.cuda.get_device_name(), "versions": rounds.versions(), "rows": tuned}
            path = options.out.with_name(options.out.name + "_tune.json")
            path.write_text(json.dumps(document, indent=1) + "\n")


def _line(row: rounds.Row) -> str:
    return f"{row.case:56} {row.ours:7.1f} ± {row.spread:5.1f}  {row.peer:6} {row.theirs:7.1f}  ratio {row.ratio:.3f}"


if __name__ == "__main__":
    main()
