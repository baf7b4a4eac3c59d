"""Keys in pages: block tables checked, and a sequence's keys read out of its pages into rows of one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_PAGE = 16  # what portable's decode takes


def decodes(pages: Tensor) -> bool:
    """Whether `ringfa3_kernels.decode` reads pages [P, page, H, D] as they are, on every device."""
    page = pages.shape[1]
    return page >= LEAST_PAGE and page & (page - 1) == 0 and pages.stride(3) == 1


def check_block_table(block_table: Tensor, q: Tensor, batch: int) -> None:
    """Raise ValueError unless it is int32 [batch, blocks] on q's device."""
    if not isinstance(block_table, Tensor) or block_table.ndim != 2 or block_table.dtype != torch.int32:
        got = f"{block_table.dtype} {list(block_table.shape)}" if isinstance(block_table, Tensor) else block_table
        raise ValueError(f"block_table: wanted torch.int32 [B, blocks], got {got!r}")
    if block_table.shape[0] != batch:
        raise ValueError(f"block_table: wanted a row for each of {batch} sequences, got {block_table.shape[0]}")
    if block_table.device != q.device:
        raise ValueError(f"block_table: wanted q's device {q.device}, got {block_table.device}")


def check_pages(block_table: Tensor, lengths: Tensor, pages: int, page: int) -> None:
    """Raise ValueError unless the table, where it is on the CPU, has numbers of pages, [0, pages), for all keys.

    Args:
        lengths: int [B], keys of each sequence.
    """
    if block_table.device.type != "cpu" or torch.compiler.is_compiling():
        return
    used = torch.arange(block_table.shape[1]) * page < lengths[:, None]
    if bool((used & ((block_table < 0) | (block_table >= pages))).any()):
        raise ValueError(f"block_table: wanted pages in [0, {pages}) up to each sequence's length, got {block_table}")


def read_pages(x: Tensor, block_table: Tensor, starts: Tensor | int, stops: Tensor) -> Tensor:
    """The keys of each sequence in order, zeros before starts and from stops on; differentiable.

    Args:
        x: [P, page, H, D].
        block_table: int32 [B, blocks].
        starts, stops: int [B] (starts: or one for all), the first key of each sequence and past its last.

    Returns:
        [B, blocks * page, H, D].
    """
    B, blocks = block_table.shape
    page = x.shape[1]
    used = torch.arange(blocks, device=x.device) * page < stops[:, None]
    # a page number past the end may be anything: any page will do there, as its keys become zeros
    keys = x.index_select(0, torch.where(used, block_table, 0).flatten()).view(B, blocks * page, *x.shape[2:])
    j = torch.arange(blocks * page, device=x.device)
    outside = (j < (starts[:, None] if isinstance(starts, Tensor) else starts)) | (j >= stops[:, None])
    return keys.masked_fill(outside[..., None, None], 0)  # 0 * NaN is NaN: what nobody wrote must not be multiplied
