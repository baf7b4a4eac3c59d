"""Predict a sharded attention, hop by hop: which transport, layout and mesh to take, and how long each rank waits."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ringfa3_launch import plan_report
from ringfa3_launch.bench.case import DTYPES, Case, parse_mask, parse_size
from ringfa3_launch.console import Console
from ringfa3_launch.options import checked_head_dim

if TYPE_CHECKING:
    from ringfa3.cost import Job, Machine, Prediction

DESCRIPTION = """\
Predict a sharded attention before any GPU is booked: every way of doing it (transport x layout x mesh) is played
through hop by hop, with the exact number of visible pairs, measured speeds of the kernels and measured bandwidths.
Needs no GPU. Figures are an H200's, unless others are given; the last table says where each comes from.

  share   speed per GPU, as a share of what one GPU alone would reach on the whole sequence
  waits   share of the busiest rank's time in which it computes nothing
  slowed  share by which transfers beside them prolong its hops
  there   when a hop's keys have arrived; waited: how long the rank was idle for them"""

EXAMPLES = """\
examples:
  ringfa3 plan --seqlen 128K --world 8                            the recommendation, hops of the slowest rank, timeline
  ringfa3 plan --seqlen 1M --world 16 --hosts 2 --backward        training, two hosts of eight
  ringfa3 plan --seqlen 64K --world 4 --mask packed --layout zigzag,balanced
  ringfa3 plan --seqlen 16K --world 2 --transport ring --png ring.png
  ringfa3 plan --seqlen 64K --world 8 --mesh 2x4                  a mesh of 2 (Ulysses) x 4 (ring)
  ringfa3 doctor --json > here.json; ringfa3 plan --seqlen 64K --world 2 --measured here.json

exit status: 0 there is a way, 2 the command line is wrong or nothing can serve it."""

