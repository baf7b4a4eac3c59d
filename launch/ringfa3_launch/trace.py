"""Run ring attention under torch.profiler and write one Perfetto trace of all ranks: hops, copies, kernels and gaps."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ringfa3_launch.bench.case import DTYPES, parse_mask, parse_size
from ringfa3_launch.console import Console
from ringfa3_launch.local import local
from ringfa3_launch.options import checked_head_dim, checked_transport, gpus_for
from ringfa3_launch.rank import RankInfo, init, launched

if TYPE_CHECKING:
    from ringfa3_launch.perfetto import Share
    from ringfa3_launch.recording import Recording, Setup

DESCRIPTION = """\
Run ring attention with torch.profiler on every rank and merge what they saw into one trace, for ui.perfetto.dev or
chrome://tracing: a process per rank, its hops and copies in rows of their own above its threads and streams.

Clocks: each rank reads its machine's clock inside a named range, which ties the profiler's time to it. Ranks of one
machine share that clock; for every other machine's, rank 0 exchanges timestamps with the rank 32 times after a barrier
and takes the round trip that was quickest: its middle is the same moment on both, to half that round trip (printed,
and written into the trace).

Reported per rank: compute is the time in which a hop (on GPUs: any kernel but NCCL's) runs, copy that in which a
message is under way, overlap the share of copy that lies within compute, gap the time in which nothing computes. On
CPUs a message ends when its rank has waited for it."""

EXAMPLES = """\
examples:
  ringfa3 trace                                                what suits this machine, to ringfa3-trace.json.gz
  ringfa3 trace --ranks 4 --seqlen 2K --heads 2:1 --head-dim 64 --dtype fp32 --device cpu
  ringfa3 trace --seqlen 64K --backward --transport ring --out ring.json
  launch/torchrun.sh -m ringfa3_launch trace --seqlen 64K      in ranks that torchrun started

then open https://ui.perfetto.dev and drag the file there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ringfa3 trace`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    what = parser.add_argument_group("what runs")
    what.add_argument("--seqlen", metavar="N", help="tokens, all ranks together (GPU 64K, CPU 2K)")
    what.add_argument(
        "--ranks", type=int, metavar="N", help="default: every GPU; 2 on CPUs; torchrun's, under torchrun"
    )
    what.add_argument("--heads", metavar="Q:KV", help="query and key/value heads (default GPU 32:8, CPU 4:2)")
    what.add_argument("--head-dim", metavar="D", type=int, default=128, help="default 128")
    what.add_argument("--dtype", choices=DTYPES, help="default GPU bf16, CPU fp32")
    what.add_argument(
        "--mask", default="causal", help="causal (default), full, window=TOKENS, documents[=COUNT], packed[=SEED]"
    )
    what.add_argument("--backward", action="store_true", help="forward and backward; default: forward")
    how = parser.add_argument_group("how")
    how.add_argument("--layout", choices=("zigzag", "contiguous", "striped", "balanced"), help="default zigzag")
    how.add_argument("--transport", default="auto", help="as `ring_attention`'s (default auto)")
    how.add_argument("--impl", default="auto", help="kernels: auto (default), hopper, portable, aten, reference")
    how.add_argument("--calls", type=int, default=1, metavar="N", help="calls recorded, after two that are not (1)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("ringfa3-trace.json.gz"), help="gzipped if .gz"
    )
    output.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Record, merge, write and summarise; see the module."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler writes to stderr
    from ringfa3_launch.recording import record

    info = RankInfo.from_env() if launched() else None
    setup = setup_from(args, info)
    if not args.out.parent.is_dir():
        raise ValueError(f"--out: wanted a file in a folder that exists, got {args.out}")
    if info is None:
        recordings = local(setup.ranks, record, setup, device=setup.device)[0]
    else:
        with init(info, device=setup.device):
            recordings = record(info, setup)
        if info.rank > 0:
            return 0
    report(args, setup, recordings)
    return 0


def setup_from(args: argparse.Namespace, info: RankInfo | None) -> Setup:
    """The options as a Setup, defaults filled in for this machine.

    Raises:
        ValueError: an option is wrong; names it.
    """
    from ringfa3_launch.recording import Setup

    gpus = gpus_for(args.device)
    ranks = info.world if info is not None else args.ranks or gpus or 2
    if ranks < 1 or (args.ranks not in (None, ranks)):
        wanted = f"the {ranks} that the launcher started" if info is not None else "1 or more"
        raise ValueError(f"--ranks: wanted {wanted}, got {args.ranks}")
    if args.calls < 1:
        raise ValueError(f"--calls: wanted 1 or more, got {args.calls}")
    heads = args.heads or ("32:8" if gpus else "4:2")
    parts = heads.split(":")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts) or int(parts[0]) % int(parts[1]):
        raise ValueError(f"--heads: wanted Q:KV with Q a multiple of KV, such as 32:8, got {heads!r}")
    return Setup(
        seqlen=parse_size(args.seqlen or ("64K" if gpus else "2K"), "--seqlen"),
        ranks=ranks,
        Hq=int(parts[0]),
        Hkv=int(parts[1]),
        D=checked_head_dim(args.head_dim),
        dtype=args.dtype or ("bf16" if gpus else "fp32"),
        mask=parse_mask(args.mask),
        backward=args.backward,
        layout=args.layout or ("contiguous" if args.transport == "ulysses" else "zigzag"),
        transport=checked_transport("--transport", args.transport),
        impl=args.impl,
        calls=args.calls,
        device="cuda" if gpus else "cpu",
    )


def report(args: argparse.Namespace, setup: Setup, recordings: list[Recording]) -> None:
    """Write the trace and print where it is and what each rank did."""
    from ringfa3_launch.perfetto import merge, shares, write

    trace = merge(recordings, setup.title)
    write(trace, args.out)
    found = shares(trace)
    if args.json:
        document = {
            "trace": str(args.out),
            "title": setup.title,
            "clocks": trace["otherData"]["clocks"],
            "ranks": [vars(share) | {"overlap": share.overlap} for share in found],
        }
        print(json.dumps(document, indent=1))
        return
    console = Console()
    console.heading(setup.title)
    console.table(("rank", "host", "ms", "compute", "copy", "overlap", "gaps", "longest gap"), [_row(s) for s in found])
    console.say(trace["otherData"]["clocks"])
    size = args.out.stat().st_size / 1e6
    events = len(trace["traceEvents"])
    console.say(f"wrote {os.path.relpath(args.out)} ({size:.2g} MB, {events} events): drag it to ui.perfetto.dev", "ok")
    if any(share.hops == 0 for share in found):
        print("some ranks computed no hop: the mask or the layout gives them nothing to do", file=sys.stderr)


def _row(share: Share) -> tuple[str, ...]:
    return (
        str(share.rank),
        share.host,
        f"{share.total:.3f}",
        f"{share.compute:.3f}",
        f"{share.copy:.3f}",
        "-" if share.overlap is None else f"{100 * share.overlap:.0f}%",
        f"{share.gaps:.3f}",
        f"{share.longest:.3f}",
    )
