"""Packed documents on several ranks: how layouts share the work, next-token labels, and a loss that is the whole one's.

    python examples/packed_documents.py                       # 2 CPU ranks
    python examples/packed_documents.py --ranks 4 --documents 3000 200 900 1500

A tiny language model of one attention layer is run over the packed sequence twice: sharded over the ranks, and whole
in one process. Loss and gradients must agree.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import ringfa3
from ringfa3_launch import RankInfo, local

VOCAB, HEADS, KV_HEADS, D = 64, 4, 2, 16


class Model(nn.Module):
    """Embedding, attention, logits; the sequence that it is given may be a shard."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HEADS * D)
        self.qkv = nn.Linear(HEADS * D, (HEADS + 2 * KV_HEADS) * D)
        self.logits = nn.Linear(HEADS * D, VOCAB)

    def forward(self, ids: Tensor, plan: ringfa3.Plan) -> Tensor:
        """[1, n] token ids of this rank -> [1, n, VOCAB]."""
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (-1, D)).split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        q, k = (rotated(part, plan.positions) for part in (q, k))  # RoPE by position, not by place in the shard
        out = ringfa3.ring_attention(q, k, v, plan=plan)
        logits: Tensor = self.logits(x + out.flatten(2))
        return logits


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x [1, n, H, D] with rotary embeddings of these positions [n]."""
    angles = positions[:, None] / 10_000 ** (torch.arange(0, D, 2) / D)
    sin, cos = angles.sin()[:, None], angles.cos()[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def step(documents: list[int], layout: str) -> tuple[Tensor, dict[str, Tensor], int]:
    """This rank's weighted loss and gradients, and the pairs that it computed."""
    model, seqlen = Model(), sum(documents)
    ids = torch.randint(VOCAB, (1, seqlen), generator=torch.Generator().manual_seed(1))
    plan = ringfa3.plan(ringfa3.Mask(documents=tuple(documents)), layout, seqlen)
    labels = plan.labels(ids)  # shifted before it was sharded; -100 at the last position of every document
    logits = model(plan.shard(ids), plan)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    loss = (losses * plan.loss_weights(labels).flatten()).sum()  # the mean over ranks is the mean over all tokens
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    pairs = sum(int((hop.visible.hi.long() - hop.visible.lo.long()).clamp(min=0).sum()) for hop in plan.hops)
    return loss.detach(), grads, pairs


def train(info: RankInfo, documents: list[int]) -> dict[str, tuple[Tensor, dict[str, Tensor], int]]:
    """By layout: loss and gradients averaged over ranks, as DDP and FSDP do, and this rank's pairs."""
    found = {}
    for layout in ("contiguous", "zigzag", "balanced"):
        loss, grads, pairs = step(documents, layout)
        for x in (loss, *grads.values()):
            dist.all_reduce(x)
            x /= info.world
        found[layout] = (loss, grads, pairs)
    return found


def main() -> None:
    """Compare layouts and ranks; exit status 1 where they disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--documents", type=int, nargs="+", default=[1200, 80, 400, 368], help="their lengths")
    args = parser.parse_args()
    wanted, wanted_grads, pairs = step(args.documents, "contiguous")  # no process group: a world of one
    print(f"one rank: loss {float(wanted):.6f}, {pairs} pairs")
    ranks = local(args.ranks, train, args.documents, device="cpu")
    for layout, (loss, grads, _) in ranks[0].items():
        worst = max(float((grads[name] - g).abs().max() / g.abs().max()) for name, g in wanted_grads.items())
        shares = ", ".join(f"{each[layout][2] / pairs:.0%}" for each in ranks)
        print(f"{layout}: loss {float(loss):.6f}, gradients within {worst:.1e}; pairs by rank: {shares}")
        if not (abs(float(loss - wanted)) < 1e-5 * float(wanted) and worst < 1e-4):
            raise SystemExit(f"wanted the loss and gradients of one rank, got {loss} and a difference of {worst}")


if __name__ == "__main__":
    main()
