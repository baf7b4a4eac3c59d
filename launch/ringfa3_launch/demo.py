"""The demo: a real language model answers a question that is hidden in a long text, the text sharded over ranks.

The model (SmolLM2-135M-Instruct) reads about Python, and one foreign sentence. Every rank reads a part of each chunk of
the text, and keeps its keys and values; the model answers from all of them, and its answer and next-token logits are
compared with those of the same model in one process. There is also a ring_attention over a longer sequence, some of
whose rows are compared with exact ones. Exit status 0 only if all of that agrees and the answer holds the hidden fact;
where one process's answer does not hold it either, that is the model's fault: it is told, but no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfa3_launch import haystack
from ringfa3_launch.checkpoint import Checkpoint, hush
from ringfa3_launch.console import Advance, Console
from ringfa3_launch.demo_ranks import Alone, Attended, Long, Read, Reading, read_alone, work
from ringfa3_launch.local import cores, local
from ringfa3_launch.options import reading as files_read

if TYPE_CHECKING:
    from torch import Tensor

Report = tuple[str, Attended, Read]  # of a rank: its device, and how it went
ANSWER_TOKENS = 32
PHASES = {"unpack": 25, "alone": 25, "long": 20, "read": 30, "answer": 5, "check": 5}  # about seconds, on two cores
LOGITS_TOLERANCE = 1e-5  # of the largest logit; 8e-7 measured: 30 layers' rounding in fp32
FACT_CHECK = "answer holds the hidden fact, if one process's does"
ROWS_FLOOR = 1e-6  # of outputs around 1: fp32 rounding, where plain attention happens to have less


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ringfa3 demo`."""
    parser.add_argument("--world", type=int, metavar="N", help="ranks (all GPUs; 2 where there is none)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where ranks run (auto)")
    parser.add_argument(
        "--model", metavar="PATH", help="a folder of transformers' format, or a GGUF file (SmolLM2-135M)"
    )
    parser.add_argument("--text", metavar="FILE", help="what the model reads (prose of Python's language reference)")
    parser.add_argument("--tokens", type=int, metavar="N", help="length of the prompt (5000; 8000 on GPUs)")
    parser.add_argument("--long", type=int, metavar="N", help="length of the longer attention (64K; 256K on GPUs)")
    parser.add_argument("--quick", action="store_true", help="a prompt of 600 tokens, and 4K instead of 64K")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if all went as it should."""
    hush()
    console = Console()
    begun = time.perf_counter()
    outcome = perform(Checkpoint.find(args.model), Setting.of(args), haystack.document(args.text), console)
    outcome["seconds"] = time.perf_counter() - begun
    if args.json:
        print(json.dumps(outcome, indent=2))
    else:
        show(outcome, console)
    return 0 if outcome["ok"] else 1


@dataclass(frozen=True)
class Setting:
    """What the demo does where: fewer and shorter things on CPUs."""

    world: int
    place: str
    tokens: int
    long: Long

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setting:
        """The options, and what they leave open for this machine.

        Raises:
            ValueError: an option is out of range.
        """
        import torch

        gpus = torch.cuda.device_count() if args.device != "cpu" else 0
        if args.device == "cuda" and gpus == 0:
            raise ValueError("--device: wanted GPUs for 'cuda', got a machine without")
        world = args.world if args.world is not None else (gpus or 2)
        place = "cuda" if 0 < world <= gpus else "cpu"
        if place == "cpu" and args.device == "cuda":
            raise ValueError(f"--world: wanted at most {gpus}, the number of GPUs, got {world}")
        tokens = args.tokens or (600 if args.quick else 8000 if place == "cuda" else 5000)
        seqlen = args.long or ((4 if args.quick else 256 if place == "cuda" else 64) << 10)
        for name, value in (("--world", world), ("--tokens", tokens), ("--long", seqlen)):
            if value < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {value}")
        samples = tuple(sorted({min(seqlen - 1, seqlen * i // 31) for i in range(32)}))
        heads, dtype = ((32, 8, 128), "bfloat16") if place == "cuda" else ((2, 1, 64), "float32")
        return cls(world, place, tokens, Long(seqlen, *heads, dtype, samples))


class Meter:
    """Phases of different length as one progress bar."""

    def __init__(self, console: Console, advance: Advance) -> None:
        self.advance = advance
        self.least = 1 if console.err.isatty() else 5  # steps a line, in a log
        self.done = 0

    def tell(self, phase: str, share: float, text: str) -> None:
        """That share of the phase, and all before it, is done."""
        before = sum(list(PHASES.values())[: list(PHASES).index(phase)])
        steps = int(before + share * PHASES[phase]) - self.done
        if steps >= self.least or (share == 0 and steps >= 0):
            self.advance(text, steps)
            self.done += steps


def perform(checkpoint: Checkpoint, setting: Setting, text: list[str], console: Console) -> dict[str, Any]:
    """All of the demo; what came of it, ready for JSON."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        with (
            tempfile.TemporaryDirectory(prefix="ringfa3-") as scratch,
            console.progress(sum(PHASES.values())) as advance,
        ):
            meter = Meter(console, advance)
            meter.tell("unpack", 0, f"unpacking {checkpoint.name}")
            with files_read(checkpoint.name):
                folder, tokenizer = checkpoint.unpack(Path(scratch))
            prompt = haystack.prompt(tokenizer, setting.tokens, text)
            dtype = "bfloat16" if setting.place == "cuda" else "float32"
            reading = Reading(folder, prompt.ids, dtype, ANSWER_TOKENS, stop_ids(folder, tokenizer, len(prompt.ids)))
            alone = read_alone(reading, setting.place, meter.tell)
            reports = on_ranks(reading, setting, meter)
            meter.tell("check", 0, "computing sampled rows exactly")
            errors = check_rows(setting, reports)
    finally:
        torch.set_num_threads(threads)
    return outcome_of(checkpoint, setting, prompt, tokenizer, alone, reports, errors)


