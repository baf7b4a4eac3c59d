"""ALiBi and dropout inside the portable kernels; ringfa3_kernels/positional.py says what they are."""

from typing import Any

import triton
import triton.language as tl

from ringfa3_kernels.positional import ROUNDS, Positional

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def load_slope(slopes, stride_b, batch, head):
    """The head's slope, for scores in the log2 domain."""
    return tl.load(slopes + batch.to(tl.int64) * stride_b + head) * 1.4426950408889634


@triton.jit
def load_positions(positions, stride_b, batch, start, S, SIZE: tl.constexpr):
    """positions[batch, start : start + SIZE] as int32 [SIZE]; past the end they are 0."""
    i = tl.arange(0, SIZE)
    return tl.load(positions + batch.to(tl.int64) * stride_b + start + i, mask=i < S - start, other=0)


@triton.jit
def biased(s, q_pos, k_pos, slope):
    """Scores s in the log2 domain with ALiBi's bias; q_pos and k_pos broadcast to its shape."""
    return s - slope * tl.abs(q_pos - k_pos).to(tl.float32)


@triton.jit
def weights(q_pos, k_pos, head, row, seed_low, seed_high, threshold, rescale):
    """Dropout's factors on the probabilities, 0 or `rescale`; q_pos and k_pos broadcast to their shape.

    The first two rounds of Philox multiply vectors only, because key and query positions meet in the third.
    """
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True)
    word, _, _, _ = tl.philox(seed, k_pos, head, q_pos, row, _ROUNDS)
    return tl.where(word >= threshold.to(tl.uint32, bitcast=True), rescale, 0.0)


# what a kernel is not given where there is no ALiBi, or no dropout: None, so that its code is as if there were none
ABSENT: dict[str, Any] = dict.fromkeys(
    [
        "q_pos", "k_pos", "q_pos_b", "k_pos_b", "slopes", "slopes_b",
        "seed_low", "seed_high", "threshold", "rescale", "first_head", "first_row",
    ]
)  # fmt: skip


def arguments(positional: Positional | None) -> dict[str, Any]:
    """The kernels' arguments for a call; strides over the batch are 0 where batch rows are alike."""
    if positional is None:
        return ABSENT
    q_pos, k_pos, slopes, dropout = positional.q_pos, positional.k_pos, positional.alibi, positional.dropout
    given: dict[str, Any] = {"q_pos": q_pos, "k_pos": k_pos, "q_pos_b": _step(q_pos), "k_pos_b": _step(k_pos)}
    if slopes is not None:
        given |= {"slopes": slopes, "slopes_b": _step(slopes)}
    if dropout is not None:
        given |= {"seed_low": _signed(dropout.seed), "seed_high": _signed(dropout.seed >> 32)}
        given |= {"threshold": _signed(dropout.threshold), "rescale": dropout.rescale}
        given |= {"first_head": dropout.head, "first_row": dropout.row}
    return ABSENT | given


def _step(x: Any) -> int:
    return x.shape[-1] if x.ndim == 2 else 0


def _signed(x: int) -> int:
    """The lowest 32 bits as an int32: Triton would type larger numbers as int64, and compile another kernel."""
    return (x + 2**31) % 2**32 - 2**31
