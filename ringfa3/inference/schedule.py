"""Scheduling: which request gets what in the next step. Leader only, no tensors; what it plans is taken as done.

A step is one decode of all requests that lack one token, and beside it one chunk of one prompt, the prompts taking
turns. Requests are admitted first come, first served, when what remains of all admitted prompts and some room to answer
fits the cache. When pages run out nevertheless, sessions in which nothing happens are forgotten, least recently used
first, then the youngest request goes back to the front of the queue: its tokens will be prefilled again.

Pages are given back by an order of its own before anything is planned that needs them, so `Pages.fits` is always asked
about what really is.

Where all layers have windows a sequence keeps what its next tokens see, and no more: a request goes on from the
beginning that it has in common with a session or another request only where `Pages.cuts` says that it can.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ringfa3.inference.pages import Pages


@dataclass(eq=False)
class Session:
    """A sequence that outlives its requests.

    Args:
        name: the caller's.
    """

    name: str
    sequence: int | None = None
    tokens: list[int] = field(default_factory=list)  # that the sequence holds while no request has it
    owner: Request | None = None  # the request that has the sequence
    users: int = 0  # requests that have not ended
    closed: bool = False
    used: int = 0  # when, by the scheduler's count of ended requests

    @property
    def idle(self) -> bool:
        """Whether it holds pages that no request needs."""
        return self.owner is None and self.sequence is not None


@dataclass(eq=False)
class Request:
    """A request on its way.

    Args:
        number: ascends by arrival.
        tokens: the prompt; answers are appended.
        prompt: how many of them are the prompt.
        most: how many may be appended.
        session: whose sequence it continues.
    """

    number: int
    tokens: list[int]
    prompt: int
    most: int
    session: Session | None = None
    sequence: int | None = None  # None: it waits, and has nothing
    held: int = 0  # of its tokens, by the sequence
    inherited: bool = False  # whether the sequence was begun by another request
    dropped: bool = False  # whether it had to give pages back before it was let in: it will not fork again
    cached: int | None = None  # prompt tokens that were there already, when it was first admitted
    awaited: tuple[Request, int] | None = None  # who is about to hold so many tokens that this one begins with, too

    @property
    def missing(self) -> int:
        """Tokens that the sequence lacks; a step that leaves none yields logits."""
        return len(self.tokens) - self.held

    @property
    def decodes(self) -> bool:
        """Whether its next step is part of the decode."""
        return self.missing == 1 and self.held > 0


@dataclass
class Step:
    """What is to be done next, and whose it is.

    Args:
        free: sequences, before anything is computed.
        fork, truncate, create: (parent, child), (sequence, length), sequence: in this order, after that.
        prefill: the request of a chunk, and its tokens.
        decode: the requests of the decode.
        failed: requests that cannot go on, and why: to be ended.
    """

    free: list[int] = field(default_factory=list)
    fork: list[tuple[int, int]] = field(default_factory=list)
    truncate: list[tuple[int, int]] = field(default_factory=list)
    create: list[int] = field(default_factory=list)
    prefill: tuple[Request, list[int]] | None = None
    decode: list[Request] = field(default_factory=list)
    failed: list[tuple[Request, str]] = field(default_factory=list)

    def order(self) -> dict[str, Any] | None:
        """As all ranks are told; None when there is nothing to do."""
        order: dict[str, Any] = {}
        for name in ("free", "fork", "truncate", "create"):
            if getattr(self, name):
                order[name] = getattr(self, name)
        if self.prefill is not None:
            order["prefill"] = [self.prefill[0].sequence, self.prefill[1]]
        if self.decode:
            order["decode"] = [[r.sequence for r in self.decode], [r.tokens[-1] for r in self.decode]]
        return {"do": "step", **order} if order else None

    def requests(self) -> Iterator[Request]:
        """Those that something is computed for."""
        if self.prefill is not None:
            yield self.prefill[0]
        yield from self.decode


class Scheduler:
    """The queue, the requests under way and the sessions.

    Args:
        pages: the leader's; read, never changed.
        chunk: prompt tokens that one step takes at most.
        max_running: requests under way at most.
        share: whether a request may begin as a fork of another one's sequence.
    """

    def __init__(self, pages: Pages, *, chunk: int = 512, max_running: int = 64, share: bool = True) -> None:
        for name, value in (("chunk", chunk), ("max_running", max_running)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: wanted an integer, 1 or more, got {value!r}")
        self.pages, self.chunk, self.max_running = pages, chunk, max_running
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []  # prompts take turns in this order
        self.sessions: dict[str, Session] = {}
        self.preemptions = self.evictions = 0
        # tokens in common from which on a sequence is worth forking
        self._worth = pages.page_size * pages.world if share else sys.maxsize
        self._gone: list[int] = []  # sequences that the next order frees
        self._sequences = self._clock = 0

    def capacity(self, prompt: int, most: int) -> tuple[int, int]:
        """(Tokens that such a request may make a rank hold when it is alone, tokens that a rank can hold)."""
        total = prompt + most - 1  # the last token is never held
        chunks, rest = divmod(total, self.chunk)
        worst = chunks * _share(self.chunk, self.pages.world) + _share(rest, self.pages.world)
        worst += 3 * (self.pages.world > 1)  # answers are dealt one by one after a last chunk that was not even
        if self.pages.reach is not None:  # that, a chunk that begins before it, a new one, and pages begun
            kept = (self.pages.reach // self.chunk + 3) * _share(
                self.chunk, self.pages.world
            ) + 2 * self.pages.page_size
            worst = min(worst, kept)
        return worst, self.pages.pages * self.pages.page_size

    def add(self, request: Request, session: str | None = None) -> None:
        """Queue a request; a session of that name goes on, or begins."""
        if session is not None:
            request.session = self.sessions.setdefault(session, Session(session))
            request.session.users += 1
        self.waiting.append(request)

    def end(self, request: Request, *, lost: bool = False) -> None:
        """The request has ended: its session keeps what the sequence holds, unless that is lost."""
        if request in self.active:
            self.active.remove(request)
        else:
            self.waiting.remove(request)
        session, sequence = request.session, request.sequence
        if session is not None:
            session.users -= 1
            self._clock += 1
            session.used = self._clock
            if session.owner is request:
                session.owner = None
                session.sequence, session.tokens = sequence, request.tokens[: request.held]
            if lost or (session.users == 0 and (session.closed or session.sequence is None)):
                self._forget(session)
        elif sequence is not None:
            self._gone.append(sequence)
        request.sequence, request.held = None, 0

    def close(self, name: str) -> bool:
        """Forget a session, once the requests that were given it have ended. False: there is none of that name."""
        session = self.sessions.pop(name, None)
        if session is None:
            return False
        session.closed = True
        if session.users == 0:
            self._forget(session)
        return True

    def plan(self) -> Step:
        """The next step. What it says counts as done from here on."""
        step = Step()
        if self.waiting and self.pages.fits(_appends(*self._turns())):  # else those under way come first
            self._admit(step)
        decode, prefill, count = self._turns()
        if self.pages.fits(_appends(decode, prefill, count)):
            for request in decode:
                request.held += 1
            step.decode = decode
            if prefill is not None:
                step.prefill = prefill, prefill.tokens[prefill.held : prefill.held + count]
                prefill.held += count
                self.active.remove(prefill)  # to the end: the other prompts' turns come first
                self.active.append(prefill)
        elif not (self._gone or step.truncate or step.create):
            self._make_room(step, min(self.active, key=_age))
        step.free, self._gone = self._gone, []
        return step

    def _turns(self) -> tuple[list[Request], Request | None, int]:
        """Who decodes, whose prompt has its turn, and how many tokens of it."""
        decode = [request for request in self.active if request.decodes]
        prefill = next((request for request in self.active if not request.decodes), None)
        return decode, prefill, 0 if prefill is None else min(prefill.missing, self.chunk)

    def _admit(self, step: Step) -> None:
        """Let requests in. An order prepares one (gives it a sequence); after it the pages can be asked about it."""
        while len(self.active) < self.max_running:
            request = next((r for r in self.waiting if self._may_begin(r)), None)
            if request is None:
                return
            if request.sequence is None:
                self._prepare(request, step)
                if step.truncate or step.create:
                    return
            if not self.pages.fits({_sequence(r): self._needs(r) for r in (*self.active, request)}):
                if not self._gone:
                    self._make_room(step, request)
                return
            self.waiting.remove(request)
            self.active.append(request)
            if request.cached is None:
                request.cached = request.held

    def _may_begin(self, request: Request) -> bool:
        """Whether it need not wait for another one: of its session, or one whose prefill will spare it its own."""
        if request.sequence is not None:
            return True
        session = request.session
        if session is not None and session.owner not in (None, request):
            return False
        if session is not None and session.sequence is not None:
            return True
        if request.awaited is not None:
            other, wanted = request.awaited
            if other in self.active and other.held < wanted:
                return False
            request.awaited = None
        for other in self.active:
            if not other.decodes and self._lasts(other):
                wanted = min(_common(other.tokens, request.tokens, self._worth), len(request.tokens) - 1)
                if wanted - other.held >= self._worth:
                    request.awaited = other, wanted
                    return False
        return True

    def _lasts(self, request: Request) -> bool:
        """Whether another request can begin as its fork when all of its tokens are held."""
        return self.pages.reach is None or len(request.tokens) <= self.pages.reach

    def _needs(self, request: Request) -> int:
        """Tokens to find room for, so that whoever is let in gets on for a while before pages run out."""
        answers = request.most - (len(request.tokens) - request.prompt) - 1  # but the last, which is never held
        needs = request.missing + min(answers, self.pages.page_size * self.pages.world)
        return needs if self.pages.reach is None else min(needs, self.pages.reach + self.chunk)

    def _prepare(self, request: Request, step: Step) -> None:
        """Give a waiting request its session's sequence, cut to what it begins with; or a fork of another; or its own.

        One token at least is left to compute, because its logits are wanted.
        """
        session, most = request.session, len(request.tokens) - 1
        if session is not None:
            session.owner = request
            if session.sequence is not None:
                same = min(_common(session.tokens, request.tokens), most)
                request.held = same if self.pages.cuts(session.sequence, same) else 0
                request.sequence, request.inherited = session.sequence, request.held > 0
                if request.held < len(session.tokens):
                    step.truncate.append((session.sequence, request.held))
                session.sequence, session.tokens = None, []
                return
        request.sequence = self._sequences
        self._sequences += 1
        there = [(each.tokens, len(each.tokens), each.sequence, 0) for each in self._idle()]
        # by the time of the fork the step's tokens are there
        there += [(each.tokens, each.held, each.sequence, min(each.missing, self.chunk)) for each in self.active]
        shared = [self._same(request, *parent) for parent in there]
        best = max(range(len(there)), key=shared.__getitem__, default=None)
        if best is None or shared[best] < self._worth or request.dropped:
            step.create.append(request.sequence)
            return
        parent = there[best][2]
        assert parent is not None
        request.held, request.inherited = shared[best], True
        step.fork.append((parent, request.sequence))
        step.truncate.append((request.sequence, request.held))  # the parent may hold more, after this step at least

    def _same(self, request: Request, tokens: list[int], held: int, sequence: int | None, grown: int) -> int:
        """How many tokens a fork of that sequence, which will have grown, can begin with for this request."""
        same = min(_common(tokens, request.tokens, self._worth), held, len(request.tokens) - 1)
        assert sequence is not None
        return same if same < self._worth or self.pages.cuts(sequence, same, grown=grown) else 0

    def _idle(self) -> list[Session]:
        """Sessions that hold pages which no request has: closed ones too, where requests of theirs wait."""
        known = dict.fromkeys([*self.sessions.values(), *(r.session for r in self.waiting)])
        return [session for session in known if session is not None and session.idle]

    def _make_room(self, step: Step, request: Request) -> None:
        """Give pages back on this request's behalf: by the next order, so that there is nothing to plan for it yet."""
        idle = self._idle()
        holders = [r for r in self.waiting if r.held and r is not request]
        younger = [r for r in self.active if r is not request] if request in self.active else []
        if idle:
            self._forget(min(idle, key=lambda session: (session.users > 0, session.used)))
            self.evictions += 1
        elif holders:
            holders[-1].dropped = True  # or it would share pages again at once
            self._drop(holders[-1])
        elif younger:
            self._preempt(max(younger, key=_age))
        elif request in self.active and request.inherited:
            self._preempt(request)
        elif not self.active and request.inherited:
            self._drop(request)
        elif request in self.active or not self.active:
            step.failed.append((request, f"the cache of {self.pages.pages} pages a rank is too small for it"))

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue, without what was computed."""
        self.active.remove(request)
        self.waiting.appendleft(request)
        self.preemptions += 1
        self._drop(request)

    def _drop(self, request: Request) -> None:
        self._gone.append(_sequence(request))
        request.sequence, request.held, request.inherited = None, 0, False

    def _forget(self, session: Session) -> None:
        if session.sequence is not None:
            self._gone.append(session.sequence)
        session.sequence, session.tokens = None, []
        if session.users == 0 and self.sessions.get(session.name) is session:
            del self.sessions[session.name]


def _sequence(request: Request) -> int:
    assert request.sequence is not None
    return request.sequence


def _appends(decode: list[Request], prefill: Request | None, count: int) -> dict[int, int]:
    """Tokens by sequence."""
    appends = {_sequence(request): 1 for request in decode}
    if prefill is not None:
        appends[_sequence(prefill)] = count
    return appends


def _age(request: Request) -> int:
    return request.number


def _share(tokens: int, world: int) -> int:
    """Of tokens appended at once, how many one rank gets at most: zigzag cuts them into 2 * world."""
    if world == 1:
        return tokens
    return -(-tokens // world) if tokens < 2 * world else 2 * -(-tokens // (2 * world))


def _common(a: list[int], b: list[int], least: int = 1) -> int:
    """Length of the longest common beginning, or 0 if that is below least; compared in slices, at memory's speed."""
    shorter = min(len(a), len(b))
    if shorter < least or a[:least] != b[:least]:
        return 0
    same, step = least, 64
    while same < shorter and a[same : same + step] == b[same : same + step]:
        same, step = min(same + step, shorter), 2 * step
    differ = min(same + step, shorter)  # the first difference is below, or there is none
    while same < differ:
        middle = (same + differ + 1) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            differ = middle - 1
    return same
