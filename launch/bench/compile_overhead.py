"""What torch.compile adds to a step's host time over eager code: for a small Llama, which is judged, and calls alone.

    python launch/bench/compile_overhead.py [--device cpu|cuda] [--only REGEX] [--rounds 30] [--steps 10] [--out FOLDER]
    torchrun --nproc-per-node 2 launch/bench/compile_overhead.py                    with the ranks' agreement

A step is one forward and one backward pass, of sizes so small that the host is what takes time. On CUDA its time is
until the host has queued all of it: the device is waited for between steps, outside of the clock, so that a full queue
holds nobody up. On a CPU it is CPU time, kernels (of a few us) included. Cases, compiled (inductor, fullgraph) and
eager, take turns round by round: what else the machine does meets all of them alike. Printed are the fastest rounds,
which other programs disturbed least, and medians in brackets.

Asked for: a compiled Llama of two layers takes the host at most 50 us a step longer than the eager one. Calls alone are
information: what is added there any compiled function costs that calls an operator written in Python (docs/log.md).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor

import ringfa3
from ringfa3.flash_attn import flash_attn_func
from ringfa3_launch import machine
from ringfa3_launch.bench.inference_report import grid, row
from ringfa3_launch.bench.report import commit, save

ASKED = 50.0  # us
JUDGED = "Llama, sequence_parallel"
BROKEN = "Llama, attn_implementation, graph breaks"  # masks are made while torch traces (docs/training.md)
NAME = "compile_overhead"
Call = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """Of what is timed; the same on every rank."""

    rows: int  # of a rank
    D: int
    dtype: torch.dtype
    world: int
    device: torch.device
    heads: int = 4
    kv_heads: int = 2


@dataclass
class Case:
    """One thing to time, eager and compiled.

    Args:
        name: for people.
        eager, compiled: do one step each.
        times: us a step of every round, by way; and of the CPU in the same rounds.
    """

    name: str
    eager: Callable[[], None]
    compiled: Callable[[], None]
    times: dict[str, list[float]] = field(default_factory=lambda: {"eager": [], "compiled": []})
    cpu: dict[str, list[float]] = field(default_factory=lambda: {"eager": [], "compiled": []})

    @property
    def more(self) -> float:
        """What compiling adds, us a step."""
        return min(self.times["compiled"]) - min(self.times["eager"])

    def spread(self, way: str) -> float:
        """Half the way from the 20th to the 80th percentile."""
        fifths = quantiles(self.times[way], n=5)
        return (fifths[-1] - fifths[0]) / 2


def models(sizes: Sizes, contexts: ExitStack, *, broken: bool = False) -> list[Case]:
    """Llamas of two layers, with our attention and with torch's; or the one that compiles with graph breaks.

    Args:
        contexts: entered, for as long as the cases are timed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from ringfa3.integrations.transformers import NAME as ONE_RANK
    from ringfa3.integrations.transformers import sequence_parallel

    def llama(implementation: str) -> LlamaForCausalLM:
        torch.manual_seed(0)  # the same weights on every rank
        hidden = sizes.heads * sizes.D
        config = LlamaConfig(
            vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
            num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=sizes.rows * sizes.world, attn_implementation=implementation,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(sizes.device, sizes.dtype)

    plan = ringfa3.plan(ringfa3.Mask(), "zigzag", sizes.rows * sizes.world, device=sizes.device)
    whole = torch.randint(256, (1, plan.seqlen), device=sizes.device)
    ids, labels = plan.shard(whole), plan.labels(whole)

    def case(name: str, model: Any) -> Case:
        def step(called: Any) -> None:
            called(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss.backward()
            model.zero_grad()

        return Case(name, partial(step, model), partial(step, torch.compile(model, fullgraph=not broken)))

    if broken:
        return [case(BROKEN, llama(ONE_RANK))]
    ours = llama("sdpa")
    contexts.enter_context(sequence_parallel(ours, plan))
    return [case(JUDGED, ours)] + ([case("Llama, torch's attention", llama("sdpa"))] if sizes.world == 1 else [])


def calls(sizes: Sizes) -> list[Case]:
    """Calls of attention alone."""
    shapes = [(1, sizes.rows, heads, sizes.D) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    options: dict[str, Any] = {"device": sizes.device, "dtype": sizes.dtype}
    inputs = [torch.randn(shape, requires_grad=True, **options) for shape in shapes]
    dout = torch.randn(shapes[0], **options)
    plan = ringfa3.plan(ringfa3.Mask(), "zigzag", sizes.rows * sizes.world, device=sizes.device)

    def step(f: Call) -> None:
        torch.autograd.grad(f(*inputs), inputs, dout)

    found: dict[str, Call] = {
        "ring_attention": ringfa3.ring_attention,
        "ring_attention, plan": lambda q, k, v: ringfa3.ring_attention(q, k, v, plan=plan),
    }
    if sizes.world == 1:
        found |= {"flash_attn_func": partial(flash_attn_func, causal=True), "torch's attention": torch_attention}
    return [Case(name, partial(step, f), partial(step, torch.compile(f, fullgraph=True))) for name, f in found.items()]


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch, for tensors as ours."""
    out: Tensor = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)


def host(step: Callable[[], None], number: int, device: torch.device) -> tuple[float, float]:
    """Microseconds a step of the host's time, and of CPU time on all of this process's threads.

    A first step is not counted: it finds the processor's caches full of what ran before.
    """
    step()
    wall = cpu = 0.0
    for _ in range(number):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began, began_cpu = time.perf_counter(), time.process_time()
        step()
        wall, cpu = wall + time.perf_counter() - began, cpu + time.process_time() - began_cpu
    return wall / number * 1e6, cpu / number * 1e6


def measure(cases: Sequence[Case], rounds: int, number: int, device: torch.device) -> None:
    """Fill in the cases' times; on a CPU they are those of the CPU, which other programs lengthen least."""
    for case in cases:
        for step in (case.eager, case.compiled):
            host(step, 3, device)  # compiles
    for _ in range(rounds):
        for case in cases:
            for way, step in (("eager", case.eager), ("compiled", case.compiled)):
                wall, cpu = host(step, number, device)
                case.times[way].append(wall if device.type == "cuda" else cpu)
                case.cpu[way].append(cpu)


def line(case: Case) -> str:
    """For people."""
    ways = ", ".join(f"{way} {min(t):7.1f} ({median(t):7.1f})" for way, t in case.times.items())
    more = min(case.cpu["compiled"]) - min(case.cpu["eager"])
    return f"{case.name:40s} {ways}: {case.more:+7.1f} us (CPU time {more:+7.1f})"


def verdict(case: Case) -> str:
    """The line that says what was asked for and what was reached."""
    reached = "reached" if case.more <= ASKED else "NOT reached"
    return f"asked: the compiled Llama at most {ASKED:g} us a step over eager; {reached}: {case.more:+.1f} us"


def document(cases: Sequence[Case], sizes: Sizes) -> dict[str, Any]:
    """What the JSON holds, in the format of docs/results; a ratio above 1 means that compiled code is faster."""
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[sizes.dtype]
    shape = f"D{sizes.D} H{sizes.heads}:{sizes.kv_heads} S{sizes.rows * sizes.world} W{sizes.world} {dtype}"
    rows = []
    for case in cases:
        name = f"fwd+bwd causal {shape} {case.name}"
        ours, theirs = min(case.times["compiled"]), min(case.times["eager"])
        rows.append(row(name, "host us a step", ours, case.spread("compiled"), "eager", theirs, theirs / ours))
        if case.name == JUDGED:
            ratio = ASKED / case.more if case.more > 0 else None  # nothing is added: no ratio says how little
            rows.append(row(name, "host us over eager", case.more, 0.0, "asked, at most", ASKED, ratio))
    return {
        "command": shlex.join(["python", "launch/bench/compile_overhead.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": machine.device_name(sizes.device.type, sizes.world),
        "versions": machine.version_table(),
        "rows": rows,
    }


def markdown(found: dict[str, Any], said: str) -> str:
    """The table for people."""
    columns = ("case", "metric", "ours", "spread", "peer", "theirs", "ratio")
    lines = [["-" if each[name] is None else str(each[name]) for name in columns] for each in found["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        "# What torch.compile adds on the host",
        f"{found['device']}, {found['date']}, commit {found['commit']}; {versions}.",
        f"    {found['command']}",
        grid(columns, lines),
        f"{said[0].upper()}{said[1:]}. ours is compiled code (inductor, fullgraph but where graph breaks are named).",
        " ".join((__doc__ or "").split("\n\n")[2].split()),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="regular expression on case names (GPUs compile for minutes)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="in a round (10)")
    parser.add_argument("--out", type=Path, help=f"folder that gets {NAME}.json and .md")
    asked = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if asked.device == "cuda" else "gloo")
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    device = torch.device("cpu")
    if asked.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        inductor.compile_threads = 1  # else workers import torch beside the first minute's rounds
    sizes = Sizes(128 if on_gpu else 8, 64 if on_gpu else 8, torch.bfloat16 if on_gpu else torch.float32, world, device)
    say = print if rank == 0 else (lambda *_: None)
    where = machine.device_name(device.type, world)
    say(f"torch {torch.__version__}, {where}, load {os.getloadavg()[0]:.1f}; us a step")
    with ExitStack() as contexts:
        cases = [case for case in (*models(sizes, contexts), *calls(sizes)) if re.search(asked.only, case.name)]
        kept = import_module("ringfa3.plan")._kept  # ringfa3.plan is the function
        before = kept.cache_info().misses
        measure(cases, asked.rounds, asked.steps, device)
        built = kept.cache_info().misses - before
    if world == 1 and re.search(asked.only, BROKEN):
        torch._dynamo.reset()  # frames that it compiles in pieces are others' too, who would pay for their guards
        cases += models(sizes, ExitStack(), broken=True)
        measure(cases[-1:], asked.rounds, asked.steps, device)
    for case in cases:
        say(line(case))
    said = " ".join(verdict(case) for case in cases if case.name == JUDGED) or "what is judged was not asked for"
    say(f"plans built meanwhile: {built} (0: calls without plan= found theirs); load {os.getloadavg()[0]:.1f}")
    say(said)
    if asked.out is not None and rank == 0:
        found = document(cases, sizes)
        say(save(found, asked.out, NAME))
        (asked.out / f"{NAME}.md").write_text(markdown(found, said))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
