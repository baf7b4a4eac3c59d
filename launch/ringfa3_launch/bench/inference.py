"""How soon and how fast a language model answers over prompt length and ranks, beside transformers on one device."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringfa3_launch.bench.attention import announce_plot, in_ranks, integers
from ringfa3_launch.bench.case import DTYPES, parse_size
from ringfa3_launch.bench.ring import command
from ringfa3_launch.checkpoint import hush
from ringfa3_launch.console import Console
from ringfa3_launch.options import gpus_for, made_folder, reading
from ringfa3_launch.rank import RankInfo, launched

if TYPE_CHECKING:
    from ringfa3_launch.bench.inference_case import Played, Program

DESCRIPTION = """\
Measure the engine: prompts of every length are answered greedily by each world of ranks, and by transformers' generate
on one device (in the same run, with the same weights).

Reported per prompt length, batch and world, as medians over the rounds:
  first token   seconds from the request to its first token: the prefill
  each token    milliseconds from a token to the next, once all prompts are read: the decode
  tokens/s      answered by the whole batch, prefill included
  cache         bytes of the pages in use, of the rank that has most
  memory        peak of the rank that has most, weights and whole cache included
  checks        greedy tokens equal transformers' (or part at a tie); logits after the prompt against wider precision

and alone: decode attention of one layer beside a device copy, and the merge of the ranks' Partials; with random
weights also attention within the longest prefill, beside ring attention over as many tokens."""

EXAMPLES = """\
examples:
  ringfa3 bench inference                                        a random Llama-3-8B shape on GPUs, a tiny one on CPUs
  ringfa3 bench inference --model ~/llama --lengths 4K,32K       a model's own weights, and prose for prompts
  ringfa3 bench inference --shape llama-3-8b --lengths 8K,128K,256K --worlds 1,2 --out docs/results
  ringfa3 bench inference --lengths 8K --batches 1,8             also eight prompts at once
  ringfa3 bench inference --device cpu --lengths 256,512 --tokens 8 --rounds 1      tiny, a minute
  launch/torchrun.sh -m ringfa3_launch bench inference           in ranks that torchrun started (that world alone)

