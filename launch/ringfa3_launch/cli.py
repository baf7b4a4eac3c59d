"""The command `ringfa3`: doctor, demo, generate, plan, trace, serve, bench."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from ringfa3_launch.options import refuses

PROGRAM = """\
Exact attention over sequences that no single GPU should have to hold.
The keys and values of a long text are sharded over ranks (GPUs, or CPU processes where there is none);
every query still sees every key that its mask allows, and the result equals one device's to rounding."""

EXAMPLES = """\
examples:
  ringfa3 doctor                      what is installed here, what would run, and does it work?
  ringfa3 demo                        a language model reads a long text that is sharded over the ranks
  ringfa3 generate --prompt-file F    a language model answers, its cache sharded over the ranks
  ringfa3 plan --seqlen 1M --world 8  which transport, layout and mesh, and how long will it take?
  ringfa3 trace --ranks 2             what did every rank do when? One trace for ui.perfetto.dev
  ringfa3 serve                       completions in OpenAI's form and attention over HTTP, on 127.0.0.1:8000
  ringfa3 bench attention --help      how fast is it here, beside torch's own attention?
  ringfa3 bench ring --help           and what does the ring add to its kernels, beside other ring libraries?
  ringfa3 bench inference --help      and how soon, and how fast, does a language model answer?
  ringfa3 bench service --help        and how many clients at once does the service answer?
  launch/torchrun.sh train.py         your own script, one rank a GPU (docs/launch.md)

`ringfa3 COMMAND --help` explains a command and its options.
Exit status: 0 it worked, 1 something is broken, 2 the command line is wrong, 130 interrupted."""

BENCH = """\
Benchmarks. Each prints a table; with --out DIR it also writes it there as JSON, Markdown and a plot."""

# command -> (module with add_arguments(parser) and run(args) -> int, one line of help)
COMMANDS = {
    ("doctor",): ("ringfa3_launch.doctor", "examine this machine and the installation; non-zero exit when broken"),
    ("demo",): ("ringfa3_launch.demo", "a real model answers from a long text sharded over the ranks"),
    ("generate",): ("ringfa3_launch.generate", "answer one prompt with a model whose cache is sharded over the ranks"),
    ("plan",): ("ringfa3_launch.planning", "predict time, waiting and memory; recommend transport, layout and mesh"),
    ("trace",): ("ringfa3_launch.trace", "run ring attention and write one Perfetto trace of all ranks"),
    ("serve",): (
        "ringfa3_launch.serve",
        "completions and attention over HTTP, from a gang of ranks that survives faults",
    ),
    ("bench", "attention"): (
        "ringfa3_launch.bench.attention",
        "sweep lengths and worlds beside torch's own attention",
    ),
    ("bench", "ring"): ("ringfa3_launch.bench.ring", "what the ring adds to its kernels, beside other ring libraries"),
    ("bench", "inference"): (
        "ringfa3_launch.bench.inference",
        "time to first token and per token, beside transformers",
    ),
    ("bench", "service"): (
        "ringfa3_launch.bench.service",
        "the HTTP service under load, and what it adds to the engine",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build(argv).parse_args(argv)
    if not hasattr(args, "run"):
        args.parser.print_help()
        return 2
    try:
        status: int = args.run(args)
        return status
    except KeyboardInterrupt:
        print("ringfa3: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        if os.environ.get("RINGFA3_TRACEBACK"):
            raise
        where = "" if refuses(error) else "  (RINGFA3_TRACEBACK=1 shows where)"
        print(f"ringfa3: {error}{where}", file=sys.stderr)
        return 2


def build(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the module of the command that argv names is imported, so that --help is quick."""
    parser = _parser(argparse.ArgumentParser, prog="ringfa3", description=PROGRAM, epilog=EXAMPLES)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    bench = _parser(
        commands.add_parser,
        "bench",
        help="benchmarks: `ringfa3 bench attention`, `bench ring`, `bench inference`, `bench service`",
        description=BENCH,
    )
    bench.set_defaults(parser=bench)
    benches = bench.add_subparsers(title="benchmarks", metavar="WHAT")
    words = tuple(word for word in argv if not word.startswith("-"))
    for command, (module, line) in COMMANDS.items():
        group = benches if command[0] == "bench" else commands
        chosen = words[: len(command)] == command
        loaded = importlib.import_module(module) if chosen else None
        entry = _parser(group.add_parser, command[-1], help=line, description=loaded.__doc__ if loaded else line)
        if loaded is not None:
            loaded.add_arguments(entry)
            entry.set_defaults(run=loaded.run)
    return parser


def _parser(make: Any, *args: Any, **options: Any) -> argparse.ArgumentParser:  # make: ArgumentParser or add_parser
    parser: argparse.ArgumentParser = make(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser, *_):  # type: ignore[no-untyped-def]  # argparse's signature
        from ringfa3_launch.machine import version

        print(f"ringfa3 {version('ringfa3')}")
        parser.exit()
