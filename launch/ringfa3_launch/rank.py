"""Who this process is among the ranks (RankInfo, read from torchrun's or Slurm's environment), and joining them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # imported where it is used: it takes seconds, and `ringfa3 --help` needs none of it

# Never NVLink multicast: a program that uses it can put a host's GPUs, which others share, out of service.
SAFE_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}

# What a watch (ringfa3.watch) finds first it ends in order: RankFailed is raised. Where torch's own watchdog is first
# it must not end the process on top of that (3, its default), nor wait for a minute, to give others time for dumps,
# with a lock held that sending needs. 2: it aborts the communicator, and the process lives.
PATIENT_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250"}

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankInfo:
    """One rank's place in the world and where the ranks meet.

    Args:
        rank: 0 <= rank < world.
        world: number of ranks on all hosts.
        local_rank: 0 <= local_rank < local_world; the index of its GPU.
        local_world: number of ranks on this host.
        master_addr: host of rank 0.
        master_port: TCP port of the rendezvous there, 1..65535.
        file: path of a rendezvous file in place of address and port (ranks of one host: no port to collide on).

    Raises:
        ValueError: a field is nonsense; names it, what was wanted and what came.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    file: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def rendezvous(self) -> str:
        """The init_method of torch.distributed.init_process_group."""
        if self.file is not None:
            return f"file://{self.file}"
        host = f"[{self.master_addr}]" if ":" in self.master_addr else self.master_addr
        return f"tcp://{host}:{self.master_port}"

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> RankInfo:
        """The rank that torchrun or, where it was not used, Slurm's srun made this process.

        Args:
            env: the environment; None: this process's.

        Raises:
            ValueError: no launcher's variables are there, some are missing, or one is nonsense; names the variable.
        """
        env = os.environ if env is None else env
        if "RANK" in env or "WORLD_SIZE" in env:
            return _from_torchrun(env)
        if "SLURM_PROCID" in env:
            return _from_slurm(env)
        raise ValueError("environment: wanted torchrun's RANK or srun's SLURM_PROCID, got neither: use a launcher")


def launched(env: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun or srun started this process."""
    env = os.environ if env is None else env
    # sbatch sets SLURM_PROCID in the batch script as well; only srun's tasks have a step
    return "RANK" in env or ("SLURM_PROCID" in env and "SLURM_STEP_ID" in env)


@contextmanager
def init(info: RankInfo, *, device: str = "auto", timeout: float = 600.0, store: Any = None) -> Iterator[torch.device]:
    """Join the other ranks in the default process group; leave it when the block ends.

    Args:
        info: this rank.
        device: "cuda" (NCCL, GPU number local_rank), "cpu" (gloo), or "auto": GPUs where the machine has some.
        timeout: seconds after which a collective that some rank did not join fails.
        store: a torch.distributed store where the ranks meet, in place of info's address (rank 0 may have bound its
            port before the others were told of it).

    Yields:
        This rank's device.

    Raises:
        ValueError: device is unknown, or there are fewer GPUs than ranks on this host.
    """
    import torch
    import torch.distributed as dist

    for name, value in (SAFE_ENVIRONMENT | PATIENT_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    place = pick_device(info.local_rank, info.local_world, device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        init_method=info.rendezvous if store is None else None,
        store=None if store is None else dist.distributed_c10d.PrefixStore("default_pg", store),  # as an address's is
        rank=info.rank,
        world_size=info.world,
        timeout=timedelta(seconds=timeout),
        device_id=place if place.type == "cuda" else None,
        pg_options=nccl_options() if place.type == "cuda" else None,
    )
    try:
        yield place
    except BaseException:
        # The others may be stuck in a collective with us: an orderly NCCL shutdown would wait for them.
        if place.type == "cpu" and dist.is_initialized():
            dist.destroy_process_group()
        raise
    else:
        if dist.is_initialized():  # many training scripts end by destroying it themselves
            dist.destroy_process_group()


def nccl_options() -> Any:
    """How ranks on GPUs send: on a stream of high priority, so that messages start beside a long kernel."""
    import torch.distributed as dist

    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


def pick_device(local_rank: int, local_world: int, device: str = "auto") -> torch.device:
    """The device of one of local_world ranks on this host; see `init`."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: wanted 'auto', 'cpu' or 'cuda', got {device!r}")
    if device == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus >= local_world:
        return torch.device("cuda", local_rank)
    if device == "auto" and gpus == 0:
        return torch.device("cpu")
    raise ValueError(
        f"device: wanted a GPU for each of {local_world} ranks on this host, got {gpus} GPUs "
        "(every rank must see all of them; device 'cpu' runs CPU ranks)"
    )