exit status: 0 measured (what could not run is named), 1 nothing was, a world failed, or answers are not what they
should be."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ringfa3 bench inference`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", metavar="PATH", help="a folder of transformers' format, or a GGUF file")
    what.add_argument("--shape", metavar="NAME", help="random weights of a shape (GPU llama-3-8b, CPU tiny)")
    what.add_argument("--lengths", metavar="LIST", help="tokens of a prompt (GPU 8K,32K,128K; CPU 256,1K)")
    what.add_argument("--batches", metavar="LIST", default="1", help="prompts at once; more than 1 at the first length")
    what.add_argument("--tokens", metavar="N", type=int, default=32, help="answered to each prompt (32)")
    what.add_argument("--worlds", metavar="LIST", help="numbers of ranks (1,2,4.. up to the GPUs; CPU 1,2)")
    what.add_argument("--dtype", choices=DTYPES, help="of weights and cache (GPU bf16, CPU fp32)")
    what.add_argument("--kernels", metavar="LIST", help="TOKENSxBATCH for decode attention alone, or none")
    what.add_argument("--check", metavar="N", help="longest prompt checked in wider precision (GPU 8K, CPU 1K)")
    how = parser.add_argument_group("how")
    how.add_argument("--no-peer", action="store_true", help="without transformers, and so without checks")
    how.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    how.add_argument("--chunk", type=int, help="prompt tokens prefilled at once (GPU 8192, CPU 256)")
    how.add_argument("--page-size", type=int, default=64, help="tokens in a page of the cache (64)")
    how.add_argument("--prefill", choices=("auto", "pass-kv", "pass-q"), default="auto", help="what travels (auto)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    how.add_argument("--rounds", type=int, default=3, help="timed, after a first one (3)")
    how.add_argument("--budget", type=float, help="seconds after which no load is begun; it is named as missing")
    how.add_argument("--seed", type=int, default=0, help="of random weights and prompts (0)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", type=Path, help="also write NAME.json, NAME.md and NAME.png there")
    output.add_argument("--name", default="inference", help="default inference")
    output.add_argument("--json", action="store_true", help="print the JSON document instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; see the module."""
    hush()
    info = RankInfo.from_env() if launched() else None
    asked = asked_from(args, info)
    silent = info is not None and info.rank > 0
    console = Console(rich=not silent)
    if args.out is not None and not silent:
        made_folder("--out", args.out)
        announce_plot(console)
    with tempfile.TemporaryDirectory(prefix="ringfa3-") as scratch:
        program = asked.program if info is not None else unpacked(asked.program, Path(scratch))
        worlds, failures = play(program, asked.worlds, info, console, asked, Path(scratch))
    if silent:
        return 0
    return report(args, program, worlds, failures, console)


@dataclass(frozen=True)
class Asked:
    """The options, checked.

    Args:
        program: what is measured.
        worlds: numbers of ranks, ascending.
        peer: whether transformers runs too.
        budget: seconds, or None.
    """

    program: Program
    worlds: tuple[int, ...]
    peer: bool
    budget: float | None


def asked_from(args: argparse.Namespace, info: RankInfo | None) -> Asked:
    """The options, defaults filled in for this machine.

    Raises:
        ValueError: an option is wrong; names it.
    """
    from ringfa3_launch.bench.inference_case import Load, Program
    from ringfa3_launch.bench.shapes import SHAPES
    from ringfa3_launch.checkpoint import Checkpoint

    gpus = gpus_for(args.device)
    if args.model is not None and args.shape is not None:
        raise ValueError(f"--shape: wanted none beside --model, got {args.shape!r}")
    shape = None if args.model is not None else args.shape or ("llama-3-8b" if gpus else "tiny")
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"--shape: wanted {', '.join(SHAPES)}, got {shape!r}")
    folder, model = None, shape or ""
    if args.model is not None:
        found = Checkpoint.find(args.model)
        folder, model = found.folder / (found.gguf or ""), found.name
    for name in ("tokens", "rounds", "chunk", "page_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: wanted 1 or more, got {value}")
    lengths = sorted({parse_size(size, "--lengths") for size in (args.lengths or _lengths(gpus)).split(",")})
    batches = sorted(set(integers("--batches", args.batches)))
    if batches[0] < 1:
        raise ValueError(f"--batches: wanted 1 or more, got {args.batches}")
    loads = [Load(length) for length in lengths] + [Load(lengths[0], batch) for batch in batches if batch > 1]
    kernels = args.kernels or ("64Kx1,64Kx16,512Kx1,512Kx16" if gpus else "1Kx1")
    program = Program(
        loads=tuple(loads), tokens=args.tokens, name=model, folder=folder, shape=shape,
        dtype=args.dtype or ("bf16" if gpus else "fp32"), device="cuda" if gpus else "cpu",
        chunk=args.chunk or (8192 if gpus else 256), page_size=args.page_size, prefill=args.prefill,
        graphs=gpus > 0 and not args.no_graphs, rounds=args.rounds,
        check=parse_size(args.check or ("8K" if gpus else "1K"), "--check"),
        kernels=() if kernels == "none" else tuple(map(_kernel, kernels.split(","))), seed=args.seed,
    )  # fmt: skip
    return Asked(program, _worlds(args.worlds, gpus, info), not args.no_peer, args.budget)


def play(
    program: Program,
    worlds: Sequence[int],
    info: RankInfo | None,
    console: Console,
    asked: Asked,
    scratch: Path,
) -> tuple[list[Played], list[str]]:
    """What came of each world, the first of which is judged by transformers too; and how worlds failed.

    Ctrl-C ends our own ranks' measuring, like the failure of a world: what was found until then is kept.
    """
    from ringfa3_launch.bench.inference_ranks import Task, perform

    until = None if asked.budget is None else time.monotonic() + asked.budget
    done: list[Played] = []
    failures: list[str] = []
    for world in worlds:
        kept = scratch / f"{world}.pickle"
        truths = done[0].truths if done else {}
        task = Task(program, asked.peer and not done, truths, until, None if info is not None else kept)
        try:
            done.append(in_ranks(perform, task, task.steps, world, info, console, device=program.device))
        except (RuntimeError, OSError, KeyboardInterrupt) as error:
            if info is not None:
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            what = "interrupted" if interrupted else f"{type(error).__name__}: {error}"
            failures.append(f"{world} ranks: {what}")
            print(f"ringfa3: {failures[-1]}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
            if kept.exists():  # our own ranks wrote it
                done.append(pickle.loads(kept.read_bytes()))
            if interrupted:
                break
    return done, failures


def report(
    args: argparse.Namespace, program: Program, worlds: Sequence[Played], failures: Sequence[str], console: Console
) -> int:
    """Print and write what came of it; returns the exit status."""
    from ringfa3_launch.bench import inference_report
    from ringfa3_launch.bench.inference_verdicts import Results

    if not worlds:
        return 1
    results = Results(program, tuple(worlds), tuple(failures))
    found = inference_report.document(results, command=command())
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        inference_report.show(results, found, console)
    if args.out is not None:
        for path in inference_report.write(results, found, args.out, args.name):
            print(f"wrote {os.path.relpath(path)}", file=sys.stderr)
    wrong = any(not checked.ok for world in worlds for checked in world.checked.values())
    nothing = not any(world.served for world in worlds)
    return 1 if failures or wrong or nothing else 0


def unpacked(program: Program, scratch: Path) -> Program:
    """The same with a plain folder in place of a GGUF file, which every rank would take half a minute to read."""
    from dataclasses import replace

    from ringfa3_launch.checkpoint import Checkpoint

    checkpoint = None if program.folder is None else Checkpoint.find(str(program.folder))
    if checkpoint is None or checkpoint.gguf is None:
        return program
    with reading(program.name):
        folder, tokenizer = checkpoint.unpack(scratch)
    tokenizer.save_pretrained(folder)
    return replace(program, folder=folder)


def _lengths(gpus: int) -> str:
    return "8K,32K,128K" if gpus else "256,1K"


def _worlds(given: str | None, gpus: int, info: RankInfo | None) -> tuple[int, ...]:
    if info is not None:
        if given not in (None, str(info.world)):
            raise ValueError(f"--worlds: wanted none beside a launcher, which started {info.world} ranks, got {given}")
        return (info.world,)
    if given is None:
        return tuple(1 << i for i in range(gpus.bit_length()) if 1 << i <= gpus) if gpus else (1, 2)
    worlds = tuple(sorted(set(integers("--worlds", given))))
    if worlds[0] < 1 or (gpus and worlds[-1] > gpus):
        raise ValueError(f"--worlds: wanted 1..{gpus or 'any'} ranks on this machine, got {given}")
    return worlds


def _kernel(text: str) -> tuple[int, int]:
    """ "64Kx16" -> (65536, 16)."""
    length, times, batch = text.partition("x")
    if not times or not batch.isdigit() or int(batch) < 1:
        raise ValueError(f"--kernels: wanted TOKENSxBATCH such as 64Kx16, or none, got {text!r}")
    return parse_size(length, "--kernels"), int(batch)
