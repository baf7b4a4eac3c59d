"""What masks mean, written a second time pair by pair, and hypothesis strategies that draw any mask."""

import itertools

import numpy as np
from hypothesis import strategies as st

from ringfa3.mask import Mask


def visible(mask: Mask, p: int, j: int, lengths, prefixes) -> bool:
    """The definition, one pair at a time, sharing nothing with the interval arithmetic under test."""
    spans, start = [], 0
    for i, length in enumerate(lengths):
        spans.append((start, start + length, prefixes[i]))
        start += length
    (home,) = [span for span in spans if span[0] <= p < span[1]]
    if not home[0] <= j < home[1]:
        return False
    p, j = p - home[0], j - home[0]
    if mask.chunk is not None and p // mask.chunk != j // mask.chunk:
        return False
    if mask.window is not None:
        left, right = mask.window
        if left != -1 and j < p - left:
            return False
        if right != -1 and j > p + right:
            return False
    if mask.causal and j > p:
        return mask.prefix is not None and p < home[2] and j < home[2]
    return True


def dense(mask: Mask, seqlen: int) -> np.ndarray:
    """bool [B or 1, S, S] by the definition."""
    packs = mask.documents if mask.batch is not None else [mask.documents or (seqlen,)]
    out = np.zeros((len(packs), seqlen, seqlen), bool)
    for b, lengths in enumerate(packs):
        prefixes = mask.prefix if mask.batch is None or isinstance(mask.prefix, int | None) else mask.prefix[b]
        prefixes = [prefixes] * len(lengths) if isinstance(prefixes, int | None) else prefixes
        for p in range(seqlen):
            for j in range(seqlen):
                out[b, p, j] = visible(mask, p, j, lengths, prefixes)
    return out


@st.composite
def packed(draw, seqlen: int):
    cuts = draw(st.lists(st.integers(0, seqlen), max_size=4))
    edges = [0, *sorted(cuts), seqlen]
    return tuple(b - a for a, b in itertools.pairwise(edges))


@st.composite
def masks(draw, seqlen: int):
    """Any mask that fits the length."""
    causal = draw(st.booleans())
    kind = draw(st.sampled_from(["none", "flat", "nested"]))
    documents = None
    if kind == "flat":
        documents = draw(packed(seqlen))
    elif kind == "nested":
        documents = tuple(draw(packed(seqlen)) for _ in range(draw(st.integers(1, 3))))
    prefix = None
    if causal and draw(st.booleans()):
        prefix = draw(st.integers(1, seqlen + 2))
        if documents is not None and draw(st.booleans()):
            rows = documents if kind == "nested" else (documents,)
            rows = tuple(tuple(draw(st.integers(0, length)) for length in row) for row in rows)
            prefix = rows if kind == "nested" else rows[0]
    window = None
    if draw(st.booleans()):
        left = draw(st.integers(-1, seqlen + 1))
        right = draw(st.integers(-1, seqlen + 1)) if not causal else draw(st.sampled_from([-1, 0]))
        window = (left, -1 if prefix is not None else right)
    chunk = draw(st.none() | st.integers(1, seqlen + 2))
    return Mask(causal=causal, window=window, documents=documents, prefix=prefix, chunk=chunk)