def _from_torchrun(env: Mapping[str, str]) -> RankInfo:
    missing = [name for name in TORCHRUN if not env.get(name)]
    if missing:
        raise ValueError(f"{', '.join(missing)}: wanted all of torchrun's variables, got only a part of them")
    rank, world, local_rank, local_world = (_integer(name, env[name]) for name in TORCHRUN[:4])
    return _named(
        TORCHRUN, rank, world, local_rank, local_world, env["MASTER_ADDR"], _integer("MASTER_PORT", env["MASTER_PORT"])
    )


def _from_slurm(env: Mapping[str, str]) -> RankInfo:
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names[:3] if not env.get(name)]
    if missing:
        raise ValueError(f"{', '.join(missing)}: wanted all of srun's variables, got only a part of them")
    rank, world, local_rank = (_integer(name, env[name]) for name in names[:3])
    counts = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    address = env.get("MASTER_ADDR") or (first_host(nodes) if nodes else None)
    if not counts or not address:
        lacking = "SLURM_STEP_TASKS_PER_NODE" if not counts else "MASTER_ADDR or SLURM_STEP_NODELIST"
        raise ValueError(f"{lacking}: wanted srun to set it, got nothing")
    node = _integer("SLURM_NODEID", env.get("SLURM_NODEID", "0"))
    per_node = _tasks_per_node(counts)
    if not 0 <= node < len(per_node):
        raise ValueError(f"SLURM_NODEID: wanted 0..{len(per_node) - 1}, got {node}")
    # One port a job, so that two jobs which share a host do not meet each other
    chosen = str(20000 + _integer("SLURM_JOB_ID", env.get("SLURM_JOB_ID", "0")) % 20000)
    port = _integer("MASTER_PORT", env.get("MASTER_PORT") or chosen)
    return _named(names, rank, world, local_rank, per_node[node], address, port)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[007-009,12],cpu1" -> "gpu007"."""
    match = re.match(r"^([^\[\],\s]+)(?:\[(\d+)[^\]]*\]([^,\s]*))?(?:,|$)", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST: wanted a node list such as gpu[01-04], got {nodes!r}")
    return "".join(part or "" for part in match.groups())


def _tasks_per_node(counts: str) -> list[int]:
    """Slurm's "2(x3),1" -> [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: wanted counts such as 2(x3),1, got {counts!r}")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _named(
    names: tuple[str, ...], rank: int, world: int, local_rank: int, local_world: int, address: str, port: int
) -> RankInfo:
    """A RankInfo whose errors name the environment's variables."""
    try:
        return RankInfo(rank, world, local_rank, local_world, address, port)
    except ValueError as error:
        field, rest = str(error).split(":", 1)
        fields = ("rank", "world", "local_rank", "local_world", "master_addr", "master_port")
        raise ValueError(f"{names[fields.index(field)]}:{rest}") from None


def _check(info: RankInfo) -> None:
    ranges: tuple[tuple[str, int, int, int | None], ...] = (
        ("world", info.world, 1, None),
        ("rank", info.rank, 0, info.world - 1),
        ("local_world", info.local_world, 1, info.world),
        ("local_rank", info.local_rank, 0, info.local_world - 1),
        ("master_port", info.master_port, 1, 65535),
    )
    for name, value, low, high in ranges:
        if value < low or (high is not None and value > high):
            wanted = f"{low} or more" if high is None else f"{low}..{high}"
            raise ValueError(f"{name}: wanted {wanted}, got {value}")
    if not info.master_addr or re.search(r"[\s/]", info.master_addr):
        raise ValueError(f"master_addr: wanted a host name or address, got {info.master_addr!r}")


def _integer(name: str, value: str) -> int:
    if not re.fullmatch(r"[+-]?\d+", value.strip()):
        raise ValueError(f"{name}: wanted an integer, got {value!r}")
    return int(value)
