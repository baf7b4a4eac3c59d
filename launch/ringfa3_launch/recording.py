"""What every rank of `ringfa3 trace` does: run the calls under torch.profiler, and compare its clock with rank 0's."""

from __future__ import annotations

import gzip
import json
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from ringfa3 import profiling
from ringfa3.attention import ring_attention
from ringfa3.plan import plan
from ringfa3_launch.bench.case import DTYPES, Case, format_size, mask_token
from ringfa3_launch.rank import RankInfo, pick_device

CLOCK = "ringfa3 clock"  # the range in which a rank reads its machine's clock
CALL = "ringfa3 call"
ROUNDS = 32  # of timestamps
WARM = 2  # calls before the recording: kernels are compiled, connections opened


@dataclass(frozen=True)
class Setup:
    """Everything a rank has to know; see `ringfa3 trace --help` for the fields."""

    seqlen: int
    ranks: int
    Hq: int
    Hkv: int
    D: int
    dtype: str
    mask: str
    backward: bool
    layout: str
    transport: str
    impl: str
    calls: int
    device: str

    @property
    def title(self) -> str:
        """ "fwd causal D128 H32:8 S64K W2 bf16, zigzag, transport auto"."""
        way = "fwd+bwd" if self.backward else "fwd"
        shape = f"D{self.D} H{self.Hq}:{self.Hkv} S{format_size(self.seqlen)} W{self.ranks} {self.dtype}"
        return f"{way} {mask_token(self.mask)} {shape}, {self.layout}, transport {self.transport}"


@dataclass(frozen=True)
class Recording:
    """One rank's profile.

    Args:
        rank, host: whose.
        read: its machine's clock, ns since 1970, at the start of its last range CLOCK.
        ahead: ns by which that clock is ahead of rank 0's; error: ns by which this may be wrong.
        profile: what torch.profiler wrote, parsed.
    """

    rank: int
    host: str
    read: int
    ahead: int
    error: int
    profile: dict[str, object]


def record(info: RankInfo, setup: Setup) -> list[Recording]:
    """Run and record on this rank; every rank must call. Returns all ranks' recordings on rank 0, [] elsewhere."""
    device = pick_device(info.local_rank, info.local_world, setup.device)
    control = dist.new_group(backend="gloo")  # for clocks and files: NCCL moves nothing but tensors on GPUs
    call = _call(setup, device)
    for _ in range(WARM):
        call()
    ahead, error = compare_clocks(control, machine_id())
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler, profiling.named():
        for _ in range(2):  # the first range of a profile takes long
            read = time.time_ns()
            with record_function(CLOCK):
                pass
        _settle(device)
        dist.barrier(control)
        for i in range(setup.calls):
            with record_function(f"{CALL} {i + 1}"):
                call()
        _settle(device)
    with tempfile.TemporaryDirectory(prefix="ringfa3-") as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        found = json.loads(path.read_text())
    mine = Recording(info.rank, socket.gethostname(), read, ahead, error, found)
    everyone = exchange(gzip.compress(json.dumps(asdict(mine)).encode(), 1), control)
    return [Recording(**json.loads(gzip.decompress(data))) for data in everyone] if info.rank == 0 else []


def compare_clocks(
    group: dist.ProcessGroup | None, machine: str, clock: Callable[[], int] = time.time_ns
) -> tuple[int, int]:
    """ns by which this rank's clock is ahead of rank 0's, and by how much that may be wrong; every rank must call.

    Ranks with rank 0's machine name share its clock: (0, 0). Any other answers rank 0's timestamps, round after round;
    in the round with the quickest trip its answer lies in the middle, to half that trip.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    machines = exchange(machine.encode(), group)
    results = torch.zeros(world, 2, dtype=torch.int64)
    stamp = torch.zeros(1, dtype=torch.int64)
    for other in range(1, world):
        if machines[other] == machines[0]:
            continue
        dist.barrier(group)
        trips = []
        for _ in range(ROUNDS if rank in (0, other) else 0):
            if rank == 0:
                left = clock()
                dist.send(stamp, group=group, group_dst=other)
                dist.recv(stamp, group=group, group_src=other)
                back = clock()
                trips.append((back - left, int(stamp) - (left + back) // 2))
            else:
                dist.recv(stamp, group=group, group_src=0)
                stamp.fill_(clock())
                dist.send(stamp, group=group, group_dst=0)
        if rank == 0:
            trip, ahead = min(trips)
            results[other] = torch.tensor([ahead, trip // 2 + 1])
    dist.broadcast(results, group=group, group_src=0)
    ahead, error = results[rank].tolist()
    return ahead, error


def exchange(data: bytes, group: dist.ProcessGroup | None) -> list[bytes]:
    """Every rank's bytes, on every rank; over gloo. Nothing is unpickled."""
    size = torch.tensor([len(data)])
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    most = max(int(each) for each in sizes)
    mine = torch.zeros(max(1, most), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine, group=group)
    return [part[: int(each)].numpy().tobytes() for part, each in zip(parts, sizes, strict=True)]


def machine_id() -> str:
    """The same for processes that share a clock: one machine since its start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _call(setup: Setup, device: torch.device) -> Callable[[], None]:
    """One call of ring_attention on this rank's random shard."""
    case = Case("fwd", setup.mask, setup.D, setup.Hq, setup.Hkv, setup.seqlen, setup.ranks, setup.dtype)
    made = plan(case.visible, setup.layout, setup.seqlen, device=device)
    dtype: torch.dtype = getattr(torch, DTYPES[setup.dtype])
    torch.manual_seed(dist.get_rank())
    rows = made.positions.numel()

    def fresh(heads: int) -> Tensor:
        return torch.randn(1, rows, heads, setup.D, device=device, dtype=dtype, requires_grad=setup.backward)

    q, k, v, dout = fresh(setup.Hq), fresh(setup.Hkv), fresh(setup.Hkv), fresh(setup.Hq).detach()

    def call() -> None:
        out = ring_attention(q, k, v, plan=made, transport=setup.transport, impl=setup.impl)
        if setup.backward:
            torch.autograd.grad(out, (q, k, v), dout)

    return call


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
