"""Commons on CUDA: symmetric memory that peers map over NVLink, streams, and stream memory operations on the flags.

A wait is done by the stream's front end (cuStreamBatchMemOp): it takes no SM, so a persistent kernel cannot keep it
from being scheduled, and the host goes on. The flags lie in host memory, registered with the driver: GPU streams and
CPUs see the same words, so a watchdog can read who waits for whom, and end the waits. Copies between GPUs are
contiguous cudaMemcpyAsync, or cuMemcpy2DAsync for rows of one pitch, which the copy engines do.

The driver is called through ctypes: a batch is built once, and needs one call each time (no dependency on a binding).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory

from ringfa3.board import Peer
from ringfa3.errors import RankFailed
from ringfa3.transport.commons import Mark, Queue, flag_memory
from ringfa3.transport.flags import Flags, Op
from ringfa3.transport.meeting import Meeting
from ringfa3.transport.streams import On, current

WAIT_32, WRITE_32, EQUAL = 1, 2, 1  # CU_STREAM_MEM_OP_WAIT_VALUE_32, .._WRITE_VALUE_32, CU_STREAM_WAIT_VALUE_EQ
PORTABLE_MAPPED = 0x1 | 0x2  # CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP
NEEDED = (
    "cuStreamBatchMemOp_v2", "cuStreamGetCaptureInfo_v2", "cuMemHostRegister_v2", "cuMemHostGetDevicePointer_v2",
    "cuMemcpy2DAsync_v2",
)  # fmt: skip
HERE = nullcontext()
UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: an address says by itself where it is


class MemOp(ctypes.Structure):
    """CUstreamBatchMemOpParams (a union of 48 bytes), as a wait or a write of 32 bits."""

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("_0", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("_1", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("_2", ctypes.c_uint64),
    )


class Place2D(ctypes.Structure):
    """One end of a CUDA_MEMCPY2D."""

    _fields_ = (
        ("x_bytes", ctypes.c_size_t),
        ("y", ctypes.c_size_t),
        ("memory_type", ctypes.c_uint),
        ("host", ctypes.c_void_p),
        ("device", ctypes.c_void_p),
        ("array", ctypes.c_void_p),
        ("pitch", ctypes.c_size_t),
    )


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (("source", Place2D), ("target", Place2D), ("width_bytes", ctypes.c_size_t), ("height", ctypes.c_size_t))

    @classmethod
    def of(cls, target: Tensor, source: Tensor) -> Copy2D:
        """For two tensors of one shape [rows, n] whose rows are contiguous."""
        height, width = source.shape
        ends = (
            Place2D(memory_type=UNIFIED, device=x.data_ptr(), pitch=x.stride(0) * x.element_size())
            for x in (source, target)
        )
        return cls(*ends, width * source.element_size(), height)


@lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    """The CUDA driver's library.

    Raises:
        OSError: there is none, or it lacks what we need.
    """
    library = ctypes.CDLL("libcuda.so.1")
    lacking = [name for name in NEEDED if not hasattr(library, name)]
    if lacking:
        raise OSError(f"libcuda.so.1 has no {', '.join(lacking)}: wanted the driver of CUDA 12 or newer")
    return library


def check(status: int, what: str) -> None:
    """Raise RuntimeError where a driver's call went wrong."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: {(text.value or b'unknown error').decode()} (CUDA driver error {status})")