def stop_ids(folder: Path, tokenizer: Any, tokens: int) -> frozenset[int]:
    """Token ids that end an answer, which is a line; ValueError if the model cannot read so many tokens and answer."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and tokens + ANSWER_TOKENS > most:
        raise ValueError(f"--tokens: wanted at most the model's {most} less {ANSWER_TOKENS} to answer, got {tokens}")
    ids = config.eos_token_id
    lines = (i for text in ("\n", "\n\n") for i in tokenizer(text, add_special_tokens=False)["input_ids"])
    return frozenset([tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids]), *lines])


def on_ranks(reading: Reading, setting: Setting, meter: Meter) -> list[Report]:
    """What the ranks report, their progress shown meanwhile."""
    meter.tell("long", 0, f"starting {setting.world} ranks")
    news, teller = get_context("spawn").Pipe(duplex=False)

    def follow() -> None:
        with contextlib.suppress(EOFError):  # once no rank and not this process can tell any more
            while True:
                meter.tell(*news.recv())

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        return local(setting.world, work, reading, setting.long, teller, device=setting.place)
    finally:
        teller.close()
        follower.join()
        news.close()


def check_rows(setting: Setting, reports: Sequence[Report]) -> dict[str, float]:
    """Largest error of the ranks' sampled rows, and of plain PyTorch attention's, against fp64 on one device."""
    import torch

    from ringfa3_kernels import Visible, attend

    long, device = setting.long, torch.device(setting.place)
    positions = torch.cat([attended.sampled[1] for _, attended, _ in reports])
    order = positions.argsort()
    ours = torch.cat([attended.sampled[0] for _, attended, _ in reports])[order].to(device)
    if tuple(positions[order].tolist()) != long.samples:
        raise RuntimeError(f"ranks: wanted rows {long.samples}, got {positions[order].tolist()}")
    rows = torch.tensor(long.samples, device=device)
    visible = Visible(torch.zeros_like(rows, dtype=torch.int32), (rows + 1).int())
    q = torch.cat([long.draw("q", p, p + 1, device) for p in long.samples], 1)
    k, v = (long.draw(name, 0, long.seqlen, device) for name in "kv")
    group = long.Hq // long.Hkv
    errors = {"ours": 0.0, "plain": 0.0}
    for h in range(long.Hkv):  # one by one: the reference repeats keys for every query head
        mine = slice(h * group, (h + 1) * group)
        q_h, k_h, v_h = q[:, :, mine], k[:, :, h : h + 1], v[:, :, h : h + 1]
        exact = attend(q_h.double(), k_h.double(), v_h.double(), visible, impl="reference").out[0]
        plain = attend(q_h, k_h, v_h, visible, impl="reference", out_dtype=q.dtype).out[0]
        for name, out in (("ours", ours[:, mine]), ("plain", plain)):
            errors[name] = max(errors[name], float((out - exact).abs().max()))
    return errors


def outcome_of(
    checkpoint: Checkpoint,
    setting: Setting,
    prompt: haystack.Prompt,
    tokenizer: Any,
    alone: Alone,
    reports: Sequence[Report],
    errors: dict[str, float],
) -> dict[str, Any]:
    """Everything that is printed, and the verdict."""
    long, dtype = setting.long, "bfloat16" if setting.place == "cuda" else "float32"
    attended, read = [report[1] for report in reports], [report[2] for report in reports]
    logits = read[0].logits
    assert logits is not None  # rank 0 always keeps them
    answer, single = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (read[0].answer, alone.answer))
    exact = alone.logits["float32"]
    difference = float((logits - exact).abs().max())
    # In 16 bits the single process is not exact either: the rule is at most twice its error
    allowed = LOGITS_TOLERANCE * float(exact.abs().max()) + 2 * float((alone.logits[dtype] - exact).abs().max())
    finite = bool(logits.isfinite().all())
    seconds = max(part.seconds for part in attended)
    checks = {
        FACT_CHECK: prompt.answered_by(answer) or not prompt.answered_by(single),
        "ranks gave the same answer": len({part.answer for part in read}) == 1,
        "answer equals one process's": answers_agree(alone, read[0].answer, allowed),
        "logits equal one process's": finite and difference <= allowed,
        "long attention is exact": errors["ours"] <= 2 * errors["plain"] + ROWS_FLOOR,
    }
    return {
        "ok": all(checks.values()),
        "checks": checks,
        "model": checkpoint.name,
        "dtype": dtype,
        "tokens": len(prompt.ids),
        "fact_at": prompt.place,
        "question": prompt.question,
        "answer": answer,
        "single_answer": single,
        "fact_found": prompt.answered_by(answer),
        "logits": {
            "largest_difference": difference,
            "allowed": allowed,
            "largest": float(exact.abs().max()),
            "sharded": top(tokenizer, logits),
            "single": top(tokenizer, alone.logits[dtype]),
        },
        "single_seconds": alone.seconds,
        "long": {
            "tokens": long.seqlen,
            "heads": [long.Hq, long.Hkv],
            "head_dim": long.D,
            "dtype": long.dtype,
            "seconds": seconds,
            "tflops": long.flops / seconds / 1e12,
            "rows_checked": len(long.samples),
            "error": errors["ours"],
            "plain_error": errors["plain"],
        },
        "ranks": [
            {
                "rank": rank,
                "device": device,
                "tokens": read.rows,
                "read_seconds": read.seconds,
                "answer_seconds": read.answer_seconds,
                "memory_bytes": read.bytes,
                "long_tokens": attended.rows,
                "long_seconds": attended.seconds,
                "long_bytes": attended.bytes,
            }
            for rank, (device, attended, read) in enumerate(reports)
        ],
    }


def answers_agree(alone: Alone, answer: tuple[int, ...], allowed: float) -> bool:
    """Whether one process answers the same; or first differs at a tie: two logits at most `allowed` apart."""
    for ours, theirs, logits in zip(answer, alone.answer, alone.steps, strict=False):
        if ours != theirs:  # what follows answers another beginning, and cannot be compared
            return bool(logits[theirs] - logits[ours] <= allowed)
    return len(answer) == len(alone.answer)


def top(tokenizer: Any, logits: Tensor, n: int = 5) -> list[list[Any]]:
    """The n likeliest next tokens and their logits."""
    values, ids = logits.topk(n)
    return [[tokenizer.decode([i]), round(x, 5)] for i, x in zip(ids.tolist(), values.tolist(), strict=True)]


def show(outcome: dict[str, Any], console: Console) -> None:
    """Print the outcome for people."""
    logits, long, ranks = outcome["logits"], outcome["long"], outcome["ranks"]
    console.heading(f"{outcome['model']} read {outcome['tokens']} tokens on {len(ranks)} ranks")
    console.say(
        f"hidden at token {outcome['fact_at']}; keys and values sharded over the ranks' caches, {outcome['dtype']}"
    )
    console.say(f"question  {outcome['question']}")
    console.say(f"answer    {outcome['answer']}", "ok" if outcome["fact_found"] else "broken")
    console.say(f"alone     {outcome['single_answer']}")
    console.heading("the next token, as the ranks see it and as one process does")
    pairs = zip(logits["sharded"], logits["single"], strict=True)
    console.table(
        ["ranks", "logit", "one process", "logit"],
        [[repr(a), f"{x:.4f}", repr(b), f"{y:.4f}"] for (a, x), (b, y) in pairs],
    )
    console.say(f"largest difference of any logit {logits['largest_difference']:.2e}, allowed {logits['allowed']:.1e}")
    console.heading(
        f"ring_attention over {long['tokens']} tokens: {long['heads'][0]} heads of {long['head_dim']}, {long['dtype']}"
    )
    console.say(f"{long['seconds']:.2f} s, {long['tflops']:.3g} TFLOP/s on all ranks together")
    console.say(
        f"{long['rows_checked']} rows against exact (fp64) ones: error {long['error']:.1e}, "
        f"plain PyTorch attention's {long['plain_error']:.1e}"
    )
    console.heading("each rank")
    console.table(
        ["rank", "device", "tokens", "read", "answer", "memory", "long tokens", "time", "memory for it"],
        [
            [
                str(rank["rank"]),
                rank["device"],
                str(rank["tokens"]),
                f"{rank['read_seconds']:.2f} s",
                f"{rank['answer_seconds']:.2f} s",
                f"{rank['memory_bytes'] / 2**20:.0f} MiB",
                str(rank["long_tokens"]),
                f"{rank['long_seconds']:.2f} s",
                f"{rank['long_bytes'] / 2**20:.0f} MiB",
            ]
            for rank in ranks
        ],
    )
    console.say(f"one process read the same text in {outcome['single_seconds']:.2f} s")
    console.heading(f"verdict, after {outcome['seconds']:.0f} s")
    for check, passed in outcome["checks"].items():
        console.say(f"{'yes' if passed else 'NO ':3}  {check}", "ok" if passed else "broken")
    if not outcome["fact_found"] and outcome["checks"][FACT_CHECK]:
        console.say("note: the model itself misses the hidden fact, sharded or not", "note")
