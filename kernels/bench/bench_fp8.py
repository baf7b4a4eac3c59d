"""The fp8 forward on one GPU: is it right, and how fast beside FlashAttention-3's fp8 forward?

PYTHONPATH=kernels python kernels/bench/bench_fp8.py [isolate] [check] [time] [--only REGEX] [--quick] [--list]
    [--variants REGEX] [--out PATH]

`isolate` takes the kernel apart piece by piece (a minute; first, where it has never run). `check` compares with fp64
and exits 1 if anything is wrong. `time` lets the table's tile, its variants, our bf16 forward and FlashAttention-3
(`fa3_sgl`, where it can be imported: peers/prepare.py fp8) take turns; with --out docs/results/fp8 it writes rows, a
table and a plot, and the variants' rows into fp8_tune.json. "with quantize" begins with bf16 tensors, and is held
against FlashAttention-3 on tensors already quantised: it has no quantiser. None named: check and time. All compile in
parallel first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import bench_attend
import check_fp8
import rounds
import torch
from bench_attend import _in_processes
from cases import TOKENS, Case
from plot_fp8 import plot
from rounds import Row
from torch import Tensor

from ringfa3_kernels import hopper
from ringfa3_kernels.hopper import fp8_configs, fp8_launch, launch, schedule
from ringfa3_kernels.hopper.fp8_configs import Fp8Config
from ringfa3_kernels.quantized import Quantized, quantize
from ringfa3_kernels.types import Partial

Calls = dict[str, Callable[[], object]]
ONE_LEVEL: dict[str, Any] = {"TWO_LEVEL": False, "K_LATE": False}
# with ours, bf16, per-head scales, with quantize and the peer ten names: an even number takes half as many turns
CHANGES: tuple[dict[str, Any], ...] = (
    ONE_LEVEL,
    {**ONE_LEVEL, "V_LATE": True},
    {**ONE_LEVEL, "LAZY": 4},
    {"PINGPONG": True},
    {"STAGES": 3},
)
CASES = [
    Case(mask, 128, 16, 16, S * 1024, max(1, TOKENS // (S * 1024))) for mask in ("full", "causal") for S in (8, 16, 64)
]


def named(case: Case) -> str:
    """The case's tokens, its dtype said to be fp8."""
    return case.name.replace("bf16", "fp8")


def variants(case: Case, only: str) -> dict[str, Fp8Config]:
    """What is worth trying beside the table's tile, by name."""
    base = fp8_configs.TABLE[case.D, launch.MASKS[case.visible("cpu").kind]]
    tiles = {_difference(t, base): t for t in (replace(base, **change) for change in CHANGES) if t != base}
    return {name: tile for name, tile in tiles.items() if re.search(only, name)}


def _difference(tile: Fp8Config, base: Fp8Config) -> str:
    changed = [f.name for f in fields(tile) if getattr(tile, f.name) != getattr(base, f.name)]
    return " ".join(f"{name}={getattr(tile, name)}" for name in changed)


def launched(
    case: Case, q: Quantized, k: Quantized, v: Quantized, tile: Fp8Config | None = None
) -> fp8_launch.Fp8Launch:
    """Our launch, out in bf16."""
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    return fp8_launch.prepare(
        q,
        k,
        v,
        case.visible(q.device.type),
        Partial(out, torch.empty(case.B, case.Hq, case.S, device=q.device)),
        None,
        scale=case.D**-0.5,
        softcap=0.0,
        counter=torch.zeros(2, dtype=torch.int32, device=q.device),
        sms=schedule.multiprocessors(q.device),
        tile=tile,
    )


