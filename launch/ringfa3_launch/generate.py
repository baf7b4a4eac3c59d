"""Answer one prompt with a language model whose key/value cache is sharded over the ranks, token by token."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING

from ringfa3_launch.checkpoint import Checkpoint, hush
from ringfa3_launch.generate_ranks import Answer, Asked, Tell, respond, unheard
from ringfa3_launch.local import local
from ringfa3_launch.options import DTYPES, dtype_name, gpus_for
from ringfa3_launch.rank import RankInfo, init, launched

if TYPE_CHECKING:
    from ringfa3.inference import Sampling

DESCRIPTION = """\
Answer one prompt. Its keys and values are sharded over the ranks: each prefills its part of every chunk and keeps what
it computed; decode reads all of it. With --tp N groups of N ranks share the weights and their heads. The answer goes to
stdout as it comes, how fast that was to stderr."""

EXAMPLES = """\
examples:
  ringfa3 generate --prompt "The capital of France is"                  a small model, on all GPUs (2 CPU ranks)
  ringfa3 generate --model ~/llama --chat --prompt-file question.txt    a folder of transformers' format, or GGUF
  cat book.txt | ringfa3 generate --model ~/llama --prompt-file - --max-tokens 500 --temperature 0.7 --seed 1
  launch/torchrun.sh -m ringfa3_launch generate --model /models/llama --prompt-file book.txt
  ringfa3 generate --model ~/llama-70b --ranks 8 --tp 4 --prompt-file book.txt   weights in 4 parts, the cache in 2 x 4

