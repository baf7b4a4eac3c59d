"""Gang: the ranks of one start, as one: calls go to all of them, and when one fails, all are of no use."""

from __future__ import annotations

import copy
import itertools
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ringfa3 import RankFailed
from ringfa3_launch.cluster.callers import Stream, Waiting
from ringfa3_launch.cluster.channel import Message
from ringfa3_launch.cluster.faults import Closed, NotReady
from ringfa3_launch.cluster.launcher import Member
from ringfa3_launch.cluster.link import Link
from ringfa3_launch.cluster.settings import Settings
from ringfa3_launch.cluster.tensors import Array

PING = 0.25  # seconds between a rank's answer and the next question
HEARSAY, LIKELY, SURE = range(3)  # how well a suspicion is founded
# seconds from a first sign of trouble to a verdict, by how well it is founded: complaints may come before the cause,
# and a lost connection before it is known how the process ended (under load 0.4 s were too few), which ends the wait
SETTLE = (1.5, 2.0, 0.4)
FRESH = 1.5  # seconds after which a rank that does not answer is not ready
RECENT = 4.0  # seconds: all ranks meet every second when idle

Header = Mapping[str, Any]
Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class RankHealth:
    """How a rank is.

    Args:
        rank: which.
        host: name of its host, "" where that is not known.
        pid: of its process there, 0 where that is not known.
        device: "cpu", "cuda:0", ...; "" where that is not known.
        alive: it answers, and its process has not ended.
        last_collective_age_s: seconds since all ranks met; None: they have not.
        cache_used, cache_pages: pages of the model's cache in use, and in all; 0 without a model.
        state: "starting", "joining", "loading", "idle", "busy", "failed", "ended" or "lost".
    """

    rank: int
    host: str = ""
    pid: int = 0
    device: str = ""
    alive: bool = False
    last_collective_age_s: float | None = None
    cache_used: int = 0
    cache_pages: int = 0
    state: str = "starting"


@dataclass
class _Suspicion:
    rank: int
    message: str
    weight: int
    at: float


