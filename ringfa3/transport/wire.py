"""The only module that sends tensors: point-to-point messages of one group, over gloo or NCCL, with failures named.

On CUDA the messages run on a high-priority stream of their own, ordered against the compute stream by events alone:
the host never waits. Every buffer belongs to the compute stream's allocator: a message starts after an event that
says its buffers are ready (`mark`), `Flight.land` makes the compute stream wait for it, and `settle` does so for all
of them before buffers go back; memory is therefore never reused under a transfer and needs no record_stream.
For the transfer to start beside a long kernel, make the group with ProcessGroupNCCL.Options(is_high_priority_stream=
True): NCCL's own stream takes its priority from there.

Only sends and receives are used, no collectives: they are matched per pair of ranks, in the order of a thread of ours,
whatever collectives the caller issues meanwhile on the same gloo group. A batch of NCCL completes when its messages'
other ends are posted; callers keep matching messages in rounds of the same number, so no cycle of waits can arise.

Another thread, the group's watch, may ask what is waited for, and end it all (`waiting`, `release`).
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from ringfa3.errors import RankFailed
from ringfa3.transport.streams import On, current
from ringfa3.transport.tally import Tally

TAG = 0x7269  # keeps our messages apart from those that a caller exchanges on the same gloo group
REMEMBERED = 1 << 14  # rounds on their way on CUDA; a stream holds fewer kernels than that
ORDERLY = 1.0  # seconds that `release` gives a thread inside NCCL to come out of it


class Awaited(NamedTuple):
    """A message that only its sender or receiver holds up."""

    rank: int
    hop: int
    round: int  # of the wire, from 1: whose count of rounds is smaller has not posted its part yet


class _Round(NamedTuple):
    """A round on its way on CUDA. Without its tensors: their memory is wanted back as soon as it has landed."""

    awaited: Awaited
    after: torch.cuda.Event | None
    arrived: torch.cuda.Event


@dataclass(frozen=True, eq=False)
class Message:
    """A contiguous tensor to send to, or to fill from, a rank of the group. kind tells messages of one pair apart."""

    peer: int
    tensor: Tensor
    send: bool
    kind: int = 0


class Wire:
    """Messages of one process group (None, or of one rank: nothing is sent) between tensors on one device.

    Made once per group and device, by all of its ranks together. All ranks post the same rounds, in the same order.
    The group is held weakly, so that what is kept for it goes when it is destroyed.
    """

    def __init__(self, group: ref[dist.ProcessGroup] | None, device: torch.device, hosts: Sequence[str] = ()) -> None:
        self._group, self.device, self._hosts = group, device, hosts
        self._stream: torch.cuda.Stream | None = None
        # not landed: should a call end in the middle, gloo still owns these buffers
        self.flying: set[Flight] = set()
        self.rounds = 0  # posted so far, those without messages too
        self.tally = Tally()
        self.captured = False  # rounds are in a CUDA graph, where nobody sees when they run
        self._under_way: deque[_Round] = deque(maxlen=REMEMBERED)
        self.blocked: Awaited | None = None  # what a thread of the host waits for
        self._posting, self._asking = threading.Lock(), threading.Lock()
        self.released = False  # everything was ended, nothing more is sent
        self.patience = math.inf  # seconds after which torch would end this process; gloo raises an error instead
        self._index = -1  # of the device, where there is a stream
        if device.type == "cuda" and group is not None and dist.get_world_size(self.group) > 1:
            self._index = torch.cuda.current_device() if device.index is None else device.index
            self._stream = torch.cuda.Stream(device, priority=-1)
            # with all ranks present: NCCL must not make its communicator for a batch that some of them sit out
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
            assert self.group is not None
            self.patience = self.group._get_backend(device).options._timeout.total_seconds()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group."""
        group = None if self._group is None else self._group()
        if group is None and self._group is not None:
            raise RuntimeError("group: wanted a living process group, got one that was destroyed since the call began")
        return group

    def mark(self) -> torch.cuda.Event | None:
        """An event after everything that the compute stream was given so far; None where work is not queued."""
        return None if self._stream is None else self.compute().record_event()

    def compute(self) -> torch.cuda.Stream:
        """The compute stream, on CUDA."""
        return current(self._index)

    def post(self, messages: Sequence[Message], hop: int, after: torch.cuda.Event | None = None) -> Flight:
        """Start the messages, once `after` has happened, and return without waiting.

        Raises:
            RankFailed: a peer is known to be gone.
        """
        self.rounds += 1
        if not messages:
            return Flight(self, (), (), hop, None, self.rounds)
        for m in messages:
            (self.tally.sent if m.send else self.tally.received)[hop] += m.tensor.nbytes
        if self._stream is None:
            flight = Flight(self, messages, [(m.peer, self._start(m, hop)) for m in messages], hop, None, self.rounds)
            self.flying.add(flight)
            return flight
        first = next((m for m in messages if not m.send), messages[0])  # what comes is missed, what goes is not
        awaited = Awaited(first.peer, hop, self.rounds)
        with On(self._stream, self._index):
            if after is not None:
                self._stream.wait_event(after)
            ops = [
                dist.P2POp(
                    dist.isend if m.send else dist.irecv,
                    m.tensor,
                    group=self.group,
                    tag=TAG + m.kind,
                    group_peer=m.peer,
                )
                for m in messages
            ]
            self.blocked = awaited  # the first message of a pair waits for its other end
            try:
                with self._posting:
                    self.check()
                    for work in dist.batch_isend_irecv(ops):
                        work.wait()  # queues a wait on our stream; the host goes on
            except RuntimeError as error:
                raise self.failed(awaited.rank, hop, error) from error
            finally:
                self.blocked = None
            arrived = self._stream.record_event()
            if torch.cuda.is_current_stream_capturing():
                self.captured = True
            else:
                self._under_way.append(_Round(awaited, after, arrived))
            return Flight(self, messages, (), hop, arrived, self.rounds)

    def waiting(self) -> Awaited | None:
        """What is waited for, although everything of our own that comes before it is done. From any thread."""
        if self.blocked is not None:
            return self.blocked
        head = self._head()
        return head.awaited if head is not None and _done(head.after) else None

    def computing(self) -> bool:
        """Whether kernels of our own hold up what is to be sent. From any thread.

        Never on CPU, where nothing tells a host that computes from one that is stuck.
        """
        head = self._head()
        return head is not None and not _done(head.after)

    def release(self) -> None:
        """End everything under way, and refuse more: blocked threads and device queues go on, with garbage.

        From any thread. On CUDA this aborts the group's NCCL communicator for good, and returns when its memory is
        freed, which waits for the kernels that the device runs.
        """
        self.released = True
        group = None if self._group is None else self._group()
        if group is None:
            return
        if self._stream is None:
            for flight in list(self.flying):
                for _, work in flight.works:
                    with contextlib.suppress(RuntimeError):  # running out of time closes gloo's connections
                        work.wait(timedelta(milliseconds=1))
            return
        held = self._posting.acquire(timeout=ORDERLY)  # who stays inside NCCL for longer is freed by the abort itself
        try:
            group._get_backend(self.device).abort()
        finally:
            if held:
                self._posting.release()

    def _head(self) -> _Round | None:
        """The first round on CUDA that has not landed. Streams are not touched, only events."""
        with self._asking:
            while self._under_way:
                head = self._under_way[0]
                with torch.cuda.device(self.device):
                    if not head.arrived.query():
                        return head
                self._under_way.popleft()
            return None

    def check(self) -> None:
        """Raise RuntimeError after `release`."""
        if self.released:
            raise RuntimeError("the group's messages were ended")

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """Where tensors that only messages touch are made: on the messages' stream."""
        return contextlib.nullcontext() if self._stream is None else On(self._stream, self._index)

    def settle(self) -> None:
        """Make the compute stream wait for everything posted, so that buffers can be let go."""
        if self._stream is not None:
            self.compute().wait_stream(self._stream)

    def failed(self, peer: int, hop: int, error: RuntimeError) -> RankFailed:
        """The error to raise for a message to or from this rank of the group that was not delivered."""
        host = self._hosts[peer] if self._hosts else ""
        return RankFailed(peer, host, hop, f"no longer exchanges messages: {_said(error)}")

    def _start(self, m: Message, hop: int) -> dist.Work:
        try:
            self.check()
            if m.send:
                work = dist.isend(m.tensor, group=self.group, tag=TAG + m.kind, group_dst=m.peer)
            else:
                work = dist.irecv(m.tensor, group=self.group, tag=TAG + m.kind, group_src=m.peer)
        except RuntimeError as error:
            raise self.failed(m.peer, hop, error) from error
        assert work is not None  # only a rank outside of the group gets none
        return work


