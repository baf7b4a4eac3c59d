"""Where ranks leave each other small notes, call by call: shared memory on one host, the group's store between hosts.

A note is two numbers, its fingerprint and its content; a text follows only where ranks differ. Calls are numbered from
1, and ranks are never more than one call apart: whoever reads all notes of call n knows that call n - 1 is over.
Beside the calls each rank has a standing, which its watch renews, and room for one alarm (ringfa3.watch).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol
from zlib import crc32

from torch._C._distributed_c10d import Store

from ringfa3.errors import RankFailed

LINE = 8  # words of 8 bytes a rank and parity: a cache line, so that a rank's stores disturb no other rank's
TEXT = 4096  # bytes of text a rank and parity
BITS = 48  # of a note's numbers; the 16 above them hold the call's number
_LOW = (1 << BITS) - 1
_BESIDE = 2  # the slot beside those of the two parities

Note = tuple[int, int]


@dataclass(frozen=True)
class Peer:
    """A rank's process: what it takes to tell whether it still lives."""

    host: str
    machine: str  # see `_machine`
    pid: int
    born: str  # start time in clock ticks: a pid may be given to another process

    @classmethod
    def here(cls) -> Peer:
        """This process."""
        return cls(socket.gethostname(), _machine(), os.getpid(), _state(os.getpid())[1])

    def near(self) -> bool:
        """Whether `dead` can tell from here."""
        return self.machine == _machine()

    def dead(self) -> bool:
        """The process is known to have ended. False where that cannot be told from here."""
        if not self.near():
            return False
        if os.path.exists("/proc/self/stat"):
            state, born = _state(self.pid)
            return state in ("", "Z", "X") or born != self.born
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


class Board(Protocol):
    """Notes of all ranks of a group."""

    pause: float  # seconds between looks at standings and alarms that cost nothing worth mentioning

    def post(self, call: int, note: Note) -> None:
        """Leave this rank's note; each number below 2 ** 48. Again for the same call: replace it."""
        ...

    def missing(self, call: int, ranks: Iterable[int]) -> list[int]:
        """Those of the ranks whose notes for this call are not there yet."""
        ...

    def note(self, call: int, rank: int) -> Note:
        """A note that is not missing."""
        ...

    def post_text(self, call: int, text: bytes) -> None:
        """Leave this rank's text, at most TEXT - 8 bytes."""
        ...

    def text(self, call: int, rank: int) -> bytes | None:
        """A rank's text; None if it is not there yet."""
        ...

    def stand(self, note: Note) -> None:
        """Replace this rank's standing; the first number is not 0, and numbers of one standing may be seen apart."""
        ...

    def standing(self) -> list[Note | None]:
        """Each rank's standing; None before its first."""
        ...

    def alarm(self, text: bytes) -> None:
        """Leave this rank's alarm, once; at most TEXT - 8 bytes."""
        ...

    def alarms(self) -> dict[int, bytes]:
        """All ranks' alarms."""
        ...

    def apart(self) -> Board:
        """The same board for another thread, which must not wait for what this one does."""
        ...


