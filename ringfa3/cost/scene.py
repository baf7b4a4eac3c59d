"""Scene: what the ranks of one ring axis compute and send, in seconds and bytes; schedules are made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ringfa3.cost.job import Job, Way, Work, dealt
from ringfa3.cost.machine import Link, Machine
from ringfa3.transport.route import hull, length


@dataclass(frozen=True, eq=False)
class Scene:
    """The ring axis of a job done some way on a machine; with Ulysses each of its ranks stands for a group of them.

    Args:
        ulysses, ring: the mesh.
        work: of the ring axis's ranks.
    """

    job: Job
    way: Way
    machine: Machine
    ulysses: int
    ring: int
    work: Work

    @staticmethod
    def of(job: Job, way: Way, machine: Machine) -> Scene:
        """Raises ValueError where the machine's rates are for other dtypes, Unsupported where the way cannot serve."""
        if job.dtype not in machine.dtypes:
            raise ValueError(f"machine: wanted rates of kernels for {job.dtype}, got those for {machine.dtypes}")
        ulysses, ring = way.mesh(job)
        return Scene(job, way, machine, ulysses, ring, dealt(job, way.layout, ring, machine.tile))

    @property
    def Hq(self) -> int:
        """Query heads of a rank."""
        return self.job.Hq // self.ulysses

    @cached_property
    def Hkv(self) -> int:
        """Key/value heads of the rank that has most: its query heads may use parts of several groups."""
        group, own = self.job.Hq // self.job.Hkv, self.Hq
        spans = (((i + 1) * own - 1) // group - i * own // group + 1 for i in range(self.ulysses))
        return max(spans)

    @property
    def ring_hosts(self) -> int:
        """Hosts that the ring axis spans."""
        a_host = self.job.world // self.job.hosts
        return max(1, self.ring * min(self.ulysses, a_host) // a_host) if self.job.hosts > 1 else 1

    def host(self, rank: int) -> int:
        """Of a rank of the ring axis."""
        return rank * self.ring_hosts // self.ring

    def link(self, kind: str, a: int, b: int) -> Link:
        """Between two ranks of the ring axis."""
        return self.machine.link("between" if self.host(a) != self.host(b) else kind, self.job.world // self.job.hosts)

    def order(self, rank: int) -> list[int]:
        """Sources by step: own shard first, then those of the ranks before."""
        return [(rank - step) % self.ring for step in range(self.ring)]

    def hops(self, rank: int, *, backward: bool = False) -> list[int]:
        """Sources of which this rank needs anything, in order; pull's backward keeps the own shard for the end."""
        found = self._hops[rank]
        if backward and self.way.transport == "pull" and found[:1] == [rank]:
            return [*found[1:], rank]
        return found

    def needed(self, rank: int, source: int) -> float:
        """Bytes of keys and values that a rank needs of a shard."""
        return self._lengths[rank][source] * self.key_bytes

    def passed(self, source: int, step: int) -> float:
        """Bytes of a shard that reach the rank `step` further on the ring: all that it and later ones need."""
        return self._passed[source][step] * self.key_bytes

    @cached_property
    def _hops(self) -> list[list[int]]:
        return [[source for source in self.order(rank) if self._lengths[rank][source]] for rank in range(self.ring)]

    @cached_property
    def _lengths(self) -> list[list[int]]:
        return [[length(keys) for keys in needs] for needs in self.work.needs]

    @cached_property
    def _passed(self) -> list[list[int]]:
        """[source][step]: hulls grow towards the owner, so they are built from the last step back."""
        found = []
        for source in range(self.ring):
            keys, sizes = None, [0] * (self.ring + 1)
            for step in range(self.ring - 1, 0, -1):
                keys = hull([keys, self.work.needs[(source + step) % self.ring][source]])
                sizes[step] = length(keys)
            found.append(sizes)
        return found

    @cached_property
    def key_bytes(self) -> float:
        """K and V of one position, all batch rows."""
        return 2.0 * self.job.batch * self.Hkv * self.job.D * self.job.itemsize

    @property
    def gradient(self) -> float:
        """How many times larger fp32 gradients are than keys and values."""
        return 4.0 / self.job.itemsize

    @property
    def row_elements(self) -> float:
        """Elements of q or out of one position, all batch rows."""
        return float(self.job.batch * self.Hq * self.job.D)

    def hop_seconds(self, rank: int, source: int, *, backward: bool) -> float:
        """Of a hop's kernel with its launch and the traffic of the state, nothing beside it.

        A kernel alone writes out (or dq) once, in q's dtype; hops but the last write fp32, hops but the first read it.
        """
        if (rank, source, backward) not in self._seconds:
            self._seconds[rank, source, backward] = self._hop_seconds(rank, source, backward)
        return self._seconds[rank, source, backward]

    def copy_seconds(self, size: float, passes: float = 2.0) -> float:
        """Of moving so many bytes inside a GPU's memory: each pass reads or writes them once."""
        return passes * size / self.machine.memory_bandwidth

    @cached_property
    def _seconds(self) -> dict[tuple[int, int, bool], float]:
        return {}

    def _hop_seconds(self, rank: int, source: int, backward: bool) -> float:
        hops, job, machine = self.hops(rank, backward=backward), self.job, self.machine
        per_pair = (10.0 if backward else 4.0) * self.Hq * job.D
        pairs, computed = (float(x[rank, source]) for x in (self.work.pairs, self.work.computed))
        kernel = machine.kernel_seconds(pairs * per_pair, job.D, backward=backward)
        if kernel:
            kernel *= computed / pairs  # masked corners of tiles cost as much as the rest
            # the row tile with most keys on one multiprocessor, at its share of the full rate
            full = max(rate for _, rate in (machine.backward if backward else machine.forward)) * 1e12
            longest = float(self.work.deepest[rank, source]) * min(machine.tile, self.work.rows[rank])
            kernel = max(kernel, longest * (10.0 if backward else 4.0) * job.D * machine.multiprocessors / full)
        read = 4.0 if source != hops[0] else 0.0
        written = 4.0 - job.itemsize if len(hops) > 1 and (backward or source != hops[-1]) else 0.0
        state = (read + written) * self.work.rows[rank] * self.row_elements / machine.memory_bandwidth
        return kernel + machine.state * state + machine.launch


def overlap(begin: float, end: float, spans: Sequence[tuple[float, float]]) -> float:
    """Seconds of [begin, end] in which any of the spans, in any order, is under way."""
    covered, upto = 0.0, begin
    for a, b in sorted(spans):
        a, b = max(a, upto), min(b, end)
        if b > a:
            covered, upto = covered + b - a, b
    return covered
