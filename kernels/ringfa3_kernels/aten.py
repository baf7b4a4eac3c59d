"""The CPU path: torch's flash attention operators, which return lse, in blocks; the masked edges in plain maths.

What a call sees is cut into rectangles of rows x keys: large ones that are visible throughout, and small tiles along
the edges of the visible region (`_pieces`). The first go to torch's operator whole, the second are computed by
definition, and each result is folded into an fp32 state. Memory stays O(S * D): of scores one tile exists at a time.

torch 2.13's operator would end the process on zero keys, answers an empty row with lse 0, aligns causal top-left and
knows no softcap. None of these reach it: no piece is empty, masked pieces are tiles, a softcap makes all pieces tiles.

16-bit inputs are widened to fp32, so no partial output is 16-bit. It costs nothing: on one Zen 5 thread, 16K causal,
D 64, 2 heads, the operator's forward / backward take 1.05 / 3.1 s in fp32, 1.2 / 2.5 s in bf16, 1.9 / 31 s in fp16.
The same forward in blocks of matmul takes 1.9 s in fp32, 1.8 times the operator's: hence two kinds of piece.

q is scaled once, before anything reads it. Scaled inside, the scores of forward and backward round differently, so
that exp(s - lse) no longer sums to 1: dv's error was 2.0 to 2.8 times that of plain maths at D 128, and is 1.0 so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ringfa3_kernels import paged
from ringfa3_kernels.call import Call
from ringfa3_kernels.positional import Positional
from ringfa3_kernels.quantized import Quantized, dequantize
from ringfa3_kernels.types import Partial, Visible

NAME = "aten"
TILE = (
    256  # rows and keys of a tile at most; 128 and 512 are slower on windows and softcap (see the figures in _pieces)
)
PAD = 8  # columns added in the backward; 1 would do, but 65 columns take 1.5 times as long as 72

# Keys that decode reads out of their pages at a time: 8 x 8K keys, 9:3 heads, D 64 take 87, 55, 42, 44, 89 ms in blocks
# of 256, 512, 1024, 2048, 8192 (one Zen 5 thread)
KEYS = 1024

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

Bounds = np.ndarray[Any, np.dtype[np.int32]]


def unsupported(call: Call) -> str | None:
    """aten serves every call on the CPU."""
    return None if call.device == "cpu" else f"it serves the CPU only, not {call.device}"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    into: Partial | None,
    out_dtype: torch.dtype,
    positional: Positional | None = None,
) -> Partial:
    """Output and lse over the visible keys; see `ringfa3_kernels.attend`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    state = Partial.empty(q, wide) if into is None else into
    keep = out_dtype == wide or into is None  # else the caller's out stays as it is
    out = state.out if keep else state.out.clone()
    Hkv = k.shape[2]
    for b in range(q.shape[0]):
        q_, out_ = _grouped(_wide(q[b], wide) * scale, Hkv), _grouped(out[b], Hkv)
        k_, v_ = (_shared(_wide(x[b], wide), q_.shape[1]) for x in (k, v))
        lse_ = state.lse[b].unflatten(0, (Hkv, -1))
        for rows, keys, mask in _pieces(visible, b, k.shape[1], tiled=softcap != 0 or positional is not None):
            qkv = q_[:, :, rows], k_[:, :, keys], v_[:, :, keys]
            plain = mask is None and not softcap and positional is None
            places = _places(positional, b, rows, keys, Hkv, wide)
            piece = _flash(*qkv, scale=1.0) if plain else _tile(*qkv, mask, softcap, *places)
            _fold(out_[:, :, rows], lse_[:, :, rows], *piece)
    return Partial(out.to(out_dtype), state.lse)


