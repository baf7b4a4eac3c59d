"""aten at its own tile size: how it cuts what is visible, that memory stays linear, and torch's operator behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringfa3_kernels import Visible, aten, attend
from tests.kernels.contract import CLAUSES, Case, causal, check, documents, full, window
from tests.kernels.test_types import sights

LONG = (
    Case("causal", 700, 700, causal, D=64, cuts=(300,)),
    Case("full", 300, 700, full, Hq=4, Hkv=1, D=64),
    Case("causal, more keys, GQA", 300, 800, causal, B=2, Hq=4, Hkv=2, D=40, scale=0.3, cuts=(257,)),
    Case("causal, fewer keys", 800, 300, causal, D=32, cuts=(100, 200)),
    Case("window", 900, 900, window(300, 10), D=16),
    Case("documents", 900, 900, documents(600, 1, 99, 200, causal=False), D=16, cuts=(450,)),
    Case("softcap", 600, 600, causal, softcap=4.0, scale=0.5, D=32),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_contract_over_several_tiles(case: Case, clause: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(clause, "aten", case, dtype, "cpu", generator)


@given(sights(), st.booleans(), st.integers(1, 9))
def test_pieces_are_the_mask_each_pair_once_and_no_piece_is_empty(
    sight: tuple[Visible, int], tiled: bool, tile: int
) -> None:
    visible, Sk = sight
    masks = visible.mask(Sk)[None] if visible.lo.ndim == 1 else visible.mask(Sk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten, "TILE", tile)
        for b, mask in enumerate(masks):
            painted = torch.zeros_like(mask, dtype=torch.int32)
            for rows, keys, part in aten._pieces(visible, b, Sk, tiled=tiled):
                assert painted[rows, keys].numel()
                if part is not None or tiled:
                    assert max(painted[rows, keys].shape) <= tile
                painted[rows, keys] += 1 if part is None else part.int()
            assert torch.equal(painted, mask.int())


@pytest.mark.parametrize(
    "sight", [causal, window(2000, 0), documents(*[512] * 16)], ids=["causal", "window", "documents"]
)
def test_masked_tiles_are_few(sight: Any) -> None:
    S = 8192
    visible = sight(Case("", S, S, sight), torch.Generator())
    pieces = list(aten._pieces(visible, 0, S, tiled=False))
    masked = sum(m.numel() for _, _, m in pieces if m is not None)
    assert masked <= 6 * S * aten.TILE, "masked work grows faster than the sequence"
    assert len(pieces) <= 8 * S // aten.TILE


def test_the_operator_is_never_asked_for_scores_of_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the process."""
    asked = []
    flash = aten._flash
    monkeypatch.setattr(aten, "_flash", lambda q, k, v, scale: asked.append(k.shape[2]) or flash(q, k, v, scale=scale))
    q, k = torch.randn(1, 600, 1, 16), torch.randn(1, 600, 1, 16)
    lo = torch.cat([torch.full((300,), 5), torch.full((300,), 590)]).int()
    hi = torch.cat([torch.full((300,), 5), torch.full((300,), 600)]).int()
    found = attend(q, k, k, Visible(lo, hi), impl="aten")
    assert asked == [10]
    assert (found.lse[..., :300] == -torch.inf).all()
    assert found.lse[..., 300:].isfinite().all()
