"""Compiles the portable fp8 kernels ahead of time as they are launched, for ringfa3_kernels.aot."""

from __future__ import annotations

from typing import Any

import torch

from ringfa3_kernels.aot import Build, build
from ringfa3_kernels.portable import launch, quantize
from ringfa3_kernels.portable.builds import TRITON_TYPE
from ringfa3_kernels.portable.configs import padded
from ringfa3_kernels.portable.quantized_forward import quantized_forward_kernel
from ringfa3_kernels.portable.quantized_launch import TABLE

FP8 = {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}


def compile(
    kernel: str, head_dim: int, capability: tuple[int, int], wanted: str = "float8_e4m3fn", **rest: Any
) -> Build:
    """Compile one kernel for a head_dim and capability.

    Args:
        kernel: "quantize" or "forward".
        wanted: name of the fp8 dtype.
        rest: options of `_quantize` or `_forward`.
    """
    given = head_dim, (capability[0], capability[1]), getattr(torch, wanted)
    return _forward(*given, **rest) if kernel == "forward" else _quantize(*given, **rest)


def _quantize(
    head_dim: int,
    capability: tuple[int, int],
    wanted: torch.dtype,
    dtype: str = "bfloat16",
    pair: bool = True,
    rotate: bool = False,
    keys: bool = False,
    step: str = "block",
) -> Build:
    """The quantising kernel: `pair` is k and v, not q; `keys`: v is written in "keys" order."""
    types = dict.fromkeys(quantize.quantize_kernel.arg_names, "i32")
    types |= dict.fromkeys(("x", "y"), f"*{TRITON_TYPE[getattr(torch, dtype)]}")
    types |= dict.fromkeys(("x_data", "y_data"), "*u8")
    types |= dict.fromkeys(("x_scale", "y_scale", "x_amax", "y_amax"), "*fp32") | {"factor": "fp32"}
    fixed = quantize.constants(head_dim, wanted, pair=pair, rotate=rotate, keys=keys)
    # strides as of contiguous tensors, which Triton compiles a kernel of its own for
    return build(
        quantize.quantize_kernel,
        types,
        fixed | {"STEP": step, "INTERPRETED": False, "x_d": 1, "y_d": 1},
        capability=capability,
        options=quantize.options(head_dim),
        multiples=("x_b", "x_s", "x_h", "y_b", "y_s", "y_h"),
    )


def _forward(
    head_dim: int, capability: tuple[int, int], wanted: torch.dtype, softcap: bool = False, continues: bool = True
) -> Build:
    """The forward, out in fp32."""
    types = dict.fromkeys(quantized_forward_kernel.arg_names, "i32")
    types |= dict.fromkeys(("q", "k", "v"), f"*{FP8[wanted]}") | dict.fromkeys(("lo", "hi", "bounds"), "*i32")
    types |= dict.fromkeys(("q_scale", "k_scale", "v_scale", "out", "lse", "out_in", "lse_in"), "*fp32")
    types |= dict.fromkeys(("to_log2", "cap"), "fp32")
    tile = TABLE[padded(head_dim)]
    return build(
        quantized_forward_kernel,
        types,
        launch.constants(tile, head_dim, False, 16, 30.0 if softcap else 0.0)
        | {"INTO": continues, "INTERPRETED": False},
        capability=capability,
        options=launch.options(tile),
    )
