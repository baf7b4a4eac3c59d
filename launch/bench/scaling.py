"""Scaling of ring attention over the GPUs of one host: strong, weak, every transport, beside other ring libraries.

Not shipped. On the GPUs of this machine, or in ranks that torchrun started:

    python launch/bench/scaling.py --seconds 500 --out docs/results
    python launch/bench/scaling.py --device cpu --world 2 --unit 16 --heads 2:1 --head-dim 32    a dry run, a minute

Machines of 4 and 8 GPUs are lent for minutes: cases come in order of importance, those that would not fit into
--seconds are skipped by name, and scaling.json is written anew after every case. Last comes what the engine adds, a
prompt of 128K tokens for Llama-3-8B's shape and the decode's merges (not in ranks that torchrun started); its rows are
in scaling.json too. A trace: ringfa3 trace --seqlen 64K --backward
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from ringfa3_launch.bench import inference, report
from ringfa3_launch.bench.attention import integers, subset
from ringfa3_launch.bench.case import DTYPES, RING_PEERS, Case
from ringfa3_launch.bench.match import Match
from ringfa3_launch.bench.ours import parse_mesh
from ringfa3_launch.bench.program import Program
from ringfa3_launch.bench.ring import TRANSPORTS, meshes, play, report_on
from ringfa3_launch.bench.ring_matches import KERNELS, ONE_GPU, beside_causal, duel, single
from ringfa3_launch.console import Console
from ringfa3_launch.options import checked_transport, gpus_for
from ringfa3_launch.rank import RankInfo, launched

LONGEST = {2: 1024, 4: 1024, 8: 2048}  # units of tokens: what this many GPUs have to get through, forward and backward
ENOUGH = 5  # rounds of a case that is judged


def main() -> int:
    """Measure, print and write; returns the exit status."""
    args = parser().parse_args()
    info = RankInfo.from_env() if launched() else None
    program, heading = asked(args, info)
    silent = info is not None and info.rank > 0
    console = Console(rich=not silent)
    notes = absent(args, info)
    world = max(match.case.world for match in program.matches)
    played = play(program, world, info, console, heading=heading, out=args.out, name=args.name, notes=notes)
    if silent:
        return 0
    status = report_on(played, heading, console, notes=notes)
    return status if notes else max(status, engine(args, world, program.device))


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--world", type=int, help="ranks (default: all GPUs, or those that torchrun started; CPU 2)")
    options.add_argument("--seconds", type=float, default=500.0, help="for everything (default 500)")
    options.add_argument("--engine", type=float, default=60.0, help="of them for the engine; 0: without (default 60)")
    options.add_argument("--rounds", type=float, default=3.0, help="seconds of a case's rounds (default 3)")
    options.add_argument("--limit", type=float, default=90.0, help="seconds that a first call may take (default 90)")
    options.add_argument("--transports", metavar="LIST", help="default: all that ringfa3 has for this world")
    options.add_argument("--peers", metavar="LIST", help=f"of {','.join(RING_PEERS)}; default all, 'none' for none")
    options.add_argument("--heads", metavar="Q:KV", default="32:8")
    options.add_argument("--head-dim", type=int, default=128)
    options.add_argument("--dtype", choices=DTYPES, help="default GPU bf16, CPU fp32")
    options.add_argument("--impl", default="auto")
    options.add_argument("--unit", type=int, default=1024, help="tokens that 1K stands for; less for a dry run")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="folder for NAME.json, NAME.md and NAME.png")
    options.add_argument("--name", default="scaling")
    return options


def asked(args: argparse.Namespace, info: RankInfo | None) -> tuple[Program, str]:
    """The program of these options, and its heading.

    Raises:
        ValueError: an option is wrong; names it.
    """
    gpus = gpus_for(args.device)
    most = info.world if info is not None else gpus or max(2, args.world or 2)
    world = most if args.world is None else args.world
    if (world != most and info is not None) or not 2 <= world <= most:
        raise ValueError(f"--world: wanted {most}, the ranks there are, got {world}")
    heads = integers("--heads", args.heads, ":")
    if len(heads) != 2 or min(heads) < 1 or heads[0] % heads[1]:
        raise ValueError(f"--heads: wanted Q:KV with Q a multiple of KV, got {args.heads!r}")
    peers = () if args.peers == "none" else tuple(args.peers.split(",")) if args.peers else RING_PEERS
    subset("--peers", peers, RING_PEERS)
    transports = args.transports.split(",") if args.transports else default_transports(world)
    for name in transports:
        mesh = parse_mesh(name)
        checked_transport("--transports", name if mesh is None else mesh[2], more=", mesh:UxR or mesh:UxR:TRANSPORT")
    case = Case("fwd", "causal", args.head_dim, *heads, args.unit, world, args.dtype or ("bf16" if gpus else "fp32"))
    matches = plan_of(case, transports, peers, unit=args.unit, rounds=args.rounds, impl=args.impl)
    seconds = args.seconds if absent(args, info) else args.seconds - args.engine
    program = Program(tuple(matches), "cuda" if gpus else "cpu", args.seed, args.limit, seconds)
    return program, f"scaling to {world} ranks, D{case.D}, H{case.Hq}:{case.Hkv}, {case.dtype}"


def default_transports(world: int) -> list[str]:
    """Everything: the rings, two simulated hosts, gather, Ulysses and the 2-D meshes."""
    pull, ring, *others = TRANSPORTS
    hosts = [f"hierarchical:{world // 2}"] if world % 2 == 0 else []
    return [pull, ring, *hosts, *others, *meshes(world)]


def plan_of(
    case: Case, transports: list[str], peers: tuple[str, ...], *, unit: int, rounds: float, impl: str
) -> list[Match]:
    """The matches, most important first; lengths in units.

    Judged: 64K forward (the world's 8K or 16K a GPU), then 16K on 4 GPUs or 32K a GPU on 8, backward, packed
    documents, weak scaling from 2, the longest sequence. The rest follows as far as time allows.
    """
    world = case.world
    flat = [name for name in transports if name != "gather" and "mesh" not in name]
    lead = flat[:1] or transports[:1]

    def at(length: int, ranks: int = world, direction: str = "fwd", mask: str = "causal") -> Case:
        return replace(case, seqlen=length * unit, world=ranks, direction=direction, mask=mask)

    def full(length: int, direction: str = "fwd") -> Match:
        work = length * (3.5 if direction == "fwd+bwd" else 1.0)
        parts = (KERNELS, ONE_GPU) if work <= 256 else (KERNELS,)  # one GPU takes a second a call there
        return duel(at(length, direction=direction), transports, peers, rounds, parts=parts, impl=impl, fewest=ENOUGH)

    def ours(length: int, ranks: int, direction: str = "fwd") -> Match:
        return duel(at(length, ranks, direction), flat[:2], (), rounds, parts=(KERNELS,), impl=impl, fewest=ENOUGH)

    subworlds = [w for w in (2, 4) if w < world]
    longest = LONGEST.get(world, 1024)
    found = [full(64), full(256 if world >= 8 else 16), full(64, "fwd+bwd")]
    found.append(beside_causal(at(64, mask="packed"), lead, ("balanced", "zigzag"), rounds, impl=impl))
    found += [ours(n * w, w) for n in (8, 32) for w in subworlds]  # weak, from fewer ranks
    found += [duel(at(n * world), flat, (), rounds, parts=(KERNELS,), impl=impl) for n in (8, 32)]
    found.append(single(at(longest, direction="fwd+bwd"), lead, impl=impl))
    found += [ours(64, w) for w in subworlds] + [ours(64, w, "fwd+bwd") for w in subworlds]  # strong
    window = f"window={4 * unit}"
    found.append(beside_causal(at(256, mask=window), lead, ("zigzag",), rounds, impl=impl))
    found += [
        beside_causal(at(64, direction="fwd+bwd", mask=mask), lead, (layout,), rounds, impl=impl)
        for mask, layout in (("packed", "balanced"), (window, "zigzag"))
    ]
    found += [full(16), full(128), full(256), full(256, "fwd+bwd"), full(32), full(512)]
    found.append(single(at(longest), flat, impl=impl))
    return _once(found)


def absent(args: argparse.Namespace, info: RankInfo | None) -> tuple[str, ...]:
    """What is part of the scaling run and is not measured with these options."""
    if info is None and args.engine > 0:
        return ()
    reason = "--engine 0" if info is None else "the ranks are torchrun's: see `ringfa3 bench inference`"
    return f"decode merge latency: {reason}", f"128K prefill of the 8B shape: {reason}"


def engine(args: argparse.Namespace, world: int, device: str) -> int:
    """`ringfa3 bench inference` in as many ranks: NAME_inference.*, and its rows in NAME.json; the exit status."""
    options, name = argparse.ArgumentParser(), f"{args.name}_inference"
    inference.add_arguments(options)
    words = f"--worlds {world} --device {device} --rounds 1 --tokens 16 --no-peer --kernels none --name {name}"
    asked = options.parse_args([*words.split(), "--lengths", str(128 * args.unit)])
    asked.out = args.out
    if args.out is not None:
        (args.out / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
    status = inference.run(asked)
    if args.out is not None and (args.out / f"{name}.json").exists():
        found, added = (json.loads((args.out / f"{x}.json").read_text()) for x in (args.name, name))
        report.save(found | {"rows": found["rows"] + added["rows"]}, args.out, args.name)
        with (args.out / f"{args.name}.md").open("a") as page:
            page.write(f"\nThe prompt of 128K tokens and the decode's merges: [{name}.md]({name}.md).\n")
    return status


def _once(matches: list[Match]) -> list[Match]:
    """Each case the first time it comes, which is its fullest match."""
    found: dict[str, Match] = {}
    for match in matches:
        found.setdefault(match.name, match)
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
