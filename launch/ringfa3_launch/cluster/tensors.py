"""Tensors as bytes and back, in the safetensors format: a JSON header that says where each lies, and the data.

Reading trusts nothing: every length, offset, shape and dtype is checked against the bytes that are there, before
anything is made of them. Neither direction copies the data of contiguous tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = Any  # NDArray | torch.Tensor: whoever has no torch tensor needs no torch

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NAMES = {  # numpy's and torch's names of these
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
DTYPES = {code: name for name, code in NAMES.items()}

MAX_HEADER = 1 << 20  # bytes
MAX_DIMS = 16


class BadTensors(ValueError):
    """Bytes that are not what they claim to be."""


@dataclass(frozen=True)
class Raw:
    """A tensor that lies in a received buffer.

    Args:
        dtype: safetensors' name, a key of SIZES.
        shape: any.
        data: its bytes, little-endian, contiguous.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def numpy(self, dtype: Any = None) -> NDArray[Any]:
        """As an array on the received bytes.

        Args:
            dtype: numpy's dtype for what numpy itself does not know (BF16: that of ml_dtypes).

        Raises:
            ValueError: BF16, and no dtype was given.
        """
        if dtype is None and self.dtype == "BF16":
            raise ValueError("dtype: wanted numpy's dtype for bfloat16 (ml_dtypes has one), got None")
        return np.frombuffer(self.data, dtype or DTYPES[self.dtype]).reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """As a CPU tensor on the received bytes; on a copy, where they are read-only."""
        import torch

        dtype = getattr(torch, DTYPES[self.dtype])
        if not self.data.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        data = bytearray(self.data) if self.data.readonly else self.data
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape)


def is_torch(x: object) -> bool:
    """Whether it is a torch tensor, without importing torch."""
    return type(x).__module__.partition(".")[0] == "torch" and hasattr(x, "data_ptr")


def dtype_of(x: Array) -> str:
    """The tensor's dtype as safetensors names it.

    Raises:
        ValueError: the format has none for it, or it is neither a numpy array nor a torch tensor.
    """
    if not (is_torch(x) or isinstance(x, np.ndarray)):
        raise ValueError(f"tensor: wanted a numpy array or a torch tensor, got {type(x).__name__}")
    name = str(x.dtype).removeprefix("torch.") if is_torch(x) else x.dtype.name
    if name not in NAMES:
        raise ValueError(f"dtype: wanted one of {', '.join(NAMES)}, got {name}")
    return NAMES[name]


def pack(tensors: Mapping[str, Array]) -> list[memoryview]:
    """The buffers whose concatenation is the tensors in safetensors' format; they share the tensors' memory.

    Raises:
        ValueError: as `dtype_of`.
    """
    header: dict[str, Any] = {}
    buffers: list[memoryview] = []
    at = 0
    for name, x in tensors.items():
        data = _bytes(x)
        header[name] = {"dtype": dtype_of(x), "shape": list(x.shape), "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
        if data.nbytes:
            buffers.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return [memoryview(len(text).to_bytes(8, "little") + text), *buffers]


def unpack(body: bytes | bytearray | memoryview) -> dict[str, Raw]:
    """The tensors that lie in these bytes.

    Raises:
        BadTensors: the bytes are not tensors in safetensors' format; says why.
    """
    view = memoryview(body).cast("B")
    if view.nbytes < 8:
        raise BadTensors(f"tensors: wanted 8 bytes or more, got {view.nbytes}")
    size = int.from_bytes(view[:8], "little")
    if size > min(MAX_HEADER, view.nbytes - 8):
        raise BadTensors(f"tensors: wanted a header of at most {min(MAX_HEADER, view.nbytes - 8)} bytes, got {size}")
    try:
        header = json.loads(bytes(view[8 : 8 + size]), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BadTensors(f"tensors: wanted a header of JSON, got {error}") from None
    if not isinstance(header, dict):
        raise BadTensors(f"tensors: wanted a JSON object, got {type(header).__name__}")
    header.pop("__metadata__", None)  # words for people, as the format has it
    data = view[8 + size :]
    found = {name: _entry(name, entry, data.nbytes) for name, entry in header.items()}
    at = 0
    for name, (_, _, start, stop) in sorted(found.items(), key=lambda item: item[1][2:]):
        if start != at:
            raise BadTensors(f"tensors: wanted {name!r} to begin at byte {at}, got {start}")
        at = stop
    if at != data.nbytes:
        raise BadTensors(f"tensors: wanted {at} bytes of data, got {data.nbytes}")
    return {name: Raw(dtype, shape, data[start:stop]) for name, (dtype, shape, start, stop) in found.items()}


def _entry(name: str, entry: object, size: int) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, start and stop of a tensor, as its header entry says and as they can be."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadTensors(f"tensors: wanted dtype, shape and data_offsets of {name!r}, got {_cut(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise BadTensors(f"tensors: wanted {name!r} of one of {', '.join(SIZES)}, got {_cut(dtype)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise BadTensors(f"tensors: wanted a shape of {name!r}, at most {MAX_DIMS} sizes, got {_cut(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise BadTensors(f"tensors: wanted offsets of {name!r} within {size} bytes, got {_cut(offsets)}")
    nbytes = math.prod(shape) * SIZES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        raise BadTensors(f"tensors: wanted {nbytes} bytes of {name!r}, got {offsets[1] - offsets[0]}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _naturals(x: object) -> bool:
    return isinstance(x, list) and all(type(i) is int and 0 <= i < 1 << 63 for i in x)


def _cut(x: object) -> str:
    return repr(x)[:80]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name twice")
    return names


def _bytes(x: Array) -> memoryview:
    """The data of a tensor, contiguous and little-endian."""
    if is_torch(x):
        import torch

        x = x.detach().cpu().contiguous().reshape(-1)
        return memoryview(x.view(torch.uint8).numpy()) if x.numel() else memoryview(b"")
    x = np.ascontiguousarray(x).reshape(-1)
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    return memoryview(x.view(np.uint8)) if x.size else memoryview(b"")
