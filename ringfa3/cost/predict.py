"""predict: the timeline of every rank, what waits, how long it takes and how much memory a rank needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ringfa3.cost import schedule
from ringfa3.cost.job import Job, Way, dealt
from ringfa3.cost.machine import Machine
from ringfa3.cost.scene import Scene, overlap
from ringfa3.cost.schedule import Copy, Schedule, Step
from ringfa3.transport.route import hull, length

TRANSPORTS = {
    "pull": schedule.pull,
    "ring": schedule.ring,
    "gather": schedule.gather,
    "hierarchical": schedule.hierarchical,
}


@dataclass(frozen=True, eq=False)
class Prediction:
    """How a job will go, done one way.

    Args:
        scene: job, way, machine and the exact work of each rank.
        steps, copies: of the ranks of the ring axis (with Ulysses each stands for a group), in order of time.
        ends: seconds at which each of them is done. forward_ends: with its forward pass.
    """

    scene: Scene
    steps: tuple[Step, ...]
    copies: tuple[Copy, ...]
    ends: tuple[float, ...]
    forward_ends: tuple[float, ...]

    @property
    def job(self) -> Job:
        return self.scene.job

    @property
    def way(self) -> Way:
        return self.scene.way

    @property
    def name(self) -> str:
        return self.way.describe(self.job)

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return max(self.ends)

    @cached_property
    def alone(self) -> float:
        """Seconds that one GPU would take for the whole job."""
        return _alone(self.job, self.scene.machine)

    @property
    def efficiency(self) -> float:
        """Speed per GPU, as a share of one GPU's."""
        return self.alone / (self.seconds * self.job.world)

    @property
    def tflops(self) -> float:
        """TFLOP/s per GPU."""
        return self.job.operations / self.job.world / self.seconds / 1e12

    @cached_property
    def computing(self) -> tuple[float, ...]:
        """Seconds that each rank's hops would take with nothing beside them and nothing to wait for."""
        totals = [0.0] * self.scene.ring
        for step in self.steps:
            totals[step.rank] += self.scene.hop_seconds(step.rank, step.source, backward=step.direction == "backward")
        return tuple(totals)

    @property
    def waiting(self) -> tuple[float, ...]:
        """Seconds in which each rank computes no hop: exposed messages, packing, and waiting for slower ranks."""
        spans = [[(s.start, s.end) for s in self.steps if s.rank == rank] for rank in range(self.scene.ring)]
        return tuple(self.seconds - overlap(0.0, self.seconds, own) for own in spans)

    @cached_property
    def losses(self) -> dict[str, float]:
        """Where the busiest rank's time goes beyond one GPU's for its share, in shares of the time; they sum to
        1 - efficiency. Below zero: gained (smaller kernels may be quicker)."""
        rank = max(range(self.scene.ring), key=lambda rank: self.computing[rank])
        busy = sum(step.end - step.start for step in self.steps if step.rank == rank)
        uneven = self.computing[rank] - sum(self.computing) / len(self.computing)
        lost = {
            "waiting for messages": self.seconds - busy,
            "kernels slowed by transfers": busy - self.computing[rank],
            "uneven work": uneven,
            "hops in place of one kernel": self.computing[rank] - uneven - self.alone / self.job.world,
        }
        return {name: seconds / self.seconds for name, seconds in lost.items()}

    @property
    def sent(self) -> float:
        """Bytes that come to the rank to which most come."""
        return max(sum(copy.size for copy in self.copies if copy.rank == rank) for rank in range(self.scene.ring))

    @property
    def hidden(self) -> float:
        """Share of the transfers' time in which their rank computes; 1 where nothing is sent."""
        total = beside = 0.0
        for copy in self.copies:
            spans = [(step.start, step.end) for step in self.steps if step.rank == copy.rank]
            total += copy.end - copy.start
            beside += overlap(copy.start, copy.end, spans)
        return beside / total if total else 1.0

    @cached_property
    def memory(self) -> tuple[float, ...]:
        """Peak bytes of each rank: inputs, outputs, state, gradients and buffers."""
        return tuple(_memory(self.scene, rank) for rank in range(self.scene.ring))


def predict(job: Job, way: Way, machine: Machine | None = None) -> Prediction:
    """How long every hop, message and rank will take.

    Args:
        machine: figures of the GPUs and links; None: `Machine.h200()`.

    Raises:
        Unsupported: the job cannot be done this way; says why.
        ValueError: the machine has no rates for this dtype.
    """
    scene = Scene.of(job, way, machine or Machine.h200())
    run = TRANSPORTS["pull" if way.transport == "ulysses" else way.transport]
    plan = Schedule(scene, [scene.machine.call] * scene.ring)
    forward_ends: tuple[float, ...] = ()
    for backward in (False, True) if job.backward else (False,):
        if backward:
            plan.busy = [max(plan.busy) + scene.machine.call] * scene.ring
            plan.line = list(plan.busy)
        schedule.heads(plan, gathering=True, backward=backward)
        if scene.ring == 1:
            plan.compute(0, 0, 0.0, backward=backward)
        else:
            run(plan, backward=backward)
        schedule.heads(plan, gathering=False, backward=backward)
        forward_ends = forward_ends or tuple(plan.busy)
    steps = sorted(plan.steps, key=lambda step: (step.start, step.rank))
    copies = sorted(plan.copies, key=lambda copy: (copy.start, copy.rank))
    return Prediction(scene, tuple(steps), tuple(copies), tuple(plan.busy), forward_ends)


