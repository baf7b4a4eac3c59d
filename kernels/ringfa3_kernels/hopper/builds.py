"""Compiles the Hopper forward ahead of time, as it is launched, and reads the schedule out of its SASS (no GPU needed).

`python -m ringfa3_kernels.aot ringfa3_kernels.hopper.builds` serves jobs of `compile`. What to look for in a build:
no spills, no C75xx (serialised wgmma), and in every step the softmax between the issue of P V and the wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringfa3_kernels.aot import Build, inspect
from ringfa3_kernels.hopper import configs, launch
from ringfa3_kernels.hopper.forward import attend_forward
from ringfa3_kernels.types import Partial, Visible

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
NAMES[torch.float8_e4m3fn] = "fp8e4nv"
QK_WAIT, PV_WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@dataclass(frozen=True)
class Step:
    """The key loop of one consumer warpgroup, in SASS instructions of its whole body (the mask's branch included).

    Args:
        instructions: all.
        spills: loads and stores of spilled registers.
        prmt: byte permutes: bf16 P packed again because the loop carries it in pieces.
        maxima: FMNMX of the row maximum while P V is in flight (before its wait).
        exps: MUFU while P V is in flight, before its wait.
    """

    instructions: int
    spills: int
    prmt: int
    maxima: int
    exps: int


@dataclass(frozen=True)
class HopperBuild(Build):
    """A build and the schedule of its consumers, one Step a warpgroup."""

    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Job:
    """A call whose kernel is compiled, on tensors without memory, B = 1.

    Args:
        mask: kind of Visible.
        mode: of the forward "plain" (out in the inputs' dtype), "wide" (fp32), "into" (continues a fp32 state), "last"
            (continues one, writes the inputs' dtype). Of the backward "plain" (dk, dv in the inputs' dtype), "wide"
            (stored in fp32), "add" (added to fp32), "keys" (plain, and dq left out).
        dtype: of q, k and v, torch's name.
        change: fields of the table's tile to try in another way.
        keep: a file to write the SASS to.
    """

    D: int
    mask: str
    mode: str = "plain"
    dtype: str = "bfloat16"
    softcap: bool = False
    Sq: int = 8192
    Sk: int = 8192
    Hq: int = 8
    Hkv: int = 8
    change: dict[str, Any] | None = None
    keep: str | None = None

    @property
    def visible(self) -> Visible:
        """Causal but where the mask is full; told as intervals where it is that."""
        if self.mask == "full":
            return Visible.full(self.Sq, self.Sk, "meta")
        causal = Visible.causal(self.Sq, self.Sk, "meta")
        return Visible(causal.lo, causal.hi) if self.mask == "intervals" else causal

    @property
    def queries(self) -> Tensor:
        """[1, Sq, Hq, D]; the outputs look like it."""
        return empty(1, self.Sq, self.Hq, self.D, of=getattr(torch, self.dtype))

    @property
    def keys(self) -> Tensor:
        """[1, Sk, Hkv, D]; the values look like them."""
        return empty(1, self.Sk, self.Hkv, self.D, of=getattr(torch, self.dtype))

    def tile(self, table: Mapping[tuple[int, int], Any]) -> Any:
        """The table's row for this call, changed as asked; None: as it is."""
        row = table[configs.padded_head_dim(self.D), launch.MASKS[self.visible.kind]]
        return replace(row, **self.change) if self.change else None

    def inspect(self, kernel: GluonASTSource) -> tuple[Build, str]:
        """The build and its SASS, which is kept where that was asked for."""
        build, texts = inspect(kernel, capability=(9, 0), options=launch.OPTIONS)
        if self.keep:
            Path(self.keep).write_text(texts["sass"])
        return build, texts["sass"]


def compile(**job: Any) -> HopperBuild:
    """Compile the kernel that such a call would launch; the options are Job's."""
    asked = Job(**job)
    one = _launch(asked)
    build, sass = asked.inspect(source(attend_forward, one.args, launch.constants(one.config)))
    return HopperBuild(**vars(build), steps=steps(sass))


def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=of, device="meta")


def source(kernel: Any, args: Sequence[Any], constants: Any) -> GluonASTSource:
    """What a launch of a Gluon kernel would compile: types as Triton would take them from the arguments.

    Args:
        args: of the launch; tensors may be without memory.
        constants: the kernel's last argument, C.
    """
    signature: dict[str, str] = {}
    attrs: dict[tuple[int], Any] = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, Tensor):
            signature[name] = "*" + NAMES[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    signature["C"] = "constexpr"
    return GluonASTSource(kernel, signature, {(len(args),): constants}, attrs)


def steps(sass: str) -> tuple[Step, ...]:
    """The key loops found in a disassembly: the innermost one around every wait for QK alone."""
    code, labels = instructions(sass)
    loops = []
    for i, (_, text) in enumerate(code):
        found = re.match(r"(?:@!?U?P\d+ )?BRA\S* .*?(?:`\((\S+)\)|0x([0-9a-f]+))", text)
        start = labels.get(found[1] or int(found[2], 16)) if found else None
        if start is not None and start < i:
            loops.append((start, i + 1))
    waits = [i for i, (_, text) in enumerate(code) if QK_WAIT in text]
    around = [min((x for x in loops if x[0] <= i < x[1]), key=lambda x: x[1] - x[0]) for i in waits]
    return tuple(_step([text for _, text in code[a:b]]) for a, b in around)


def _step(body: Sequence[str]) -> Step:
    def count(pattern: str, lines: Sequence[str]) -> int:
        return sum(re.search(pattern, line) is not None for line in lines)

    issued = next(i for i, line in enumerate(body) if QK_WAIT in line)
    waited = next(i for i, line in enumerate(body) if PV_WAIT in line and i > issued)
    flight = body[issued:waited]
    return Step(
        len(body),
        count(r"\b(STL|LDL)\b", body),
        count("PRMT", body),
        count("FMNMX", flight),
        count(r"MUFU\.EX2", flight),
    )


def instructions(sass: str) -> tuple[list[tuple[int, str]], dict[str | int, int]]:
    """(address, text) of every instruction, and the index that a label or an address stands for."""
    code: list[tuple[int, str]] = []
    labels: dict[str | int, int] = {}
    for line in sass.splitlines():
        found = re.match(r"\s*/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line)
        if found:
            labels[int(found[1], 16)] = len(code)
            code.append((int(found[1], 16), found[2]))
        elif line.startswith(".L_x"):
            labels[line.strip().rstrip(":")] = len(code)
    return code, labels


def _launch(job: Job) -> launch.Launch:
    q, k = job.queries, job.keys
    row = empty(1, job.Hq, job.Sq)
    into = Partial(q.float(), row) if job.mode in ("into", "last") else None
    wide = job.mode in ("wide", "into")
    return launch.prepare(
        q,
        k,
        k,
        job.visible,
        into if into and wide else Partial(q.float() if wide else q, row),
        into,
        scale=job.D**-0.5,
        softcap=30.0 if job.softcap else 0.0,
        counter=empty(2, of=torch.int32),
        sms=132,
        tile=job.tile(configs.TABLE),
    )