@dataclass(frozen=True, eq=False)
class Flight:
    """Messages on their way."""

    wire: Wire
    messages: Sequence[Message]  # kept: their memory must not be reused before they have landed
    works: Sequence[tuple[int, dist.Work]]
    hop: int
    arrived: torch.cuda.Event | None
    round: int = 0

    def land(self) -> None:
        """Wait until all are delivered: the host on CPU, the compute stream on CUDA. Once: gloo would wait for another.

        Raises:
            RankFailed: a peer died, or took longer than the process group's timeout.
        """
        if self.arrived is not None:
            self.wire.compute().wait_event(self.arrived)
        for peer, work in self.works:
            self.wire.blocked = Awaited(peer, self.hop, self.round)
            try:
                self.wire.check()  # gloo would wait once more for what `release` has ended
                work.wait()
            except RuntimeError as error:
                raise self.wire.failed(peer, self.hop, error) from error
            finally:
                self.wire.blocked = None
        self.wire.flying.discard(self)


def _said(error: RuntimeError) -> str:
    """What a backend's error says first, without where in its sources it was raised and what it advises."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[?\S*\.(cc|cpp|cu|h|hpp):\d+\]?,?\s*", "", first).split(". ")[0]


def _done(event: torch.cuda.Event | None) -> bool:
    """Whether the device has passed it; None: there was nothing to wait for."""
    if event is None:
        return True
    return bool(event.query())
