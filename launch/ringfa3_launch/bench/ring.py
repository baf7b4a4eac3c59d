"""What the ring costs on this machine: against its own kernels, one GPU, packed documents and other ring libraries."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ringfa3_launch.bench.attention import announce_plot, in_ranks, integers, subset
from ringfa3_launch.bench.case import DIRECTIONS, DTYPES, RING_PEERS, Case, parse_size
from ringfa3_launch.console import Console
from ringfa3_launch.options import checked_head_dim, checked_transport, gpus_for, made_folder
from ringfa3_launch.rank import RankInfo, launched

if TYPE_CHECKING:
    from ringfa3_launch.bench.match import Match
    from ringfa3_launch.bench.program import Played, Program

TRANSPORTS = ("pull", "ring", "gather", "ulysses")
DESCRIPTION = """\
Measure what the ring adds to its kernels. In one process group and one run, everybody timed in turn, round by round:

  ours            ring_attention by every transport (one that cannot run here is named, with the reason)
  kernels alone   the same attend calls hop by hop on local tensors, with no transport
  one launch      all keys in one attend call (forward): what continuing the softmax hop by hop costs
  one GPU         the whole sequence on every rank, all at once, so that the GPUs draw the power they draw in the ring
  peers           torch's context_parallel and, where importable, ring-flash-attn and yunchang

for causal attention at every length, then packed documents and a sliding window beside plain causal attention, and
where asked for one call at a million tokens. Figures that are judged are listed with what was asked and reached.

`bench attention` is the same measurement of one call as a user makes it, over worlds; this command takes it apart."""

EXAMPLES = """\
examples:
  ringfa3 bench ring                                        all GPUs of this machine
  ringfa3 bench ring --seqlens 16K,64K --transports pull,ring --peers none
  ringfa3 bench ring --long 1M --out docs/results           also one call at 1M tokens; writes ring.json, .md, .png
  ringfa3 bench ring --budget 300                           what can be measured in five minutes, in this order
  ringfa3 bench ring --device cpu --seqlens 1K --heads 2:1 --head-dim 64 --packed 1K --window none   tiny, seconds
  launch/torchrun.sh -m ringfa3_launch bench ring           in ranks that torchrun started

