"""What is asked of the ring, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ringfa3_launch.bench.case import Case, format_size
from ringfa3_launch.bench.match import OURS, Outcome
from ringfa3_launch.bench.ring_matches import CAUSAL, KERNELS, ONE_GPU, ONE_LAUNCH

K = 1 << 10
RING_OVER_KERNELS = {  # (direction, tokens) -> time of the ring over that of its kernels alone, at most
    ("fwd", 16 * K): 1.06,
    **{("fwd", n * K): 1.03 for n in (32, 64, 128)},
    **{("fwd+bwd", n * K): 1.05 for n in (32, 64, 128)},
}
AGAINST_PEERS = {16 * K: 1.0, 64 * K: 1.0, 128 * K: 1.0}  # forward: speed over the best peer's, at least
OF_PLAIN_CAUSAL = {("packed", 64 * K): 0.8, ("window=4096", 256 * K): 0.7}  # speed over plain causal's, at least
OF_ONE_GPU = {  # (ranks, direction, tokens) -> speed over one GPU's kernel, at least
    (4, "fwd", 16 * K): 0.75,
    (4, "fwd", 64 * K): 0.95,
    (4, "fwd+bwd", 64 * K): 0.93,
    (8, "fwd", 64 * K): 0.93,
    (8, "fwd", 256 * K): 0.98,
}
WEAK = 0.97  # speed per GPU of the largest world over that of 2 ranks, at the same tokens a rank, at least
PARTIALS = 1.02  # kernels hop by hop over one launch, at 8K tokens a rank, at most
SAME = 1.02  # an error that is no larger than another, to what two roundings differ by
FLOOR = 1e-6  # relative error below which nobody is wrong: fp32 sums in another order


@dataclass(frozen=True)
class Verdict:
    """One thing that is asked.

    Args:
        case: where.
        what: the figure.
        who: whose, of those that ran.
        asked: the bound, in words; "" where nothing is asked and the figure is for information.
        reached: the figure; None: not measured.
        ok: whether it was reached; None: nothing asked, or not measured.
    """

    case: str
    what: str
    who: str
    asked: str
    reached: float | None
    ok: bool | None

    def as_row(self) -> dict[str, Any]:
        """For JSON: four significant digits."""
        return asdict(self) | {"reached": None if self.reached is None else float(f"{self.reached:.4g}")}


def judge(outcomes: Sequence[Outcome]) -> list[Verdict]:
    """Everything that can be judged in these outcomes, each figure with what is asked of it."""
    found: list[Verdict] = []
    for outcome in outcomes:
        found += _one_call(outcome)
        if not outcome.ours:
            continue
        for rule in (_overlap, _peers, _one_gpu, _partials, _causal, _error, _memory):
            found += rule(outcome)
    return found + weak_scaling(outcomes)


def best(outcome: Outcome, names: Sequence[str] | None = None) -> str:
    """The fastest of ours, or of these."""
    return min(outcome.ours if names is None else names, key=lambda name: outcome.seconds(name) or float("inf"))


def over_kernels(outcome: Outcome, name: str) -> float | None:
    """Time of one of ours over that of its kernels alone; None for other ways than the ring, whose kernels differ."""
    mine, kernels = outcome.seconds(name), outcome.seconds(KERNELS)
    if not mine or not kernels or name not in outcome.ours or not _is_ring(outcome, name):
        return None
    return mine / kernels


def declared(case: Case) -> float:
    """Bytes that a rank may take: its tensors, the fp32 state, and the buffers that the transports declare.

    Forward: q, k, v, out, the state (out and lse in fp32) and three slots for a shard. Backward besides: dout and the
    gradients in the inputs' dtype, dq in fp32, delta with its two fp32 factors, and dK, dV in fp32 four times (what is
    computed, what arrives, what leaves, what is at home). Nothing grows with the sequence but by n = S / W.
    """
    size = 4 if case.dtype == "fp32" else 2
    n = -(-case.seqlen // case.world)
    q, kv = n * case.Hq * case.D, 2 * n * case.Hkv * case.D
    rows = n * case.Hq * 4
    forward = size * (2 * q + kv) + 4 * q + rows + 3 * size * kv
    if case.direction == "fwd":
        return float(forward)
    return float(forward + size * (2 * q + kv) + rows + 2 * 4 * q + 4 * 4 * kv)


def _overlap(outcome: Outcome) -> list[Verdict]:
    case = outcome.match.case
    rings = [name for name in outcome.ours if over_kernels(outcome, name) is not None]
    if not rings:
        return []
    who = best(outcome, rings)
    limit = RING_OVER_KERNELS.get((case.direction, case.seqlen)) if case.world == 2 else None
    return [_at_most(outcome, "time over kernels alone", who, over_kernels(outcome, who), limit)]


def _peers(outcome: Outcome) -> list[Verdict]:
    if not outcome.peers:
        return []
    case, who = outcome.match.case, best(outcome)
    rival = best(outcome, outcome.peers)
    ratio = _over(outcome.rate(who), outcome.rate(rival))
    asked = 1.0 if case.world > 2 and case.direction == "fwd" else None
    if case.world == 2 and case.direction == "fwd":
        asked = AGAINST_PEERS.get(case.seqlen)
    return [_at_least(outcome, f"speed over the best peer's, {rival}", who, ratio, asked)]


def _one_gpu(outcome: Outcome) -> list[Verdict]:
    case, who = outcome.match.case, best(outcome)
    if outcome.rate(ONE_GPU) is None:
        return []
    limit = OF_ONE_GPU.get((case.world, case.direction, case.seqlen)) if case.mask == "causal" else None
    return [_at_least(outcome, "speed over one GPU's", who, _over(outcome.rate(who), outcome.rate(ONE_GPU)), limit)]


def _partials(outcome: Outcome) -> list[Verdict]:
    hops, launch = outcome.seconds(KERNELS), outcome.seconds(ONE_LAUNCH)
    if not hops or not launch:
        return []
    case = outcome.match.case
    limit = PARTIALS if case.seqlen == 8 * K * case.world and case.mask == "causal" else None
    return [_at_most(outcome, "kernels hop by hop over one launch", KERNELS, hops / launch, limit)]


def _causal(outcome: Outcome) -> list[Verdict]:
    plain = [name for name in outcome.timings if name.startswith(CAUSAL)]
    if not plain:
        return []
    case, who = outcome.match.case, best(outcome)
    limit = OF_PLAIN_CAUSAL.get((case.mask.partition("=")[0] if "packed" in case.mask else case.mask, case.seqlen))
    limit = limit if case.direction == "fwd" else None
    causal = best(outcome, plain)
    ratio = _over(outcome.rate(who), outcome.rate(causal))
    found = [_at_least(outcome, "TFLOP/s on visible pairs over plain causal's", who, ratio, limit)]
    for other in outcome.ours:
        if other != who:
            ratio = _over(outcome.rate(other), outcome.rate(causal))
            found.append(_at_least(outcome, "TFLOP/s on visible pairs over plain causal's", other, ratio, None))
    return found


def _error(outcome: Outcome) -> list[Verdict]:
    """Against one GPU on the same rows where it was in the match, else against plain PyTorch attention."""
    who = max(outcome.ours, key=lambda name: outcome.errors.get(name, 0.0))
    mine = outcome.errors.get(who)
    alone, plain = outcome.errors.get(ONE_GPU), outcome.plain.get(who)
    if mine is None:
        return []
    if alone:
        limit = SAME if mine > FLOOR else None
        return [_at_most(outcome, "largest error over one GPU's, same rows", who, mine / alone, limit)]
    limit = 2.0 if mine > FLOOR else None
    return [_at_most(outcome, "largest error over plain attention's", who, mine / plain, limit)] if plain else []


def _memory(outcome: Outcome) -> list[Verdict]:
    rings = [name for name in outcome.ours if name in outcome.memory and _is_ring(outcome, name)]
    if not rings or outcome.device != "cuda":
        return []
    who = max(rings, key=lambda name: outcome.memory[name])
    share = outcome.memory[who] / declared(outcome.match.case)
    return [_at_most(outcome, "peak memory over tensors and declared buffers", who, share, 1.0)]


def _one_call(outcome: Outcome) -> list[Verdict]:
    """A length that has to be got through, forward and backward: it ran, and how fast."""
    if outcome.match.seconds or outcome.match.case.direction == "fwd":
        return []
    who = best(outcome) if outcome.ours else "none"
    what = "one call ran, TFLOP/s"
    return [Verdict(outcome.match.name, what, who, "runs", outcome.rate(who), bool(outcome.ours))]


def weak_scaling(outcomes: Sequence[Outcome]) -> list[Verdict]:
    """The largest world against 2 ranks, wherever both ran the same tokens a rank."""
    largest = max((outcome.match.case.world for outcome in outcomes), default=0)
    plain = [o for o in outcomes if o.ours and o.match.case.mask == "causal"]
    small = {(o.match.case.direction, o.match.case.seqlen // 2): o for o in plain if o.match.case.world == 2}
    found = []
    for outcome in plain:
        case = outcome.match.case
        base = small.get((case.direction, case.seqlen // case.world))
        if case.world == largest > 2 and base is not None:
            who = best(outcome)
            what = f"speed over 2 ranks' at {format_size(case.seqlen // case.world)} tokens a rank"
            limit = WEAK if case.direction == "fwd" and largest == 8 else None
            found.append(_at_least(outcome, what, who, _over(outcome.rate(who), base.rate(best(base))), limit))
    return found


def _is_ring(outcome: Outcome, name: str) -> bool:
    entry = outcome.match.entry(name)
    return entry.method == OURS and entry.transport not in ("ulysses", "gather") and "mesh" not in entry.transport


def _over(mine: float | None, theirs: float | None) -> float | None:
    return mine / theirs if mine and theirs else None


def _at_most(outcome: Outcome, what: str, who: str, reached: float | None, limit: float | None) -> Verdict:
    return _verdict(outcome, what, who, "<=", reached, limit, lambda x, bound: x <= bound)


def _at_least(outcome: Outcome, what: str, who: str, reached: float | None, limit: float | None) -> Verdict:
    return _verdict(outcome, what, who, ">=", reached, limit, lambda x, bound: x >= bound)


def _verdict(
    outcome: Outcome,
    what: str,
    who: str,
    sign: str,
    reached: float | None,
    limit: float | None,
    holds: Callable[[float, float], bool],
) -> Verdict:
    asked = "" if limit is None else f"{sign} {limit:g}"
    ok = None if limit is None or reached is None else holds(reached, limit)
    return Verdict(outcome.match.name, what, who, asked, reached, ok)