class CudaCommons:
    """See `Commons`. `group` names a group of the meeting's members alone, over which symmetric memory meets."""

    def __init__(self, meeting: Meeting, peers: Sequence[Peer], group: str, device: torch.device) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("transport: a capture cannot make its buffers: run once before it")
        # before the first rendezvous: NVLink multicast can put a host's GPUs, which others share, out of service, and
        # nothing here needs it
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        indices = meeting.exchange(device.index)
        if len(set(indices)) < len(indices):
            # every rank sees its own GPU alone, as number 0 (Ray); that they differ is known from their UUIDs
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        self.meeting, self.peers = meeting, peers
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", self.index)
        self._group: Any = group  # not the group itself: pools are kept until it goes
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the driver's calls below want the device's context
            self.flags = Flags(flag_memory(meeting), len(meeting.members), meeting.members.index(meeting.rank))
            self._base = _register(self.flags)
        self.failure: RankFailed | None = None
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._batches: dict[tuple[Op, ...], ctypes.Array[MemOp]] = {}

    def here(self) -> Queue:
        """See `Commons`."""
        return CudaQueue(self, 0, current(self.index))

    def beside(self, number: int) -> Queue:
        """See `Commons`."""
        if number not in self._streams:
            self._streams[number] = torch.cuda.Stream(self.device, priority=-1)
        return CudaQueue(self, number, self._streams[number])

    def share(self, size: int) -> tuple[Tensor, ...]:
        """See `Commons`."""
        if self.flags.world == 1:
            return (torch.empty(size, dtype=torch.uint8, device=self.device),)
        from torch.distributed import _symmetric_memory as symmetric  # only where CUDA is: takes a while

        own = None
        with torch.cuda.device(self.device):
            try:
                # not symmetric.empty: its pool would keep what a buffer has grown out of
                own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self.device)
            except RuntimeError:  # told to all below: a rendezvous that one of them misses would hang
                own = None
            there = self.meeting.exchange(own is not None)
            if own is None or not all(there):
                ranks = ", ".join(str(m) for m, ok in zip(self.meeting.members, there, strict=True) if not ok)
                raise MemoryError(f"rank {ranks}: no room for {size} bytes of symmetric memory")
            handle = symmetric.rendezvous(own, self._group)  # lives as long as `own`
        world, me = len(self.meeting.members), self.flags.rank
        return tuple(own if i == me else handle.get_buffer(i, (size,), torch.uint8) for i in range(world))

    def drain(self) -> None:
        """See `Commons`."""
        torch.cuda.synchronize(self.device)

    def capture(self) -> int:
        """See `Commons`."""
        if not torch.cuda.is_current_stream_capturing():
            return 0
        status, number = ctypes.c_int(), ctypes.c_uint64()
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        asked = driver().cuStreamGetCaptureInfo_v2(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
        check(asked, "cuStreamGetCaptureInfo")
        return number.value

    def release(self, failure: RankFailed) -> None:
        """See `Commons`. What is queued behind will wait too, for flags that it has reset itself: again and again."""
        self.failure = failure
        self.flags.release()
        threading.Thread(target=_keep_free, args=(self.flags,), daemon=True, name="ringfa3 release").start()

    def selected(self) -> AbstractContextManager[object]:
        """Where the driver is called: with our device as the current one, which it is but for callers of others."""
        return HERE if torch.cuda.current_device() == self.index else torch.cuda.device(self.index)

    def batch(self, ops: Sequence[Op]) -> ctypes.Array[MemOp]:
        """The driver's form of the operations; built once."""
        key = tuple(ops)
        made = self._batches.get(key)
        if made is None:
            made = (MemOp * len(key))()
            for slot, op in zip(made, key, strict=True):
                slot.operation, slot.flags = (WAIT_32, EQUAL) if op.wait else (WRITE_32, 0)  # 0: with a memory barrier
                slot.address, slot.value = self._base + 4 * op.word, op.value
            self._batches[key] = made
        return made


class CudaQueue:
    """A stream."""

    def __init__(self, commons: CudaCommons, number: int, stream: torch.cuda.Stream) -> None:
        self.number, self._commons, self.stream = number, commons, stream
        self._handle = ctypes.c_void_p(stream.cuda_stream)

    def run(self, ops: Sequence[Op]) -> None:
        """See `Queue`."""
        if self._commons.failure is not None:
            raise self._commons.failure
        batch = self._commons.batch(ops)
        with self._commons.selected():
            status = driver().cuStreamBatchMemOp_v2(self._handle, len(batch), batch, 0)
        check(status, "cuStreamBatchMemOp")

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `Queue`."""
        with On(self.stream, self._commons.index):
            for target, source in pairs:
                if source.is_contiguous():
                    target.copy_(source, non_blocking=True)
                else:  # torch would run a kernel
                    self._copy_rows(Copy2D.of(target, source))

    def _copy_rows(self, what: Copy2D) -> None:
        with self._commons.selected():
            status = driver().cuMemcpy2DAsync_v2(ctypes.byref(what), self._handle)
        check(status, "cuMemcpy2DAsync")

    def mark(self) -> Mark:
        """See `Queue`."""
        return self.stream.record_event()

    def follow(self, mark: Mark) -> None:
        """See `Queue`."""
        self.stream.wait_event(mark)


def why_not() -> str:
    """What this process lacks, "" where nothing."""
    try:
        driver()
    except OSError as error:
        return str(error)
    return ""


def reach(device: torch.device) -> tuple[str, list[str], list[str]]:
    """UUIDs: the device's own, those visible in this process, and those whose memory it can map."""
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    here = torch.cuda.current_device() if device.index is None else device.index
    mapped = [uuid for i, uuid in enumerate(uuids) if i == here or torch.cuda.can_device_access_peer(here, i)]
    return uuids[here], uuids, mapped


def _keep_free(flags: Flags, seconds: float = 60.0) -> None:
    """What the device still holds gets through within this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        flags.release()
        time.sleep(1e-3)


def _register(flags: Flags) -> int:
    """The flags' address for streams; unregistered when they go."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(flags.memory))
    check(
        driver().cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(len(flags.memory)), PORTABLE_MAPPED),
        "cuMemHostRegister",
    )
    # not at exit: the driver would wait there for streams that may wait for a dead rank
    weakref.finalize(flags, driver().cuMemHostUnregister, ctypes.c_void_p(address)).atexit = False
    there = ctypes.c_uint64()
    check(
        driver().cuMemHostGetDevicePointer_v2(ctypes.byref(there), ctypes.c_void_p(address), 0),
        "cuMemHostGetDevicePointer",
    )
    return there.value