exit status: 0 measured (what could not run is named), 1 none of ours ran in some case."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ringfa3 bench ring`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    what = parser.add_argument_group("what is measured")
    what.add_argument("--seqlens", metavar="LIST", help="tokens, all ranks together (GPU 16K,32K,64K,128K; CPU 1K,2K)")
    what.add_argument("--world", metavar="N", type=int, help="ranks (default: all GPUs; CPU 2)")
    what.add_argument("--heads", metavar="Q:KV", help="query and key/value heads (default GPU 32:8, CPU 4:2)")
    what.add_argument("--head-dim", metavar="D", type=int, default=128, help="default 128")
    what.add_argument("--dtype", choices=DTYPES, help="default GPU bf16, CPU fp32")
    what.add_argument("--directions", metavar="LIST", default=",".join(DIRECTIONS), help="of fwd,fwd+bwd (both)")
    what.add_argument("--packed", metavar="TOKENS", help="length of the packed case, or none (GPU 64K, CPU 2K)")
    what.add_argument("--window", metavar="W@TOKENS", help="sliding window and length, or none (4K@256K; CPU 256@2K)")
    what.add_argument("--long", metavar="TOKENS", help="also one forward+backward call at this length (default none)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--transports", metavar="LIST",
        help=f"as ring_attention's, and mesh:UxR[:TRANSPORT] (default {','.join(TRANSPORTS)}, and 2-D meshes from 4)",
    )  # fmt: skip
    how.add_argument("--impl", default="auto", help="kernels: auto (default), hopper, portable, aten, reference")
    how.add_argument("--peers", metavar="LIST", help=f"of {','.join(RING_PEERS)} (default: all; 'none' for none)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    how.add_argument("--seconds", type=float, default=5.0, help="spent on a case's rounds, at least three (default 5)")
    how.add_argument("--budget", type=float, help="seconds for everything; cases that would not fit are skipped")
    how.add_argument("--limit", type=float, default=120.0, help="seconds that a first call may take (default 120)")
    how.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", type=Path, help="also write NAME.json, NAME.md and NAME.png there")
    output.add_argument("--name", default="ring", help="default ring")
    output.add_argument("--json", action="store_true", help="print the JSON document instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; see the module."""
    info = RankInfo.from_env() if launched() else None
    asked = asked_from(args, info)
    silent = info is not None and info.rank > 0
    console = Console(rich=not silent)
    if args.out is not None and not silent:
        made_folder("--out", args.out)
        announce_plot(console)
    heading = title(asked.case)
    played = play(asked.program, asked.case.world, info, console, heading=heading, out=args.out, name=args.name)
    return 0 if silent else report_on(played, heading, console, as_json=args.json)


@dataclass(frozen=True)
class Asked:
    """The options, checked: a case that stands for all of them, and the program."""

    case: Case
    program: Program


def asked_from(args: argparse.Namespace, info: RankInfo | None) -> Asked:
    """The options, defaults filled in for this machine.

    Raises:
        ValueError: an option is wrong; names it.
    """
    from ringfa3_launch.bench.program import Program

    gpus = gpus_for(args.device)
    most = info.world if info is not None else gpus or max(2, args.world or 2)
    world = most if args.world is None else args.world
    if most < 2:
        raise ValueError(f"bench ring: wanted 2 ranks or more, got {most} (one GPU alone: `ringfa3 bench attention`)")
    if not 2 <= world <= most:
        wanted = f"2..{most} ranks on this machine" if gpus or info is not None else "2 ranks or more"
        raise ValueError(f"--world: wanted {wanted}, got {world}")
    heads = integers("--heads", args.heads or ("32:8" if gpus else "4:2"), ":")
    if len(heads) != 2 or min(heads) < 1 or heads[0] % heads[1]:
        raise ValueError(f"--heads: wanted Q:KV with Q a multiple of KV, such as 32:8, got {args.heads!r}")
    subset("--directions", tuple(args.directions.split(",")), DIRECTIONS)
    dtype = args.dtype or ("bf16" if gpus else "fp32")
    case = Case("fwd", "causal", checked_head_dim(args.head_dim), *heads, parse_size("1K"), world, dtype)
    matches = tuple(_matches(args, case, gpus > 0))
    return Asked(case, Program(matches, "cuda" if gpus else "cpu", args.seed, args.limit, args.budget))


def _matches(args: argparse.Namespace, case: Case, gpu: bool) -> list[Match]:
    """Everything that the options ask for, the judged lengths first."""
    from dataclasses import replace

    from ringfa3_launch.bench.ours import parse_mesh
    from ringfa3_launch.bench.ring_matches import beside_causal, duel, single

    peers = () if args.peers == "none" else tuple(args.peers.split(",")) if args.peers else RING_PEERS
    subset("--peers", peers, RING_PEERS)
    transports = args.transports.split(",") if args.transports else [*TRANSPORTS, *meshes(case.world)]
    for name in transports:
        mesh = parse_mesh(name)
        checked_transport("--transports", name if mesh is None else mesh[2], more=", mesh:UxR or mesh:UxR:TRANSPORT")
    seqlens = args.seqlens or ("16K,32K,64K,128K" if gpu else "1K,2K")
    found = []
    for direction in args.directions.split(","):
        for size in sorted({parse_size(size, "--seqlens") for size in seqlens.split(",")}):
            here = replace(case, direction=direction, seqlen=size)
            found.append(duel(here, transports, peers, args.seconds, impl=args.impl, fewest=3))
    rings = [name for name in transports if name not in ("gather", "ulysses") and "mesh" not in name] or transports[:1]
    packed = args.packed or ("64K" if gpu else "2K")
    if packed != "none":
        here = replace(case, mask="packed", seqlen=parse_size(packed, "--packed"))
        found.append(beside_causal(here, rings, ("balanced", "zigzag"), args.seconds, impl=args.impl))
    window, at, length = (args.window or ("4K@256K" if gpu else "256@2K")).partition("@")
    if window != "none":
        if not at:
            raise ValueError(f"--window: wanted WINDOW@TOKENS such as 4K@256K, or none, got {args.window!r}")
        here = replace(case, mask=f"window={parse_size(window, '--window')}", seqlen=parse_size(length, "--window"))
        found.append(beside_causal(here, rings, ("zigzag", "contiguous"), args.seconds, impl=args.impl))
    if args.long:
        here = replace(case, direction="fwd+bwd", seqlen=parse_size(args.long, "--long"))
        found.append(single(here, rings[:1], impl=args.impl))
    return found


def meshes(world: int) -> list[str]:
    """The 2-D meshes of so many ranks, as transports: "mesh:2x4"."""
    return [f"mesh:{u}x{world // u}" for u in range(2, world) if world % u == 0]


def title(case: Case) -> str:
    """What all cases have in common."""
    return f"the ring, {case.world} ranks, D{case.D}, H{case.Hq}:{case.Hkv}, {case.dtype}"


def play(
    program: Program,
    world: int,
    info: RankInfo | None,
    console: Console,
    *,
    heading: str,
    out: Path | None,
    name: str,
    notes: tuple[str, ...] = (),
) -> Played:
    """Play the program in ranks of this machine, or (info given) in this rank; NAME.json grows match by match."""
    from ringfa3_launch.bench.guard import Stuck
    from ringfa3_launch.bench.program import perform

    keep = None
    if out is not None:
        keep = partial(_keep, out=out, name=name, heading=heading, command=command(), notes=notes)
    more, steps = (keep,), len(program.matches)
    try:
        return in_ranks(perform, program, steps, world, info, console, device=program.device, more=more)
    except Stuck as error:
        kept = "" if out is None else f"; what was measured before is in {out / name}.json"
        print(f"ringfa3: {error}{kept}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly exit would wait for what hangs


def report_on(
    played: Played, heading: str, console: Console, *, as_json: bool = False, notes: tuple[str, ...] = ()
) -> int:
    """Print what came of it; returns the exit status."""
    from ringfa3_launch.bench import ring_report

    found = ring_report.document(played, command=command(), notes=notes)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        ring_report.show(played, found, heading, console)
    return 0 if played.outcomes and all(outcome.ours for outcome in played.outcomes) else 1


def command() -> str:
    """This command line."""
    program = Path(sys.argv[0]).name
    words = ["ringfa3"] if program in ("ringfa3", "__main__.py") else ["python", program]
    return shlex.join([*words, *sys.argv[1:]])


def _keep(
    played: Played, last: bool, *, out: Path, name: str, heading: str, command: str, notes: tuple[str, ...]
) -> None:
    """In rank 0, after every match."""
    from ringfa3_launch.bench import report, ring_report

    found = ring_report.document(played, command=command, notes=notes)
    if not last:
        report.save(found, out, name)
        return
    for path in ring_report.write(played, found, heading, out, name):
        print(f"wrote {os.path.relpath(path)}", file=sys.stderr)
