"""Compiles the fp8 forward ahead of time, as it is launched, and reads the schedule out of its SASS (no GPU needed).

`python -m ringfa3_kernels.aot ringfa3_kernels.hopper.fp8_builds` serves jobs of `compile`; builds.py says what to look
for in a build.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringfa3_kernels.aot import inspect
from ringfa3_kernels.hopper import configs, fp8_configs, fp8_launch, launch
from ringfa3_kernels.hopper.builds import HopperBuild, Job, empty, source, steps
from ringfa3_kernels.hopper.fp8 import attend_fp8
from ringfa3_kernels.quantized import BLOCK, Quantized, padded
from ringfa3_kernels.types import Partial


@dataclass(frozen=True)
class Fp8Build(HopperBuild):
    """A build, with counts of the whole kernel.

    Args:
        qgmma: matrix products on fp8.
        conversions: instructions that round two numbers to e4m3.
        operand: of a full mask without tail or softcap: for every register of the operand of P V, which registers of a
            thread's scores the key loop rounded to its four bytes.
    """

    qgmma: int = 0
    conversions: int = 0
    operand: tuple[tuple[int, ...], ...] = ()


def compile(**job: Any) -> Fp8Build:
    """Compile the kernel that such a call would launch; the options are builds.Job's, out is bf16 in mode "plain"."""
    asked = Job(**job)
    one = prepared(asked)
    build, texts = inspect(
        source(attend_fp8, one.args, fp8_launch.constants(one.config)), capability=(9, 0), options=launch.OPTIONS
    )
    if asked.keep:
        Path(asked.keep).write_text(texts["sass"])
    plain = asked.mask == "full" and not asked.softcap and asked.Sk % BLOCK == 0
    return Fp8Build(
        **vars(build),
        steps=steps(texts["sass"]),
        qgmma=len(re.findall(r"\bQGMMA", texts["sass"])),
        conversions=len(re.findall(r"\bF2FP\S*\.E4M3", texts["sass"])),
        operand=operands(texts["ptx"], configs.padded_head_dim(asked.D)) if plain else (),
    )


PACK = re.compile(r"cvt\S+ lo, (%r\d+), (%r\d+); cvt\S+ hi, (%r\d+), (%r\d+); mov\.b32 (%r\d+), \{lo, hi\}")
PRODUCT = re.compile(r"wgmma\.mma_async\S+ \{([^}]*)\}, (?:\{([^}]*)\})?")
PLAIN = re.compile(r"\s*(?:mov|ex2|fma|mul|sub|add)\.\S+\s+(%r\d+), ([^;]*);")


def operands(ptx: str, D: int) -> tuple[tuple[int, ...], ...]:
    """What `Fp8Build.operand` says: the last P V of every consumer takes what its key loop packed."""
    made: dict[str, list[tuple[int, list[str]]]] = {}  # register -> the lines that write it, and what from
    products: list[tuple[int, list[str], list[str]]] = []  # line, accumulator, operand in registers
    for i, line in enumerate(ptx.splitlines()):
        if found := PACK.search(line):
            made.setdefault(found[5], []).append((i, [found[n] for n in (2, 1, 4, 3)]))  # lowest byte first
        elif found := PRODUCT.search(line):
            products.append((i, found[1].split(","), found[2].split(",") if found[2] else []))
        elif found := PLAIN.match(line):
            made.setdefault(found[1], []).append((i, re.findall(r"%r\d+", found[2])))

    def sources(register: str, line: int) -> tuple[int, list[str]]:
        return max(x for x in made[register] if x[0] < line)

    def score(register: str, line: int, scores: dict[str, int]) -> int:
        """P = exp2(s * factor - maximum): of the registers it comes from, the one that holds s."""
        while register not in scores:
            line, origin = sources(register, line)
            known = [r for r in origin if r in scores]
            register = known[0] if known else origin[0]
        return scores[register]

    # products of a block; a consumer has QK of the first block, QK and PV of the loop, PV of the last
    qk, pv = D // 32, BLOCK // 32
    traced = []
    for first in range(0, len(products), 2 * (qk + pv)):
        scores = {register: n for n, register in enumerate(products[first + 2 * qk - 1][1])}
        for issued, _, operand in products[first + 2 * qk + pv : first + 2 * (qk + pv)]:
            for register in operand:
                at, four = sources(register, issued)
                while len(four) == 1:  # copies: out of what goes round the loop, into the operand
                    at, four = sources(four[0], at)
                traced.append(tuple(score(byte, at, scores) for byte in four))
    return tuple(traced)


def prepared(job: Job) -> fp8_launch.Fp8Launch:
    """The launch of a job, on tensors without memory."""
    q, k, v = _rows(job.Sq, job.Hq, job.D), _rows(job.Sk, job.Hkv, job.D), _keys(job.Sk, job.Hkv, job.D)
    out, lse = empty(1, job.Sq, job.Hq, job.D), empty(1, job.Hq, job.Sq)
    into = Partial(out, lse) if job.mode in ("into", "last") else None
    wide = job.mode in ("wide", "into")
    return fp8_launch.prepare(
        q,
        k,
        v,
        job.visible,
        into if into and wide else Partial(out if wide else out.bfloat16(), lse),
        into,
        scale=job.D**-0.5,
        softcap=30.0 if job.softcap else 0.0,
        counter=empty(2, of=torch.int32),
        sms=132,
        tile=job.tile(fp8_configs.TABLE),
    )


def _rows(S: int, H: int, D: int) -> Quantized:
    return Quantized(empty(1, S, H, D, of=torch.float8_e4m3fn), _scales(S, H), BLOCK, S)


def _keys(S: int, H: int, D: int) -> Quantized:
    data = empty(1, H, D, padded(S), of=torch.float8_e4m3fn)
    return Quantized(data, _scales(S, H), BLOCK, S, order="keys")


def _scales(S: int, H: int) -> Tensor:
    return empty(1, H, padded(S) // BLOCK)
