"""Are variants of the Hopper forward right, and faster than what the tile table has?

PYTHONPATH=kernels python kernels/bench/tune.py [--rows REGEX] [--variants REGEX] [--rounds 7] [--ms 30] [--power]
    [--list] [--out PATH.json]

REGEX of --rows is searched in case names ("fwd causal D128 H32:8 S8K W1 bf16"), that of --variants in names like
"V_LATE=True" ("(table)" is always there). A variant is the table's tile with a few fields changed. Each is first held
to the error rule on that very row: at most twice plain PyTorch's error against fp64. Then the variants of a row and
FlashAttention-3 (cuDNN where that cannot be imported) take turns in an order drawn anew in every round. With --power
each then runs alone for a second while nvidia-smi reads clock and power: FLOP per clock tells waiting from low clocks.
Copy a variant into ringfa3_kernels/hopper/configs.py where it beats the table by more than the spread.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import bench_attend
import cases
import rounds
import torch
from cases import Case
from torch import Tensor

from ringfa3_kernels import reference
from ringfa3_kernels.hopper import configs, launch
from ringfa3_kernels.hopper.configs import Config
from ringfa3_kernels.types import Partial, Visible

THREE = {"NWG": 3, "BM": 192, "CONSUMER_REGS": 160, "PRODUCER_REGS": 32, "V_LATE": False, "K_LATE": True}
TWO = {"NWG": 2, "BM": 128, "CONSUMER_REGS": 240, "PRODUCER_REGS": 24, "V_LATE": True, "K_LATE": False, "STAGES": 2}
ROWS_CHECKED = 96  # of a row tile's neighbourhood, at the beginning, in the middle and at the end


@dataclass(frozen=True)
class Found:
    """One contender on one row: TFLOP/s, spread in per cent of it, ratio to the peer; with --power what it draws."""

    row: str
    variant: str
    rate: float
    spread: float
    peer: str
    ratio: float
    draw: tuple[float, ...] = ()  # MHz, watts, FLOP per clock and SM


def variants(case: Case) -> list[Config]:
    """The table's tile for a case and what is worth trying beside it (shared memory and registers allow each)."""
    mask = launch.MASKS[case.visible("cpu").kind]
    here = configs.pick(case.D, mask, case.S)
    changes: list[dict[str, Any]] = [{flag: not getattr(here, flag)} for flag in ("LAZY_RESCALE", "V_LATE", "K_LATE")]
    if here.NWG == 2:
        changes += [{"PINGPONG": not here.PINGPONG}]
    if case.D == 256:
        changes += [{"DIRECT": not here.DIRECT}]
    if case.D == 64:
        changes += [TWO if here.NWG == 3 else THREE, {"STAGES": 5 - here.STAGES}]
    found = [here]
    for change in changes:
        tile = replace(here, **change)
        if tile not in found:
            found.append(tile)
    return found


def difference(tile: Config, base: Config) -> str:
    """The fields in which a tile differs from the table's."""
    changed = [
        f"{f.name}={getattr(tile, f.name)}" for f in fields(tile) if getattr(tile, f.name) != getattr(base, f.name)
    ]
    return " ".join(changed) or "(table)"


def chosen(case: Case, only: str) -> list[Config]:
    """A case's variants whose names match, the table's first."""
    tiles = variants(case)
    return [t for t in tiles if t is tiles[0] or re.search(only, difference(t, tiles[0]))]


