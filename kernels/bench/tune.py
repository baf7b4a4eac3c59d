"""Time the alternatives to each row of the Hopper forward's tile table, by turns, and print the table that wins.

PYTHONPATH=kernels python kernels/bench/tune.py [--only REGEX] [--lengths 2,16] [--rounds 5] [--list]

REGEX is searched in names like "D128 causal". The winner has the best geometric mean over the lengths; copy the printed
rows into ringfa3_kernels/hopper/configs.py where they beat the row there by more than the spread.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace

import bench_attend
import cases
import rounds
import torch
from cases import Case

from ringfa3_kernels.hopper import configs
from ringfa3_kernels.hopper.configs import CAUSAL, FULL, INTERVALS, Config

MASKS = {FULL: "full", CAUSAL: "causal", INTERVALS: "intervals"}
HEADS = {64: 32, 128: 16, 256: 8}
THREE = {"NWG": 3, "BM": 192, "CONSUMER_REGS": 160, "PRODUCER_REGS": 32}
TWO = {"NWG": 2, "BM": 128, "CONSUMER_REGS": 240, "PRODUCER_REGS": 24}


def alternatives(D: int, mask: int) -> list[Config]:
    """The table's tile and what is worth trying beside it (shared memory and registers allow each)."""
    here = configs.TABLE[D, mask]
    changes: list[dict[str, int | bool]] = [
        {"V_LATE": not here.V_LATE},
        {"LAZY_RESCALE": not here.LAZY_RESCALE},
        {"K_LATE": not here.K_LATE},
        {"K_LATE": not here.K_LATE, "V_LATE": not here.V_LATE},
        {"K_LATE": not here.K_LATE, "LAZY_RESCALE": not here.LAZY_RESCALE},
    ]
    if here.NWG == 2:
        changes += [{"PINGPONG": not here.PINGPONG}, {"PINGPONG": not here.PINGPONG, "V_LATE": not here.V_LATE}]
    if D == 64:
        changes += [{**TWO}, {**TWO, "V_LATE": True}, {**TWO, "V_LATE": True, "K_LATE": False}, {"STAGES": 3}]
        changes += [{**TWO, "LAZY_RESCALE": not here.LAZY_RESCALE}]
    if D == 128:
        changes += [{"QB": 1}]
    if D == 256:
        changes += [{"PINGPONG": False, "LAZY_RESCALE": False}, {"STAGES": 2, "V_LATE": True, "K_LATE": True}]
    found = [here]
    for change in changes:
        tile = replace(here, **change)  # type: ignore[arg-type]
        if tile not in found:
            found.append(tile)
    return found


def difference(tile: Config, base: Config) -> str:
    """The fields in which a tile differs from the table's."""
    changed = [
        f"{f.name}={getattr(tile, f.name)}" for f in fields(tile) if getattr(tile, f.name) != getattr(base, f.name)
    ]
    return " ".join(changed) or "(table)"


def time_row(D: int, mask: int, lengths: list[int], turns: int) -> Config:
    """Time one row's alternatives at every length, print them best first, and return the best."""
    tiles = alternatives(D, mask)
    scores = {tile: 0.0 for tile in tiles}  # sum of log time
    shown: dict[Config, list[str]] = {tile: [] for tile in tiles}
    for S in lengths:
        case = Case(MASKS[mask], D, HEADS[D], HEADS[D], S * 1024, max(1, cases.TOKENS // (S * 1024)))
        q, k, v = case.tensors("cuda")
        calls: bench_attend.Calls = {}
        for i, tile in enumerate(tiles):
            launch = bench_attend.launched(case, q, k, v, tile)
            try:
                launch.run()
                torch.cuda.synchronize()
            except Exception as error:  # a tile that does not fit is out of the race, by name
                print(f"  {difference(tile, tiles[0])}: {type(error).__name__}: {str(error)[:120]}", flush=True)
                scores[tile] = math.inf
                continue
            calls[str(i)] = launch.run
        fa3 = {n: c for n, c in bench_attend.peers(q, k, v, case.mask).items() if n == "fa3"}
        times = rounds.interleaved({**calls, **fa3}, rounds=turns, ms=6.0)
        for i, tile in enumerate(tiles):
            if str(i) in times:
                t = times[str(i)]
                beside = f" ({times['fa3'].ms / t.ms:.3f} of fa3)" if fa3 else ""
                shown[tile].append(f"{S}K {case.flops() / t.ms / 1e9:.0f} ± {100 * t.spread / t.ms:.1f}%{beside}")
                scores[tile] += math.log(t.ms)
        torch.cuda.empty_cache()
    ranked = sorted(tiles, key=lambda tile: scores[tile])
    print(f"D{D} {MASKS[mask]}, TFLOP/s")
    for tile in ranked:
        gain = math.exp((scores[tiles[0]] - scores[tile]) / len(lengths)) - 1
        print(f"  {100 * gain:+5.1f}%  {difference(tile, tiles[0]):60} {' | '.join(shown[tile])}", flush=True)
    return ranked[0]


def rows(only: str) -> Iterator[tuple[int, int]]:
    """The table's keys whose name matches."""
    return ((D, mask) for D, mask in configs.TABLE if re.search(only, f"D{D} {MASKS[mask]}"))


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on names like 'D128 causal'")
    parser.add_argument("--lengths", default="2,16", help="sequence lengths in K tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--list", action="store_true", help="print the alternatives, time nothing (needs no GPU)")
    options = parser.parse_args()
    chosen = list(rows(options.only))
    if options.list:
        for D, mask in chosen:
            tiles = alternatives(D, mask)
            print(f"D{D} {MASKS[mask]}:", *(difference(t, tiles[0]) for t in tiles), sep="\n  ")
        return
    print(torch.cuda.get_device_name(), rounds.versions(), flush=True)
    lengths = [int(x) for x in options.lengths.split(",")]
    jobs = [
        (Case(MASKS[mask], D, HEADS[D], HEADS[D], 2048, 1), tile)
        for D, mask in chosen
        for tile in alternatives(D, mask)
    ]
    bench_attend.precompile(jobs)
    best = {(D, mask): time_row(D, mask, lengths, options.rounds) for D, mask in chosen}
    print("TABLE rows that won:")
    for (D, mask), tile in best.items():
        print(f"    ({D}, {MASKS[mask].upper()}): {tile},")


if __name__ == "__main__":
    main()
