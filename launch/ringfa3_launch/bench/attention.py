"""Sweep ring attention over sequence lengths and worlds, beside torch's own attention in the same processes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ringfa3_launch.bench.case import DIRECTIONS, DTYPES, PEERS, RING_PEERS, Sweep, parse_mask, parse_size
from ringfa3_launch.console import Advance, Console
from ringfa3_launch.local import local
from ringfa3_launch.options import checked_head_dim, checked_transport, gpus_for, made_folder
from ringfa3_launch.rank import RankInfo, init, launched

if TYPE_CHECKING:
    from ringfa3_launch.bench.sweep import Result

T = TypeVar("T")

DESCRIPTION = """\
Measure ring attention over sequence lengths and worlds (a world of 1 is one device alone), beside torch's own
attention in the same processes: every round times each of them once, in turn, so that clocks and heat favour nobody.

Reported per case, as medians over the rounds:
  TFLOP/s     per GPU (per CPU rank), counting 4 operations a visible query-key pair, head and head_dim, 2.5x backward
  efficiency  TFLOP/s per GPU, as a share of what the world of 1 reached at the same length
  % peak      of the device's dense matrix rate (datasheet), and of a matrix product measured in the same rounds
  memory      peak of one rank: its inputs, outputs, gradients and all that a call allocates
  error       relative, on sampled rows against fp64; beside it, plain PyTorch attention's in the same precision"""

EXAMPLES = """\
examples:
  ringfa3 bench attention                                       what suits this machine
  ringfa3 bench attention --seqlens 16K,64K,256K --worlds 1,2   on two GPUs, four minutes
  ringfa3 bench attention --mask window=4096 --directions fwd   sliding window, forward only
  ringfa3 bench attention --mask documents --layout balanced    packed documents, dealt so that ranks have equal work
  ringfa3 bench attention --out docs/results                    also writes attention.json, attention.md, attention.png
  ringfa3 bench attention --seqlens 1K --heads 2:1 --head-dim 64 --dtype fp32 --device cpu   tiny, seconds
  launch/torchrun.sh -m ringfa3_launch bench attention          in ranks that torchrun started

exit status: 0 measured (missing peers are named, with the reason), 1 ringfa3's own attention failed a case."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ringfa3 bench attention`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    what = parser.add_argument_group("what is measured")
    what.add_argument("--seqlens", metavar="LIST", help="tokens, all ranks together (GPU 1K,4K,16K,64K; CPU 1K,2K,4K)")
    what.add_argument("--worlds", metavar="LIST", help="numbers of ranks (default 1,2,4.. up to the GPUs; CPU 1,2)")
    what.add_argument("--heads", metavar="Q:KV", help="query and key/value heads (default GPU 32:8, CPU 4:2)")
    what.add_argument("--head-dim", metavar="D", type=int, default=128, help="default 128")
    what.add_argument("--dtype", choices=DTYPES, help="default GPU bf16, CPU fp32")
    what.add_argument(
        "--mask",
        default="causal",
        help="causal (default), full, window=TOKENS, documents[=COUNT] or packed[=SEED]",
    )
    what.add_argument("--directions", metavar="LIST", default=",".join(DIRECTIONS), help="of fwd,fwd+bwd (both)")
    how = parser.add_argument_group("how")
    how.add_argument("--layout", choices=("zigzag", "contiguous", "striped", "balanced"), default="zigzag")
    how.add_argument("--transport", default="auto", help="as ring_attention's: auto (default), ring, gather, ...")
    how.add_argument("--impl", default="auto", help="kernels: auto (default), hopper, portable, aten, reference")
    how.add_argument("--peers", metavar="LIST", help=f"default {','.join(PEERS)}; 'none'; any of `bench ring`'s")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    how.add_argument("--seconds", type=float, default=4.0, help="spent on a case's rounds, at least two (default 4)")
    how.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", type=Path, help="also write NAME.json, NAME.md and NAME.png there")
    output.add_argument("--name", default="attention", help="default attention")
    output.add_argument("--json", action="store_true", help="print the JSON document instead of the table")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; see the module."""
    info = RankInfo.from_env() if launched() else None
    sweep = sweep_from(args, info)
    silent = info is not None and info.rank > 0
    console = Console(rich=not silent)
    if args.out is not None and not silent:
        made_folder("--out", args.out)
        announce_plot(console)
    from ringfa3_launch.bench.sweep import measure, program

    steps = len(program(sweep).matches)
    results = in_ranks(measure, sweep, steps, max(sweep.worlds), info, console, device=sweep.device)
    if silent:
        return 0
    return _report(args, sweep, results, console)


