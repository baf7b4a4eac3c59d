"""Schedules: when each rank computes which hop and what is under way beside it, transport by transport.

All recurrences follow what the transports do: a copy starts when its data, its buffer and its channel are free, a hop
when its keys have arrived and the hop before is done. Each rank has one channel for what comes to it. Two copies out of
one rank's memory at a time (pull) do not slow each other: ranks pull from different owners at any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ringfa3.cost.scene import Scene, overlap
from ringfa3.transport.route import hull, length


@dataclass(frozen=True)
class Step:
    """One hop of one rank. Seconds from the start of the call.

    Args:
        rank, source: of the ring axis. direction: "forward" or "backward".
        pairs: visible ones. size: bytes of keys and values that had to come for it.
        arrived: when they were there. waited: how long the rank had nothing to do because they were not.
    """

    rank: int
    direction: str
    source: int
    pairs: int
    size: float
    arrived: float
    start: float
    end: float
    waited: float


@dataclass(frozen=True)
class Copy:
    """One message to a rank. what: "keys", "gradients" or "heads" (Ulysses' exchange)."""

    rank: int
    direction: str
    what: str
    peer: int
    size: float
    start: float
    end: float


@dataclass
class Schedule:
    """What every rank of the ring axis does, as it grows.

    Args:
        busy: until when each rank's compute stream has work.
        line: until when each rank's channel carries what comes to it.
    """

    scene: Scene
    busy: list[float]
    line: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.line = list(self.busy)
        # of each rank: (start, end, stall) of copies not yet over
        self._beside: list[list[tuple[float, float, float]]] = [[] for _ in self.busy]

    def compute(self, rank: int, source: int, arrived: float, *, backward: bool) -> float:
        """Append a hop, stretched by what the transfers beside it cost it. Returns its end."""
        start = max(self.busy[rank], arrived)
        base = self.scene.hop_seconds(rank, source, backward=backward)
        beside = self._beside[rank] = [span for span in self._beside[rank] if span[1] > start]
        end = start + base
        for stall in {stall for *_, stall in beside}:  # of links of one kind, in and out at a time count once
            spans = [(a, b) for a, b, own in beside if own == stall]
            end += stall * overlap(start, start + base, spans)
        pairs, size = int(self.scene.work.pairs[rank, source]), self.scene.needed(rank, source)
        way = "backward" if backward else "forward"
        waited = start - self.busy[rank]
        own = rank == source
        self.steps.append(Step(rank, way, source, pairs, 0.0 if own else size, arrived, start, end, waited))
        self.busy[rank] = end
        return end

    def copy(self, rank: int, peer: int, size: float, ready: float, kind: str, what: str, *, backward: bool) -> float:
        """Append a message from peer to rank, when it is ready and the channel is free. Returns its end."""
        if size <= 0:
            return ready
        start = max(ready, self.line[rank])
        link = self.scene.link(kind, rank, peer)
        end = start + link.seconds(size)
        self.copies.append(Copy(rank, "backward" if backward else "forward", what, peer, size, start, end))
        self.line[rank] = end
        for side in (rank, peer):
            self._beside[side].append((start, end, link.stall))
        return end


def ring(plan: Schedule, *, backward: bool) -> None:
    """Rounds of neighbours' messages; backward the gradients follow a round later and the last rank sends them home."""
    scene, n = plan.scene, plan.scene.ring
    last = [max((t for t in range(1, n) if scene.needed((s + t) % n, s)), default=0) for s in range(n)]
    plan.busy = [at + scene.copy_seconds(scene.passed(rank, 1)) for rank, at in enumerate(plan.busy)]  # packing
    done = list(plan.busy)
    ends = [[at] for at in plan.busy]  # of each rank: before its first step, after each one
    for step in range(n + (1 if backward and n > 1 else 0)):
        arrived = list(done)
        flown = list(done)
        for rank in range(n):  # what reaches this rank beside its step
            before = (rank - 1) % n
            free = ends[rank][-1 if backward else max(0, step + 2 - scene.way.depth)]
            ready = max(done[rank], done[before], free, ends[before][-1] if backward else 0.0)
            end = ready
            if step + 1 < n:
                size = scene.passed((rank - step - 1) % n, step + 1)
                end = plan.copy(rank, before, size, ready, "sendrecv", "keys", backward=backward)
            if backward:
                for peer, size in _gradients(scene, rank, step, last):
                    end = max(end, plan.copy(rank, peer, size, ready, "sendrecv", "gradients", backward=True))
            flown[rank], flown[before] = max(flown[rank], end), max(flown[before], end)
        for rank in range(n):
            source = (rank - step) % n
            end = plan.busy[rank]
            if step < n and source in scene.hops(rank):
                end = plan.compute(rank, source, arrived[rank], backward=backward)
            if backward:  # the share waits for what arrived, and is added to it
                end = max(end, flown[rank]) + scene.copy_seconds(scene.needed(rank, source) * scene.gradient, 3.0)
                plan.busy[rank] = end
            ends[rank].append(end)
        done = flown


def _gradients(scene: Scene, rank: int, step: int, last: Sequence[int]) -> list[tuple[int, float]]:
    """(peer, bytes) of the gradient sums that reach this rank in a round."""
    n, found = scene.ring, []
    source = (rank - step) % n
    if 1 < step < n and step - 1 < last[source]:
        found.append(((rank - 1) % n, scene.passed(source, 1) * scene.gradient))
    if step > 1 and step - 1 == last[rank]:
        found.append(((rank + step - 1) % n, scene.passed(rank, 1) * scene.gradient))
    return found


def pull(plan: Schedule, *, backward: bool) -> None:
    """Copies from the owners, as many ahead as there are buffers; backward owners pull the others' shares, too."""
    scene, n = plan.scene, plan.scene.ring
    latency = scene.link("pull", 0, 0).latency
    # everybody's shard must lie in symmetric memory before anybody pulls
    staged = max(at + scene.copy_seconds(scene.passed(rank, 1)) for rank, at in enumerate(plan.busy))
    plan.busy = [max(at, staged) for at in plan.busy]
    plan.line = [staged + latency] * n
    hops = [scene.hops(rank, backward=backward) for rank in range(n)]
    arrived = [[0.0] * len(own) for own in hops]
    ends: list[list[float]] = [[] for _ in range(n)]
    fetched = [0] * n
    for step in range(max(map(len, hops), default=0)):
        shares = []
        for rank, own in enumerate(hops):
            # a buffer is free again after the hop `depth` before; the own shard needs none
            while (i := fetched[rank]) < min(len(own), scene.way.depth + max(1 - backward, step)):
                free = ends[rank][i - scene.way.depth] if i >= scene.way.depth + (not backward) else 0.0
                if own[i] != rank:
                    size = scene.needed(rank, own[i])
                    arrived[rank][i] = plan.copy(rank, own[i], size, free, "pull", "keys", backward=backward)
                fetched[rank] += 1
            if step < len(own):
                end = plan.compute(rank, own[step], arrived[rank][step], backward=backward)
                ends[rank].append(end)
                if own[step] != rank:
                    shares.append((end, own[step], rank))
        if backward:
            _pull_shares(plan, shares)
    if backward:  # dq is done; so must be the sums that the others computed
        plan.busy = [max(at, line) for at, line in zip(plan.busy, plan.line, strict=True)]


def _pull_shares(plan: Schedule, shares: Sequence[tuple[float, int, int]]) -> None:
    """Each owner fetches shares (ready, owner, rank) of its gradient and adds them."""
    for ready, owner, rank in sorted(shares):
        size = plan.scene.needed(rank, owner) * plan.scene.gradient
        end = plan.copy(owner, rank, size, ready, "pull", "gradients", backward=True)
        plan.line[owner] = end + plan.scene.copy_seconds(size, 3.0)


def gather(plan: Schedule, *, backward: bool) -> None:
    """One exchange beside the own hop; backward a second one brings the gradients home."""
    scene, n = plan.scene, plan.scene.ring
    plan.busy = [at + scene.copy_seconds(scene.passed(rank, 1)) for rank, at in enumerate(plan.busy)]
    posted = max(plan.busy)
    arrived = [
        _exchange(plan, rank, [(peer, scene.needed(rank, peer)) for peer in scene.hops(rank)], posted, "keys", backward)
        for rank in range(n)
    ]
    for rank in range(n):
        for source in scene.hops(rank):
            plan.compute(rank, source, 0.0 if source == rank else arrived[rank], backward=backward)
    if backward:
        posted = max(plan.busy)
        for rank in range(n):
            shares = [(peer, scene.needed(peer, rank) * scene.gradient) for peer in range(n) if peer != rank]
            end = _exchange(plan, rank, shares, posted, "gradients", backward)
            plan.busy[rank] = end + scene.copy_seconds(sum(size for _, size in shares), 3.0)


def _exchange(
    plan: Schedule, rank: int, messages: list[tuple[int, float]], ready: float, what: str, backward: bool
) -> float:
    """All messages to a rank in one batch: they share the channel at the speed of all of them together."""
    messages = [(peer, size) for peer, size in messages if peer != rank and size > 0]
    end = ready
    for kind in ("near", "far"):
        batch = [m for m in messages if (plan.scene.host(m[0]) != plan.scene.host(rank)) == (kind == "far")]
        if batch:
            total = sum(size for _, size in batch)
            end = max(end, plan.copy(rank, batch[0][0], total, ready, "sendrecv", what, backward=backward))
    return end


def hierarchical(plan: Schedule, *, backward: bool) -> None:
    """Each rank passes shards on to its like on the next host; inside a host they are pulled from whom they reached.

    Backward the host's shares of a shard are pulled together by the rank that held it, whose sum goes on as in a ring.
    """
    scene, n = plan.scene, plan.scene.ring
    hosts = scene.ring_hosts
    a_host = n // hosts
    ends = [[at] * scene.way.depth for at in plan.busy]  # of each rank's hops: a buffer is free `depth` hops later
    held = list(plan.busy)  # when the shard of this outer step is with each rank
    net = list(plan.busy)
    sums = list(plan.busy)
    for outer in range(hosts):
        coming = list(held)
        for rank in range(n if outer + 1 < hosts else 0):
            source = (rank - (outer + 1) * a_host) % n
            size = _onward(scene, source, outer + 1)
            before = (rank - a_host) % n
            coming[rank] = _between(plan, net, rank, before, size, max(held[rank], held[before]), "keys", backward)
        for inner in range(a_host):
            shares = []
            for rank in range(n):
                host, local = divmod(rank, a_host)
                peer = host * a_host + (local - inner) % a_host
                source = (peer - outer * a_host) % n
                if source not in scene.hops(rank):
                    continue
                arrived = held[rank] if outer else 0.0
                if inner:
                    size = scene.needed(rank, source)
                    ready = max(held[peer], ends[rank][-scene.way.depth])
                    arrived = plan.copy(rank, peer, size, ready, "pull", "keys", backward=backward)
                end = plan.compute(rank, source, arrived, backward=backward)
                ends[rank].append(end)
                if inner:
                    shares.append((end, peer, rank, scene.needed(rank, source) * scene.gradient))
                sums[rank] = max(sums[rank], end)
            for ready, owner, rank, size in sorted(shares) if backward else ():
                sums[owner] = plan.copy(owner, rank, size, ready, "pull", "gradients", backward=True)
        if backward and outer:  # the sums go one host on; the last ones go home, as far
            onward = [_onward(scene, (rank - (outer + 1) * a_host) % n, 1) * scene.gradient for rank in range(n)]
            done = list(sums)
            for rank in range(n):
                before = (rank - a_host) % n
                sums[rank] = _between(plan, net, rank, before, onward[rank], done[before], "gradients", True)
        held = coming
    if backward:
        plan.busy = [max(at, ended) for at, ended in zip(plan.busy, sums, strict=True)]


def _onward(scene: Scene, source: int, outer: int) -> float:
    """Bytes of a shard that reach the host `outer` further on: what its ranks and those of later hosts need."""
    hosts, home = scene.ring_hosts, scene.host(source)
    readers = [rank for rank in range(scene.ring) if (scene.host(rank) - home) % hosts >= outer]
    return length(hull(scene.work.needs[rank][source] for rank in readers)) * scene.key_bytes


def _between(
    plan: Schedule, net: list[float], rank: int, peer: int, size: float, ready: float, what: str, backward: bool
) -> float:
    """A message between hosts: its channel is not that of the copies inside a host."""
    near, plan.line[rank] = plan.line[rank], net[rank]
    end = plan.copy(rank, peer, size, ready, "sendrecv", what, backward=backward)
    net[rank], plan.line[rank] = plan.line[rank], near
    return end


def heads(plan: Schedule, *, gathering: bool, backward: bool) -> None:
    """Ulysses' exchange of heads for rows (gathering), or back; nothing runs beside it."""
    scene, job = plan.scene, plan.scene.job
    u = scene.ulysses
    if u == 1:
        return
    rows = [held / u for held in scene.work.rows]  # of each rank of a group
    wide = job.batch * job.D * job.itemsize * (u - 1)
    elements = scene.Hq + (2 * scene.Hkv if gathering != backward else 0)  # q with k, v; dq with dk, dv
    far = u > job.world // job.hosts
    link = scene.machine.link("between" if far else "sendrecv", job.world // job.hosts)
    start, way = max(plan.busy), "backward" if backward else "forward"
    for rank in range(scene.ring):
        size = rows[rank] * wide * elements
        # packed before and unpacked after: two passes each
        end = start + link.seconds(size) + scene.copy_seconds(size, 4.0)
        plan.copies.append(Copy(rank, way, "heads", rank, size, start, end))
        plan.busy[rank] = plan.line[rank] = end
