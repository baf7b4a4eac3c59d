"""Agreement: on every call all ranks compare what must be equal, exchange shard lengths and report bad arguments.

Every rank leaves a note (fingerprint of its signature, its rows) and reads everybody's, so all come to the same verdict
and raise the same error, before anything is sent. It happens on every call, whatever a rank has seen before: a check
that only some ranks make would itself hang. Where the notes differ, a second round of texts says what differs.

It is also where a gang is declared failed (`fail`): here, and by an alarm on every other rank, so that all raise the
same RankFailed.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Hashable
from functools import lru_cache
from hashlib import blake2b
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from ringfa3.board import BITS, TEXT, Board, Peer, meet
from ringfa3.errors import RankFailed

Signature = tuple[tuple[str, Hashable], ...]  # (name, value) of everything that must be equal

ROWS = 44  # bits of a note's second number for rows; the state is above them
FINE, WRONG, GAVE_UP, BROKEN = range(4)  # states: a usable call, an error in its arguments, and see OVER
ENDED = "its process has ended"
OVER = {GAVE_UP: "gave up waiting; this rank came too late", BROKEN: "a call of it ended in the middle"}
SPINS = 50  # polls before the clock is read; about 25 us, what ranks in step differ by
AWAKE = 1e-4  # seconds before it sleeps. Not sched_yield: where others want the processor, it costs a time slice (ms)
WATCH = 0.05  # seconds between looks at whether the missing ranks live
SETTLE = 0.01  # seconds for alarms of the same moment to meet, so that all ranks hear the same one
CLIP = 160  # characters of a value in a message
ENDING = 0.1  # seconds that a dying process may take from its connections' end to its own
BACKWARD = "call whose backward pass this is"  # name of the value that a backward pass agrees on


class Agreement:
    """Agreement between the ranks of one group. Making it is collective: every rank, in the same order of groups.

    Args:
        group: a process group with more than one rank.
        timeout: seconds that a rank waits for the others: to make the first call and each later one, and in each hop of
            a call for a message that nothing of this rank's own holds up.
        shared_memory: False: exchange notes through the group's store even on one host (what happens between hosts).

    Raises:
        RankFailed: a rank did not come in time.
    """

    def __init__(self, group: dist.ProcessGroup, *, timeout: float = 300.0, shared_memory: bool = True) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout: wanted a positive number of seconds, got {timeout}")
        self.rank, self.world, self.timeout = dist.get_rank(group), dist.get_world_size(group), timeout
        self.others = [rank for rank in range(self.world) if rank != self.rank]
        self._call = 0
        self._lock = threading.Lock()
        self._failure: RankFailed | None = None
        self._told = False  # the other ranks know
        self._board: Board
        self.peers: tuple[Peer, ...]
        store = _get_process_group_store(group)
        self._board, self.peers = meet(store, self.rank, self.world, timeout=timeout, shared=shared_memory)

    @property
    def board(self) -> Board:
        """Where the ranks leave their notes."""
        return self._board

    @property
    def failure(self) -> RankFailed | None:
        """Why the gang has failed; None while it has not."""
        return self._failure

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host name of each rank."""
        return tuple(peer.host for peer in self.peers)

    def agree(self, signature: Signature, rows: int, error: Exception | None = None) -> tuple[int, ...]:
        """Everybody's rows, once all ranks are known to have made the same call.

        Args:
            signature: (name, value) pairs; values must have the same repr on every rank if and only if they are equal.
            rows: length of this rank's shard.
            error: what is wrong with this rank's arguments. It is raised here, and a ValueError on the other ranks.

        Raises:
            ValueError: signatures differ, or another rank's arguments are wrong: on every rank, and it says where.
            RankFailed: a rank died, or did not come within the timeout.
        """
        self.check()
        self._call += 1
        board, call = self._board, self._call
        fingerprint = _fingerprint(signature)
        own = (fingerprint, (FINE if error is None else WRONG) << ROWS | rows)
        board.post(call, own)
        self._wait(lambda ranks: board.missing(call, ranks), own)
        notes = [board.note(call, rank) if rank != self.rank else own for rank in range(self.world)]
        if all(first == fingerprint and second >> ROWS == FINE for first, second in notes):
            return tuple(second for _, second in notes)
        for rank, (_, second) in enumerate(notes):
            if second >> ROWS in OVER:
                self._fail(rank, OVER[second >> ROWS], own)
        texts = self._texts(signature, error, own)
        if error is not None:
            raise error
        raise ValueError(_difference(texts))

    def check(self) -> None:
        """Raise RankFailed if the gang has failed."""
        if self._failure is not None:
            raise self._failure

    def abandon(self, error: BaseException) -> RankFailed | None:
        """A call ended in the middle here, with messages under way: the next call of every rank raises RankFailed.

        Args:
            error: why it ended. A RankFailed says who is to blame; by others, this rank is.

        Returns:
            What to raise in its place: why the gang had failed, where it had; None: the error as it is.
        """
        if self._failure is None:
            self._board.post(self._call + 1, (0, BROKEN << ROWS))
            if not isinstance(error, RankFailed):
                self.fail(RankFailed(self.rank, self.hosts[self.rank], None, OVER[BROKEN]))
                return None
            self.fail(self._explained(error))
        return self._failure

    def fail(self, error: RankFailed, board: Board | None = None) -> RankFailed:
        """The gang has failed: raise this from now on, here and on the other ranks.

        Args:
            board: `board.apart()`, on another thread than the calls'.

        Returns:
            What all ranks raise: this error, or that of another rank which was the first to know.
        """
        board = board or self._board
        with self._lock:
            if not self._told:
                self._told = True
                error = self._failure or error
                if not board.alarms():
                    told = {"rank": error.rank, "host": error.host, "hop": error.hop, "message": error.message[:CLIP]}
                    board.alarm(json.dumps(told).encode())
                time.sleep(SETTLE)
                self._failure = self._failure or self.heard(board) or error
            assert self._failure is not None  # told
            return self._failure

    def heard(self, board: Board | None = None) -> RankFailed | None:
        """What the alarm says that some rank gave; where several did, the first of them."""
        alarms = (board or self._board).alarms()
        return RankFailed(**json.loads(alarms[min(alarms)])) if alarms else None

    def _explained(self, error: RankFailed) -> RankFailed:
        """The error; or where that rank's process has ended meanwhile, this, which is why its messages stay away."""
        peer = self.peers[error.rank]
        deadline = time.monotonic() + ENDING
        while error.rank != self.rank and peer.near() and time.monotonic() < deadline:
            if peer.dead():
                return RankFailed(error.rank, peer.host, error.hop, ENDED)
            if self._board.alarms():  # says more
                break
            time.sleep(1e-3)
        return error

    def _texts(self, signature: Signature, error: Exception | None, own: tuple[int, int]) -> list[dict[str, str]]:
        """What every rank has to say for itself: its error, or its signature."""
        call, board = self._call, self._board
        said = _spelled(signature) if error is None else {"error": str(error)}
        board.post_text(call, _encoded(said))
        self._wait(lambda ranks: [rank for rank in ranks if board.text(call, rank) is None], own)
        return [json.loads(board.text(call, rank) or b"{}") for rank in range(self.world)]

    def _wait(self, missing: Callable[[list[int]], list[int]], own: tuple[int, int]) -> None:
        """Until no rank is missing. Spins, then sleeps longer and longer, with an eye on the others."""
        ranks = self.others
        for _ in range(SPINS):
            ranks = missing(ranks)
            if not ranks:
                return
        start = watched = time.monotonic()
        pause = 0.0
        while ranks := missing(ranks):
            now = time.monotonic()
            if pause == 0.0 and now - start < AWAKE:
                continue
            if now - watched > WATCH:
                watched = now
                if self._failure is not None or self._board.alarms():
                    self._fail(ranks[0], "failed", own)
                gone = [rank for rank in ranks if self.peers[rank].dead()]
                if gone and set(gone) & set(missing(gone)):  # not a last word before it died
                    self._fail(gone[0], ENDED, own)
            if now - start > self.timeout:
                listed = ", ".join(map(str, ranks))
                self._fail(ranks[0], f"no call of rank {listed} within {self.timeout:g} s", own)
            pause = min(max(2 * pause, 2e-5), 2e-3)
            time.sleep(pause)

    def _fail(self, rank: int, message: str, own: tuple[int, int]) -> NoReturn:
        """Raise RankFailed, here and in every later call, and tell ranks that come too late. An alarm knows better."""
        self._board.post(self._call, (own[0], GAVE_UP << ROWS))
        with self._lock:
            if self._failure is None:
                self._failure = self.heard() or RankFailed(rank, self.peers[rank].host, None, message)
        raise self._failure