class SharedBoard:
    """In memory that all ranks of one host map.

    Per rank and parity of the call: the note's two words, each with 16 bits of the call's number above it, so that a
    word is valid or not by itself, in whatever order a processor lets stores be seen; a word with 32 bits of call and
    checksum for the text, which is read again until they match. A third slot of the same form is for what is beside the
    calls: two untagged words of standing, and the alarm as the text of call 2.
    """

    pause = 0.05

    def __init__(self, memory: mmap.mmap, rank: int, world: int) -> None:
        self._memory = memory  # unmapped when the last view of it goes
        self._words = memoryview(memory).cast("Q")
        self._rank, self._world = rank, world

    @staticmethod
    def size(world: int) -> int:
        """Bytes for a group of this size."""
        return 3 * world * (LINE * 8 + TEXT)

    def post(self, call: int, note: Note) -> None:
        at = self._at(call & 1, self._rank)
        tag = (call & 0xFFFF) << BITS
        self._words[at] = tag | note[0]
        self._words[at + 1] = tag | note[1]

    def missing(self, call: int, ranks: Iterable[int]) -> list[int]:
        words, tag, first = self._words, call & 0xFFFF, self._at(call & 1, 0)
        return [
            rank
            for rank in ranks
            if words[first + rank * LINE] >> BITS != tag or words[first + rank * LINE + 1] >> BITS != tag
        ]

    def note(self, call: int, rank: int) -> Note:
        at = self._at(call & 1, rank)
        return self._words[at] & _LOW, self._words[at + 1] & _LOW

    def post_text(self, call: int, text: bytes) -> None:
        self._write(call & 1, call, text)

    def text(self, call: int, rank: int) -> bytes | None:
        return self._read(call & 1, call, rank)

    def stand(self, note: Note) -> None:
        at = self._at(_BESIDE, self._rank)
        self._words[at], self._words[at + 1] = note

    def standing(self) -> list[Note | None]:
        places = [self._at(_BESIDE, rank) for rank in range(self._world)]
        return [(self._words[at], self._words[at + 1]) if self._words[at] else None for at in places]

    def alarm(self, text: bytes) -> None:
        self._write(_BESIDE, _BESIDE, text)

    def alarms(self) -> dict[int, bytes]:
        texts = {rank: self._read(_BESIDE, _BESIDE, rank) for rank in range(self._world)}
        return {rank: text for rank, text in texts.items() if text is not None}

    def apart(self) -> Board:
        return self

    def _write(self, slot: int, call: int, text: bytes) -> None:
        at = self._text_at(slot, self._rank)
        framed = len(text).to_bytes(8, "little") + text
        self._memory[at : at + len(framed)] = framed
        self._words[self._at(slot, self._rank) + 2] = (call & 0xFFFFFFFF) << 32 | crc32(framed)

    def _read(self, slot: int, call: int, rank: int) -> bytes | None:
        word = self._words[self._at(slot, rank) + 2]
        if word >> 32 != call & 0xFFFFFFFF:
            return None
        at = self._text_at(slot, rank)
        length = int.from_bytes(self._memory[at : at + 8], "little")
        framed = self._memory[at : at + 8 + length] if length <= TEXT - 8 else b""
        return framed[8:] if crc32(framed) == word & 0xFFFFFFFF else None

    def _at(self, slot: int, rank: int) -> int:
        return (slot * self._world + rank) * LINE

    def _text_at(self, slot: int, rank: int) -> int:
        return 3 * self._world * LINE * 8 + (slot * self._world + rank) * TEXT


class StoreBoard:
    """In the group's store (usually a TCPStore): correct between hosts, a few round trips a call."""

    pause = 0.5

    def __init__(self, store: Store, prefix: str, rank: int, world: int) -> None:
        self._store, self._prefix, self._rank, self._world = store, prefix, rank, world

    def post(self, call: int, note: Note) -> None:
        self._store.set(self._key(call, self._rank), f"{note[0]} {note[1]}")
        if call > 2:  # everybody has left call - 2 behind
            self._store.delete_key(self._key(call - 2, self._rank))

    def missing(self, call: int, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if not self._store.check([self._key(call, rank)])]

    def note(self, call: int, rank: int) -> Note:
        first, second = self._store.get(self._key(call, rank)).split()
        return int(first), int(second)

    def post_text(self, call: int, text: bytes) -> None:
        self._store.set(self._key(call, self._rank) + "/text", text.decode())

    def text(self, call: int, rank: int) -> bytes | None:
        key = self._key(call, rank) + "/text"
        return self._store.get(key) if self._store.check([key]) else None

    def stand(self, note: Note) -> None:
        self._store.set(self._key("standing", self._rank), f"{note[0]} {note[1]}")

    def standing(self) -> list[Note | None]:
        keys = [self._key("standing", rank) for rank in range(self._world)]
        there = [True] * self._world if self._store.check(keys) else [self._store.check([key]) for key in keys]
        texts = iter(self._store.multi_get([key for key, is_there in zip(keys, there, strict=True) if is_there]))
        notes = [tuple(map(int, next(texts).split())) if is_there else None for is_there in there]
        return notes  # type: ignore[return-value]  # they are pairs, as stand left them

    def alarm(self, text: bytes) -> None:
        self._store.set(self._key("alarm", self._rank), text.decode())
        self._store.set(f"{self._prefix}/alarmed", "1")  # one key to look at

    def alarms(self) -> dict[int, bytes]:
        if not self._store.check([f"{self._prefix}/alarmed"]):
            return {}
        keys = {rank: self._key("alarm", rank) for rank in range(self._world)}
        return {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}

    def apart(self) -> Board:
        clone: Store = self._store.clone()  # type: ignore[attr-defined]  # the stubs lack it
        return StoreBoard(clone, self._prefix, self._rank, self._world)

    def _key(self, call: int | str, rank: int) -> str:
        return f"{self._prefix}/{call}/{rank}"