def sweep_from(args: argparse.Namespace, info: RankInfo | None) -> Sweep:
    """The options as a Sweep, defaults filled in for this machine.

    Args:
        info: this rank, where a launcher started it; it bounds the worlds.

    Raises:
        ValueError: an option is wrong; names it.
    """
    gpus = gpus_for(args.device)
    most = info.world if info is not None else gpus or max(2, *integers("--worlds", args.worlds or "2"))
    worlds = integers("--worlds", args.worlds) if args.worlds else tuple(w for w in _powers(most))
    if min(worlds) < 1 or max(worlds) > most:
        what = "ranks that the launcher started" if info is not None else "GPUs"
        raise ValueError(f"--worlds: wanted 1..{most} ({what}), got {','.join(map(str, worlds))}")
    heads = integers("--heads", args.heads or ("32:8" if gpus else "4:2"), ":")
    if len(heads) != 2 or min(heads) < 1 or heads[0] % heads[1]:
        raise ValueError(f"--heads: wanted Q:KV with Q a multiple of KV, such as 32:8, got {args.heads!r}")
    directions = tuple(args.directions.split(","))
    subset("--directions", directions, DIRECTIONS)
    peers = () if args.peers == "none" else tuple(args.peers.split(",")) if args.peers else PEERS
    subset("--peers", peers, (*PEERS, *RING_PEERS))
    seqlens = args.seqlens or ("1K,4K,16K,64K" if gpus else "1K,2K,4K")
    return Sweep(
        seqlens=tuple(sorted({parse_size(size, "--seqlens") for size in seqlens.split(",")})),
        worlds=tuple(sorted(set(worlds))),
        Hq=heads[0],
        Hkv=heads[1],
        D=checked_head_dim(args.head_dim),
        dtype=args.dtype or ("bf16" if gpus else "fp32"),
        mask=parse_mask(args.mask),
        directions=directions,
        layout=args.layout,
        transport=checked_transport("--transport", args.transport),
        impl=args.impl,
        peers=peers,
        device="cuda" if gpus else "cpu",
        seconds=args.seconds,
        seed=args.seed,
    )


def in_ranks(
    measure: Callable[..., T],
    asked: Any,
    steps: int,
    world: int,
    info: RankInfo | None,
    console: Console,
    *,
    device: str,
    more: tuple[Any, ...] = (),
) -> T:
    """What measure(info, asked, listener, *more) returns on rank 0, or (info given) here, with a progress bar.

    Args:
        measure: of a module's top level; listener is a pipe's end or a callable that takes (text, steps done), or None.
        asked: what it measures.
        steps: how many it reports.
        world: ranks to start, where info is None.
        info: this rank, where a launcher started it.
        device: "cuda" or "cpu".
    """
    if info is not None:
        with init(info, device=device):
            if info.rank > 0:
                return measure(info, asked, None, *more)
            with console.progress(steps) as advance:
                return measure(info, asked, advance, *more)
    reader, writer = Pipe(duplex=False)
    with console.progress(steps) as advance:
        listener = threading.Thread(target=_listen, args=(reader, advance), daemon=True)
        listener.start()
        try:
            return local(world, measure, asked, writer, *more, device=device)[0]
        finally:
            writer.close()  # the ranks' copies are closed: the listener reads to the end and stops
            listener.join(5)


def _listen(reader: connection.Connection, advance: Advance) -> None:
    while True:
        try:
            text, steps = reader.recv()
        except (EOFError, OSError):
            return
        advance(text, steps)


def _report(args: argparse.Namespace, sweep: Sweep, results: list[Result], console: Console) -> int:
    from ringfa3_launch.bench import report
    from ringfa3_launch.bench.ring_peers import applies

    command = shlex.join(["ringfa3", *sys.argv[1:]])
    document = report.document(results, command=command)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        report.show(results, document, console)
        for name in sweep.peers:
            if not any(applies(name, world) for world in sweep.worlds):
                wanted = "1" if applies(name, 1) else "2 or more"
                console.say(f"missing: {name}: compares with worlds of {wanted}, and --worlds has none", "note")
    if args.out is not None:
        for path in report.write(results, document, args.out, args.name):
            print(f"wrote {os.path.relpath(path)}", file=sys.stderr)
    return 1 if any(result.failure for result in results) else 0


def announce_plot(console: Console) -> None:
    """Say now that there will be no plot, where there will be none."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plot will be written (pip install 'ringfa3[bench]')", file=console.err)


def integers(option: str, text: str, separator: str = ",") -> tuple[int, ...]:
    """An option's integers.

    Raises:
        ValueError: it has others; names the option.
    """
    parts = text.split(separator)
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"{option}: wanted integers separated by '{separator}', got {text!r}")
    return tuple(map(int, parts))


def _powers(most: int) -> list[int]:
    return sorted({w for w in (1 << i for i in range(most.bit_length())) if w <= most} | {most})


def subset(option: str, got: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Raise ValueError, naming the option, unless all that it got is wanted."""
    for name in got:
        if name not in wanted:
            raise ValueError(f"{option}: wanted {', '.join(wanted)}, got {name!r}")