@lru_cache(maxsize=1024)
def _fingerprint(signature: Signature) -> int:
    """48 bits that differ where signatures do; Python's own hash differs from process to process."""
    return int.from_bytes(blake2b(repr(signature).encode(), digest_size=BITS // 8).digest(), "little")


def _spelled(signature: Signature) -> dict[str, str]:
    """Values as text; long ones are cut, and a digest tells them apart."""
    spelled = {}
    for name, value in signature:
        text = value if isinstance(value, str) else repr(value)
        if len(text) > CLIP:
            text = f"{text[:CLIP]}... (digest {blake2b(text.encode(), digest_size=4).hexdigest()})"
        spelled[name] = text
    return spelled


def _encoded(said: dict[str, str]) -> bytes:
    """As JSON in at most TEXT - 8 bytes; the longest values lose their ends."""
    longest = max(map(len, said.values()), default=0)
    while len(encoded := json.dumps(said).encode()) > TEXT - 8:
        longest = longest * 3 // 4
        said = {name: value[:longest] for name, value in said.items()}
    return encoded


def _difference(texts: list[dict[str, str]]) -> str:
    """The message that every rank raises."""
    errors = [f"rank {rank}: {said['error']}" for rank, said in enumerate(texts) if "error" in said]
    if errors:
        return "; ".join(errors)
    if any(BACKWARD in said for said in texts):
        return _crossed([said.get(BACKWARD) for said in texts])
    differing = []
    for name in dict.fromkeys(name for said in texts for name in said):
        holders: dict[str, list[int]] = {}
        for rank, said in enumerate(texts):
            holders.setdefault(said.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            values = ", ".join(f"{_ranks(ranks, 'has', 'have')} {value}" for value, ranks in holders.items())
            differing.append(f"{name}: {values}")
    return "ranks disagree on " + "; ".join(differing)


def _crossed(calls: list[str | None]) -> str:
    """The message where ranks run backward passes of different calls; None: a rank runs none."""
    holders: dict[str | None, list[int]] = {}
    for rank, call in enumerate(calls):
        holders.setdefault(call, []).append(rank)
    there = [
        f"{_ranks(ranks, 'is', 'are') if i == 0 else _ranks(ranks)} "
        + ("in a forward pass" if call is None else f"in that of call {call}")
        for i, (call, ranks) in enumerate(holders.items())
    ]
    return f"backward passes run in different orders: {', '.join(there)}"


def _ranks(ranks: list[int], one: str = "", more: str = "") -> str:
    """ "rank 1" or "ranks 0, 2", and the verb that goes with it."""
    named, verb = (f"rank {ranks[0]}", one) if len(ranks) == 1 else (f"ranks {', '.join(map(str, ranks))}", more)
    return f"{named} {verb}" if verb else named
