"""The fp8 forward's arithmetic in torch, number by number but for the order of sums: its yardstick on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringfa3_kernels.quantized import BLOCK, Quantized, padded
from ringfa3_kernels.types import Partial, Visible

FLOOR = -1.0e30
TINY = 1e-30


def attend(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    visible: Visible,
    *,
    scale: float,
    softcap: float = 0.0,
    into: Partial | None = None,
    lazy: int = 0,
    round_p: bool = True,
) -> Partial:
    """What `fp8.py` computes: fp32 out [B, Sq, Hq, D] and lse [B, Hq, Sq]; `into` stays as it is. v in order "keys".

    Args:
        lazy: Fp8Config.LAZY.
        round_p: P is rounded to e4m3; without that, what remains is the error of fp32.
    """
    B, Sq, Hq, _ = q.shape
    Sk, Hkv = k.shape[1:3]
    shift = 8 - lazy
    sign = -1.0 if scale < 0 and not softcap else 1.0  # the running maximum of scale * s needs scale > 0
    scale *= sign
    rows, keys = sign * q.data.float().transpose(1, 2), k.data.float().transpose(1, 2).repeat_interleave(Hq // Hkv, 1)
    values = v.data.float().repeat_interleave(Hq // Hkv, 1)  # [B, Hq, D, padded Sk], as it lies
    q_scale = _of_row(q, Sq)[..., None]
    k_scale, v_scale = (x.scale.repeat_interleave(Hq // Hkv, 1) for x in (k, v))
    seen = visible.mask(Sk).expand(B, Sq, Sk)[:, None]
    place = operand_places(q.device)
    m, l, acc, unit = _start(q, into, shift)
    for n in reversed(range(padded(Sk) // BLOCK)):
        stop = min((n + 1) * BLOCK, Sk)
        at = n if k.block else 0
        by = q_scale * (scale * math.log2(math.e)) * k_scale[:, :, at, None, None]
        s = rows @ keys[:, :, n * BLOCK : stop].transpose(-1, -2)
        if softcap:
            s = softcap * math.log2(math.e) * torch.tanh(s * by / (softcap * math.log2(math.e)))
        else:
            s = s * by.clamp(min=TINY)
        s = s.masked_fill(~seen[..., n * BLOCK : stop], -torch.inf)
        top = s.nan_to_num(nan=-torch.inf, neginf=-torch.inf).amax(-1, keepdim=True) - shift
        grown = torch.maximum(m, top).clamp(min=FLOOR)
        grown = torch.where(grown - m <= lazy, m, grown) if lazy else grown
        p = torch.exp2(s - grown)
        alpha = torch.exp2(m - grown)
        new_unit = v_scale[:, :, at, None, None]
        l = l * alpha + p.sum(-1, keepdim=True)
        p = torch.nn.functional.pad(p, (0, -p.shape[-1] % BLOCK))
        p8 = p.to(torch.float8_e4m3fn).float() if round_p else p
        p8 = p8.unflatten(-1, (-1, 16))[..., place].flatten(-2)
        acc = acc * (alpha * (unit / new_unit)) + p8 @ values[..., n * BLOCK : (n + 1) * BLOCK].transpose(-1, -2)
        m, unit = grown, new_unit
    lse = torch.where(l == 0, -torch.inf, (m + torch.log2(l)) * math.log(2))[..., 0]
    out = torch.where(l == 0, 0.0, acc * (unit / l))
    return Partial(out.transpose(1, 2), lse)


def operand_places(device: torch.device | str | None = None) -> Tensor:
    """int64 [16]: the key whose P the place of wgmma's operand gets, read off the threads' registers.

    Thread t of four holds the scores of keys 8 c + 2 t + b, packs them into the bytes 2 c + b of a register, and that
    register is places 4 t .. 4 t + 3 of the operand.
    """
    key = torch.empty(16, dtype=torch.int64)
    for t in range(4):
        for c in range(2):
            for b in range(2):
                key[4 * t + 2 * c + b] = 8 * c + 2 * t + b
    return key.to(device)


def _of_row(x: Quantized, S: int) -> Tensor:
    """[B, H, S]: every row's scale."""
    return x.scale.repeat_interleave(BLOCK, 2)[..., :S] if x.block else x.scale.expand(-1, -1, S)


def _start(q: Quantized, into: Partial | None, shift: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m less shift, l, acc and acc's unit before the first block: nothing, or a state as one key that scores lse."""
    B, Sq, H, D = q.shape
    unit = torch.ones(B, H, 1, 1, device=q.device)
    if into is None:
        zero = torch.zeros(B, H, Sq, 1, device=q.device)
        return zero - torch.inf, zero, torch.zeros(B, H, Sq, D, device=q.device), unit
    weight = torch.full((B, H, Sq, 1), 2.0**shift, device=q.device)
    m = into.lse[..., None] * math.log2(math.e) - shift
    return m, torch.where(m == -torch.inf, 0.0, weight), into.out.float().transpose(1, 2) * weight, unit
