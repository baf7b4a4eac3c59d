"""What an implementation is told about a call when dispatch asks whether it serves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Call:
    """The facts of one attend, attend_backward or decode; hashable, so that dispatch remembers its answer.

    Args:
        direction: "forward", "backward" or "decode".
        device: type of the tensors' device: "cuda", "cpu".
        capability: CUDA compute capability, (0, 0) elsewhere.
        dtype: of q, k and v.
        B, Sq, Sk, Hq, Hkv, D: sizes; for decode Sk is what the block table has room for.
        batched_visible: lo and hi differ between batch rows ([B, Sq]).
        softcap: a softcap is applied.
        into: the call continues a Partial.
        out_dtype: dtype of the output (forward) or of dq, dk, dv (backward).
        accumulate: backward adds to its gradients instead of storing them.
        deterministic: backward must be bitwise reproducible.
        aligned: head_dim is contiguous, and every pointer and other stride is a multiple of 16 bytes (what TMA asks).
        page: keys of a page of the cache that decode reads, 0 for other calls.
        blocks: of fp8 q, k and v: rows that a scale covers, 0 for a whole head; () for other calls.
        v_order: how fp8 v lies in memory, "rows" or "keys" (see Quantized).
        alibi, dropout: scores get ALiBi's bias, probabilities are dropped.
    """

    direction: str
    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    B: int
    Sq: int
    Sk: int
    Hq: int
    Hkv: int
    D: int
    batched_visible: bool
    softcap: bool
    into: bool
    out_dtype: torch.dtype
    accumulate: bool
    deterministic: bool
    aligned: bool
    page: int = 0
    blocks: tuple[int, ...] = ()
    v_order: str = "rows"
    alibi: bool = False
    dropout: bool = False
