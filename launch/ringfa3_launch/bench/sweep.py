"""What every rank of `ringfa3 bench attention` does: ours and the peers of each case, as matches on growing worlds."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import connection

from ringfa3_launch.bench.case import Case, Sweep
from ringfa3_launch.bench.match import GEMM, OURS, Entry, Match, Outcome
from ringfa3_launch.bench.program import Program, Tell, perform
from ringfa3_launch.bench.ring_peers import applies, layout_of
from ringfa3_launch.bench.timing import Timing
from ringfa3_launch.bench.verdicts import FLOOR
from ringfa3_launch.rank import RankInfo


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

    @staticmethod
    def of(outcome: Outcome) -> Result:
        """What a match of ours, peers and a matrix product says about its case."""
        missing = dict(outcome.missing)
        failure, errors = missing.pop(OURS, ""), dict(outcome.errors)
        if OURS in outcome.plain:
            errors["plain"] = outcome.plain[OURS]
            limit = 2 * errors["plain"] + FLOOR
            if not errors[OURS] <= limit:  # NaN fails too
                failure = f"relative error {errors[OURS]:.2e}, twice plain attention's is {limit:.2e}"
        flops = outcome.flops.get(GEMM, 0.0)
        case = outcome.match.case
        return Result(case, outcome.device, outcome.timings, flops, missing, outcome.memory, errors, failure)

    def tflops(self, name: str) -> Timing | None:
        """TFLOP/s per GPU in each round."""
        timing = self.timings.get(name)
        if timing is None:
            return None
        flops = self.gemm_flops if name == GEMM else self.case.flops / self.case.world
        return Timing(tuple(flops / t / 1e12 for t in timing.seconds))


def program(sweep: Sweep) -> Program:
    """The sweep's matches: a case each."""
    matches = tuple(_match(case, sweep) for world in sweep.worlds for case in sweep.cases(world))
    return Program(matches, sweep.device, sweep.seed)


def measure(info: RankInfo, sweep: Sweep, listener: connection.Connection | Tell | None) -> list[Result]:
    """Run the sweep on this rank; see `perform`.

    Returns:
        The results of the worlds that this rank was in.

    Raises:
        Stuck: a call of ours hangs.
    """
    return [Result.of(outcome) for outcome in perform(info, program(sweep), listener).outcomes]


def _match(case: Case, sweep: Sweep) -> Match:
    entries = [Entry(OURS, OURS, case, sweep.layout, sweep.transport, sweep.impl)]
    for name in sweep.peers:
        if applies(name, case.world):
            entries.append(Entry(name, name, case, layout_of(name)))
    return Match(case, (*entries, Entry(GEMM, GEMM, case)), sweep.seconds)
