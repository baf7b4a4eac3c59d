"""Agreement: ranks that differ, fail, stay away or die are an error on every rank; ranks in step pay microseconds."""

from __future__ import annotations

import os
import signal
import statistics
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringfa3
from ringfa3 import Agreement, RankFailed
from ringfa3.agree import _difference, _encoded, _spelled
from ringfa3.board import TEXT, Peer
from tests.patience import patience

BOARDS = pytest.mark.parametrize("shared", [True, False], ids=["memory", "store"])


def said(fn: Any, *args: Any) -> str:
    """What an exception says, and its type; "" where there is none."""
    try:
        fn(*args)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def lengths_and_differences(rank: int, size: int, shared: bool) -> None:
    a = Agreement(dist.group.WORLD, timeout=30, shared_memory=shared)
    assert type(a._board).__name__ == ("SharedBoard" if shared else "StoreBoard")
    everywhere = tuple(10 * r for r in range(size))
    for call in range(6):
        assert a.agree((("heads", 4), ("call", call // 2)), 10 * rank) == everywhere
    for _ in range(3):  # every rank has seen its own signature before; that must not matter
        message = said(a.agree, (("heads", 8 if rank == 1 else 4), ("dtype", torch.float32)), 0)
        assert "ValueError: ranks disagree on heads: " in message
        assert "rank 1 has 8" in message
        assert "dtype" not in message
        assert a.agree((("heads", 4),), 10 * rank) == everywhere  # and the next call is none the worse
    wrong = ValueError("window: wanted more") if rank == size - 1 else None
    message = said(a.agree, (("heads", 4),), 0, wrong)
    where = "" if wrong else f"rank {size - 1}: "
    assert message == f"ValueError: {where}window: wanted more"
    assert a.agree((("heads", 4),), 10 * rank) == everywhere
    long = tuple(range(10_000 + rank))
    assert "(digest " in said(a.agree, (("documents", long),), 0)


@BOARDS
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_come_to_the_same_verdict(world, size, shared):
    world(size)(lengths_and_differences, shared)


def many_calls(rank: int, size: int) -> None:
    a = Agreement(dist.group.WORLD, timeout=60)
    a._call = (1 << 16) - 5  # the words keep 16 bits of it
    for call in range(12):
        if rank == call % size:
            time.sleep(0.002 * (call % 3))
        assert a.agree((), call + rank) == tuple(call + r for r in range(size))


def test_calls_outlive_the_bits_of_their_number(world):
    world(3)(many_calls)


def stay_away(rank: int, size: int, shared: bool) -> float:
    a = Agreement(dist.group.WORLD, timeout=1.0, shared_memory=shared)
    a.agree((), 0)
    start = time.monotonic()
    if rank == size - 1:
        time.sleep(2.0)  # and then come too late
        with pytest.raises(RankFailed, match="gave up waiting") as caught:
            a.agree((), 0)
        assert caught.value.rank == 0
    else:
        with pytest.raises(RankFailed, match="within 1 s") as caught:
            a.agree((), 0)
        assert (caught.value.rank, caught.value.hop) == (size - 1, None)
        assert caught.value.host == a.hosts[rank]
        with pytest.raises(RankFailed):  # the gang is broken from now on
            a.agree((), 0)
        return time.monotonic() - start
    return 0.0


@BOARDS
def test_a_rank_that_stays_away(world, shared):
    waited = world(3)(stay_away, shared)
    assert max(waited) < 4


def subgroups(rank: int, size: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3]), dist.new_group([1, 3])]
    for group in groups:
        if dist.get_rank(group) >= 0:
            a = Agreement(group, timeout=30)
            assert a.agree((("group", "x"),), rank) == tuple(dist.get_process_group_ranks(group))
    assert Agreement(dist.group.WORLD, timeout=30).agree((), rank) == tuple(range(size))
    for group in groups:
        if dist.get_rank(group) >= 0:
            dist.destroy_process_group(group)


def test_groups_do_not_disturb_each_other(world):
    before = set(os.listdir("/dev/shm"))
    world(4)(subgroups)
    left = [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("ringfa3-")]
    deadline = time.monotonic() + patience(30)
    while left and time.monotonic() < deadline:  # another run's may be there for a moment
        left = [name for name in left if os.path.exists(f"/dev/shm/{name}")]
    assert not left


def cost(rank: int, size: int, calls: int) -> float:
    a = Agreement(dist.group.WORLD, timeout=60)
    signature = tuple((f"name {i}", i) for i in range(15))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        a.agree(signature, 1024)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def test_cost_of_a_call_in_step(world):
    median = max(world(2)(cost, 3000))
    assert median < 1e-3  # 10 us on an idle machine; here others may run beside us


def never_come(rank: int, size: int) -> None:
    if rank:
        with pytest.raises(RankFailed, match="no call of rank 0 within"):
            Agreement(dist.group.WORLD, timeout=0.5)


def test_a_rank_that_never_comes_at_all(world):
    world(2)(never_come)
    world(2).close(patient=False)  # their count of meetings is off now


def die(rank: int, size: int, shared: bool) -> float:
    a = Agreement(dist.group.WORLD, timeout=60, shared_memory=shared)
    a.agree((), 0)
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RankFailed, match="its process has ended") as caught:
        a.agree((), 0)
    assert caught.value.rank == 1
    return time.monotonic() - start


@BOARDS
def test_a_rank_that_dies_is_noticed_long_before_the_timeout(world, shared):
    waited = world(3)(die, shared, dying=(1,))
    assert max(waited[0], waited[2]) < 5


def die_in_a_hop(rank: int, size: int) -> float:
    q = torch.randn(1, 64, 2, 16)
    options = {"transport": "ring", "causal": False, "impl": "aten"}
    ringfa3.ring_attention(q, q, q, **options)
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:  # no agreement that would notice first
        ringfa3.ring_attention(q, q, q, agree=False, **options)
    assert caught.value.rank == 1
    assert caught.value.hop is not None
    assert caught.value.host
    assert caught.value.message.startswith("no longer exchanges messages: ")
    assert "pair.cc" not in caught.value.message
    return time.monotonic() - start


def test_a_rank_that_dies_in_a_hop(world):
    waited = world(2)(die_in_a_hop, dying=(1,))
    assert waited[0] < 5


def test_a_process_that_has_ended_is_dead():
    me = Peer.here()
    assert not me.dead()
    assert Peer(me.host, me.machine, me.pid, "0").dead()  # its number was given to another
    assert not Peer("elsewhere", "another machine", 1, "").dead()  # cannot be told from here


def test_texts_fit_their_slot_and_still_tell_values_apart():
    one, two = (_spelled((("mask", "x" * 5000 + str(i)),)) for i in range(2))
    assert len(one["mask"]) < 300
    assert "rank 0 has" in _difference([one, two])
    assert len(_encoded({str(i): "y" * 300 for i in range(15)} | {"error": "z" * 9000})) <= TEXT - 8


def test_timeout_is_checked():
    with pytest.raises(ValueError, match="timeout: wanted a positive number of seconds, got 0"):
        Agreement(None, timeout=0)
