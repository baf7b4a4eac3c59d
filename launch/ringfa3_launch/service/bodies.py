"""safetensors from strangers: the header is read and believed only where it fits, before any memory is taken.

A body is 8 bytes (length N of the header, little endian), N bytes of JSON, and the tensors' bytes one after another.
Refused: a header that is too long, or that `cluster.tensors.read_header` refuses (of JSON that is not as it should be,
with bytes that overlap, leave holes or go on after the last tensor); dtypes that attention does not take.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ringfa3_launch.cluster.tensors import BadTensors, read_header
from ringfa3_launch.service.errors import Refusal

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIMENSIONS = 8  # more than any tensor here has
BLOCK = 1 << 22  # elements that are looked at together


@dataclass(frozen=True)
class Described:
    """One tensor of a header: dtype, shape, and where in the data it begins and ends (bytes)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


async def read_tensors(
    chunks: AsyncIterator[bytes],
    length: int,
    *,
    names: Iterable[str],
    header_bytes: int,
    check: Callable[[Mapping[str, Described]], None],
) -> dict[str, torch.Tensor]:
    """The tensors of a body, after `check` has seen what they will be.

    Args:
        chunks: the body.
        length: its declared length in bytes; memory for the data is taken from it, but only once the header agrees.
        names: of the tensors; each must be there and no other.
        header_bytes: the longest header.
        check: raises Refusal on dtypes and shapes that the call does not take.

    Raises:
        Refusal: 400 (or 413 for a header that is too long), naming what is wrong.
    """
    head = bytearray()
    async for chunk in chunks:
        head += chunk
        if len(head) >= 8 and len(head) >= 8 + _header_length(head, length, header_bytes):
            break
    if len(head) < 8:
        raise _bad("wanted 8 bytes of length or more", f"{len(head)}")
    size = _header_length(head, length, header_bytes)
    if len(head) < 8 + size:
        raise _bad(f"wanted a header of {size} bytes", f"{len(head) - 8}")
    header = described(bytes(head[8 : 8 + size]), length - 8 - size)
    if set(header) != set(names):
        raise _bad(f"wanted the tensors {', '.join(names)}", ", ".join(sorted(header))[:200] or "none")
    check(header)
    data = bytearray(length - 8 - size)
    filled = len(head) - 8 - size
    data[:filled] = head[8 + size :]
    del head
    async for chunk in chunks:
        if filled + len(chunk) > len(data):
            raise _bad("wanted the declared length", "more")
        data[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    if filled != len(data):
        raise _bad(f"wanted {len(data)} bytes of data", f"{filled}")
    return {name: _tensor(data, each) for name, each in header.items()}


def described(text: bytes, length: int) -> dict[str, Described]:
    """The tensors that a header describes.

    Args:
        length: of the data that follow, in bytes.

    Raises:
        Refusal: it is not a header of exactly those data, or they are not of DTYPES.
    """
    try:
        found = read_header(text, length, dtypes=tuple(DTYPES), dimensions=DIMENSIONS)
    except BadTensors as error:
        raise Refusal(400, str(error), param="body", code="invalid_safetensors") from None
    return {name: Described(DTYPES[each.dtype], each.shape, each.begin, each.end) for name, each in found.items()}


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Attention over NaN or infinity has no answer that anybody wants: it spreads to every row that sees it.

    Raises:
        Refusal: 400, naming the tensor.
    """
    for name, tensor in tensors.items():
        for block in tensor.reshape(-1).split(BLOCK):
            if not bool(torch.isfinite(block).all()):
                raise Refusal.wrong(name, "finite numbers", "NaN or infinity", code="not_finite")


def _header_length(head: bytearray, length: int, most: int) -> int:
    size: int = struct.unpack_from("<Q", head)[0]
    if size > length - 8:
        raise _bad("wanted a header within the body", f"a header of {size} bytes")
    if size > most:
        raise Refusal(413, f"tensors: wanted a header of at most {most} bytes, got {size}", code="header_too_large")
    return size


def _tensor(data: bytearray, each: Described) -> torch.Tensor:
    if each.end == each.begin:  # torch.frombuffer takes no empty buffer
        return torch.empty(each.shape, dtype=each.dtype)
    count = (each.end - each.begin) // each.dtype.itemsize
    return torch.frombuffer(data, dtype=each.dtype, count=count, offset=each.begin).reshape(each.shape)


def _bad(wanted: str, got: str) -> Refusal:
    return Refusal(400, f"tensors: {wanted}, got {got}", param="body", code="invalid_safetensors")
