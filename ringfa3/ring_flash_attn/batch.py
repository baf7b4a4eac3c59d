"""ring_, zigzag_ring_ and stripe_flash_attn_func with their packed forms: one sequence, dealt in three ways."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ringfa3.flash_attn.operation import check_shapes, sides, unpacked
from ringfa3.ring_flash_attn.call import Common
from ringfa3.shards import Group


def ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """Attention over a sequence of which rank r holds the r-th of `world` pieces: q.chunk(world, dim=1)[r].

    Args:
        q: [B, n, Hq, D], this rank's rows; bf16, fp16 or fp32.
        k, v: [B, n, Hkv, D], Hq a multiple of Hkv.
        dropout_p: share of the probabilities that are dropped, in [0, 1); the others are scaled by 1 / (1 - p). What is
            dropped follows from torch.manual_seed, which all ranks must have called alike (they compare), and does not
            depend on how many they are.
        softmax_scale: factor on q.k; None: D ** -0.5.
        causal: no row sees keys beyond its position in the whole sequence.
        window_size: (left, right): a row sees keys from position - left to position + right; -1 is unlimited.
        alibi_slopes: fp32 [Hq] or [B, Hq], the same on every rank: -slope * distance is added to the scores, distance
            being counted in the whole sequence. No gradient.
        deterministic: gradients bitwise equal from run to run, at some cost.
        return_attn_probs: also return softmax_lse, and None for the probabilities.
        group: a ProcessGroup or DeviceMesh; None: all ranks. Every rank of it must call.

    Returns:
        out [B, n, Hq, D] in q's dtype, or (out, softmax_lse fp32 [B, Hq, n], None).

    Raises:
        ValueError, Unsupported, RankFailed: as `ringfa3.ring_attention`.
    """
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, "contiguous", q, k, v)


def ring_flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`ring_flash_attn_func` with keys and values in one tensor, kv [B, n, 2, Hkv, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, "contiguous", q, kv)


def ring_flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`ring_flash_attn_func` with queries, keys and values in one tensor, qkv [B, n, 3, H, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, "contiguous", qkv)


def zigzag_ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """Causal attention over a sequence of 2 * world pieces of which rank r holds the r-th and the r-th last.

    The rest is as `ring_flash_attn_func`; causal=False raises, as it does in ring-flash-attn.
    """
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, "zigzag", q, k, v)


def zigzag_ring_flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`zigzag_ring_flash_attn_func` with keys and values in one tensor, kv [B, n, 2, Hkv, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, "zigzag", q, kv)


def zigzag_ring_flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`zigzag_ring_flash_attn_func` with queries, keys and values in one tensor, qkv [B, n, 3, H, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, "zigzag", qkv)


def stripe_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """Causal attention over a sequence of which rank r holds positions r, r + world, r + 2 * world, ...

    The rest is as `ring_flash_attn_func`; causal=False raises, as it does in ring-flash-attn.
    """
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, "striped", q, k, v)


def stripe_flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`stripe_flash_attn_func` with keys and values in one tensor, kv [B, n, 2, Hkv, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, "striped", q, kv)


def stripe_flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`stripe_flash_attn_func` with queries, keys and values in one tensor, qkv [B, n, 3, H, D]."""
    common = Common(
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group
    )
    return _dealt(common, "striped", qkv)


def _dealt(common: Common, layout: str, *tensors: Tensor) -> Any:
    """The call for a sequence dealt so, from q, k, v or q, kv or qkv."""

    def prepare() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        q, k, v = separate(tensors, "[B, S, H, D]")
        if layout != "contiguous":
            only_causal(common.causal)
        window = sides(common.window_size, common.causal)
        return q, k, v, {"causal": common.causal, "window": window, "layout": layout}

    return common.run(prepare)


def only_causal(causal: bool) -> None:
    """Raise ValueError unless causal, for functions that deal the sequence so as to halve causal work."""
    if causal is not True:
        raise ValueError(f"causal: wanted True (a ring_flash_attn function serves the rest), got {causal!r}")


def separate(tensors: tuple[Tensor, ...], shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of such a shape out of (q, k, v), (q, kv) or (qkv,).

    Raises:
        ValueError: not of that shape, or of that with a dimension for the parts before heads.
    """
    packed = shape.replace("H", f"{4 - len(tensors)}, H")
    if len(tensors) == 1:
        q, k, v = unpacked(packed, 3, qkv=tensors[0])
    elif len(tensors) == 2:
        q, (k, v) = tensors[0], unpacked(packed, 2, kv=tensors[1])
    else:
        q, k, v = tensors
    check_shapes(shape, q=q, k=k, v=v)
    return q, k, v