def meet(store: Store, rank: int, world: int, *, timeout: float, shared: bool = True) -> tuple[Board, tuple[Peer, ...]]:
    """Meet all ranks of a group, for the first time: a board to leave notes on, and who they are.

    Args:
        store: the group's own store.
        timeout: seconds to wait for the last rank.
        shared: False: use the store, although shared memory would do.

    Raises:
        RankFailed: a rank did not come in time.
    """
    arrived = store.add("ringfa3/arrived", 1)  # the same group may meet again: a new agreement, after a failure
    prefix = f"ringfa3/{(arrived - 1) // world}"
    deadline = time.monotonic() + timeout
    path = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp", f"ringfa3-{secrets.token_hex(8)}")
    memory = None
    try:
        if rank == 0:
            memory = create(path, SharedBoard.size(world)) if shared else None
            store.set(f"{prefix}/file", str(path))
        else:
            await_keys(store, {0: f"{prefix}/file"}, deadline, timeout)
            memory = attach(Path(store.get(f"{prefix}/file").decode()), SharedBoard.size(world)) if shared else None
        me = asdict(Peer.here()) | {"attached": memory is not None}
        store.set(f"{prefix}/peer/{rank}", json.dumps(me))
        await_keys(store, {r: f"{prefix}/peer/{r}" for r in range(world)}, deadline, timeout)
    finally:
        if rank == 0:  # everybody who could has it mapped by now
            path.unlink(missing_ok=True)
    met = [json.loads(store.get(f"{prefix}/peer/{r}")) for r in range(world)]
    everywhere = all([peer.pop("attached") for peer in met])
    peers = tuple(Peer(**peer) for peer in met)
    if everywhere and memory is not None:
        return SharedBoard(memory, rank, world), peers
    return StoreBoard(store, prefix, rank, world), peers


def await_keys(
    store: Store, keys: dict[int, str], deadline: float, timeout: float, see: Callable[[int], None] | None = None
) -> None:
    """Wait until each rank has set its key. Told (`see`) at every look which rank is missing; may raise."""
    pause = 1e-4
    while missing := [rank for rank, key in keys.items() if not store.check([key])]:
        if see is not None:
            see(missing[0])
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing))
            raise RankFailed(missing[0], "", None, f"no call of rank {ranks} within {timeout:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.01)


def create(path: Path, size: int) -> mmap.mmap | None:
    """A new file of zeros, mapped; only this user may read it."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(fd, 0, size)  # a full /dev/shm is found now, not by a SIGBUS later
        return mmap.mmap(fd, size)
    except OSError:
        return None
    finally:
        os.close(fd)


def attach(path: Path, size: int) -> mmap.mmap | None:
    """The file, mapped; None where this host does not have it."""
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(path, os.O_RDWR)
        try:
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)
    return None


@lru_cache
def _machine() -> str:
    """Differs between machines, and between containers that cannot see each other's processes."""
    return "|".join((_read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid"), socket.gethostname()))


def _state(pid: int) -> tuple[str, str]:
    """State letter and start time of a process; "" where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