def hiding_tokens(
    Hq: int, Hkv: int, tflops: float, bandwidth: float, *, backward: bool = False, itemsize: int = 2
) -> float:
    """Tokens a rank from which on messages take no longer than the hops beside them, for causal zigzag.

    A hop of n rows computes half of n * n pairs, and n keys must come meanwhile; backward 2.5 times the operations
    stand against keys, values and fp32 dK, dV. So n >= k * (Hkv / Hq) * F / BW with k = 2 forward and 2.4 backward,
    for 16-bit inputs (shared/ANCHORS.md). Head_dim cancels out.

    Args:
        tflops: of the kernel in that direction, TFLOP/s.
        bandwidth: of the link, GB/s.
        itemsize: bytes of an element of k and v.
    """
    if min(Hq, Hkv, tflops, bandwidth, itemsize) <= 0:
        raise ValueError(f"hiding_tokens: wanted all above 0, got {Hq}, {Hkv}, {tflops}, {bandwidth}, {itemsize}")
    factor = (itemsize + 4) / 2.5 if backward else itemsize
    return factor * Hkv / Hq * (tflops * 1e12) / (bandwidth * 1e9)


def _alone(job: Job, machine: Machine) -> float:
    """Seconds of the whole job on one GPU."""
    forward = job.operations / (3.5 if job.backward else 1.0)
    kernels = machine.kernel_seconds(forward, job.D)
    if job.backward:
        kernels += machine.kernel_seconds(2.5 * forward, job.D, backward=True)
    work = dealt(job, "contiguous", 1, machine.tile)
    kernels *= float(work.computed[0, 0]) / max(1.0, float(work.pairs[0, 0]))
    return kernels + (machine.launch + machine.call) * (2 if job.backward else 1)


def _memory(scene: Scene, rank: int) -> float:
    """Peak bytes of a rank: in the hops, or where it exchanges heads; the larger of forward and backward."""
    job, u = scene.job, scene.ulysses
    row, key = scene.row_elements * job.itemsize, scene.key_bytes
    rows = scene.work.rows[rank]
    lse = 4.0 * job.batch * scene.Hq * rows
    # with Ulysses the caller's q, k, v, out (rows / u, all heads) lie beside what the exchange made of them
    callers = 0.0 if u == 1 else rows / u * (2 * row * u + 2.0 * job.batch * job.Hkv * job.D * job.itemsize)
    several = len(scene.hops(rank)) > 1
    state = 4.0 * scene.row_elements * rows if several else 0.0
    inputs = callers + rows * (2 * row + key) + lse  # q, out, k, v, lse
    forward = inputs + state + _buffers(scene, rank)
    if not job.backward:
        return forward
    wide = scene.gradient if several else 1.0
    # dout; dq, and its cast; the shard's own dk, dv and the share of the hop; delta
    gradients = rows * row * (1 + wide + (1 if several else 0)) + 2 * rows * key * wide + lse
    return max(forward, inputs + gradients + _buffers(scene, rank, backward=True))


def _buffers(scene: Scene, rank: int, *, backward: bool = False) -> float:
    """Bytes for shards and gradients under way."""
    if scene.ring == 1:
        return 0.0
    key, depth, transport = scene.key_bytes, scene.way.depth, scene.way.transport
    others = [s for s in scene.order(rank) if s != rank]
    needed = [scene.needed(rank, source) for source in others]
    largest = max(needed, default=0.0)
    wide = scene.gradient if backward else 0.0
    own = scene.passed(rank, 1)
    if transport == "ring":
        arrives = [scene.passed(source, step + 1) for step, source in enumerate(others)]
        slots = [own, *arrives]
        held = sum(max(slots[i::depth], default=0.0) for i in range(depth))
        return held + wide * (max(arrives, default=0.0) + own)
    if transport == "gather":
        return own + sum(needed) * (1 + wide) + own * wide
    # what others need of the shard, in symmetric memory, and the ring of buffers; backward, shares wait there for
    # their owners, and one of the own shard arrives
    held = own + min(depth, len(others)) * largest + wide * (min(depth - 1, len(others)) * largest + own)
    if transport == "hierarchical":
        readers = (scene.work.needs[r][s] for r in range(scene.ring) for s in others)
        held += 2 * length(hull(readers)) * key * (1 + wide)
    return held
