"""rowsum(dout * out) - dlse on a GPU in one pass: what the softmax's derivative subtracts in every row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of out that a program reads


# Strides are specialised: where they are multiples of 16 the loads are wide.
@triton.jit(do_not_specialize=["l_b", "l_h", "l_s", "H", "S"])
def delta_kernel(
    dout, out, dlse, delta, do_b, do_s, do_h, o_b, o_s, o_h, l_b, l_h, l_s, H, S,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(S * H / ROWS), B): rows (i, h) of [S, H], so that neighbours in memory are read together."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < S * H
    i, h = (row // H).to(tl.int64), (row % H).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < HEAD_DIM)[None, :]
    x = tl.load(dout + (b * do_b + i * do_s + h * do_h)[:, None] + d[None, :], mask=mask, other=0.0)
    y = tl.load(out + (b * o_b + i * o_s + h * o_h)[:, None] + d[None, :], mask=mask, other=0.0)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    if DLSE:
        total -= tl.load(dlse + b * l_b + h * l_h + i * l_s, mask=inside, other=0.0)
    tl.store(delta + (b * H + h) * S + i, total, mask=inside)


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(dout * out) - dlse of 16- or 32-bit CUDA tensors; see `ringfa3_kernels.row_delta`.

    Args:
        dout, out: [B, S, H, D], head_dim contiguous.

    Returns:
        fp32 [B, H, S].
    """
    B, S, H, D = out.shape
    delta = torch.empty(B, H, S, dtype=torch.float32, device=out.device)
    block = triton.next_power_of_2(D)
    rows = max(1, ELEMENTS // block)
    given = delta if dlse is None else dlse
    with torch.cuda.device(out.device):
        delta_kernel[(triton.cdiv(S * H, rows), B)](
            dout, out, given, delta, *dout.stride()[:3], *out.stride()[:3], *given.stride(), H, S,
            HEAD_DIM=D, BLOCK_D=block, ROWS=rows, DLSE=dlse is not None,
        )  # fmt: skip
    return delta
