"""What ALiBi and dropout cost on one GPU, beside the same kernels without them and torch's flash attention.

PYTHONPATH=kernels python kernels/bench/bench_positional.py [--rounds 6]

Prints TFLOP/s, median and spread, of portable's forward and of both passes: causal, bf16, 16 heads, 16K tokens.
The peer is torch's FlashAttention-2 with dropout (whose random numbers have 8 bits, ours 32).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import rounds
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ringfa3_kernels import Dropout, Visible, attend, attend_backward, row_delta

B, S, H = 1, 16384, 16
P = 0.1

Call = Callable[[], object]


def variants() -> dict[str, dict[str, Any]]:
    """Options of attend and attend_backward."""
    at = torch.arange(S, device="cuda", dtype=torch.int32)
    slopes = torch.tensor([2.0 ** -(i / 2) for i in range(1, H + 1)], device="cuda")
    return {
        "bare": {},
        "ALiBi": {"positions": (at, at), "alibi": slopes},
        "dropout": {"positions": (at, at), "dropout": Dropout(P, 1)},
        "both": {"positions": (at, at), "alibi": slopes, "dropout": Dropout(P, 1)},
    }


def calls(D: int, *, backward: bool) -> dict[str, Call]:
    """The forward by variant, or forward and backward."""
    q, k, v, dout = (torch.randn(B, S, H, D, device="cuda", dtype=torch.bfloat16) for _ in "qkvd")
    visible = Visible.causal(S, S, "cuda")
    grads = {name: torch.empty_like(q) for name in ("dq", "dk", "dv")}

    def ours(options: dict[str, Any]) -> Call:
        def call() -> None:
            found = attend(q, k, v, visible, out_dtype=q.dtype, impl="portable", **options)
            if backward:
                delta = row_delta(dout, found.out)
                attend_backward(
                    dout, q, k, v, found.lse, delta, visible, accumulate=False, impl="portable", **grads, **options
                )

        return call

    leaves = [x.transpose(1, 2).detach().requires_grad_(backward) for x in (q, k, v)]

    def peer() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out: Tensor = scaled_dot_product_attention(*leaves, dropout_p=P, is_causal=True)
        if backward:
            torch.autograd.grad(out, leaves, dout.transpose(1, 2))

    return {name: ours(options) for name, options in variants().items()} | {"FA2 dropout": peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    asked = parser.parse_args()
    print(torch.cuda.get_device_name(), rounds.versions())
    for D in (64, 128):
        for what, products in (("fwd", 2), ("fwd+bwd", 7)):
            work = products * B * H * D * S * S  # half of 2 * S * S; the backward's 5 products count, not portable's 7
            times = rounds.interleaved(calls(D, backward=what != "fwd"), rounds=asked.rounds, ms=60)
            for name, t in times.items():
                rate = work / t.ms / 1e9
                spread = rate * t.spread / t.ms
                print(f"{what} causal D{D} H{H}:{H} S{S // 1024}K bf16 {name}: {rate:.0f} ± {spread:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
