"""The numbers behind the documentation's pictures: from real plans, real calls, the cost model and a recorded trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringfa3 import Mask, Plan
from ringfa3.cost import Job, Prediction, Way, predict, recommend
from ringfa3_kernels import Visible, attend

TRACE = Path(__file__).parent / "results" / "ring_trace.json.gz"
WORLD = 4
LAYOUTS = ("contiguous", "zigzag", "striped")
TINY, LONG = 32, 65_536  # positions: few enough to see each one; as many as a real sequence has
JOBS = {
    "causal, 16K, 2 GPUs": Job(Mask(), 16 << 10, 2, 32, 8, 128),
    "causal, 128K, 8 GPUs": Job(Mask(), 128 << 10, 8, 32, 8, 128),
    "full, 64K, 8 GPUs": Job(Mask(causal=False), 64 << 10, 8, 32, 8, 128),
    "window of 4K, 256K, 8 GPUs": Job(Mask(window=(4095, 0)), 256 << 10, 8, 32, 8, 128),
    "8 documents, 64K, 4 GPUs": Job(
        Mask(documents=(20_000, 1_500, 8_036, 12_000, 6_000, 9_000, 3_000, 6_000)), 64 << 10, 4, 32, 8, 128
    ),
    "causal, 256K, 2 hosts of 8 GPUs": Job(Mask(), 256 << 10, 16, 32, 8, 128, hosts=2),
}


def figures() -> dict[str, Any]:
    """All of them, as JSON has them."""
    return {
        "layouts": {name: owners(name) for name in LAYOUTS},
        "load": {name: load(name) for name in LAYOUTS},
        "ring": ring(),
        "softmax": softmax(),
        "timeline": timelines(),
        "trace": trace(),
        "ways": {name: ways(job) for name, job in JOBS.items()},
    }


def owners(layout: str) -> list[int]:
    """The rank that holds each of a few positions."""
    held = [0] * TINY
    for rank in range(WORLD):
        for position in Plan.build(Mask(), layout, TINY, WORLD, rank).positions.tolist():
            held[position] = rank
    return held


def load(layout: str) -> list[list[int]]:
    """Visible pairs of [rank][hop], hop h with the keys of rank - h; causal."""
    pairs = [[0] * WORLD for _ in range(WORLD)]
    for rank in range(WORLD):
        for hop in Plan.build(Mask(), layout, LONG, WORLD, rank).hops:
            seen = (hop.visible.hi.long() - hop.visible.lo.long()).clamp(min=0)
            pairs[rank][(rank - hop.source) % WORLD] = int(seen.sum())
    return pairs


def ring() -> dict[str, Any]:
    """Of every rank: its runs of positions under zigzag, and whose keys it meets, hop by hop."""
    plans = [Plan.build(Mask(), "zigzag", LONG, WORLD, rank) for rank in range(WORLD)]
    return {
        "held": [[list(run[:2]) for run in plan.dealing.runs[plan.rank]] for plan in plans],
        "sources": [[hop.source for hop in plan.hops] for plan in plans],
    }


def softmax() -> dict[str, Any]:
    """How one rank's Partial grows, hop by hop: lse of some rows, and how far out is from the end's, in fp64."""
    S, D, rank = 512, 64, 1
    random = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(random.standard_normal((1, S, 2, D))) for _ in range(3))
    plans = [Plan.build(Mask(), "zigzag", S, WORLD, each) for each in range(WORLD)]
    mine = plans[rank]
    rows = {"early": 2, "middle": S // WORLD // 2, "late": S // WORLD - 1}
    exact = attend(mine.shard(q), k, v, _visible(mine), impl="reference")
    state, found = None, []
    for hop in mine.hops:
        keys, values = (plans[hop.source].shard(x)[:, hop.keys].float() for x in (k, v))
        state = attend(mine.shard(q).float(), keys, values, hop.visible, into=state, impl="aten")
        away = (state.out.double() - exact.out).square().mean().sqrt() / exact.out.square().mean().sqrt()
        found.append(
            {
                "source": hop.source,
                "lse": {name: float(state.lse[0, 0, row]) for name, row in rows.items()},
                "error": float(away),
            }
        )
    return {
        "rank": rank,
        "hops": found,
        "positions": {name: int(mine.positions[row]) for name, row in rows.items()},
        "exact": {name: float(exact.lse[0, 0, row]) for name, row in rows.items()},
    }


def _visible(plan: Plan) -> Visible:
    """What the plan's rows see of the whole sequence at once."""
    lo, hi = plan.mask.bounds(plan.positions.numpy().astype(np.int32), plan.seqlen)
    return Visible(torch.from_numpy(lo), torch.from_numpy(hi))


def timelines() -> list[dict[str, Any]]:
    """Predicted hops and copies of 16K tokens on 4 H200s, three ways; milliseconds."""
    job = Job(Mask(), 16 << 10, WORLD, 32, 8, 128)
    ways = (("ring", "contiguous"), ("ring", "zigzag"), ("pull", "zigzag"))
    return [_timeline(predict(job, Way(*way))) for way in ways]


def _timeline(p: Prediction) -> dict[str, Any]:
    return {
        "name": p.name,
        "ms": p.seconds * 1e3,
        "efficiency": p.efficiency,
        "hops": [[s.rank, s.source, s.start * 1e3, s.end * 1e3] for s in p.steps],
        "copies": [[c.rank, c.start * 1e3, c.end * 1e3] for c in p.copies],
    }


def trace() -> dict[str, Any]:
    """Hops and copies that were recorded on 2 H200s; milliseconds from the first of them."""
    with gzip.open(TRACE, "rt") as file:
        document = json.load(file)
    events = document["traceEvents"]
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    timed = [(e, lanes[e["pid"], e["tid"]]) for e in events if e["ph"] == "X"]
    begin = min(e["ts"] for e, lane in timed if lane == "hops" or lane.startswith("copies"))
    spans: dict[str, list[list[Any]]] = {"hops": [], "copies": []}
    for e, lane in timed:
        span = [(e["ts"] - begin) / 1e3, (e["ts"] + e["dur"] - begin) / 1e3]
        if lane == "hops":
            way, source = e["name"].split()[0], int(e["name"].rsplit(" ", 1)[1])
            spans["hops"].append([e["pid"], way, source, *span])
        elif lane.startswith("copies"):
            spans["copies"].append([e["pid"], e["args"]["bytes"], *span])
    return {"title": document["otherData"]["title"], **{name: sorted(each) for name, each in spans.items()}}


def ways(job: Job) -> dict[str, Any]:
    """Predicted shares of one GPU's speed: every layout by the first transport, every transport in its best layout."""
    choice = recommend(job)
    first = "pull" if job.hosts == 1 else "hierarchical"
    found: dict[str, Any] = {"best": choice.best.name, "layouts": {}, "transports": {}}
    for p in choice.ranked:  # the quickest first
        if p.way.ulysses == 1:
            found["transports"].setdefault(p.way.transport, [p.way.layout_name, p.efficiency])
        if p.way.ulysses == 1 and p.way.transport == first:
            found["layouts"][p.way.layout_name] = p.efficiency
    return found