def wrong(case: Case, q: Tensor, k: Tensor, v: Tensor, result: Partial) -> str:
    """What is wrong with a result, by the error rule on three stretches of rows of the last head; nothing if right."""
    visible, S = case.visible("cuda"), case.S
    options: dict[str, Any] = {"scale": case.D**-0.5, "softcap": 0.0, "into": None}
    for first in (0, S // 2 - ROWS_CHECKED // 2, S - ROWS_CHECKED):
        rows = slice(first, first + ROWS_CHECKED)
        part = [x[-1:, s, -1:] for x, s in ((q, rows), (k, slice(None)), (v, slice(None)))]
        mask = Visible(visible.lo[rows].contiguous(), visible.hi[rows].contiguous())
        exact = reference.attend(*(x.double() for x in part), mask, out_dtype=torch.float64, **options)
        plain = reference.attend(*part, mask, out_dtype=q.dtype, **options)
        ours = result.out[-1:, rows, -1:].double(), result.lse[-1:, -1:, rows].double()
        allowed = (plain.out.double() - exact.out).norm() * 2
        if not (ours[0] - exact.out).norm() <= allowed:
            return f"error {(ours[0] - exact.out).norm():.2e} in rows {first}.., allowed {allowed:.2e}"
        if not (ours[1] - exact.lse).abs().max() <= 2 * (plain.lse.double() - exact.lse).abs().max() + 1e-4:
            return f"lse off by {(ours[1] - exact.lse).abs().max():.1e} in rows {first}.."
    if bool(result.out.isnan().any()) or bool(result.lse.isnan().any()):
        return "NaN: something was not written"
    return ""


def sustained(call: Callable[[], object], ms: float, work: float) -> tuple[float, ...]:
    """(MHz, watts, FLOP per clock and SM) while a callable runs back to back for most of a second."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = max(2, round(900 / ms))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    time.sleep(0.25)
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "-i", "0"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    torch.cuda.synchronize()
    try:
        megahertz, watts = (float(x) for x in said.split(","))
    except ValueError:
        return ()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return megahertz, watts, round(work * repeats / begin.elapsed_time(end) / megahertz / sms / 1e3, 1)


def measure(case: Case, only: str, *, turns: int, ms: float, power: bool) -> list[Found]:
    """Check and time one row's variants and the peer; print and return what was found."""
    q, k, v = case.tensors("cuda")
    tiles = chosen(case, only)
    calls: dict[str, Callable[[], object]] = {}
    print(case.name, flush=True)
    for tile in tiles:
        name = difference(tile, tiles[0])
        try:
            result = Partial(torch.full_like(q, torch.nan), torch.full((case.B, case.Hq, case.S), torch.nan).cuda())
            one = bench_attend.launched(case, q, k, v, tile, result=result)
            one.run()
            complaint = wrong(case, q, k, v, result)
        except Exception as error:  # a variant that does not fit is out of the race, by name
            complaint = f"{type(error).__name__}: {str(error)[:120]}"
        if complaint:
            print(f"  {name}: WRONG: {complaint}", flush=True)
        else:
            calls[name] = one.run
    others = bench_attend.peers(q, k, v, case.mask)
    peer = next(iter(others))
    calls[peer] = others[peer]
    times = rounds.interleaved(calls, rounds=turns, ms=ms)
    found = []
    for name, t in times.items():
        draw = sustained(calls[name], t.ms, case.flops()) if power else ()
        row = Found(
            case.name,
            name,
            round(case.flops() / t.ms / 1e9, 1),
            round(100 * t.spread / t.ms, 1),
            peer,
            round(times[peer].ms / t.ms, 3),
            draw,
        )
        found.append(row)
        said = "  sustained {:.0f} MHz {:.0f} W {:.0f} FLOP/clock/SM".format(*draw) if draw else ""
        print(f"  {name:28} {row.rate:7.1f} TFLOP/s ± {row.spread:4.1f}%  {row.ratio:.3f} of {peer}{said}", flush=True)
    torch.cuda.empty_cache()
    return found


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="regular expression on case names")
    parser.add_argument("--variants", default="", help="regular expression on the variants' names")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ms", type=float, default=30.0, help="length of a turn")
    parser.add_argument("--power", action="store_true", help="read clock and power of each, running alone")
    parser.add_argument("--list", action="store_true", help="print rows and variants, run nothing (needs no GPU)")
    parser.add_argument("--out", type=Path, help="write everything found as JSON")
    options = parser.parse_args()
    table = [
        c
        for c in cases.table(quick=False)
        if not c.state and c.mask in launch.MASKS and re.search(options.rows, c.name)
    ]
    if options.list:
        for case in table:
            tiles = chosen(case, options.variants)
            print(case.name, *(difference(t, tiles[0]) for t in tiles), sep="\n  ")
        return
    print(torch.cuda.get_device_name(), rounds.versions(), flush=True)
    bench_attend.precompile([(case, tile) for case in table for tile in chosen(case, options.variants)])
    found: list[Found] = []
    for case in table:
        found += measure(case, options.variants, turns=options.rounds, ms=options.ms, power=options.power)
    if options.out:
        report = {"versions": rounds.versions(), "rows": [asdict(row) for row in found]}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