def attend_quantized(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    into: Partial | None,
    out_dtype: torch.dtype,
) -> Partial:
    """`attend` of what the fp8 tensors stand for, in fp32; see `ringfa3_kernels.attend`."""
    wide = dequantize(q), dequantize(k), dequantize(v)
    return attend(*wide, visible, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype)


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    visible: Visible,
    *,
    scale: float,
    softcap: float,
    splits: int | None,
) -> Partial:
    """A few rows a sequence over paged keys, in blocks of KEYS; see `ringfa3_kernels.decode`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, Sq, Hq, D = q.shape
    Hkv = k_pages.shape[2]
    rows = (q.to(wide) * scale).unflatten(2, (Hkv, -1)).transpose(1, 2)  # [B, Hkv, Sq, G, D]
    rows = rows.reshape(B, Hkv, -1, D)  # a key is read once for all rows and heads that share it
    out, lse = torch.zeros_like(rows), torch.full(rows.shape[:3], -torch.inf, dtype=wide)
    for b, (start, stop) in enumerate(paged.hulls(visible, B)):
        for first in range(start - start % KEYS, stop, KEYS):
            keys = max(first, start), min(first + KEYS, stop)
            k, v = (paged.read(x, block_table[b], *keys).to(wide).transpose(0, 1) for x in (k_pages, v_pages))
            mask = paged.mask(visible, b, *keys)
            mask = None if mask is None else mask.repeat_interleave(Hq // Hkv, 0)
            _fold(out[b], lse[b], *_tile(rows[b], k, v, mask, softcap))
    out, lse = out.unflatten(2, (Sq, -1)), lse.unflatten(2, (Sq, -1))
    return Partial(out.transpose(1, 2).flatten(2, 3).contiguous(), lse.transpose(2, 3).flatten(1, 2).contiguous())


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    visible: Visible,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool,
    scale: float,
    softcap: float,
    deterministic: bool,
    positional: Positional | None = None,
) -> None:
    """Gradients for rows whose final lse and delta are given, the same bits every time; see `ringfa3_kernels`.

    The operator takes no delta: it computes rowsum(dout * out) itself. So one more column carries it: there dout is
    delta and out is 1, while out's other columns and that of q, k and v are 0, which leaves all other results alone.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = [x if x.dtype == wide else torch.empty_like(x, dtype=wide) for x in (dq, dk, dv)]
    if not accumulate:
        for x in sums:
            x.zero_()
    Hkv, D = k.shape[2:]
    one = torch.zeros(D + PAD, dtype=wide)
    one[D] = 1
    for b in range(q.shape[0]):
        dq_, dk_, dv_ = _grouped(sums[0][b], Hkv), *(x[b].transpose(0, 1) for x in sums[1:])
        lse_, delta_ = (x[b].unflatten(0, (Hkv, -1)) for x in (lse, delta))
        lse_ = torch.where(lse_ == -torch.inf, 0.0, lse_)  # rows that saw nothing: exp(-inf - lse) is to be 0
        q_, dout_ = (_grouped(F.pad(x[b].to(wide), (0, PAD)), Hkv) for x in (q, dout))
        k_, v_ = (_shared(F.pad(x[b].to(wide), (0, PAD)), q_.shape[1]) for x in (k, v))
        q_.mul_(scale)
        dout_[..., D] = delta_
        for rows, keys, mask in _pieces(visible, b, k.shape[1], tiled=softcap != 0 or positional is not None):
            args = dout_[:, :, rows], q_[:, :, rows], k_[:, :, keys], v_[:, :, keys]
            if mask is None and not softcap and positional is None:
                grads = _flash_backward(*args, one.expand_as(args[0]), lse_[:, :, rows], 0.0, False, scale=1.0)
            else:
                narrow = [x[..., :D] for x in args]
                places = _places(positional, b, rows, keys, Hkv, wide)
                grads = _tile_backward(narrow, lse_[:, :, rows], delta_[:, :, rows], mask, softcap, *places)
            dq_[:, :, rows].add_(grads[0][..., :D], alpha=scale)
            dk_[:, keys] += grads[1][..., :D].sum(1)
            dv_[:, keys] += grads[2][..., :D].sum(1)
    for x, total in zip((dq, dk, dv), sums, strict=True):
        if x is not total:
            x.copy_(total)


