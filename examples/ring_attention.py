"""The first ring_attention: one long sequence over all ranks, forward and backward, some rows checked in fp64.

launch/torchrun.sh examples/ring_attention.py                    # a rank a GPU; 2 CPU ranks where there is none
launch/torchrun.sh --nproc 4 examples/ring_attention.py --seqlen 10007
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist
from torch import Tensor

import ringfa3
from ringfa3_launch import RankInfo, init

CHECKED = 8  # rows


def main() -> None:
    """Compute, check, print; every rank ends with status 1 where a row is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=4096, help="tokens, all ranks together; any number")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    args = parser.parse_args()
    info = RankInfo.from_env()
    with init(info) as device:
        torch.manual_seed(0)  # the same sequence on every rank, so that any rank can check any row
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        whole = [
            torch.randn(1, args.seqlen, h, 64, dtype=dtype, device=device) for h in (args.heads, *[args.kv_heads] * 2)
        ]

        plan = ringfa3.plan(ringfa3.Mask(), "zigzag", args.seqlen, device=device)
        q, k, v = (plan.shard(x).requires_grad_() for x in whole)  # a program that holds shards has no whole to cut
        start = time.perf_counter()
        out = ringfa3.ring_attention(q, k, v, plan=plan)
        out.float().square().mean().backward()  # gradients of keys travel home to the rank that holds them
        grads = [float(x.grad.norm()) for x in (q, k, v) if x.grad is not None]
        seconds = time.perf_counter() - start

        every = plan.unshard(out.detach())
        rows = torch.randint(args.seqlen, (CHECKED,), generator=torch.Generator().manual_seed(1)).tolist()
        error = max(float((every[0, row] - exact(whole, row)).abs().max()) for row in rows)
        lines = [f"rank {info.rank} of {info.world} on {device}: {plan.lengths[info.rank]} rows, {seconds:.2f} s"]
        lines += [f"  keys of rank {hop.source}: {hop.keys.stop - hop.keys.start}" for hop in plan.hops]
        lines += ["  norms of dq, dk, dv: " + ", ".join(f"{each:.3g}" for each in grads)]
        for rank in range(info.world):  # in turn
            if rank == info.rank:
                print(*lines, sep="\n", flush=True)
            dist.barrier()
        if info.rank == 0:
            print(f"error of {CHECKED} rows: {error:.1e}", flush=True)
        if not error < (1e-5 if dtype is torch.float32 else 3e-2):
            raise SystemExit(f"wanted the exact rows, got an error of {error}")


def exact(qkv: list[Tensor], row: int) -> Tensor:
    """[Hq, D] fp64: what this row sees of all positions up to its own."""
    q, k, v = qkv
    keys, values = (x[0, : row + 1].double().repeat_interleave(q.shape[2] // x.shape[2], dim=1) for x in (k, v))
    scores = torch.einsum("hd,jhd->hj", q[0, row].double(), keys) / q.shape[3] ** 0.5
    return torch.einsum("hj,jhd->hd", scores.softmax(dim=1), values)


if __name__ == "__main__":
    main()
