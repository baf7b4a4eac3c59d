"""The pull transport on gloo ranks: what arrives and comes home, buffers reused, grown and read by changing ranks."""

from __future__ import annotations

import ctypes
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import ringfa3
from ringfa3 import Mask, Plan, RankFailed
from ringfa3.board import Peer
from ringfa3.gang import Gang
from ringfa3.transport import Hierarchical, Pull
from ringfa3.transport.choose import automatic, check, choose
from ringfa3.transport.commons import HostCommons, HostQueue
from ringfa3.transport.cuda import MemOp
from ringfa3.transport.meeting import Meeting
from ringfa3.transport.place import Place, apart, hosts_of
from ringfa3.transport.pool import GRAIN, SHARD, Pool
from tests.patience import patience
from tests.ring import test_attention
from tests.ring.test_attention import Case, ring_case

MASKS = (Mask(), Mask(causal=False), Mask(window=(3, 0)), Mask(documents=(9, 4, 10)), Mask(causal=False, window=(0, 6)))
CPU = torch.device("cpu")


def numbered(p: Plan, call: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [2, n, 1, 1] that say where they are from: source, index and call, v negative; batch row 1 is 1000 up."""
    x = 100.0 * p.rank + torch.arange(p.kv_lengths[p.rank]).view(1, -1, 1, 1) + 10000 * call
    x = torch.cat([x, x + 1000])
    return x, -x


def forward(transport: Pull, p: Plan, call: int = 0) -> None:
    """Every hop of the plan comes, with its source's keys and values."""
    seen = []
    for hop, (k, v) in transport.rotate(numbered(p, call), p):
        seen.append(hop.source)
        want = 10000 * call + 100.0 * hop.source + torch.arange(hop.keys.start, hop.keys.stop)
        assert torch.equal(k[:, :, 0, 0], torch.stack([want, want + 1000]))
        assert torch.equal(v, -k)
    assert sorted(seen) == sorted(hop.source for hop in p.hops)


def backward(transport: Pull, p: Plan, call: int = 0) -> None:
    """Each rank adds rank + 1 + call to what it sees: the owner ends with the sum over those who see a key."""
    rotation = transport.rotate_backward(numbered(p, call), p)
    first = True
    for hop, (k, v), (dk, dv) in rotation:
        assert dk.is_contiguous()
        assert dv.is_contiguous()
        assert dk.shape == k.shape == v.shape == dv.shape
        if first:
            dk.zero_()
            dv.zero_()
        assert not dk.any()
        assert not dv.any()
        first = False
        assert float(k[0, 0, 0, 0]) == 10000 * call + 100.0 * hop.source + hop.keys.start
        dk += p.rank + 1 + call
        dv -= p.rank + 1 + call
    want = torch.zeros(p.kv_lengths[p.rank])
    for reader in range(p.world):
        keys = p.needs[reader][p.rank]
        if keys is not None:
            want[keys] += reader + 1 + call
    dk, dv = rotation.home()
    assert dk.dtype == torch.float32
    assert torch.equal(dk[:, :, 0, 0], want.expand(2, -1))
    assert torch.equal(dv, -dk)


def everything(rank: int, size: int, depth: int) -> None:
    """Masks of which each has other readers, one after another in the same buffers, which grow on the way."""
    transport = Pull(Gang.of(None).pool(CPU, range(size)), depth=depth)
    call = 0
    for seqlen in (23, 2, 61):
        for mask in MASKS if seqlen != 2 else (Mask(causal=False), Mask()):
            for layout in ("contiguous", "zigzag", "striped"):
                p = ringfa3.plan(
                    Mask(documents=(9, 4, 48)) if mask.documents and seqlen == 61 else mask, layout, seqlen
                )
                for do in (forward, backward, backward, forward):
                    call += 1
                    do(transport, p, call % 7)
    assert transport.pool.waiting() is None


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_slice_arrives_and_every_gradient_comes_home(world, size, depth):
    world(size)(everything, depth)


TRANSPORTS = {
    2: ("pull", "hierarchical:1"),
    3: ("pull:1", "hierarchical:3"),
    4: ("hierarchical:2", "pull:3", "hierarchical"),
}


@pytest.mark.parametrize("size", TRANSPORTS)
@pytest.mark.parametrize("layout", test_attention.LAYOUTS)
@pytest.mark.parametrize("mask", test_attention.MASKS)
def test_equals_one_device(world, size, layout, mask):
    turn = test_attention.LAYOUTS.index(layout) + list(test_attention.MASKS).index(mask)
    case = Case(test_attention.MASKS[mask], layout, TRANSPORTS[size][turn % len(TRANSPORTS[size])])
    test_attention.check(case, world(size)(ring_case, case, {}))


@pytest.mark.parametrize(
    "case",
    [
        Case(transport="pull", dtype=torch.bfloat16),
        Case(transport="pull", dtype=torch.float64),
        Case(transport="pull", sinks=True, B=1, Hkv=1),
        Case(transport="hierarchical:2", dtype=torch.float64, B=3),
        Case(transport="pull", seqlen=3),
        Case(transport="hierarchical:2", seqlen=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"async_op": True}, {"agree": False}], ids=str)
def test_options(world, case, options):
    if options.get("agree") is False:
        case = replace(case, seqlen=64)  # uneven shards want a plan or an agreement
    test_attention.check(case, world(4)(ring_case, case, options))


class Beside(HostQueue):
    """A queue that lags behind, as a stream does: a thread of its own, which dawdles."""

    def __init__(self, commons: HostCommons, number: int) -> None:
        super().__init__(commons, number)
        self._todo: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._pauses = random.Random(commons.meeting.rank * 10 + number)
        threading.Thread(target=self._work, daemon=True).start()

    def run(self, ops):
        self._todo.put(lambda: HostQueue.run(self, ops))

    def copy(self, pairs):
        self._todo.put(lambda: HostQueue.copy(self, pairs))

    def mark(self):
        event = threading.Event()
        self._todo.put(event.set)
        return event

    def follow(self, mark):
        if mark is not None:
            self._todo.put(mark.wait)

    def _work(self) -> None:
        while True:
            task = self._todo.get()
            time.sleep(self._pauses.random() ** 4 * 0.002)
            task()


class Here(HostQueue):
    """The caller's queue, beside such."""

    def follow(self, mark):
        if mark is not None:
            assert mark.wait(20)


class Lagging(HostCommons):
    """Commons with such queues."""

    def here(self):
        return Here(self, 0)

    def beside(self, number):
        self.queues = getattr(self, "queues", {})
        if number not in self.queues:
            self.queues[number] = Beside(self, number)
        return self.queues[number]


def lags(rank: int, size: int, depth: int) -> None:
    meeting = Meeting.of(dist.group.WORLD, f"lagging {depth}", range(size), CPU)
    pool = Pool(Lagging(meeting, meeting.peers()))
    pull = Pull(pool, depth=depth)
    wire = Gang.of(None).wire(CPU)
    one_host = Hierarchical(pool, wire, (0,) * size, depth=depth)
    for call, mask in enumerate(MASKS):
        p = ringfa3.plan(mask, "zigzag", 23)
        for transport in (pull, one_host):
            for do in (forward, backward, forward):
                do(transport, p, call)


@pytest.mark.parametrize("depth", [1, 2])
def test_nothing_is_read_before_it_is_there(world, depth):
    """As on CUDA, where what goes on beside the hops takes its time."""
    world(3)(lags, depth)


def trained_and_not(rank: int, size: int, transport: str) -> None:
    """Views of a buffer are kept: those made in inference mode must serve calls outside of it, and the other way."""
    group = dist.new_group(list(range(size)))  # with buffers that nobody has seen
    q, k, v = (torch.randn(1, 8, 2, 8) for _ in range(3))
    seen = []
    for _ in range(2):
        with torch.inference_mode():
            seen.append(ringfa3.ring_attention(q, k, v, group=group, transport=transport).clone())
        qkv = [x.clone().requires_grad_() for x in (q, k, v)]
        out = ringfa3.ring_attention(*qkv, group=group, transport=transport)
        out.backward(out)
        seen.append(out.detach())
    assert all(torch.equal(out, seen[0]) for out in seen)
    dist.destroy_process_group(group)


@pytest.mark.parametrize("transport", ["pull", "hierarchical:1", "hierarchical:2"])
def test_training_and_inference_share_buffers(world, transport):
    world(2)(trained_and_not, transport)


def grows(rank: int, size: int) -> None:
    """A longer call makes larger buffers, once; a shorter one keeps them; what a peer has staged is not lost."""
    found = shared()
    pool = Gang.of(None).pool(CPU, range(size))
    before = None
    for rows in (100, 40, 3 * GRAIN // 8 // 2, 100):  # two batch rows of K and V in fp32
        p = ringfa3.plan(Mask(causal=False), "contiguous", size * rows)
        forward(Pull(pool), p)
        backward(Pull(pool), p)
        buffer = pool.buffers(SHARD, 1)[0]
        assert before is None or (buffer is before) == (rows <= 100 and buffer.numel() == before.numel())
        assert buffer.numel() % GRAIN == 0
        before = buffer
    assert before is not None
    assert before.numel() >= 3 * GRAIN
    leftover = shared() - found if rank == 0 else set()
    deadline = time.monotonic() + patience(20)
    while leftover and time.monotonic() < deadline:  # other tests' ranks meet meanwhile, and leave nothing either
        time.sleep(0.05)
        leftover &= shared()
    assert not leftover


def shared() -> set[str]:
    """Files of ours in shared memory, whosever."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("ringfa3-")}


def test_buffers_grow(world):
    world(2)(grows)


def mapped() -> int:
    """Mappings of shared memory of ours in this process."""
    return sum("ringfa3-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def gives_back(rank: int, size: int, where: str) -> None:
    """Buffers are gone on every rank, with a call under way before and right answers after."""
    mesh = (
        DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("ulysses", "ring")) if where == "mesh" else None
    )
    transport = "pull" if where == "mesh" else where
    options = {"causal": False, "transport": transport, "group": mesh, "layout": "contiguous"}
    q, k, v = (torch.randn(1, 300, heads, 16, generator=torch.manual_seed(rank + heads)) for heads in (4, 2, 2))
    ringfa3.release_buffers(mesh)  # perhaps nothing there yet
    seen = [ringfa3.ring_attention(q, k, v, **options)]
    ringfa3.release_buffers(mesh)
    without = mapped()
    for _ in range(3):
        seen.append(ringfa3.ring_attention(q, k, v, **options))
        assert (mapped() > without) == (where != "ring")
        later = ringfa3.ring_attention(q, k, v, async_op=True, **options)
        ringfa3.release_buffers(mesh)
        assert mapped() == without
        seen.append(later.wait())
    assert all(torch.equal(out, seen[0]) for out in seen)


@pytest.mark.parametrize("where", ["pull", "hierarchical:2", "ring", "mesh"])
def test_buffers_are_given_back(world, where):
    world(4)(gives_back, where)


def refuses_to_give_back(rank: int, size: int) -> None:
    """Not a group, or another rank that does something else: an error everywhere, and calls go on."""
    with pytest.raises(ValueError, match="group: wanted"):
        ringfa3.release_buffers("everybody")  # type: ignore[arg-type]
    q = torch.randn(1, 8, 2, 16)
    for odd in (0, 1):
        act = ringfa3.release_buffers if rank == odd else partial(ringfa3.ring_attention, q, q, q, transport="pull")
        with pytest.raises(ValueError, match=f"call: .*rank {odd} has release_buffers"):
            act()
    ringfa3.ring_attention(q, q, q, transport="pull")


def test_giving_back_is_agreed_on(world):
    world(2)(refuses_to_give_back)


def jittered(rank: int, size: int, transport: str, seed: int) -> list[torch.Tensor]:
    """Gradients of a call whose ranks dawdle at random."""
    case = Case(transport=transport)
    kernel = ringfa3.attention.attend_backward
    pauses = torch.rand(64, generator=torch.Generator().manual_seed(seed * 100 + rank)).tolist()

    def slow(*args: object, **kwargs: object) -> None:
        time.sleep(pauses.pop() * 0.004)
        kernel(*args, **kwargs)

    ringfa3.attention.attend_backward = slow
    try:
        return list(ring_case(rank, size, case, {}).values())
    finally:
        ringfa3.attention.attend_backward = kernel


@pytest.mark.parametrize("transport", ["pull", "hierarchical:2"])
def test_sums_do_not_depend_on_timing(world, transport):
    once, again = (world(4)(jittered, transport, seed) for seed in (1, 2))
    for a, b in zip(once, again, strict=True):
        assert all(map(torch.equal, a, b))


def in_two_groups(rank: int, size: int) -> None:
    """Calls of two groups interleave, the second with its ranks in another order."""
    other = _groups.get(size)
    if other is None:
        other = _groups[size] = dist.new_group(list(range(size)))
    p = ringfa3.plan(Mask(), "zigzag", 23)
    one, two = (Pull(Gang.of(group).pool(CPU, range(size))) for group in (None, other))
    assert one.pool is not two.pool
    first = one.rotate(numbered(p, 1), p)
    hop, (k, _) = next(first)
    backward(two, p, 2)
    assert float(k[0, 0, 0, 0]) == 10000 + 100 * hop.source + hop.keys.start
    for hop, (k, _) in first:
        assert float(k[0, 0, 0, 0]) == 10000 + 100 * hop.source + hop.keys.start


_groups: dict[int, dist.ProcessGroup] = {}  # of a rank's process


def test_two_groups(world):
    world(3)(in_two_groups)


def dies(rank: int, size: int) -> None:
    """Rank 1 ends its process in the middle of a backward pass, and the others hear of it."""
    p = ringfa3.plan(Mask(causal=False), "contiguous", 12)
    pull = Pull(Gang.of(None).pool(CPU, range(size)))
    backward(pull, p)
    begun = time.monotonic()
    hops = iter(pull.rotate_backward(numbered(p), p))
    next(hops)
    if rank == 1:
        os._exit(1)
    with pytest.raises(RankFailed, match="its process has ended") as failed:
        list(hops)
    assert failed.value.rank == 1
    assert failed.value.host == Peer.here().host
    assert failed.value.hop == {0: 1, 2: 2}[rank]  # the step in which rank 1 computes its share for this rank
    assert time.monotonic() - begun < patience(5)


def test_a_dead_rank_is_named(world):
    world(3)(dies, dying=(1,))


def given_up(rank: int, size: int) -> None:
    """Rank 1 stays away; rank 0 sees whom it waits for, and a watchdog ends its wait."""
    p = ringfa3.plan(Mask(causal=False), "contiguous", 12)
    pull = Pull(Gang.of(None).pool(CPU, range(size)))
    forward(pull, p)
    assert pull.pool.waiting() is None
    if rank == 1:
        return
    seen = []

    def watchdog() -> None:
        while not seen:
            seen.extend(filter(None, [pull.pool.waiting()]))
        pull.pool.release()

    thread = threading.Thread(target=watchdog)
    thread.start()
    with pytest.raises(RankFailed, match="given up") as failed:
        forward(pull, p)
    thread.join()
    assert (failed.value.rank, failed.value.hop) == seen[0] == (1, 1)
    with pytest.raises(RankFailed):
        forward(pull, p)


def test_a_watchdog_may_end_a_wait(world):
    world(2)(given_up)
    world(2).close(patient=False)  # the pool is of no use any more


def test_the_drivers_structure():
    """CUstreamBatchMemOpParams: a union of 48 bytes; offsets of the members of its waits and writes."""
    offsets = {name: getattr(MemOp, name).offset for name, _ in MemOp._fields_ if not name.startswith("_")}
    assert offsets == {"operation": 0, "address": 8, "value": 16, "flags": 24, "alias": 32}
    assert ctypes.sizeof(MemOp) == 48


def test_depth_is_checked():
    with pytest.raises(ValueError, match="depth: wanted at least 1, got 0"):
        Pull(None, depth=0)


@pytest.mark.parametrize(
    "name", ["pul", "pull:0", "pull:x", "ring:2", "hierarchical:", "hierarchical:0", "hierarchical:x", 3]
)
def test_names_are_checked(name):
    with pytest.raises(ValueError, match="transport: wanted one of 'auto', 'pull'"):
        check(name)
    for known in ("auto", "pull", "pull:1", "hierarchical", "hierarchical:2"):
        check(known)


A, B, C = (Peer(host, f"machine of {host}", 1, "") for host in "abc")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ((Place(A), Place(A)), ""),
        ((Place(A), Place(A), Place(B)), "rank 0 is on a and rank 2 on b"),
        ((Place(A, "1", ("1", "2"), ("1", "2")), Place(A, "2", ("1", "2"), ("1", "2"))), ""),
        ((Place(A, "1", ("1", "2"), ("1",)), Place(A, "2", ("1", "2"), ("2",))), "ranks 0 and 1 have no peer access"),
        ((Place(A, "1", ("1",), ("1",)), Place(A, "2", ("2",), ("2",))), ""),  # each sees its own alone
        ((Place(A, "1", ("1",), ("1",)), Place(A, "1", ("1",), ("1",))), "share one GPU"),
        ((Place(A, "1", lacks="libcuda.so.1 has no x"), Place(A, "2")), "rank 0: libcuda.so.1 has no x"),
    ],
)
def test_who_can_read_whom(found, reason):
    assert reason in apart(found, range(len(found)))
    assert bool(reason) == bool(apart(found, range(len(found))))


class Fleet:
    """A gang whose ranks are where the test says."""

    def __init__(self, *found: Place) -> None:
        self.found = found

    def places(self, device: torch.device) -> tuple[Place, ...]:
        return self.found


def test_pull_between_hosts_is_refused():
    p = Plan.build(Mask(), "zigzag", 8, 2, 0)
    with pytest.raises(ValueError, match="read each other's memory for 'pull', got: rank 0 is on a and rank 1 on b"):
        choose("pull", p, 1 << 20, CPU, Fleet(Place(A), Place(B)))
    with pytest.raises(ValueError, match="read each other's memory, got: rank 0 is on a and rank 1 on b"):
        choose("hierarchical:2", p, 1 << 20, CPU, Fleet(Place(A), Place(B)))


def test_automatic():
    cuda = torch.device("cuda", 0)
    one, two, three = ([Place(x, str(i)) for i in range(4)] for x in (A, B, C))
    two, three = ([replace(p, gpu=h + p.gpu) for p in ps] for ps, h in ((two, "b"), (three, "c")))
    small, large = 1 << 10, 1 << 30
    assert automatic(small, cuda, Fleet(*one)) == "gather"
    assert automatic(large, CPU, Fleet(*one)) == "ring"
    assert automatic(large, cuda, Fleet(*one)) == "pull"
    assert automatic(large, cuda, Fleet(*one, *two, *three)) == "hierarchical"
    assert automatic(large, cuda, Fleet(*one, *two[:3])) == "ring"
    assert automatic(large, cuda, Fleet(one[0], two[0])) == "ring"
    assert automatic(large, cuda, Fleet(one[0], one[0])) == "ring"  # one GPU for both
    assert hosts_of((*one, *two, one[0])) == (0, 0, 0, 0, 1, 1, 1, 1, 0)


def test_a_watchdog_ends_a_meeting():
    meeting = Meeting(dist.HashStore(), "test", (0, 1), 0, timeout=60.0)

    def watchdog() -> None:
        while meeting.awaited != 1:
            time.sleep(1e-3)
        meeting.failure = RankFailed(1, "", 0, "has stalled")

    thread = threading.Thread(target=watchdog)
    thread.start()
    start = time.monotonic()
    with pytest.raises(RankFailed, match="has stalled"):
        meeting.exchange(None)
    thread.join()
    assert time.monotonic() - start < patience(5)
    assert meeting.awaited is None