def _pieces(visible: Visible, b: int, Sk: int, *, tiled: bool) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Cut what batch row b sees into rectangles (rows, keys, mask), none empty; mask is None where all is visible.

    A masked rectangle is at most TILE x TILE, and there are O(S / TILE) of them; with `tiled` every one is so small.
    """
    lo, hi = (x if x.ndim == 1 else x[b] for x in (visible.lo, visible.hi))
    for r0, r1, k0, k1, masked in _cut(lo.numpy(), hi.numpy(), (0, visible.rows, 0, Sk), tiled):
        mask = None
        if masked:
            j = torch.arange(k0, k1, dtype=torch.int32)
            mask = (j >= lo[r0:r1, None]) & (j < hi[r0:r1, None])
        yield slice(r0, r1), slice(k0, k1), mask


def _cut(
    lo: Bounds, hi: Bounds, area: tuple[int, int, int, int], tiled: bool
) -> Iterator[tuple[int, int, int, int, bool]]:
    """Shrink an area (rows r0..r1, keys k0..k1) to what is visible of it, and halve it until it is plain or a tile."""
    r0, r1, k0, k1 = area
    r0 = max(r0, int(np.searchsorted(hi, k0, "right")))  # the first row with hi > k0
    r1 = min(r1, int(np.searchsorted(lo, k1, "left")))  # after the last row with lo < k1
    if r0 >= r1:
        return
    k0, k1 = max(k0, int(lo[r0])), min(k1, int(hi[r1 - 1]))
    if k0 >= k1:
        return
    masked = bool(lo[r1 - 1] > k0 or hi[r0] < k1)
    if max(r1 - r0, k1 - k0) <= TILE or not (masked or tiled):
        yield r0, r1, k0, k1, masked
    elif r1 - r0 >= k1 - k0:
        r = (r0 + r1) // 2
        yield from _cut(lo, hi, (r0, r, k0, k1), tiled)
        yield from _cut(lo, hi, (r, r1, k0, k1), tiled)
    else:
        j = (k0 + k1) // 2
        yield from _cut(lo, hi, (r0, r1, k0, j), tiled)
        yield from _cut(lo, hi, (r0, r1, j, k1), tiled)


def _places(
    positional: Positional | None, b: int, rows: slice, keys: slice, Hkv: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What positions add to a piece's scores and multiply its probabilities by, [Hkv, G, rows, keys]; None: nothing."""
    if positional is None:
        return None, None
    piece = positional.cut(b, rows, keys)
    both = piece.bias(dtype), piece.weights(dtype)
    bias, weights = (None if x is None else x[0].unflatten(0, (Hkv, -1)) for x in both)
    return bias, weights


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, softcap: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scores [Hkv, G, rows, keys], -inf where masked, and the softcap's slope at each."""
    s = torch.matmul(q, k.transpose(-1, -2))
    slope = None
    if softcap:
        s.div_(softcap).tanh_()
        slope = 1 - s * s
        s.mul_(softcap)
    if bias is not None:
        s.add_(bias)
    return (s if mask is None else s.masked_fill_(~mask, -torch.inf)), slope


def _tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    softcap: float,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [Hkv, G, rows, D] and lse [Hkv, G, rows] of one tile; rows that see nothing of it get 0 and -inf."""
    s, _ = _scores(q, k, mask, softcap, bias)
    m = s.amax(-1, keepdim=True)
    m.masked_fill_(m == -torch.inf, 0.0)  # keeps exp(-inf - m) at 0
    p = s.sub_(m).exp_()
    l = p.sum(-1, keepdim=True)
    lse = (m + l.log()).squeeze(-1)
    if weights is not None:
        p.mul_(weights)
    return torch.matmul(p, v).div_(l.masked_fill_(l == 0, 1.0)), lse


def _tile_backward(
    tensors: list[Tensor],
    lse: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    softcap: float,
    bias: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (of the scaled q), dk, dv of one tile, dk and dv for every query head. `tensors` are dout, q, k and v."""
    dout, q, k, v = tensors
    s, slope = _scores(q, k, mask, softcap, bias)
    p = s.sub_(lse[..., None]).exp_()
    ds = torch.matmul(dout, v.transpose(-1, -2))
    if weights is not None:
        ds.mul_(weights)
    ds.sub_(delta[..., None]).mul_(p)
    if slope is not None:
        ds.mul_(slope)
    if weights is not None:
        p.mul_(weights)
    dk, dv = (torch.matmul(x.transpose(-1, -2), y) for x, y in ((ds, q), (p, dout)))
    return torch.matmul(ds, k), dk, dv


def _fold(out: Tensor, lse: Tensor, piece_out: Tensor, piece_lse: Tensor) -> None:
    """Merge a piece into the state in place: `types.merge`, without a copy of the state."""
    total = torch.logaddexp(lse, piece_lse)
    share = torch.exp(piece_lse - torch.where(total == -torch.inf, 0.0, total))
    out.lerp_(piece_out, share[..., None])
    lse.copy_(total)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the state's dtype with contiguous head dims, which the operator wants; no copy where it is so already."""
    wide: Tensor = x.to(dtype)
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def _grouped(x: Tensor, Hkv: int) -> Tensor:
    """[S, Hq, D] -> view [Hkv, G, S, D]: G query heads share a key/value head."""
    grouped: Tensor = x.unflatten(1, (Hkv, -1)).permute(1, 2, 0, 3)
    return grouped


def _shared(x: Tensor, G: int) -> Tensor:
    """[S, Hkv, D] -> view [Hkv, G, S, D]: one key/value head for G query heads, stride 0 instead of copies."""
    return x.transpose(0, 1).unsqueeze(1).expand(-1, G, -1, -1)
