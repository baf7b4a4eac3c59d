"""What every rank of `ringfa3 bench attention` does: build a case's inputs, time ours and the peers, check both."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import connection

import torch
import torch.distributed as dist
from torch import Tensor

from ringfa3.attention import ring_attention
from ringfa3.plan import Plan, plan
from ringfa3_launch.bench.accuracy import Rows, Sample
from ringfa3_launch.bench.case import DTYPES, Case, Sweep
from ringfa3_launch.bench.peers import Inputs, Missing, Peer, applies, both, prepare
from ringfa3_launch.bench.timing import Clock, Contestant, Memory, Timing
from ringfa3_launch.rank import RankInfo, pick_device

OURS, GEMM = "ours", "gemm"
GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
WARM_TOKENS = 256  # a rank
FLOOR = 1e-6  # relative error below which nobody is wrong: fp32 sums in another order
WRONG = 0.1  # a relative error above this is another function, not rounding

Tell = Callable[[str, int], None]


@dataclass(frozen=True)
class Result:
    """One case as it was measured; figures of the slowest or fullest rank.

    Args:
        case: what was measured.
        device: "cuda" or "cpu".
        timings: of "ours", "gemm" and each peer that ran.
        gemm_flops: operations of the matrix product.
        missing: peer -> why it did not run.
        memory: peak bytes of one rank, "ours" and peers; those that could be measured.
        errors: relative, on sampled rows against fp64: "ours", "plain" (the same maths in the inputs' dtype) and peers.
        failure: why ours did not run, or "".
    """

    case: Case
    device: str
    timings: dict[str, Timing]
    gemm_flops: float
    missing: dict[str, str]
    memory: dict[str, int]
    errors: dict[str, float]
    failure: str = ""

    def tflops(self, name: str) -> Timing | None:
        """TFLOP/s per GPU in each round."""
        timing = self.timings.get(name)
        if timing is None:
            return None
        flops = self.gemm_flops if name == GEMM else self.case.flops / self.case.world
        return Timing(tuple(flops / t / 1e12 for t in timing.seconds))


def steps(sweep: Sweep) -> int:
    """How many steps `measure` reports."""
    return len(sweep.worlds) * len(sweep.seqlens) * len(sweep.directions)


def measure(info: RankInfo, sweep: Sweep, listener: connection.Connection | Tell | None) -> list[Result]:
    """Run the sweep on this rank. Every rank must call it; ranks beyond a case's world wait.

    Args:
        listener: where rank 0 reports progress: called with, or sent, (text, steps done).

    Returns:
        The results of the worlds that this rank was in.
    """
    device = pick_device(info.local_rank, info.local_world, sweep.device)
    if info.rank > 0 or listener is None:
        listener = _nobody
    tell = _sender(listener) if isinstance(listener, connection.Connection) else listener
    waiting = dist.new_group(timeout=timedelta(days=1), backend="gloo")  # ranks beyond a world sleep, however long
    results = []
    for world in sweep.worlds:
        group = dist.new_group(list(range(world)))
        if info.rank < world:
            assert isinstance(group, dist.ProcessGroup)
            results += _measure_world(world, sweep, Place(info.rank, group, device), tell)
        dist.barrier(waiting)
    return results


@dataclass(frozen=True)
class Place:
    """This rank among those of a world."""

    rank: int
    group: dist.ProcessGroup
    device: torch.device


def _measure_world(world: int, sweep: Sweep, place: Place, tell: Tell) -> list[Result]:
    warm = replace(next(sweep.cases(world)), seqlen=WARM_TOKENS * world, direction=max(sweep.directions, key=len))
    Bench(warm, sweep, place, Memory(place.device)).warm()  # libraries load, connections open: no case pays for that
    _free(place.device)
    memory = Memory(place.device)
    results = []
    for case in sweep.cases(world):
        tell(case.name, 0)
        result = Bench(case, sweep, place, memory).run()
        results.append(result)
        tell(_summary(result), 1)
        _free(place.device)
    return results


class Bench:
    """One case on one rank."""

    def __init__(self, case: Case, sweep: Sweep, place: Place, memory: Memory) -> None:
        self.case, self.sweep, self.place = case, sweep, place
        self.meter = memory
        self.dtype: torch.dtype = getattr(torch, DTYPES[case.dtype])
        self.missing: dict[str, str] = {}
        self.memory: dict[str, int] = {}
        self.errors: dict[str, float] = {}

    def warm(self) -> None:
        """Call ours once."""
        shard = Shard.make(self.case, self.sweep.layout, self.place, self.sweep.seed)
        self._ours(shard).call()

    def run(self) -> Result:
        """Measure the case."""
        shard = Shard.make(self.case, self.sweep.layout, self.place, self.sweep.seed)
        ours = self._ours(shard)
        failure = self._first_call(OURS, ours, shard)
        contestants = [] if failure else [Contestant(OURS, ours.call)]
        if not failure:
            self.errors["plain"] = shard.error(shard.sample.plain, self.place)
            limit = 2 * self.errors["plain"] + FLOOR
            if not self.errors[OURS] <= limit:  # NaN fails too
                failure = f"relative error {self.errors[OURS]:.2e}, twice plain attention's is {limit:.2e}"
        for name in self.sweep.peers:
            if applies(name, self.case.world):
                contestants += self._peer(name, shard)
        contestants.append(self._gemm())
        clock = Clock(self.place.device, self.place.group if self.case.world > 1 else None)
        timings = clock.interleaved(contestants, self.sweep.seconds)
        flops = 2.0 * GEMM_SIZE[self.place.device.type] ** 3
        return Result(
            self.case, self.place.device.type, timings, flops, self.missing, self.memory, self.errors, failure
        )

    def _ours(self, shard: Shard) -> Peer:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = ring_attention(
                q, k, v, plan=shard.plan, group=self.place.group, transport=self.sweep.transport, impl=self.sweep.impl
            )
            return out

        return Peer(both(attend, self.case, shard.inputs))

    def _peer(self, name: str, shard: Shard) -> list[Contestant]:
        """The peer as a contestant, once it has shown that it computes the same; otherwise its reason is noted."""
        if name.startswith("context-parallel") and self.sweep.layout != "zigzag":
            shard = Shard.make(self.case, "zigzag", self.place, self.sweep.seed)  # its own order
        try:
            peer = prepare(name, self.case, shard.inputs, self.place.group)
        except Missing as missing:
            self.missing[name] = str(missing)
            return []
        reason = self._first_call(name, peer, shard)
        if not reason and not self.errors[name] < WRONG:
            reason = f"computes something else here (relative error {self.errors[name]:.2g})"
        if reason:
            self.missing[name] = reason
            return []
        return [Contestant(name, peer.call, peer.session)]

    def _first_call(self, name: str, peer: Peer, shard: Shard) -> str:
        """Call once: memory and error are noted. Returns why it failed, on any rank, or ""."""
        reason, taken = "", None
        try:
            with peer.session():
                outputs, most, added = self.meter.peak(peer.call)
            taken = shard.sample.take(outputs)
            del outputs
        except Exception as error:  # whatever stops a contestant is what the table has to say about it
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        if _largest(float(bool(reason)), self.place):
            _free(self.place.device)
            return reason or "failed on another rank"
        assert taken is not None
        used = most if name == OURS else added and added + shard.inputs.bytes
        most = int(_largest(float(used or 0), self.place))
        if most:
            self.memory[name] = most
        self.errors[name] = shard.error(taken, self.place)
        return ""

    def _gemm(self) -> Contestant:
        """The matrix product that shows what the device's matrix units do in the same minute."""
        size = GEMM_SIZE[self.place.device.type]
        a, b = (torch.randn(size, size, device=self.place.device).to(self.dtype) for _ in range(2))
        a @ b
        return Contestant(GEMM, lambda: a @ b)


@dataclass(frozen=True)
class Shard:
    """This rank's part of a case's random tensors, in one layout, and sampled rows with their exact results."""

    plan: Plan
    inputs: Inputs
    sample: Sample

    @staticmethod
    def make(case: Case, layout: str, place: Place, seed: int) -> Shard:
        """The whole tensors are made from seeds, alike on every rank and in every layout, and cut."""
        dealt = plan(case.visible, layout, case.seqlen, place.group, device=place.device)
        dtype = getattr(torch, DTYPES[case.dtype])

        def whole(index: int, heads: int) -> Tensor:
            generator = torch.Generator(place.device).manual_seed(4 * seed + index)
            shape = (1, case.seqlen, heads, case.D)
            return torch.randn(shape, generator=generator, device=place.device, dtype=dtype)

        backward = case.direction == "fwd+bwd"
        q, k, v = (dealt.shard(whole(i, h)) for i, h in enumerate((case.Hq, case.Hkv, case.Hkv)))
        dout = dealt.shard(whole(3, case.Hq)) if backward else q.new_empty(0)
        inputs = Inputs(q.requires_grad_(backward), k.requires_grad_(backward), v.requires_grad_(backward), dout)
        sample = Sample(case, dealt.positions, inputs, lambda: (whole(1, case.Hkv), whole(2, case.Hkv)))
        return Shard(dealt, inputs, sample)

    def error(self, taken: Rows, place: Place) -> float:
        """Relative error of sampled rows over all ranks: the larger of out's and dq's."""
        sums = self.sample.squares(taken).to(place.device)
        if dist.get_world_size(place.group) > 1:
            dist.all_reduce(sums, group=place.group)
        return float((sums[:, 0] / sums[:, 1]).sqrt().max())


def _largest(value: float, place: Place) -> float:
    """The largest over the world's ranks."""
    if dist.get_world_size(place.group) == 1:
        return value
    x = torch.tensor([value], dtype=torch.float64, device=place.device)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=place.group)
    return float(x)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _summary(result: Result) -> str:
    rates = result.tflops(OURS)
    return (
        f"{result.case.name}: {rates.median:.4g} TFLOP/s a rank" if rates else f"{result.case.name}: {result.failure}"
    )


def _nobody(text: str, done: int) -> None:
    """Progress of a rank that nobody listens to."""


def _sender(outbox: connection.Connection) -> Tell:
    return lambda text, done: outbox.send((text, done))
