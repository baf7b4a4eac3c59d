"""What this machine is and has installed, as findings that `doctor` prints and benchmarks record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringfa3_launch.local import cores
from ringfa3_launch.rank import SAFE_ENVIRONMENT

# What of the environment says how ranks talk and what they run on
COMMUNICATION = ("NCCL_", "TORCH_NCCL_", "GLOO_", "NVSHMEM_", "TORCH_SYMM_MEM_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_")


@dataclass(frozen=True)
class Finding:
    """One fact, and what it means.

    Args:
        section, name: where it belongs.
        value: the fact, as JSON may hold it.
        status: "plain", "ok", "note" (works, but you may want to know) or "broken".
        detail: what follows from it, in words.
    """

    section: str
    name: str
    value: Any
    status: str = "plain"
    detail: str = ""


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> list[Finding]:
    """Python, ringfa3, torch and its Triton, numpy, and CUDA's libraries."""
    found = [
        Finding("versions", "python", platform.python_version()),
        _installed("ringfa3", "not installed as a package: it runs from the source roots"),
    ]
    try:
        import torch
    except Exception as error:  # a broken install raises anything from ImportError to OSError
        return [*found, Finding("versions", "torch", None, "broken", f"cannot be imported: {error}")]
    too_old = numbers(torch.__version__) < (2, 11)
    found.append(
        Finding("versions", "torch", str(torch.__version__), *(("broken", "wanted 2.11 or newer") if too_old else ()))
    )
    found += [triton_pair(version("triton"), importlib.metadata.requires("torch") or []), _numpy()]
    for extra, what in (("rich", "coloured output"), ("matplotlib", "plots"), ("transformers", "demo")):
        found.append(_installed(extra, f"not installed; {what} needs it"))
    if torch.cuda.is_available():
        found += [
            Finding("versions", "cuda", torch.version.cuda),
            Finding("versions", "driver", _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")),
            Finding("versions", "nccl", ".".join(map(str, torch.cuda.nccl.version()))),
            Finding("versions", "cudnn", torch.backends.cudnn.version()),
        ]
    return found


def triton_pair(triton: str | None, requirements: list[str]) -> Finding:
    """The Triton found, and whether it is the one that torch pins.

    Args:
        triton: the installed version, or None.
        requirements: torch's, as importlib.metadata gives them.
    """
    pins = (re.match(r"(?:pytorch-)?triton\s*\(?==\s*([\w.+]+)", line) for line in requirements)
    pin = next((match[1] for match in pins if match), None)
    pinned = f"torch pins {pin}" if pin else "torch pins none (a CPU build)"
    if triton is None:
        return Finding("versions", "triton", None, "note", f"not installed; {pinned}; impl 'portable' needs it")
    if numbers(triton) < (3, 6):
        return Finding("versions", "triton", triton, "broken", f"wanted 3.6 or newer; {pinned}")
    if pin is not None and numbers(pin) != numbers(triton):
        return Finding("versions", "triton", triton, "note", f"{pinned}, not this: torch.compile may break")
    return Finding("versions", "triton", triton, "plain", f"{pinned}{': the pair found' if pin else ''}")


def devices() -> list[Finding]:
    """CPU cores and memory, and each GPU with its capability, memory and fp8."""
    import torch

    found = [
        Finding("devices", "cpu", {"cores": cores(), "memory_gib": memory_gib()}, detail=cpu_name()),
    ]
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
        found.append(Finding("devices", "gpus", 0, "note", f"no NVIDIA GPU: CPU ranks over gloo ({reason})"))
        return found
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        facts = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "multiprocessors": gpu.multi_processor_count,
            "fp8": (gpu.major, gpu.minor) >= (8, 9),
        }
        old = (gpu.major, gpu.minor) < (8, 0)
        detail = "impl 'portable' wants capability 8.0 or newer" if old else ""
        found.append(Finding("devices", f"gpu {i}", facts, "note" if old else "plain", detail))
    return found


