"""Compiles the decode kernels ahead of time as they are launched, for ringfa3_kernels.aot."""

from __future__ import annotations

from typing import Any

import torch

from ringfa3_kernels.aot import Build, build
from ringfa3_kernels.portable.builds import TRITON_TYPE
from ringfa3_kernels.portable.configs import CAPABILITY, DecodeConfig, pick_decode
from ringfa3_kernels.portable.decode import combine_kernel, decode_kernel
from ringfa3_kernels.portable.decode_launch import combine_constants, constants, rows_of_tile
from ringfa3_kernels.portable.launch import options


def compile(
    kernel: str,
    head_dim: int,
    dtype: str,
    family: str,
    *,
    page: int = 64,
    rows: int = 4,
    batch: int = 1,
    softcap: bool = False,
    whole: bool = False,
    aligned: bool = True,
    far: bool = False,
    config: dict[str, Any] | None = None,
) -> Build:
    """Compile one kernel as `decode_launch` would launch it.

    Args:
        kernel: "decode" or "combine", which takes head_dim, family, rows (here of out: all sequences' rows times
            heads) and batch only.
        dtype: name of the inputs' torch dtype.
        family: row of the config table, which fixes the capability.
        rows: query rows times heads of a group.
        batch: sequences.
        whole: each sequence is one piece.
        aligned: strides and pointers are multiples of 16 bytes.
        far: keys of a page lie so far apart that a tile spans 2^31 elements.
        config: fields of a DecodeConfig in place of the table's.
    """
    inputs = getattr(torch, dtype)
    chosen = DecodeConfig(**config) if config else pick_decode(head_dim, inputs, CAPABILITY[family], rows)
    if kernel == "combine":
        return build(
            combine_kernel,
            _types(combine_kernel, "fp32"),
            combine_constants(head_dim, chosen.block_n, rows, batch),
            capability=CAPABILITY[family],
            options={"num_warps": 4, "num_stages": 3},  # Triton's own
        )
    unit = 16 // inputs.itemsize if aligned else 1
    block_m = rows_of_tile(chosen, rows)
    return build(
        decode_kernel,
        _types(decode_kernel, TRITON_TYPE[inputs]),
        constants(chosen, head_dim, page, unit, 30.0 if softcap else 0.0, block_m, batch, whole=whole, far=far),
        capability=CAPABILITY[family],
        options=options(chosen),
    )


def _types(kernel: Any, element: str) -> dict[str, str]:
    """Triton's type of every run-time argument of a kernel."""
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("q", "k", "v"), f"*{element}")
    types |= dict.fromkeys(("table", "lo", "hi"), "*i32")
    types |= dict.fromkeys(("parts", "parts_lse", "out", "lse"), "*fp32")
    return types | dict.fromkeys(("to_log2", "cap"), "fp32")