def flash_attention_3(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Calls:
    """FlashAttention-3 on the same tensors with one scale a head, which is what it reads."""
    if importlib.util.find_spec("fa3_sgl") is None:
        return {}
    import fa3_sgl

    made = quantize(q, k, v, block=0)
    scales = [x.scale[..., 0].contiguous() for x in made]
    data = [x.data for x in made]
    return {"fa3": lambda: fa3_sgl.fa3_forward(*data, case.mask == "causal", None, *scales)}


def timed(case: Case, only: str, *, turns: int, ms: float) -> tuple[list[Row], list[Row]]:
    """Rows of one case for the results, and rows of all variants against the same peer."""
    q, k, v = case.tensors("cuda")
    made = quantize(q, k, v, v_order="keys")
    base = launched(case, *made)
    heads = launched(case, *quantize(q, k, v, block=0, v_order="keys"))
    tried = {name: launched(case, *made, tile) for name, tile in variants(case, only).items()}
    peers = flash_attention_3(case, q, k, v)
    # nobody is timed doing something else, and what is added up in which way shows in its error
    errors = _errors(case, {"ours": base, "scales a head": heads, **tried}, peers, (q, k, v))
    said = ", ".join(f"{name} {error:.2e}" for name, error in errors.items())
    print(f"{named(case)}: error against bf16: {said}", flush=True)
    visible = case.visible("cuda")
    options: dict[str, Any] = {"scale": case.D**-0.5, "softcap": 0.0, "into": None, "out_dtype": torch.bfloat16}
    out = Partial(torch.empty_like(q), torch.empty(case.B, case.Hq, case.S, device=q.device))
    calls: Calls = {
        "ours": base.run,
        "with quantize": lambda: hopper.attend_quantized(*quantize(q, k, v, v_order="keys"), visible, **options),
        "scales a head": heads.run,
        "ours bf16": bench_attend.launched(case, q, k, v, result=out).run,
        **{name: one.run for name, one in tried.items()},
    }
    times = rounds.interleaved({**calls, **peers}, rounds=turns, ms=ms)
    peer = "fa3" if peers else "ours bf16"
    shown: list[Row] = []
    for name in ("ours", "with quantize"):
        pairs = {x: times[x] for x in (name, *(["fa3"] if peers else []), *(["ours bf16"] if name == "ours" else []))}
        suffix = "" if name == "ours" else " with quantize"
        shown += rounds.compare(named(case) + suffix, pairs, case.flops(), ours=name)
    others = [name for name in calls if name not in ("ours", "with quantize", peer)]
    rest = [
        replace(row, case=f"{named(case)} {name}")
        for name in others
        for row in rounds.compare(named(case), {name: times[name], peer: times[peer]}, case.flops(), ours=name)
    ]
    return shown, rest


def drift(case: Case) -> list[Row]:
    """Errors where all values are near 1, whose sums are as large as can be: what the matrix unit loses of them."""
    q, k, v = case.tensors("cuda")
    qkv = q, k, 1 + v / 10
    made = quantize(*qkv, v_order="keys")
    base = fp8_configs.TABLE[case.D, launch.MASKS[case.visible("cpu").kind]]
    ours = {"ours": launched(case, *made), "ours, one level": launched(case, *made, replace(base, **ONE_LEVEL))}
    errors = {name: round(100 * x, 2) for name, x in _errors(case, ours, flash_attention_3(case, *qkv), qkv).items()}
    mine = errors.pop("ours")
    name = f"{named(case)} values near 1"
    return [Row(name, "% error", mine, 0.0, peer, x, round(x / mine, 3)) for peer, x in errors.items()]


def _errors(
    case: Case, ours: dict[str, fp8_launch.Fp8Launch], peers: Calls, qkv: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    """How far each is from our bf16 forward, relative to that."""
    exact = bench_attend.launched(case, *qkv)
    exact.run()
    wanted = exact.args[5].float()  # the output: args are those of the kernel
    got: dict[str, Tensor] = {}
    for name, one in ours.items():
        one.run()
        got[name] = one.args[5]
    for name, call in peers.items():
        result = call()
        assert isinstance(result, tuple | list)
        got[name] = result[0]
    return {name: ((x.float() - wanted).norm() / wanted.norm()).item() for name, x in got.items()}


def precompile(cases: list[Case], only: str) -> None:
    """Compile everything that is timed, in parallel processes, into Triton's cache on disk."""
    seen: dict[tuple[str, str], tuple[Case, Fp8Config | None]] = {}
    for case in cases:
        for name, tile in {"": None, **variants(case, only)}.items():
            seen.setdefault((case.mask, name), (replace(case, B=1, S=8192), tile))
    _in_processes(_compile, list(seen.values()))
    bench_attend.precompile([(case, None) for case in cases])


def _compile(job: tuple[Case, Fp8Config | None]) -> str:
    case, tile = job
    try:
        q, k, v = case.tensors("cuda")
        launched(case, *quantize(q, k, v, v_order="keys"), tile).warmup()
    except Exception as error:  # any failure to compile is reported by name; the run that needs it fails again
        return f"  {named(case)}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def save(path: Path, rows: list[Row], command: str) -> None:
    """Write path.json and path.md; rows of other metrics that are there already and not measured anew stay."""
    found = path.with_suffix(".json")
    kept = [Row(**row) for row in json.loads(found.read_text())["rows"]] if found.exists() else []
    kept = [row for row in kept if row.metric != "TFLOP/s" and row.case not in {new.case for new in rows}]
    title = "Forward attention on fp8, one GPU"
    rounds.save(path, [*rows, *kept], command=command, title=title, method=rounds.TOGETHER)


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="isolate, check, time; the last two if none is named")
    parser.add_argument("--only", default="", help="regular expression on case names")
    parser.add_argument("--variants", default="", help="regular expression on the variants' names")
    parser.add_argument("--quick", action="store_true", help="fewer checks and shorter turns")
    parser.add_argument("--list", action="store_true", help="print the cases and checks, run nothing (needs no GPU)")
    parser.add_argument("--out", type=Path, help="write PATH.json, PATH.md, PATH.png and PATH_tune.json")
    options = parser.parse_args()
    what = options.what or ["check", "time"]
    if not {"isolate", "check", "time"}.issuperset(what):
        parser.error(f"wanted isolate, check or time, got {' '.join(what)}")
    cases = [c for c in CASES if re.search(options.only, named(c))]
    checks = [c for c in check_fp8.table(quick=options.quick) if re.search(options.only, c.name)]
    if options.list:
        print(*(f"{named(c)}: {', '.join(variants(c, options.variants))}" for c in cases), sep="\n")
        print(*(c.name for c in checks), sep="\n")
        return
    print(torch.cuda.get_device_name(), rounds.versions(), flush=True)
    if "isolate" in what:
        check_fp8.isolate()
    if "check" in what:
        _in_processes(check_fp8.compiled, checks)
        if not check_fp8.run(checks):
            raise SystemExit("wrong results: see FAIL above")
    if "time" in what:
        precompile(cases, options.variants)
        rows: list[Row] = []
        others: list[Row] = []
        command = " ".join(["python", "kernels/bench/bench_fp8.py", *sys.argv[1:]])
        for case in cases:
            shown, tried = timed(case, options.variants, turns=4, ms=10.0 if options.quick else 20.0)
            shown += drift(case)
            print(*(_line(row) for row in [*shown, *tried]), sep="\n", flush=True)
            rows, others = rows + shown, others + tried
            torch.cuda.empty_cache()
            if options.out:  # after every case: a run may be cut short
                save(options.out, rows, command)
                tuned = {"command": command, "versions": rounds.versions(), "rows": [asdict(row) for row in others]}
                path = options.out.with_name(f"{options.out.name}_tune.json")
                path.write_text(json.dumps(tuned, indent=1) + "\n")
        if options.out:
            plot(options.out, rows)


def _line(row: Row) -> str:
    return f"{row.case:88} {row.ours:7.1f} ± {row.spread:4.1f}  {row.peer:10} {row.theirs:7.1f}  ratio {row.ratio:.3f}"


if __name__ == "__main__":
    main()
