"""What every rank does in a match: make each entry's inputs, call it once under a limit, check it, time all in turn."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ringfa3 import release_buffers
from ringfa3.transport.meeting import timeout_of
from ringfa3_launch.bench import kernels, ring_peers
from ringfa3_launch.bench.case import DTYPES, RING_PEERS
from ringfa3_launch.bench.groups import among
from ringfa3_launch.bench.guard import Guard, Stuck
from ringfa3_launch.bench.match import GEMM, HOPS, LAUNCH, OURS, Entry, Match, Outcome
from ringfa3_launch.bench.ours import Meshes, attend_with, group_of
from ringfa3_launch.bench.peers import Missing, Peer, both, prepare
from ringfa3_launch.bench.shard import Place, Shard, free
from ringfa3_launch.bench.timing import Clock, Contestant, Memory, Timing

GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
WRONG = 0.1  # a relative error above this is another function, not rounding


@dataclass
class Figures:
    """An Outcome's figures while they are gathered; see there."""

    timings: dict[str, Timing] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    plain: dict[str, float] = field(default_factory=dict)


class Arena:
    """The ranks of one world, one of which this is.

    Args:
        place: this rank among them, with the group of our own calls.
        alone: this rank by itself.
        rivals: the group of the peers' calls (None: no peers): one that fails must not take ours down.
        control: a gloo group of these ranks; None for a world of one.
        meshes: those that entries may name, by their shape.
        limit: seconds that a first call may take.
        seed: of the random inputs.
    """

    def __init__(
        self,
        place: Place,
        alone: Place,
        rivals: dist.ProcessGroup | None,
        control: dist.ProcessGroup | None,
        *,
        meshes: Meshes,
        limit: float,
        seed: int,
    ) -> None:
        self.place, self.alone, self.rivals, self.meshes, self.seed = place, alone, rivals, meshes, seed
        self.guard = Guard(place.device, control, limit)
        self.meter = Memory(place.device)
        self._hung: dict[str, str] = {}  # peers whose call did not return: they are not called again
        self._held: dict[str, int] = {}  # by transport, bytes that its pools hold outside torch's allocator
        self.warming = False  # libraries load: what grows is not a pool

    def play(self, match: Match) -> Outcome:
        """Measure the match. Every rank of the world must call.

        Raises:
            Stuck: a call of ours hangs, or a peer's cannot be broken off.
        """
        began = time.monotonic()
        if self._held:
            released = self.guard.attempt(self._release)  # of other failures every entry of ours tells, by name
            if released.hung:
                raise Stuck(f"release_buffers: {released.reason}")
        found, contestants = Figures(), []
        shards: dict[tuple[object, ...], Shard] = {}
        for entry in match.entries:
            contestant = self._enter(entry, match, shards, found)
            if contestant is not None:
                contestants.append(contestant)
        if match.seconds and contestants:
            clock = Clock(self.place.device, self.place.group if self.place.world > 1 else None)
            found.timings |= clock.interleaved(contestants, match.seconds, fewest=match.fewest)
        del contestants, shards
        free(self.place.device)
        return Outcome(match, self.place.device.type, **vars(found), wall=time.monotonic() - began)

    def _release(self) -> None:
        """Have our pools begin anew, so that a case shows what it needs, not what one before it did."""
        self._held.clear()
        if self.place.world > 1:
            release_buffers(self.place.group)
            for mesh in self.meshes.values():
                if mesh.size() == self.place.world:
                    release_buffers(mesh)

    def _enter(
        self, entry: Entry, match: Match, shards: dict[tuple[object, ...], Shard], found: Figures
    ) -> Contestant | None:
        """The entry as a contestant, once it has been called and checked; otherwise its reason is noted."""
        patience = 1.0 if match.seconds else 3.0
        made = self.guard.attempt(lambda: self._made(entry, match, shards))
        reason = made.reason.removeprefix("Missing: ")
        if made.hung:
            self._break_off(entry, reason)
        if reason:
            self._out(entry, reason, found)
            return None
        shard, peer = made.result
        first = self.guard.attempt(lambda: self._first_call(peer, shard), patience=patience)
        if first.hung:
            self._break_off(entry, first.reason)
        if first.reason:
            self._out(entry, first.reason, found)
            return None
        seconds, taken, added, outside = first.result
        if entry.method == OURS and not self.warming:
            outside = self._held[entry.transport] = self._held.get(entry.transport, 0) + outside
        found.flops[entry.name] = self._flops(entry)
        if not match.seconds:
            found.timings[entry.name] = Timing((self.place.largest(seconds),))
        if shard is not None:
            outside = max(0, outside)
            used = int(self.place.largest(0.0 if added is None else float(added + shard.inputs.bytes + outside)))
            found.memory |= {entry.name: used} if used else {}
            found.outside[entry.name] = int(self.place.largest(float(outside)))
            if entry.method not in (HOPS, LAUNCH):  # they compute on other tensors, and for the time alone
                found.errors[entry.name] = shard.error(taken, self.place)
                found.plain[entry.name] = shard.error(shard.sample.plain, self.place)
                if entry.method != OURS and not found.errors[entry.name] < WRONG:
                    reason = f"computes something else here (relative error {found.errors[entry.name]:.2g})"
                    self._out(entry, reason, found)
                    return None
        return Contestant(entry.name, peer.call, peer.session)

    def _out(self, entry: Entry, reason: str, found: Figures) -> None:
        found.missing[entry.name] = reason
        found.timings.pop(entry.name, None)
        free(self.place.device)

    def _break_off(self, entry: Entry, reason: str) -> None:
        """After a call that hangs: end the rivals' group and make another, or, where it was ours, end everything.

        On GPUs a world smaller than all ranks gets no other: its peers are not called any more.
        """
        if entry.method not in RING_PEERS or self.rivals is None:
            raise Stuck(f"{entry.name}: {reason}")
        rivals, self.rivals = self.rivals, None
        self._hung[entry.method] = reason
        ranks, name = dist.get_process_group_ranks(rivals), f"{rivals.group_name} again"
        backend, timeout = dist.get_backend(rivals), timedelta(seconds=timeout_of(rivals, self.place.device))
        self.guard.abort(rivals)
        if backend == "nccl" and len(ranks) < dist.get_world_size():
            return  # another would take those beyond this world, who do not know of it
        self.rivals = self.guard.attempt(lambda: among(ranks, name, backend=backend, timeout=timeout)).result

    def _made(self, entry: Entry, match: Match, shards: dict[tuple[object, ...], Shard]) -> tuple[Shard | None, Peer]:
        """The entry's shard (kept, if another has the same) and its call."""
        if entry.method == GEMM:
            return None, self._gemm(entry)
        place = self.alone if entry.case.world < self.place.world else self.place
        group = group_of(entry, place, self.meshes)
        key = (entry.case, entry.layout, group)
        shard = shards.get(key)
        if shard is None:
            at = None
            if place is not self.place:  # rows of the ring, so that their errors compare
                ring = (s for s in shards.values() if s.plan.world > 1 and s.plan.seqlen == entry.case.seqlen)
                at = next((s.sample.positions for s in ring), None)
            shard = shards[key] = Shard.make(entry.case, entry.layout, group, place.device, self.seed, at)
        return shard, self._peer(entry, shard)

    def _peer(self, entry: Entry, shard: Shard) -> Peer:
        if entry.method == OURS:
            return Peer(both(attend_with(entry, shard), entry.case, shard.inputs))
        if entry.method == HOPS:
            return Peer(kernels.hops(shard, entry.case, impl=entry.impl))
        if entry.method == LAUNCH:
            return Peer(kernels.one_launch(shard, entry.case, impl=entry.impl))
        if entry.method not in RING_PEERS:
            return prepare(entry.method, entry.case, shard.inputs)
        if entry.method in self._hung:
            raise Missing(f"not called again: {self._hung[entry.method]}")
        if self.rivals is None:
            raise Missing(f"not called: the peers' process group was aborted when {', '.join(self._hung)} hung")
        return ring_peers.prepare(entry.method, entry.case, shard.inputs, self.rivals)

    def _first_call(self, peer: Peer, shard: Shard | None) -> tuple[float, object, int | None, int]:
        """Seconds; the sampled rows; bytes that the call took; bytes that it keeps outside torch's allocator."""
        if self.place.world > 1:
            dist.barrier(self.place.group)
        with peer.session():
            before = self._outside()
            begin = time.perf_counter()
            outputs, _, added = self.meter.peak(peer.call)
            seconds = time.perf_counter() - begin
            taken = None if shard is None or not isinstance(outputs, tuple) else shard.sample.take(outputs)
            return seconds, taken, added, self._outside() - before

    def _outside(self) -> int:
        """Bytes of this GPU that somebody else than torch's allocator holds: NCCL, symmetric memory, libraries."""
        if self.place.device.type != "cuda":
            return 0
        left, total = torch.cuda.mem_get_info(self.place.device)
        return total - left - torch.cuda.memory_reserved(self.place.device)

    def _gemm(self, entry: Entry) -> Peer:
        """The matrix product that shows what the device's matrix units do in the same minute."""
        size, dtype = GEMM_SIZE[self.place.device.type], getattr(torch, DTYPES[entry.case.dtype])
        a, b = (torch.randn(size, size, device=self.place.device).to(dtype) for _ in range(2))
        return Peer(lambda: (a @ b,))

    def _flops(self, entry: Entry) -> float:
        if entry.method == GEMM:
            return 2.0 * GEMM_SIZE[self.place.device.type] ** 3
        return entry.case.flops / entry.case.world


def warm(arena: Arena, match: Match, tokens: int) -> None:
    """Call the match's own entries once, on few tokens: libraries load and connections open before anything counts."""
    case = replace(match.case, seqlen=tokens * match.case.world, mask="causal")
    entries = tuple(
        replace(entry, case=case) for entry in match.entries if entry.method == OURS and entry.case == match.case
    )
    if entries:
        arena.warming = True
        arena.play(Match(case, entries, 0.0))
        arena.warming = False