def links(*, megabytes: int = 256) -> list[Finding]:
    """Which GPUs reach each other's memory, how they are wired, and the bandwidth of copies between them."""
    import torch

    n = torch.cuda.device_count()
    if n < 2:
        return []
    peer = [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(n)] for i in range(n)]
    apart = [f"{i}-{j}" for i in range(n) for j in range(n) if not peer[i][j]]
    pairs = {(i, j): round(copy_bandwidth(i, j, megabytes=megabytes), 1) for i in range(n) for j in range(n) if i != j}
    speeds = [[pairs.get((i, j)) for j in range(n)] for i in range(n)]
    measured = list(pairs.values())
    return [
        Finding(
            "links", "peer access", peer, "note" if apart else "ok",
            f"none between {', '.join(apart)}: copies pass through the host" if apart else "every pair of GPUs",
        ),
        Finding(
            "links", "copy GB/s", speeds, "plain",
            f"{min(measured):.0f}..{max(measured):.0f} GB/s a direction, copy engine, {megabytes} MiB",
        ),
        Finding("links", "topology", _nvidia_smi("topo", "-m"), "plain", "nvidia-smi topo -m"),
    ]  # fmt: skip


def mapped() -> int:
    """How many GPUs there are, if each can map the memory of every other; else 1."""
    import torch

    n = torch.cuda.device_count()
    pairs = ((i, j) for i in range(n) for j in range(n) if i != j)
    return n if all(torch.cuda.can_device_access_peer(i, j) for i, j in pairs) else 1


def copy_bandwidth(source: int, target: int, *, megabytes: int = 256, repeats: int = 10) -> float:
    """GB/s of a copy from one GPU's memory to another's, by the copy engine; the best of three timings."""
    import torch

    there = torch.zeros(megabytes << 20, dtype=torch.uint8, device=f"cuda:{target}")
    here = torch.randint(256, (megabytes << 20,), dtype=torch.uint8, device=f"cuda:{source}")
    there.copy_(here)  # the first copy turns peer access on
    best = float("inf")
    with torch.cuda.device(source):
        for _ in range(3):
            torch.cuda.synchronize(target)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                there.copy_(here, non_blocking=True)
            stop.record()
            stop.synchronize()
            best = min(best, start.elapsed_time(stop) / 1e3 / repeats)
    return here.numel() / best / 1e9


def communication(env: Mapping[str, str] | None = None) -> list[Finding]:
    """What the environment tells NCCL, gloo and NVSHMEM; above all whether NVLink multicast is off."""
    env = os.environ if env is None else env
    found = []
    for name, off in SAFE_ENVIRONMENT.items():
        value = env.get(name)
        if value is None:
            finding = Finding("communication", name, None, "ok", f"unset here; our launchers set {off} in every rank")
        elif value == off:
            finding = Finding("communication", name, value, "ok", "NVLink multicast is off")
        else:
            finding = Finding("communication", name, value, "note", f"may use NVLink multicast: set it to {off}")
        found.append(finding)
    for name in sorted(env):
        if name.startswith(COMMUNICATION) and name not in SAFE_ENVIRONMENT:
            found.append(Finding("communication", name, env[name]))
    return found


def device_name(device: str, ranks: int = 1) -> str:
    """What a benchmark's figures belong to: "2 x NVIDIA H200", or "2 CPU ranks on 16 cores of AMD EPYC".

    Args:
        device: "cuda" or "cpu".
        ranks: how many.
    """
    import torch

    if device == "cuda":
        name = torch.cuda.get_device_name(0)
        return name if ranks == 1 else f"{ranks} x {name}"
    return f"{ranks} CPU rank{'s' if ranks > 1 else ''} on {cores()} cores of {cpu_name()}"


def version_table() -> dict[str, str]:
    """Name -> version of what a benchmark's figures depend on."""
    names = ("python", "ringfa3", "torch", "triton", "cuda", "driver", "nccl", "cudnn")
    return {finding.name: str(finding.value) for finding in versions() if finding.name in names and finding.value}


def cpu_name() -> str:
    """The processor's model."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def memory_gib() -> float:
    """Physical memory, GiB."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def numbers(text: str) -> tuple[int, ...]:
    """The release numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _numpy() -> Finding:
    numpy, triton = version("numpy"), version("triton")
    interpreted = triton is not None and numbers(triton)[:2] == (3, 6)
    if numpy is None:
        return Finding("versions", "numpy", None, "broken", "not installed")
    if interpreted and numbers(numpy) >= (2, 4):
        return Finding(
            "versions", "numpy", numpy, "note", "TRITON_INTERPRET=1 on Triton 3.6 needs numpy < 2.4; nothing else does"
        )
    return Finding("versions", "numpy", numpy, "plain", "Triton 3.6's interpreter works with it" if interpreted else "")


def _installed(package: str, otherwise: str) -> Finding:
    found = version(package)
    return Finding("versions", package, found, "plain" if found else "note", "" if found else otherwise)


def _nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi answers (of several equal lines, one), or None where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.rstrip().splitlines()
    return lines[0] if len(set(lines)) == 1 else "\n".join(lines)
