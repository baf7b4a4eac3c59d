"""Compiles the Hopper backward ahead of time, as it is launched, and reads the order of things out of its SASS.

`python -m ringfa3_kernels.aot ringfa3_kernels.hopper.backward_builds` serves jobs of `compile`. What to look for in a
build: no spills, no C75xx (serialised wgmma), exps while products are in flight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ringfa3_kernels.aot import Build
from ringfa3_kernels.hopper import backward_launch, configs
from ringfa3_kernels.hopper.backward import attend_backward
from ringfa3_kernels.hopper.builds import Job, empty, instructions, source


@dataclass(frozen=True)
class BackwardStep:
    """The loop over row blocks of one consumer warpgroup, in SASS instructions (the mask's branch included).

    Args:
        instructions: all.
        spills: loads and stores of spilled registers.
        prmt: byte permutes: 16-bit operands packed again because the loop carries them in pieces.
        hgmma: matrix instructions.
        flow: the order of what matters: M n (matrix instructions), W n (wait until n are in flight), E n (exps),
            S n (shared-memory stores), B (named barrier), R (TMA reduction).
    """

    instructions: int
    spills: int
    prmt: int
    hgmma: int
    flow: str


@dataclass(frozen=True)
class BackwardBuild(Build):
    """A build and the schedule of its consumers, one step a warpgroup."""

    steps: tuple[BackwardStep, ...] = ()


def compile(**job: Any) -> BackwardBuild:
    """Compile the kernel that such a call would launch; the options are `builds.Job`'s."""
    asked = Job(**job)
    one = _launch(asked)
    build, sass = asked.inspect(source(attend_backward, one.args, backward_launch.constants(one.config)))
    return BackwardBuild(**vars(build), steps=steps(sass))


def steps(sass: str) -> tuple[BackwardStep, ...]:
    """The innermost loops that hold matrix instructions, in a disassembly.

    Only conditional branches close a loop: unconditional ones lead back from the retries of a wait.
    """
    code, labels = instructions(sass)
    loops = []
    for i, (_, text) in enumerate(code):
        found = re.match(r"@!?U?P\d+ BRA\S* .*?(?:`\((\S+)\)|0x([0-9a-f]+))", text)
        start = labels.get(found[1] or int(found[2], 16)) if found else None
        if start is not None and start < i:
            body = [line for _, line in code[start : i + 1]]
            if any("HGMMA" in x for x in body):
                loops.append((start, i + 1))
    inner = [x for x in loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return tuple(_step([text for _, text in code[a:b]]) for a, b in inner)


MARKS = (
    ("M", r"\bHGMMA"),
    ("E", r"MUFU\.(EX2|TANH)"),
    ("S", r"\b(STS|STSM)\b"),
    ("B", r"\bBAR\.(SYNC|ARV)"),
    ("R", r"UTMAREDG|UTMASTG"),
)


def _step(body: Sequence[str]) -> BackwardStep:
    flow: list[list[Any]] = []
    for line in body:
        wait = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line)
        mark = f"W{wait[1]}" if wait else next((name for name, x in MARKS if re.search(x, line)), None)
        if mark and flow and flow[-1][0] == mark and not wait:
            flow[-1][1] += 1
        elif mark:
            flow.append([mark, 1])

    def count(pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in body)

    words = " ".join(name if n == 1 else f"{name}*{n}" for name, n in flow)
    return BackwardStep(len(body), count(r"\b(STL|LDL)\b"), count("PRMT"), count("HGMMA"), words)


def _launch(job: Job) -> backward_launch.BackwardLaunch:
    q, k = job.queries, job.keys
    row = empty(1, job.Hq, job.Sq)
    grad = k.float() if job.mode in ("wide", "add") else k
    return backward_launch.prepare(
        q,
        q,
        k,
        k,
        row,
        row,
        job.visible,
        dq=None if job.mode == "keys" else q.float(),
        dk=grad,
        dv=grad,
        accumulate=job.mode == "add",
        scale=job.D**-0.5,
        softcap=30.0 if job.softcap else 0.0,
        tile=job.tile(configs.BACKWARD_TABLE),
    )
