"""safetensors from strangers: the header is read and believed only where it fits, before any memory is taken.

A body is 8 bytes (length N of the header, little endian), N bytes of JSON, and the tensors' bytes one after another.
Refused: a header that is too long or no JSON, duplicate names, other fields, dtypes that attention does not take,
shapes that do not give the bytes, bytes that overlap, leave holes or go on after the last tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

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
    described = parse_header(bytes(head[8 : 8 + size]), length - 8 - size)
    if set(described) != set(names):
        raise _bad(f"wanted the tensors {', '.join(names)}", ", ".join(sorted(described))[:200] or "none")
    check(described)
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
    return {name: _tensor(data, each) for name, each in described.items()}


def parse_header(text: bytes, length: int) -> dict[str, Described]:
    """The tensors that a header describes, in the order of their bytes.

    Args:
        length: of the data that follow, in bytes.

    Raises:
        Refusal: it is not a header of exactly those data.
    """
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # also bytes that are no UTF-8, and numbers of too many digits
        raise _bad("wanted a header of JSON without duplicate names", "something else") from None
    if not isinstance(header, dict):
        raise _bad("wanted a JSON object as header", type(header).__name__)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad("__metadata__: wanted strings by name", "something else")
    described = {name: _described(name, each) for name, each in header.items()}
    at = 0
    ordered = dict(sorted(described.items(), key=lambda item: (item[1].begin, item[1].end)))
    for name, each in ordered.items():
        if each.begin != at:
            raise _bad(f"{name!r}: wanted data_offsets from {at}: no hole, no overlap", f"{each.begin}")
        at = each.end
    if at != length:
        raise _bad(f"wanted tensors of {length} bytes together, as the body has", f"{at}")
    return ordered


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
        raise Refusal(413, f"safetensors: wanted a header of at most {most} bytes, got {size}", code="header_too_large")
    return size


def _described(name: str, entry: object) -> Described:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"{name!r}: wanted dtype, shape and data_offsets, no more", "others")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(f"{name!r}: wanted dtype {', '.join(DTYPES)}", repr(dtype)[:40])
    if not _sizes(shape) or len(shape) > DIMENSIONS:
        raise _bad(f"{name!r}: wanted a shape of at most {DIMENSIONS} sizes", "something else")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _bad(f"{name!r}: wanted data_offsets [begin, end]", "something else")
    begin, end = offsets
    bytes_ = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != bytes_:
        raise _bad(f"{name!r}: wanted {bytes_} bytes, as shape and dtype say", f"{end - begin}")
    return Described(DTYPES[dtype], tuple(shape), begin, end)


def _sizes(value: object) -> bool:
    """Whether it is a list of numbers that a size can be; so bounded that no product of them is long to compute."""
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 48 for each in value)


def _tensor(data: bytearray, each: Described) -> torch.Tensor:
    if each.end == each.begin:  # torch.frombuffer takes no empty buffer
        return torch.empty(each.shape, dtype=each.dtype)
    count = (each.end - each.begin) // each.dtype.itemsize
    return torch.frombuffer(data, dtype=each.dtype, count=count, offset=each.begin).reshape(each.shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate names")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _bad(wanted: str, got: str) -> Refusal:
    return Refusal(400, f"safetensors: {wanted}, got {got}", param="body", code="invalid_safetensors")
