"""What torch.compile adds to a step of attention on the host, forward and backward, over eager code.

python launch/bench/compile_overhead.py [--device cpu|cuda] [--rounds 40] [--steps 50]
torchrun --nproc-per-node 2 launch/bench/compile_overhead.py     # with the ranks' agreement

Shapes are so small that the host's work is what takes time. A step is one forward and one backward pass of one call;
compiled (inductor, fullgraph) and eager rounds of --steps steps take turns. Printed are the fastest rounds of either,
which other programs disturbed least, the medians in brackets. What is asked for: at most 50 us more. Some of it is
what any compiled function costs, whatever it calls: torch's own attention shows it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import ringfa3
from ringfa3.flash_attn import flash_attn_func

ASKED = 50.0  # us


def calls(rows: int, device: torch.device) -> dict[str, Callable[..., Any]]:
    """What is timed, by name."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    plan = ringfa3.plan(ringfa3.Mask(), "zigzag", rows * world, device=device)
    found: dict[str, Callable[..., Any]] = {
        "ring_attention": ringfa3.ring_attention,
        "ring_attention plan": lambda q, k, v: ringfa3.ring_attention(q, k, v, plan=plan),
    }
    if world == 1:
        found |= {"flash_attn_func": partial(flash_attn_func, causal=True), "torch's attention": torch_attention}
    return found


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch, for tensors as ours."""
    out: Tensor = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)


def steps(f: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor, number: int, device: torch.device) -> float:
    """Microseconds a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # this process, whatever else runs
    start = clock()
    for _ in range(number):
        torch.autograd.grad(f(*inputs), inputs, dout)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / number * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    asked = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if asked.device == "cuda" else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    device = torch.device(asked.device, rank) if asked.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    say = print if rank == 0 else (lambda *_: None)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(f"torch {torch.__version__}, {name}, {dist.get_world_size() if dist.is_initialized() else 1} ranks; us a step")
    rows, D = (128, 64) if device.type == "cuda" else (8, 8)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, rows, h, D, device=device, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    dout = torch.randn(1, rows, 4, D, device=device, dtype=dtype)
    for call, eager in calls(rows, device).items():
        both = {"eager": eager, "compiled": torch.compile(eager, fullgraph=True)}
        times: dict[str, list[float]] = {way: [] for way in both}
        for f in both.values():
            steps(f, [q, k, v], dout, 3, device)
        for _ in range(asked.rounds):
            for way, f in both.items():
                times[way].append(steps(f, [q, k, v], dout, asked.steps, device))
        more = min(times["compiled"]) - min(times["eager"])
        line = ", ".join(f"{way} {min(t):7.1f} ({median(t):7.1f})" for way, t in times.items())
        say(f"{call:20s} {line}: {more:+6.1f} us ({'as asked' if more <= ASKED else f'asked: at most {ASKED:g}'})")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