MOST = 512  # ranks; beyond, counting every rank's pairs in every shard takes too long
LINKS = {"pull": "pull", "ring": "sendrecv", "hosts": "between"}  # as --bandwidth names them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ringfa3 plan`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    what = parser.add_argument_group("what is computed")
    what.add_argument("--seqlen", required=True, help="tokens, all ranks together: 64K, 1M, ...")
    what.add_argument("--world", type=int, required=True, metavar="N", help="ranks, one GPU each")
    what.add_argument("--hosts", type=int, default=1, metavar="N", help="hosts that the ranks are on (default 1)")
    what.add_argument("--heads", metavar="Q:KV", default="32:8", help="query and key/value heads (default 32:8)")
    what.add_argument("--head-dim", metavar="D", type=int, default=128, help="default 128")
    what.add_argument("--batch", metavar="B", type=int, default=1, help="batch rows (default 1)")
    what.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    what.add_argument(
        "--mask", default="causal", help="causal (default), full, window=TOKENS, documents[=COUNT], packed[=SEED]"
    )
    what.add_argument("--backward", action="store_true", help="forward and backward; default: forward")
    ways = parser.add_argument_group("ways to consider")
    ways.add_argument("--transport", metavar="LIST", help="of pull,ring,gather,hierarchical,ulysses (default: all)")
    ways.add_argument("--layout", metavar="LIST", help="of zigzag,contiguous,striped,balanced (default: all)")
    ways.add_argument("--mesh", metavar="UxR", help="ranks of the ulysses and of the ring axis, as 2x4 (default: all)")
    ways.add_argument("--depth", type=int, default=3, metavar="N", help="buffers for shards under way (default 3)")
    figures = parser.add_argument_group("figures to predict with")
    figures.add_argument(
        "--measured", action="append", default=[], metavar="FILE", type=Path,
        help="what `ringfa3 doctor --json` (bandwidth of copies) or `ringfa3 bench attention --json` (speed of the "
        "kernels on one GPU) wrote; may be given several times",
    )  # fmt: skip
    figures.add_argument(
        "--bandwidth", metavar="LINK=GB/s", action="append", default=[],
        help="of large messages: pull=365, ring=280 (NCCL inside a host) or hosts=45 (between hosts, a GPU)",
    )  # fmt: skip
    figures.add_argument("--tflops", metavar="FWD[,BWD]", help="of the attention kernels on one GPU, at this head_dim")
    output = parser.add_argument_group("output")
    output.add_argument("--rank", metavar="R", help="whose hops to list: a number or 'all' (default: the slowest's)")
    output.add_argument("--png", metavar="FILE", type=Path, help="also draw the timeline of all ranks there")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Predict, print and draw; see the module."""
    from ringfa3.cost import recommend
    from ringfa3_kernels import Unsupported

    job, machine = job_from(args), machine_from(args)
    if args.png is not None and args.png.suffix.lower() != ".png":
        raise ValueError(f"--png: wanted a file that ends in .png, got {args.png}")
    if args.png is not None and not args.png.parent.is_dir():
        raise ValueError(f"--png: wanted a file in a folder that exists, got {args.png}")
    if args.depth < 2:
        raise ValueError(f"--depth: wanted 2 buffers or more, one to read and one to fill, got {args.depth}")
    transports, layouts = _names(args.transport), _names(args.layout)
    _check_names(transports, layouts)
    ulysses = None if args.mesh is None else (_mesh(args.mesh, job.world),)
    if ulysses is None and transports is not None and "ulysses" not in transports:
        ulysses = (1,)  # a transport by name means that alone, no mesh
    _check_heads(job, job.world if transports == ("ulysses",) else 1 if ulysses is None else ulysses[0])
    try:
        choice = recommend(
            job,
            machine,
            transports=transports,
            ulysses=ulysses,
            depth=args.depth,
            **({"layouts": layouts} if layouts else {}),
        )
    except Unsupported as error:
        raise ValueError(str(error)) from None
    ranks = _ranks(args.rank, choice.best)
    if args.json:
        print(json.dumps(plan_report.document(choice, machine), indent=1))
    else:
        plan_report.show(choice, machine, args.mask, ranks, Console())
    if args.png is not None:
        from ringfa3_launch.timeline import draw

        draw(choice.best, args.png, f"{plan_report.title(job, args.mask)}\n{plan_report.totals(choice.best)}")
        print(f"wrote {os.path.relpath(args.png)}", file=sys.stderr)
    return 0


def job_from(args: argparse.Namespace) -> Job:
    """The options as a Job.

    Raises:
        ValueError: an option is wrong; names it.
    """
    from ringfa3.cost import Job

    if not 1 <= args.world <= MOST:
        raise ValueError(f"--world: wanted 1..{MOST} ranks, got {args.world}")
    parts = args.heads.split(":")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts) or int(parts[0]) % int(parts[1]):
        raise ValueError(f"--heads: wanted Q:KV with Q a multiple of KV, such as 32:8, got {args.heads!r}")
    seqlen = parse_size(args.seqlen, "--seqlen")
    checked_head_dim(args.head_dim)
    Hq, Hkv = map(int, parts)
    mask = Case("fwd", parse_mask(args.mask), args.head_dim, Hq, Hkv, seqlen, args.world, args.dtype).visible
    try:
        return Job(mask, seqlen, args.world, Hq, Hkv, args.head_dim, args.dtype, args.batch, args.hosts, args.backward)
    except ValueError as error:  # its arguments are named as our options are
        raise ValueError(f"--{error}") from None


def machine_from(args: argparse.Namespace) -> Machine:
    """The H200, with what was measured here or said on the command line in place of its figures.

    Raises:
        ValueError: a file or an option says nothing that can be used.
    """
    from ringfa3.cost import Machine
    from ringfa3_launch.measured import apply

    machine = Machine.h200()
    for path in args.measured:
        machine = apply(machine, path, args.dtype)
    for text in args.bandwidth:
        link, equals, value = text.partition("=")
        if link not in LINKS or not equals or not _positive(value):
            raise ValueError(f"--bandwidth: wanted {', '.join(LINKS)} = GB/s above 0, such as pull=365, got {text!r}")
        machine = machine.with_bandwidth(LINKS[link], float(value), "--bandwidth")
    if args.tflops:
        parts = args.tflops.split(",")
        if len(parts) > 2 or not all(map(_positive, parts)):
            raise ValueError(
                f"--tflops: wanted FORWARD or FORWARD,BACKWARD above 0, such as 650,590, got {args.tflops!r}"
            )
        if args.backward and len(parts) == 1:
            raise ValueError(f"--tflops: wanted FORWARD,BACKWARD with --backward, got {args.tflops!r}")
        rates = [((1.0, float(part)),) for part in parts]
        machine = machine.with_kernels(
            "--tflops", forward=rates[0], backward=rates[-1], dtype=args.dtype, D=args.head_dim
        )
    if args.dtype not in machine.dtypes:
        raise ValueError(f"--tflops: wanted speeds for {args.dtype} (the H200's are bf16's and fp16's), got none")
    return machine


def _ranks(text: str | None, p: Prediction) -> list[int]:
    ranks = range(p.scene.ring)
    if text is None:
        return [max(ranks, key=lambda rank: p.ends[rank])]
    if text == "all":
        return list(ranks)
    if not text.isdigit() or int(text) not in ranks:
        raise ValueError(f"--rank: wanted 'all' or one of the {len(ranks)} ranks of the ring axis, got {text!r}")
    return [int(text)]


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(text.split(","))


def _check_names(transports: tuple[str, ...] | None, layouts: tuple[str, ...] | None) -> None:
    from ringfa3.cost import LAYOUTS, TRANSPORTS

    for option, got, wanted in (("--transport", transports, TRANSPORTS), ("--layout", layouts, LAYOUTS)):
        for name in got or ():
            if name not in wanted:
                raise ValueError(f"{option}: wanted {', '.join(wanted)}, got {name!r}")


def _check_heads(job: Job, u: int) -> None:
    """Raise ValueError unless Ulysses, asked for on so many ranks, deals each of them as many query heads."""
    if job.Hq < u:
        raise ValueError(f"--heads: wanted at least one query head for each of {u} Ulysses ranks, got {job.Hq}")
    if job.Hq % u:
        raise ValueError(
            f"--heads: wanted query heads that the {u} Ulysses ranks divide, as plan covers head counts that divide "
            f"(ring_attention serves others too), got {job.Hq}"
        )


def _mesh(text: str, world: int) -> int:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[0]) * int(parts[1]) != world:
        raise ValueError(
            f"--mesh: wanted ULYSSESxRING whose product is the {world} ranks, such as 1x{world}, got {text!r}"
        )
    return int(parts[0])


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
