"""Attention over one long sequence on the ranks of a Ray cluster, as a Ray job; some rows are checked in fp64.

On a cluster (launch/ray_cluster.yaml, launch/kuberay.yaml) whose dashboard is at 8265:

    export RAY_AUTH_MODE=token                # the token: ~/.ray/auth_token, the cluster's
    ray job submit --address http://127.0.0.1:8265 --working-dir examples -- python ray_job.py --ranks 8 --seqlen 131072

On this machine, with or without a Ray cluster running: python examples/ray_job.py
"""

from __future__ import annotations

import argparse
import time

import torch

from ringfa3_launch.cluster import RingCluster

CHECKED = 8  # rows


def main() -> None:
    """Compute, check, print; exit status 1 where a row is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    with RingCluster.ray(args.ranks, device=args.device) as cluster:
        dtype = torch.float32 if cluster.info()["device"] == "cpu" else torch.bfloat16
        q, k, v = (torch.randn(1, args.seqlen, heads, 128).to(dtype) for heads in (8, 2, 2))
        cluster.attention(q, k, v)  # the first call compiles and connects
        start = time.perf_counter()
        out = cluster.attention(q, k, v)
        seconds = time.perf_counter() - start
        print(*(f"rank {each.rank}: {each.device} on {each.host}" for each in cluster.health()), sep="\n")
    rows = torch.randint(args.seqlen, (CHECKED,))
    error = max(float((out[0, row] - exact(q, k, v, int(row))).abs().max()) for row in rows)
    print(f"{args.seqlen} tokens over {args.ranks} ranks: {seconds:.3f} s, tensors in and out; error {error:.1e}")
    if not error < (1e-4 if dtype is torch.float32 else 3e-2):
        raise SystemExit(f"wanted the exact rows, got an error of {error}")


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: int) -> torch.Tensor:
    """[Hq, D] fp64: what this row sees of all positions up to its own."""
    keys, values = (x[0, : row + 1].double().repeat_interleave(q.shape[2] // x.shape[2], dim=1) for x in (k, v))
    scores = torch.einsum("hd,jhd->hj", q[0, row].double(), keys) / q.shape[3] ** 0.5
    return torch.einsum("hj,jhd->hd", scores.softmax(dim=1), values)


if __name__ == "__main__":
    main()
