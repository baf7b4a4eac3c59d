"""Ahead-of-time compilation without a GPU: what ptxas says of a kernel, and which instructions its SASS holds.

`python -m ringfa3_kernels.aot MODULE` reads a JSON list of jobs from stdin and writes one JSON line for each Build:
MODULE.compile(**job) -> Build. It runs in a process of its own because Triton decides at import whether to interpret.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

# Reported as "ptxas info: (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized ..."
SERIALISED = re.compile(r"\((C75\d\d)\)")


@dataclass(frozen=True)
class Build:
    """One compiled kernel.

    Args:
        registers: per thread.
        spills: bytes of register spill stores.
        shared: bytes of shared memory a block.
        serialised: ptxas' codes for wgmma that it serialises; empty is good.
        hgmma, hmma, ffma, tma: SASS instructions of Hopper's and of Ampere's matrix unit, of the fp32 pipe, TMA loads.
        copies: SASS instructions that copy 16 bytes a thread to shared memory, without waiting for them.
        rash: arrivals at an mbarrier by one thread, in the name of warps that no barrier has brought together before it
            since they last touched shared memory or the matrix unit; a warp that is late would be overtaken.
        seconds: compile time.
        triton: version that compiled it.
    """

    registers: int
    spills: int
    shared: int
    serialised: tuple[str, ...]
    hgmma: int
    hmma: int
    ffma: int
    tma: int
    seconds: float
    triton: str = triton.__version__
    copies: int = 0
    rash: int = 0


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: tuple[int, int],
    options: Mapping[str, Any],
    multiples: Sequence[str] = (),
) -> Build:
    """Compile a @triton.jit kernel for a CUDA capability and inspect the result.

    Args:
        types: Triton's type of each run-time argument, e.g. {"q": "*bf16", "Sq": "i32",
            "k": "tensordesc<bf16[1,64,1,128]>"}. Pointers are taken to be multiples of 16 bytes.
        constants: values of the constexpr arguments.
        options: num_warps, num_stages and the like.
        multiples: integer arguments that are multiples of 16.
    """
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    divisible = [n for n in kernel.arg_names if n in multiples or types.get(n, "").startswith("*")]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in kernel.arg_names},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[n],): [["tt.divisibility", 16]] for n in divisible},
    )
    return inspect(source, capability=capability, options=options)[0]


def inspect(source: Any, *, capability: tuple[int, int], options: Mapping[str, Any]) -> tuple[Build, dict[str, str]]:
    """Compile a source as Triton knows them (ASTSource, GluonASTSource); the build, and its "ptx" and "sass"."""
    begin = time.perf_counter()
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,
        contextlib.redirect_stdout(log),
        knobs.cache.scope(),
        knobs.nvidia.scope(),
    ):
        knobs.cache.dir = cache  # a cached kernel would come without ptxas' words
        knobs.nvidia.dump_ptxas_log = True
        target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        compiled = triton.compile(source, target=target, options=dict(options))
        sass = _disassemble(compiled.asm["cubin"], Path(cache))
    said = log.getvalue()
    found = Build(
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        spills=sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        shared=compiled.metadata.shared,
        serialised=tuple(sorted(set(SERIALISED.findall(said)))),
        hgmma=len(re.findall(r"\bHGMMA", sass)),
        hmma=len(re.findall(r"\bHMMA", sass)),
        ffma=len(re.findall(r"\bFFMA", sass)),
        tma=len(re.findall(r"\bUTMALDG", sass)),
        seconds=round(time.perf_counter() - begin, 2),
        copies=len(re.findall(r"\bLDGSTS\S*\.128", sass)),
        rash=_rash(compiled.asm["ptx"]),
    )
    return found, {"ptx": compiled.asm["ptx"], "sass": sass}


# What a thread may still have to do in shared memory, or with the matrix unit; and where others may come from.
TOUCHES = re.compile(r"(ld|st)\.shared|stmatrix|ldmatrix|wgmma\.(wait|mma)|mbarrier\.try_wait|cp\.async\.bulk|^\$L__BB")


def _rash(ptx: str) -> int:
    """See Build."""
    met, count = False, 0
    for line in ptx.splitlines():
        if re.match(r"\s*(bar|barrier)\.(warp\.)?sync", line):
            met = True
        elif re.search(r"mbarrier\.arrive\.shared", line):
            count += not met
        elif TOUCHES.search(line):
            met = False
    return count


def _disassemble(cubin: bytes, folder: Path) -> str:
    """SASS; the nvdisasm of Triton 3.9 shows only the header of what its own ptxas wrote, cuobjdump shows it all."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    for command in ([knobs.nvidia.nvdisasm.path, "-c"], [knobs.nvidia.cuobjdump.path, "-sass"]):
        text = subprocess.run([*command, path], capture_output=True, text=True, check=False).stdout
        if "/*0000*/" in text:
            return text
    raise RuntimeError("neither nvdisasm nor cuobjdump could disassemble the kernel")


def build_all(
    module: str, jobs: Sequence[Mapping[str, Any]], *, workers: int = 2, packages: Path | None = None
) -> list[Build]:
    """The Builds of MODULE.compile(**job) for every job, in order, made by `workers` processes.

    Args:
        packages: a folder of packages that come before the installed ones: another Triton.

    Raises:
        RuntimeError: a compilation failed; carries what the process said.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # interpreted kernels do not compile
    environment["PYTHONPATH"] = os.pathsep.join([*([str(packages)] if packages else []), *filter(None, sys.path)])
    shares = [list(range(i, len(jobs), workers)) for i in range(min(workers, len(jobs)))]

    def serve(share: list[int]) -> list[str]:
        asked = json.dumps([dict(jobs[i]) for i in share])
        command = [sys.executable, "-m", "ringfa3_kernels.aot", module]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment)
        if done.returncode:
            stuck = share[min(done.stdout.count("\n"), len(share) - 1)]
            raise RuntimeError(f"compiling {dict(jobs[stuck])} failed:\n{done.stderr[-4000:]}")
        return done.stdout.splitlines()

    builds: dict[int, Build] = {}
    with ThreadPoolExecutor(workers) as pool:
        for share, lines in zip(shares, pool.map(serve, shares), strict=True):
            builds |= {i: _read(line) for i, line in zip(share, lines, strict=True)}
    return [builds[i] for i in range(len(jobs))]


def _read(line: str) -> Build:
    fields = json.loads(line)
    return Build(**fields | {"serialised": tuple(fields["serialised"])})


def main() -> None:
    """Serve the jobs on stdin, as the module's docstring says."""
    module = importlib.import_module(sys.argv[1])
    for job in json.load(sys.stdin):
        print(json.dumps(asdict(module.compile(**job))), flush=True)


if __name__ == "__main__":
    main()
