"""What of a call depends on places in the whole sequence: ALiBi's slopes and dropout, checked, and for each hop."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from ringfa3.hops import Hop
from ringfa3.layout import deal
from ringfa3.plan import Plan
from ringfa3_kernels import Dropout
from ringfa3_kernels.lasting import lasting
from ringfa3_kernels.positional import check_slopes

REPEATABLE = "preserve_rng_state=True (its default) or a seed in a checkpoint, which must drop the same again"


def check_dropout(p: Any, seed: Any, *, compared: bool) -> Dropout | None:
    """The dropout that a call asks for; None where it asks for none.

    Args:
        seed: None: drawn from torch's default generator (the CPU's), which must stand alike on every rank.
        compared: the ranks compare their seeds, or there is one rank.

    Raises:
        ValueError: a number out of range, or no seed where ranks may draw different ones.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not math.isfinite(p) or not 0 <= p < 1:
        raise ValueError(f"dropout_p: wanted a number in [0, 1), got {p!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64):
        raise ValueError(f"dropout_seed: wanted an integer in [0, 2**64) or None, got {seed!r}")
    if not p:
        return None
    if seed is None and not compared:
        raise ValueError("dropout_seed: wanted a seed where agree=False, as ranks do not compare theirs, got None")
    return Dropout(float(p), drawn_seed() if seed is None else seed)


def check_alibi(slopes: Tensor | None, q: Tensor) -> Tensor | None:
    """The slopes of a call, fp32 [Hq] or [B, Hq] contiguous.

    Raises:
        ValueError: they are not, or want a gradient.
    """
    return None if slopes is None else check_slopes("alibi_slopes", slopes, q).clone()  # the caller may write to them


def drawn_seed() -> int:
    """A seed from torch's default generator: repeatable by torch.manual_seed, and when a checkpoint recomputes.

    Raises:
        ValueError: a CUDA graph is captured, every replay of which would drop the same; or a reentrant checkpoint will
            recompute this call without the generator's state, and nobody could tell afterwards that it drew another
            (within no_grad it would not, but that cannot be seen from here).
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "dropout_seed: wanted a seed while a CUDA graph is captured, whose replays repeat it, got None"
        )
    if not torch.is_grad_enabled() and _forgetful(sys._getframe()):
        raise ValueError(f"dropout_seed: wanted {REPEATABLE}, got neither")
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def kept(dropout: Dropout | None) -> tuple[Tensor, ...]:
    """For autograd to save beside the other tensors: seed and share, int64 [2] on the CPU; nothing without dropout.

    A checkpoint throws away what is saved, and has in its place what its recomputation saves: see `changed`.
    """
    if dropout is None:
        return ()
    seed = dropout.seed - (2**64 if dropout.seed >= 2**63 else 0)
    return (torch.tensor([seed, dropout.threshold], dtype=torch.int64, device="cpu"),)  # whatever the default device is


def changed(dropout: Dropout | None, saved: Sequence[Tensor]) -> ValueError | None:
    """The error to raise in a backward pass where saved tensors are of a forward pass that dropped otherwise.

    Args:
        dropout: the forward pass's.
        saved: what autograd has for what `kept` gave.
    """
    if [x.tolist() for x in saved] == [x.tolist() for x in kept(dropout)]:
        return None
    return ValueError(f"dropout_seed: wanted {REPEATABLE}, got another seed or dropout_p when it recomputed")


def _forgetful(frame: FrameType | None) -> bool:
    """Whether this runs in the forward pass of a reentrant checkpoint that will not set the generator back."""
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__ and not frame.f_locals["preserve_rng_state"]:
            return True
        frame = frame.f_back
    return False


def options(plan: Plan, hop: Hop, alibi: Tensor | None, dropout: Dropout | None, heads: slice | None) -> dict[str, Any]:
    """What `attend` is to be told of places in this hop; nothing where nothing depends on them.

    Args:
        plan: of the ring.
        alibi: slopes of all heads.
        heads: query heads that this rank computes; None: all.
    """
    if alibi is None and dropout is None:
        return {}
    if heads is not None:
        alibi = None if alibi is None else alibi[..., heads].clone()
        dropout = None if dropout is None else Dropout(dropout.p, dropout.seed, heads.start)
    return {"positions": (plan.positions, key_positions(plan, hop)), "alibi": alibi, "dropout": dropout}


def key_positions(plan: Plan, hop: Hop) -> Tensor:
    """Where the hop's keys stand in the sequence of keys: int32 [keys], on the plan's device; kept with the hop."""
    found = _KNOWN.get(hop)
    if found is None:
        runs = deal(plan.layout, plan.kv_seqlen, plan.world).runs[hop.source]

        def made() -> Tensor:
            pieces = [torch.arange(*run, dtype=torch.int32, device=plan.device) for run in runs]
            return torch.cat(pieces)[hop.keys].clone()  # aligned: for others Triton compiles another kernel

        found = lasting(made, plan.device)
        if not (plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):  # else it is the graph's
            _KNOWN[hop] = found
    return found


_KNOWN: WeakKeyDictionary[Hop, Tensor] = WeakKeyDictionary()