exit status: 0 answered, 1 the model failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ringfa3 generate`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    what = parser.add_argument_group("what is answered")
    what.add_argument("--model", metavar="PATH", help="a folder of transformers' format, or GGUF (SmolLM2-135M)")
    what.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    what.add_argument("--prompt-file", metavar="FILE", help="a text file in UTF-8 that holds it; - is stdin")
    what.add_argument("--chat", action="store_true", help="the prompt, less newlines at its end, is a user's message")
    what.add_argument("--system", metavar="TEXT", help="what the model is told before it, with --chat")
    how = parser.add_argument_group("sampling")
    how.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of the answer (256)")
    how.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    how.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest; 0: all (0)")
    how.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest that sum to P (1)")
    how.add_argument("--seed", type=int, metavar="N", help="equal seeds, equal answers (a new one every time)")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")
    how.add_argument("--ignore-eos", action="store_true", help="go on after the model's end of sequence")
    where = parser.add_argument_group("where")
    where.add_argument("--ranks", type=int, metavar="N", help="processes of this machine (all GPUs; 2 on CPUs)")
    where.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share the weights (1)")
    where.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where ranks run (auto)")
    where.add_argument(
        "--dtype", type=dtype_name, choices=DTYPES, help="of weights and cache (GPU bfloat16, CPU float32)"
    )
    where.add_argument("--chunk", type=int, metavar="N", help="prompt tokens prefilled at once (GPU 8192, CPU 1024)")
    where.add_argument("--page-size", type=int, default=64, metavar="N", help="tokens in a page of the cache (64)")
    where.add_argument("--prefill", choices=("auto", "pass-kv", "pass-q"), default="auto", help="what travels (auto)")
    where.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead")


def run(args: argparse.Namespace) -> int:
    """Answer; see the module."""
    hush()
    info = RankInfo.from_env() if launched() else None
    asked, world, place = asked_from(args, info)
    tell: Tell = unheard if args.json else _show
    from ringfa3_kernels import Unsupported

    try:
        if info is not None:
            with init(info, device=place):
                answer = respond(info, asked, tell if info.rank == 0 else None)
        else:
            print(f"{asked.name} on {world} ranks ({place})", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="ringfa3-") as scratch:
                answer = respond_locally(world, asked.unpacked(Path(scratch)), place, tell)
    except Unsupported as error:
        raise ValueError(f"--model: wanted one that can be served, got {asked.name} ({error})") from None
    if answer is None:  # a rank that does not lead
        return 0
    report(answer, world, as_json=args.json)
    return 1 if answer.finish == "error" else 0


def asked_from(args: argparse.Namespace, info: RankInfo | None) -> tuple[Asked, int, str]:
    """The options, what they leave open filled in for this machine; number of ranks; "cuda" or "cpu".

    Raises:
        ValueError: an option is wrong; names it.
    """
    gpus = gpus_for(args.device)
    if info is not None and args.ranks not in (None, info.world):
        raise ValueError(f"--ranks: wanted none beside a launcher, which started {info.world}, got {args.ranks}")
    world = info.world if info is not None else args.ranks if args.ranks is not None else gpus or 2
    if world < 1:
        raise ValueError(f"--ranks: wanted 1 or more, got {world}")
    if args.tp < 1 or world % args.tp:
        raise ValueError(f"--tp: wanted a divisor of the number of ranks, {world}, got {args.tp}")
    local_world = world if info is None else info.local_world
    if args.device == "cuda" and local_world > gpus:
        raise ValueError(f"--ranks: wanted at most {gpus}, the number of GPUs, got {local_world}")
    place = "cuda" if local_world <= gpus else "cpu"
    for name in ("chunk", "page_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: wanted 1 or more, got {value}")
    if args.system is not None and not args.chat:
        raise ValueError(f"--system: wanted it beside --chat only, got {args.system!r}")
    text = prompt_of(args, info)
    checkpoint = Checkpoint.find(args.model)
    folder = checkpoint.folder if checkpoint.gguf is None else checkpoint.folder / checkpoint.gguf
    dtype = args.dtype or ("bfloat16" if place == "cuda" else "float32")
    chunk = args.chunk or (8192 if place == "cuda" else 1024)
    asked = Asked(
        folder, checkpoint.name, text, args.chat, args.system, sampling_of(args), dtype, chunk, args.page_size,
        args.prefill, not args.no_graphs, args.tp,
    )  # fmt: skip
    return asked, world, place


def prompt_of(args: argparse.Namespace, info: RankInfo | None) -> str:
    """The prompt's text.

    Raises:
        ValueError: there is none, or two, or it cannot be read.
    """
    if (args.prompt is None) == (args.prompt_file is None):
        got = "neither" if args.prompt is None else "both"
        raise ValueError(f"--prompt: wanted either it or --prompt-file, got {got}")
    if args.prompt is not None:
        return str(args.prompt)
    if args.prompt_file == "-":
        if info is not None:
            raise ValueError("--prompt-file: wanted a file that all ranks of a launcher can read, got stdin")
        return sys.stdin.read()
    try:
        return Path(args.prompt_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"--prompt-file: wanted a text file in UTF-8, got {args.prompt_file} ({why})") from None


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling options, checked; errors name the option."""
    from ringfa3.inference import Sampling

    try:
        return Sampling(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
            max_tokens=args.max_tokens, stop=tuple(args.stop), ignore_eos=args.ignore_eos,
        )  # fmt: skip
    except ValueError as error:
        name, rest = str(error).split(":", 1)
        raise ValueError(f"--{name.replace('_', '-')}:{rest}") from None


def respond_locally(world: int, asked: Asked, place: str, tell: Tell) -> Answer | None:
    """`respond` in ranks of this machine; their text is told here, as it comes."""
    reader, writer = Pipe(duplex=False)

    def listen() -> None:
        try:
            while True:
                tell(reader.recv())
        except EOFError:
            return
        except BrokenPipeError:  # who reads our stdout has left: so do the ranks
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # `local` ends them in order

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        return local(world, respond, asked, writer, device=place)[0]
    finally:
        writer.close()  # the ranks' copies are closed: the listener reads to the end
        listener.join(5)


def report(answer: Answer, world: int, *, as_json: bool) -> None:
    """How it went, on stderr; the whole answer on stdout, where it is wanted as JSON."""
    if as_json:
        used, there = answer.pages
        shown = asdict(answer) | {"tokens_per_second": answer.rate, "pages_used": used, "pages": there, "ranks": world}
        print(json.dumps(shown, indent=1))
    elif answer.tokens:
        print(flush=True)
    if answer.error is not None:
        print(f"ringfa3: {answer.error}", file=sys.stderr)
        return
    rate = "" if answer.rate is None else f", then {answer.rate:.1f} tokens/s"
    print(
        f"prompt {answer.prompt_tokens} tokens, first token after {answer.first:.2f} s "
        f"({answer.prompt_tokens / answer.first:.0f} tokens/s){rate}; {len(answer.tokens)} tokens, {answer.finish}; "
        f"{world} ranks",
        file=sys.stderr,
        flush=True,
    )


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
