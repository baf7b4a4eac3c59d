"""Fp8: attention whose keys, values and queries are 8 bits wide, in the kernels and between the ranks.

Each rank quantises its shard of k and v once; data and scales travel as one cargo, about half the bytes of bf16, and no
rank rounds anything again. q is quantised once a call. The Partial between hops stays fp32.

Scales stand for blocks of 128 keys, counted from a shard's first. A hop's slice therefore begins and ends at a block
(`Plan.aligned`), and what its rows see of it moves along. Where heads are traded (Ulysses), ranks round what they have
after the exchange, which itself is as wide as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ringfa3.plan import Hop, Plan
from ringfa3.transport import Transport
from ringfa3.transport.cargo import Along, Cargo, Tensors
from ringfa3_kernels import (
    Quantized,
    Unsupported,
    attend,
    dequantize,
    dispatch,
    quantize,
    quantize_keys,
    quantize_queries,
)
from ringfa3_kernels.call import Call
from ringfa3_kernels.door import own_precision
from ringfa3_kernels.quantized import BLOCK, Order, unsupported_device

Gradients = Literal["exact", "rounded"]

ROWS = Along(dim=1)
COLUMNS = Along(dim=3, keys=BLOCK, indices=BLOCK)  # v in order "keys": [B, H, D, n], n rounded up to a block
SCALES = {BLOCK: Along(dim=2, keys=BLOCK), 0: Along(indices=0)}  # by block; 0: one of a whole head


@dataclass(frozen=True)
class Fp8:
    """How `ring_attention(fp8=...)` rounds q, k and v to e4m3.

    On Hopper GPUs a head_dim above 128 takes `portable`, which multiplies in 16 bits: bf16 without fp8 is faster there.

    Args:
        block: keys, and rows of q, that share a scale in one head: 128; or 0: all that a rank holds.
        rotate: multiply the rows of q and k by one random orthogonal matrix first, which spreads outliers over the row;
            see `ringfa3_kernels.quantize_queries`. False, True or a seed; the head_dim must be a power of two.
        gradients: "exact": those of the call without fp8. The backward pass computes out and lse anew from q, k and v
            as they came, at the price of another forward pass in their dtype, and goes on as ever. The fp8 forward's
            own lse would not do: by it, probabilities recomputed from unrounded scores do not sum to 1, and errors of
            gradients have no bound (dv's was 3.9 times dv where scores were large: docs/results/fp8_ranks.md). What
            `sink_logits` make of out and lse afterwards is differentiated where the fp8 forward was.
            "rounded": those of attention at the rounded q, k and v, passed straight through the rounding. No further
            forward pass; their error is of the size of the forward's, 5% for normal inputs.

    Raises:
        ValueError: an option is wrong; names it, what was wanted and what came.
    """

    block: int = BLOCK
    rotate: bool | int = False
    gradients: Gradients = "exact"

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or self.block not in SCALES:
            raise ValueError(f"Fp8 block: wanted {BLOCK}, or 0 for one scale a head, got {self.block!r}")
        if not isinstance(self.rotate, int) or not 0 <= self.rotate < 2**31:
            raise ValueError(f"Fp8 rotate: wanted False, True or a seed from 0 to 2^31 - 1, got {self.rotate!r}")
        if self.gradients not in get_args(Gradients):
            raise ValueError(f"Fp8 gradients: wanted 'exact' or 'rounded', got {self.gradients!r}")


def quantized_hops(
    transport: Transport, plan: Plan, q: Tensor, k: Tensor, v: Tensor, fp8: Fp8, order: Order
) -> tuple[Quantized, Iterator[tuple[Hop, tuple[Quantized, Quantized]]]]:
    """q as the kernels want it, and what `Transport.rotate` yields, quantised.

    Args:
        order: from `served_order`, the same on every rank.
    """
    queries = quantize_queries(q, block=fp8.block, rotate=fp8.rotate)
    keys, values = quantize_keys(k, v, block=fp8.block, rotate=fp8.rotate, v_order=order)
    cargo = Cargo(
        (keys.data, values.data, keys.scale, values.scale),
        (ROWS, ROWS if order == "rows" else COLUMNS, *(SCALES[fp8.block],) * 2),
    )
    rotation = transport.rotate(cargo, plan.aligned(BLOCK))
    return queries, ((hop, _received(came, hop, keys, values)) for hop, came in rotation)


def rounded(q: Tensor, k: Tensor, v: Tensor, fp8: Fp8) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels read in place of q, k and v, in their dtype; q and k rotated, where they are."""
    read = quantize(q, k, v, block=fp8.block, rotate=fp8.rotate)
    a, b, c = (dequantize(x, q.dtype) for x in read)
    return a, b, c


def rotated_back(x: Tensor, fp8: Fp8) -> Tensor:
    """The gradient [B, S, H, D] of what `rounded` made of q or k as that of q or k itself."""
    if fp8.rotate is False:
        return x
    D = x.shape[3]
    one = torch.eye(D, device=x.device).view(1, D, 1, D)  # rotated its elements are 1 and -1: nothing is rounded
    turn = dequantize(quantize_queries(one, rotate=fp8.rotate))[0, :, 0]
    with own_precision(x):
        return (x.float() @ turn.T).to(x.dtype)


def check_fp8(q: Tensor, fp8: object) -> None:
    """Raise unless q can be rounded so.

    Raises:
        ValueError: fp8 is not an Fp8, or q has a dtype that cannot be rounded.
    """
    if not isinstance(fp8, Fp8):
        raise ValueError(f"fp8: wanted an Fp8 or None, got {fp8!r}")
    if q.dtype == torch.float64:
        raise ValueError(f"q: wanted dtype bfloat16, float16 or float32 beside fp8, got {q.dtype}")


@lru_cache(maxsize=256, typed=True)  # rotate=1 is not rotate=True
def served_order(
    Hq: int,
    Hkv: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    softcap: bool,
    impl: str,
    block: int,
    rotate: bool | int,
) -> Order:
    """How v has to lie in memory, so that the first of the implementations that serve such a call either way does.

    Raises:
        Unsupported: the named implementation, or every one, lacks something this call needs.
        ValueError: no implementation has that name.
    """
    q, k = (torch.empty(1, 0, H, D, dtype=dtype, device=device) for H in (Hq, Hkv))
    order = _preferred(q, k, softcap, impl, block)
    empty = quantize(q, k, k, block=block, rotate=rotate, v_order=order)
    cap = 1.0 if softcap else 0.0
    state = attend(*empty, softcap=cap, impl=impl)
    attend(*empty, softcap=cap, into=state, out_dtype=dtype, impl=impl)
    return order


def _preferred(q: Tensor, k: Tensor, softcap: bool, impl: str, block: int) -> Order:
    if unsupported_device(q.device) is not None:  # `quantize` says so
        return "rows"
    call = Call(
        direction="forward", device=q.device.type, capability=dispatch.capability(q.device), dtype=torch.float8_e4m3fn,
        B=1, Sq=BLOCK, Sk=BLOCK, Hq=q.shape[2], Hkv=k.shape[2], D=q.shape[3], batched_visible=False, softcap=softcap,
        into=True, out_dtype=q.dtype, accumulate=False, deterministic=False, aligned=q.shape[3] % 16 == 0,
        blocks=(block,) * 3,
    )  # fmt: skip
    served: dict[Order, str] = {}
    for order in get_args(Order):
        with suppress(Unsupported):  # of both orders: `attend` says so
            served[order] = dispatch.choose(replace(call, v_order=order), impl).NAME
    if "rows" not in served or "keys" not in served:
        return "keys" if "keys" in served else "rows"
    by_keys, by_rows = (dispatch.IMPLEMENTATIONS.index(served[order]) for order in ("keys", "rows"))
    return "keys" if by_keys < by_rows else "rows"


def _received(came: Tensors, hop: Hop, k: Quantized, v: Quantized) -> tuple[Quantized, Quantized]:
    """The slice of a hop's keys and values as what our own shard's are."""
    k_data, v_data, k_scale, v_scale = came
    length = hop.keys.stop - hop.keys.start
    return replace(k, data=k_data, scale=k_scale, length=length), replace(v, data=v_data, scale=v_scale, length=length)