class Gang:
    """The ranks of one start. Made when all listen; `join` makes them one.

    Args:
        members: by rank.
        settings: the cluster's.
        wake: set when there is something to `look` at.
        attempt: which of a cluster's gangs it is.
    """

    def __init__(
        self, members: Sequence[Member], settings: Settings, wake: threading.Event, *, attempt: int = 0
    ) -> None:
        self.members, self._settings, self._wake = members, settings, wake
        self.attempt = attempt
        self.world = len(members)
        self.failure: Exception | None = None
        self.serving = False
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._name = secrets.token_hex(8)  # so that numbers of several processes differ
        self._callers: dict[str, Waiting | Stream] = {}
        self._suspicions: list[_Suspicion] = []
        self._known = {member.rank: RankHealth(member.rank, member.host) for member in members}
        now = time.monotonic()
        self._heard = dict.fromkeys(range(self.world), now)
        self._asked = dict.fromkeys(range(self.world), now)
        self._looked = now
        self._links: list[Link] = []  # for questions that are answered at once
        self._data: list[Link] = []  # for calls and their tensors
        try:
            for links in (self._links, self._data):
                for member in members:
                    links.append(Link(member, settings, arrived=self._hear, lost=self._lost))
        except BaseException:
            self.close(NotReady("a rank could not be reached"))
            raise

    def join(self, deadline: float, given_up: threading.Event) -> None:
        """Make them one: all join, load and are ready to serve.

        Args:
            deadline: of the monotonic clock.
            given_up: nobody wants them any more.

        Raises:
            RankFailed: a rank could not.
            Closed: they were given up.
            TimeoutError: not by the deadline.
        """
        for rank in range(self.world):
            self._renew(rank, self._ask(rank, {"do": "health"}, deadline))
        port = self._ask(0, {"do": "meet"}, deadline)["port"]
        joined = Waiting(self.world)
        number = self._register(joined)
        for link in self._links:
            link.send({"id": number, "do": "join", "address": self.members[0].host, "port": port})
        try:
            while len(joined.answers) < self.world:
                if given_up.is_set():
                    raise Closed("the cluster has been closed")
                if time.monotonic() > deadline:
                    late = ", ".join(str(rank) for rank in range(self.world) if rank not in joined.answers)
                    raise TimeoutError(f"rank {late} of {self.world}: wanted it to start in time, it did not")
                if (failure := self.look(patient=True)) is not None:
                    raise failure
                time.sleep(0.02)
        finally:
            self.forget(number)
        if (failure := self.look(patient=True)) is not None:
            raise failure
        for rank, message in joined.answers.items():
            self._renew(rank, message.header)
        self.serving = True

    def call(self, header: Header, tensors: Sequence[Tensors], *, timeout: float | None = None) -> list[Message]:
        """What every rank answered, by rank.

        Args:
            header: of the call, without its number.
            tensors: each rank's; not to be changed until this returns.
            timeout: seconds; None: no limit. A call that ran out of time may yet be carried out.

        Raises:
            RankFailed: the gang failed before all had answered.
            ValueError, Overloaded, SessionLost: it was refused, by all ranks.
            TimeoutError: not in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = Waiting(self.world)
        number = self._register(waiting)
        header = {**header, "id": number}
        try:
            others = set(range(1, self.world))
            for rank in others:
                self._data[rank].send(header, tensors[rank])
            try:
                waiting.until(lambda: waiting.held | waiting.answers.keys() >= others, deadline)
                waiting.raise_refusal()
            except BaseException:
                for rank in others:
                    self._data[rank].send({"id": number, "do": "drop", "call": number})
                raise
            self._data[0].send(header, tensors[0])
            waiting.until(lambda: len(waiting.answers) == self.world, deadline)
            waiting.raise_refusal()
        finally:
            self.forget(number)
        return [waiting.answers[rank] for rank in range(self.world)]

    def stream(self, header: Header, stream: Stream) -> str:
        """Ask the leader for what has many answers; returns the number by which to `cancel`."""
        number = self._register(stream)
        self._data[0].send({**header, "id": number})
        return number

    def tell(self, rank: int, header: Header) -> None:
        """Tell a rank something that it does not answer."""
        self._data[rank].send({**header, "id": self._number()})

    def forget(self, number: str) -> None:
        """Hear no more of the call or stream with this number."""
        with self._lock:
            self._callers.pop(number, None)

    def ask(self, rank: int, header: Header, *, timeout: float) -> dict[str, Any]:
        """A rank's answer to a question that is not a call."""
        return self._ask(rank, header, time.monotonic() + timeout)

    def look(self, *, patient: bool = False) -> RankFailed | None:
        """Whether a rank has failed; called several times a second by one thread.

        Args:
            patient: ranks may be silent (they start).
        """
        now = time.monotonic()
        for member in self.members:
            if (how := member.ended()) is not None:
                return self._failed(member.rank, f"its process has ended by {how}")
        with self._lock:
            suspicions = list(self._suspicions)
        if suspicions:
            worst = max(suspicions, key=lambda suspicion: suspicion.weight)
            if now - suspicions[0].at > SETTLE[worst.weight]:
                return self._failed(worst.rank, worst.message)
        if patient:
            return None
        paused, self._looked = now - self._looked > 2.0, now  # callers' patient looks must not hide a pause
        for rank, link in enumerate(self._links):
            waits = self._asked[rank] > self._heard[rank]
            if waits and paused:  # it was us who stood still
                self._asked[rank] = now
            elif waits and now - self._asked[rank] > self._settings.timeout:
                return self._failed(rank, f"no sign of life for {self._settings.timeout:g} s")
            elif not waits and now - self._heard[rank] > PING:
                self._asked[rank] = now
                link.send({"id": "ping", "do": "health"})
        return None

    def ready(self) -> bool:
        """Whether all ranks answer, and met a moment ago or are at work."""
        now = time.monotonic()
        if not self.serving or self.failure is not None or self._suspicions:
            return False
        if any(self._asked[rank] > heard and now - self._asked[rank] > FRESH for rank, heard in self._heard.items()):
            return False
        known = list(self._known.values())
        met = [health.last_collective_age_s is not None and health.last_collective_age_s < RECENT for health in known]
        return all(recent or health.state == "busy" for recent, health in zip(met, known, strict=True))

    def health(self) -> list[RankHealth]:
        """By rank."""
        now, found = time.monotonic(), []
        for member in self.members:
            rank = member.rank
            health, age = self._known[rank], now - self._heard[rank]
            alive = member.ended() is None and not any(each.rank == rank for each in self._suspicions)
            late = self._asked[rank] > self._heard[rank] and now - self._asked[rank] > FRESH
            met = health.last_collective_age_s
            state = health.state if alive and not late else "lost"
            met = None if met is None else met + age
            found.append(replace(health, alive=alive and not late, last_collective_age_s=met, state=state))
        return found

    def end(self, timeout: float) -> None:
        """Let all ranks end in order: returns when they have, or at the latest after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        self.serving = False
        self._links[0].send({"id": self._number(), "do": "end"})
        while time.monotonic() < deadline and any(member.ended() is None for member in self.members):
            time.sleep(0.02)

    def close(self, error: Exception) -> None:
        """It is over: all callers hear this error, all connections end."""
        with self._lock:
            self.serving = False
            self.failure = error
            callers, self._callers = list(self._callers.values()), {}
        for caller in callers:
            caller.failed(copy.copy(error))  # each raises its own
        for link in (*self._links, *self._data):
            link.close()

    def _ask(self, rank: int, header: Header, deadline: float) -> dict[str, Any]:
        waiting = Waiting(1)
        number = self._register(waiting)
        try:
            self._links[rank].send({**header, "id": number})
            while not waiting.answers:
                if (failure := self.look(patient=True)) is not None:
                    raise failure
                try:
                    waiting.until(lambda: bool(waiting.answers), min(deadline, time.monotonic() + 0.05))
                except TimeoutError:
                    if time.monotonic() >= deadline:
                        raise
        finally:
            self.forget(number)
        waiting.raise_refusal()
        return waiting.answers[rank].header

    def _number(self) -> str:
        return f"{self._name}-{next(self._numbers)}"

    def _register(self, caller: Waiting | Stream) -> str:
        number = self._number()
        with self._lock:
            if self.failure is not None:
                raise copy.copy(self.failure)
            self._callers[number] = caller
        return number

    def _hear(self, rank: int, message: Message) -> None:
        """From a link's thread."""
        header = message.header
        if (failure := header.get("failure")) is not None:  # the callers hear who failed, not who complained first
            self._suspect(int(failure["rank"]), str(failure["message"]), SURE if failure["sure"] else HEARSAY)
        elif header.get("id") == "ping":
            self._renew(rank, header)
        elif (caller := self._callers.get(str(header.get("id")))) is not None:
            caller.arrived(rank, message)

    def _renew(self, rank: int, answer: dict[str, Any]) -> None:
        self._known[rank] = RankHealth(
            rank, str(answer["host"]), int(answer["pid"]), str(answer["device"] or ""), True, answer["age"],
            int(answer["cache_used"]), int(answer["cache_pages"]), str(answer["state"]),
        )  # fmt: skip
        self._heard[rank] = time.monotonic()

    def _lost(self, rank: int, why: str) -> None:
        self._suspect(rank, f"its connection is lost: {why}", LIKELY)

    def _suspect(self, rank: int, message: str, weight: int) -> None:
        """A rank is said to have failed, or cannot be heard any more; `look` decides."""
        with self._lock:
            self._suspicions.append(_Suspicion(rank, message, weight, time.monotonic()))
        self._wake.set()

    def _failed(self, rank: int, message: str) -> RankFailed:
        return RankFailed(rank, self._known[rank].host, None, message)
