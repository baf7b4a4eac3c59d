"""A language model reads a prompt that is sharded over ranks, answers, and is asked again about what it has read.

    python examples/long_prompt.py --model FOLDER_OR_GGUF --file long.txt "Who is the narrator?" "And when?"

Ranks are GPUs where there are some, else CPU processes of this machine. Every rank reads its part of the prompt and
keeps those keys and values; a later question of the session computes only what is new.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ringfa3.inference import Sampling
from ringfa3_launch.cluster import RingCluster


def main() -> None:
    """Read, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of transformers' format, or a GGUF file")
    parser.add_argument("--file", type=Path, required=True, help="what is read first")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("questions", nargs="+")
    args = parser.parse_args()
    transcript = args.file.read_text()
    with RingCluster.local(args.ranks, device=args.device, model=args.model) as cluster:
        for question in args.questions:
            transcript += f"\n{question}\n"
            for event in cluster.complete(transcript, Sampling(max_tokens=args.tokens), session="reader"):
                if event.error is not None:
                    raise SystemExit(event.error)
                transcript += event.text
                print(event.text, end="", flush=True)
            print(f"\n[{event.prompt_tokens} tokens, {event.cached_tokens} of them not read again]", flush=True)


if __name__ == "__main__":
    main()
