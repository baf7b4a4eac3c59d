"""Compiles the portable kernels ahead of time as they are launched, for ringfa3_kernels.aot."""

from __future__ import annotations

from typing import Any

import torch

from ringfa3_kernels.aot import Build, build
from ringfa3_kernels.portable.backward import key_gradient_kernel, query_gradient_kernel
from ringfa3_kernels.portable.configs import CAPABILITY, TileConfig, padded, pick
from ringfa3_kernels.portable.forward import forward_kernel
from ringfa3_kernels.portable.launch import constants, options
from ringfa3_kernels.portable.positional import ABSENT

KERNELS: dict[str, Any] = {"forward": forward_kernel, "keys": key_gradient_kernel, "queries": query_gradient_kernel}
MOVING = {"forward": ("k", "v"), "keys": ("q", "dout"), "queries": ("k", "v")}  # tiles that change from step to step
POSITIONS = ("q_pos", "k_pos", "q_pos_b", "k_pos_b")  # arguments for both of the next
ALIBI = ("slopes", "slopes_b")
DROPOUT = ("seed_low", "seed_high", "threshold", "rescale", "first_head", "first_row")
TRITON_TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile(
    kernel: str,
    head_dim: int,
    dtype: str,
    family: str,
    softcap: bool = False,
    continues: bool = True,
    tma: bool | None = None,
    wide_out: bool = True,
    config: dict[str, Any] | None = None,
    alibi: bool = False,
    dropout: bool = False,
) -> Build:
    """Compile one kernel as `launch` would launch it.

    Args:
        kernel: "forward", "keys" or "queries".
        dtype: name of the inputs' torch dtype.
        family: row of the config table, which fixes the capability.
        continues: into= (forward) or accumulate=True (backward).
        tma: False for what is launched where strides do not allow TMA.
        wide_out: outputs are fp32, not the inputs' dtype.
        config: fields of a TileConfig in place of the table's.
        alibi, dropout: with slopes, with dropout.
    """
    inputs = getattr(torch, dtype)
    tile = TileConfig(**config) if config else pick(kernel, head_dim, inputs, CAPABILITY[family], alibi or dropout)
    by_tma = tile.tma if tma is None else tma
    unit = 16 // inputs.itemsize
    flag = {"INTO" if kernel == "forward" else "ACCUMULATE": continues}
    given = {*(POSITIONS if alibi or dropout else ()), *(ALIBI if alibi else ()), *(DROPOUT if dropout else ())}
    absent = {name: None for name in ABSENT if name not in given}
    types = _types(kernel, head_dim, inputs, tile, by_tma, torch.float32 if wide_out else inputs)
    return build(
        KERNELS[kernel],
        {name: kind for name, kind in types.items() if name not in absent},
        constants(tile, head_dim, by_tma, unit, 30.0 if softcap else 0.0) | flag | absent,
        capability=CAPABILITY[family],
        options=options(tile),
    )


def _types(
    kernel: str, head_dim: int, inputs: torch.dtype, tile: TileConfig, tma: bool, out: torch.dtype
) -> dict[str, str]:
    """Triton's type of every run-time argument of a kernel."""
    element = TRITON_TYPE[inputs]
    rows = tile.block_m if kernel == "keys" else tile.block_n
    descriptor = f"tensordesc<{element}[1,{rows},1,{padded(head_dim)}]>"
    types = dict.fromkeys(KERNELS[kernel].arg_names, "i32")
    types |= dict.fromkeys(("q", "dout", "k", "v"), f"*{element}")
    types |= dict.fromkeys(("lo", "hi", "bounds", "q_pos", "k_pos"), "*i32")
    types |= dict.fromkeys(("lse", "delta", "out_in", "lse_in", "slopes"), "*fp32")
    types |= dict.fromkeys(("out", "dq", "dk", "dv"), f"*{TRITON_TYPE[out]}")
    types |= dict.fromkeys(("to_log2", "cap", "scale", "rescale"), "fp32")
    return types | dict.fromkeys(MOVING[kernel], descriptor) if tma else types
