"""The contract that every implementation of decode keeps: its cases, poisoned pages, and what is asked of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ringfa3_kernels import Partial, Unsupported, Visible, decode
from tests.kernels.contract import UNSUPPORTED, stale_memory
from tests.kernels.oracle import Answer, Unlucky, assert_close, plain


@dataclass(frozen=True)
class Case:
    """A call: the sequences, what their rows see, how the cache lies in memory.

    Args:
        lengths: keys of each sequence, the new ones included; rows see up to themselves, rows before the first nothing.
        Sq: new tokens of each sequence.
        window: keys that a row sees at most, itself included; None: all before it.
        spare: blocks of the table that no sequence needs.
        layout, v_layout: keys of LAYOUTS, for the pages of keys and values; None: as the keys'.
        splits: asked for one after the other.
    """

    name: str
    lengths: tuple[int, ...]
    Sq: int = 1
    Hq: int = 2
    Hkv: int = 2
    D: int = 16
    page: int = 16
    window: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    spare: int = 1
    layout: str = "dense"
    v_layout: str | None = None
    splits: tuple[int | None, ...] = (None,)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """lo and hi, int32 [B, Sq]."""
        ends = torch.tensor(self.lengths)[:, None] - self.Sq + 1 + torch.arange(self.Sq)
        hi = ends.clamp(min=0).int()
        return (torch.zeros_like(hi) if self.window is None else (hi - self.window).clamp(min=0)), hi


def _interleaved(x: Tensor) -> Tensor:
    """Keys and values of a page beside each other, as some caches keep them."""
    return torch.stack([x, torch.full_like(x, torch.nan)], 2)[:, :, 0]


def _unaligned(x: Tensor) -> Tensor:
    P, page, Hkv, D = x.shape
    around = x.new_full((P + 1, page, Hkv + 1, D + 3), torch.nan)
    around[1:, :, 1:, 1:-2] = x
    return around[1:, :, 1:, 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "heads before keys": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "keys before pages": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "interleaved": _interleaved,
    "unaligned": _unaligned,
}

CASES = (
    Case("one key", (1,), splits=(None, 7)),
    Case("one sequence", (77,), Hq=8, Hkv=2, D=64, splits=(None, 1, 7)),
    Case("MHA", (40, 33), Hq=3, Hkv=3, D=24),
    Case("GQA 8, ragged", (70, 3, 41), Hq=8, Hkv=1, D=40, page=32, splits=(2, 7)),
    Case("MQA, several tiles of rows", (50,), Sq=4, Hq=24, Hkv=1, splits=(2,)),
    Case("2 tokens", (40, 17), Sq=2, Hq=4, Hkv=1, D=32),
    Case("3 tokens, 3 heads a group", (37,), Sq=3, Hq=3, Hkv=1, D=32, splits=(2,)),
    Case("5 tokens", (48, 64), Sq=5, Hq=4, Hkv=2, D=32, splits=(3,)),
    Case("8 tokens", (90, 8), Sq=8, Hq=8, Hkv=2, D=16, page=64),
    Case("16 tokens", (60,), Sq=16, D=16, page=32),
    Case("more tokens than keys", (3, 0, 40), Sq=4, splits=(None, 1)),
    Case("empty sequences", (0, 35, 0, 20, 0), splits=(1, 2)),
    Case("all empty", (0, 0), splits=(None, 1)),
    Case("one long among short", (150, 1, 2, 3), page=32, splits=(None, 5)),
    Case("window", (100, 20, 75), Sq=2, Hq=4, Hkv=2, D=32, window=21, splits=(1, 7)),
    Case("window within a page", (100,), page=64, window=5, splits=(3,)),
    Case("softcap", (60, 31), Hq=4, Hkv=1, D=32, softcap=4.0, scale=1.0),
    Case("softcap and window", (60, 31), Sq=3, softcap=2.0, scale=0.7, window=9),
    Case("scale", (60,), scale=0.4, D=32),
    Case("scale below 0", (60,), scale=-0.3, D=32),
    Case("scale 0", (30,), scale=0.0),
    Case("scores far from 0", (60,), scale=8.0),
    Case("head_dim 8", (30,), D=8),
    Case("head_dim 128", (50,), D=128, Hq=4, Hkv=1),
    Case("head_dim 256", (33,), D=256),
    Case("pages of 128", (200, 129), page=128, splits=(3,)),
    Case("pages of 48", (100, 7), page=48),
    Case("pages of 1", (9, 4), page=1),
    Case("no spare blocks", (32, 16), spare=0),
    Case("heads before keys", (50, 20), layout="heads before keys", D=40, splits=(2,)),
    Case("keys before pages", (50, 20), layout="keys before pages", page=32),
    Case("interleaved", (50, 20), layout="interleaved", page=32),
    Case("unaligned", (50, 20), layout="unaligned", page=32, D=24),
    Case("values lie otherwise", (50, 20), layout="heads before keys", v_layout="interleaved", page=16),
    Case("values lie otherwise, large pages", (50, 20), layout="interleaved", v_layout="keys before pages", page=32),
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, drawn anew in every run.

    Pages that no sequence owns, keys past a sequence's end and keys that no row sees hold NaN (keys) and infinity
    (values); the table says -1 where no row sees a key of the block.
    """

    case: Case
    q: Tensor
    k: Tensor  # [B, longest, Hkv, D], what the pages hold
    v: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    visible: Visible

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        """Normal numbers, made on the CPU so that a seed means the same everywhere."""
        B, longest = len(case.lengths), max(1, *case.lengths)
        blocks = -(-longest // case.page) + case.spare
        shapes = ((B, case.Sq, case.Hq, case.D), *[(B, longest, case.Hkv, case.D)] * 2)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        lo, hi = case.bounds()
        P = B * blocks + 2
        table = torch.randperm(P, generator=generator)[: B * blocks].view(B, blocks).int()
        pages = [torch.full((P, case.page, case.Hkv, case.D), bad, dtype=dtype) for bad in (torch.nan, torch.inf)]
        for b in range(B):
            seen = _seen(lo[b], hi[b])
            for j in seen:
                for x, dense in zip(pages, (k, v), strict=True):
                    x[table[b, j // case.page], j % case.page] = dense[b, j]
            used = {j // case.page for j in seen}
            table[b, [block for block in range(blocks) if block not in used]] = -1
        layouts = (case.layout, case.v_layout or case.layout)
        k_pages, v_pages = (LAYOUTS[layout](x.to(device)) for layout, x in zip(layouts, pages, strict=True))
        on = [x.to(device) for x in (q, k, v)]
        return cls(case, *on, k_pages, v_pages, table.to(device), Visible(lo, hi).to(device))

    def plain(self, dtype: torch.dtype) -> Answer:
        """Plain PyTorch's answer in `dtype`."""
        nothing = torch.zeros(len(self.case.lengths), self.case.Hq, self.case.Sq, device=self.q.device)
        return plain(
            self.q, self.k, self.v, torch.zeros_like(self.q), nothing, self.visible.mask(self.k.shape[1]),
            dtype=dtype, scale=self.case.scale, softcap=self.case.softcap,
        )  # fmt: skip

    def decode(self, impl: str, splits: int | None) -> Partial:
        """What an implementation answers, where torch.empty is full of NaN."""
        with stale_memory(impl):
            return decode(
                self.q, self.k_pages, self.v_pages, self.block_table, self.visible,
                scale=self.case.scale, softcap=self.case.softcap, splits=splits, impl=impl,
            )  # fmt: skip


def _seen(lo: Tensor, hi: Tensor) -> range:
    """Keys from the first to the last that any of these rows sees."""
    some = hi > lo
    return range(int(lo[some].min()), int(hi[some].max())) if some.any() else range(0)


def refused(impl: str, case: Case, dtype: torch.dtype, device: str) -> bool:
    """Whether the implementation may, and must, answer with Unsupported."""
    if impl == "hopper" or (impl, device, dtype) in UNSUPPORTED:
        return True
    return impl == "portable" and (case.page < 16 or case.page & (case.page - 1) != 0)


def check(impl: str, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """That an implementation answers a case rightly or, where it may, refuses it by name.

    Raises:
        AssertionError: it does not; errors just above the rule count once three draws in a row show them.
    """
    for draws_left in (2, 1, 0):
        try:
            return _check_one_draw(impl, case, dtype, device, generator)
        except Unlucky:
            if not draws_left:
                raise


def _check_one_draw(impl: str, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    inputs = Inputs.draw(case, dtype, device, generator)
    if refused(impl, case, dtype, device):
        with pytest.raises(Unsupported, match=impl):
            inputs.decode(impl, None)
        return
    truth, yardstick = inputs.plain(torch.float64), inputs.plain(dtype)
    state = torch.promote_types(dtype, torch.float32)
    unseen = (inputs.visible.hi <= inputs.visible.lo).expand(len(case.lengths), -1)
    for splits in case.splits:
        found = inputs.decode(impl, splits)
        for name, got in (("out", found.out), ("lse", found.lse)):
            assert got.dtype == state
            assert got.is_contiguous()
            assert_close(f"{name}, splits {splits}", got, getattr(truth, name), getattr(yardstick, name), dtype)
        assert not found.out[unseen].any(), "out: rows that saw nothing are not 0"
