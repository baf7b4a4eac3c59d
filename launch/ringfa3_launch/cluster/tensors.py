"""Tensors as bytes and back, in the safetensors format: a JSON header that says where each lies, and the data.

Reading trusts nothing: every length, offset, shape and dtype is checked against the bytes that are there, before
anything is made of them. Neither direction copies the data of contiguous tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
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
DIMENSIONS = 16


class BadTensors(ValueError):
    """Bytes that are not what they claim to be."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a header: dtype (a key of SIZES), shape, and where in the data it begins and ends (bytes)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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
    data = view[8 + size :]
    found = read_header(bytes(view[8 : 8 + size]), data.nbytes)
    return {name: Raw(each.dtype, each.shape, data[each.begin : each.end]) for name, each in found.items()}


def read_header(
    text: bytes, length: int, *, dtypes: Collection[str] = tuple(SIZES), dimensions: int = DIMENSIONS
) -> dict[str, Entry]:
    """The tensors that a header describes, in its order.

    Args:
        text: JSON.
        length: of the data that follow, in bytes.
        dtypes: those that are taken, of SIZES.
        dimensions: of a tensor, at most.

    Raises:
        BadTensors: it is not a header of exactly those data, without overlaps and holes; says why.
    """
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and numbers of too many digits
        raise BadTensors(f"tensors: wanted a header of JSON, got {error}") from None
    if not isinstance(header, dict):
        raise BadTensors(f"tensors: wanted a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})  # words for people, as the format has it
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadTensors("tensors: wanted __metadata__ of strings by name, got something else")
    found = {name: _entry(_cut(name), entry, length, dtypes, dimensions) for name, entry in header.items()}
    at = 0
    for name, each in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if each.begin != at:
            raise BadTensors(f"tensors: wanted {_cut(name)} to begin at byte {at}, got {each.begin}")
        at = each.end
    if at != length:
        raise BadTensors(f"tensors: wanted {at} bytes of data, got {length}")
    return found


def _entry(name: str, entry: object, length: int, dtypes: Collection[str], dimensions: int) -> Entry:
    """A tensor, as its header entry says and as it can be."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadTensors(f"tensors: wanted dtype, shape and data_offsets of {name}, got {_cut(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise BadTensors(f"tensors: wanted {name} of one of {', '.join(dtypes)}, got {_cut(dtype)}")
    if not _sizes(shape) or len(shape) > dimensions:
        raise BadTensors(f"tensors: wanted a shape of {name}, at most {dimensions} sizes, got {_cut(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= length:
        raise BadTensors(f"tensors: wanted offsets of {name} within {length} bytes, got {_cut(offsets)}")
    nbytes = math.prod(shape) * SIZES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        raise BadTensors(f"tensors: wanted {nbytes} bytes of {name}, got {offsets[1] - offsets[0]}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(x: object) -> bool:
    """Whether it is a list of numbers that a size can be; so bounded that no product of them is long to compute."""
    return isinstance(x, list) and all(type(i) is int and 0 <= i < 1 << 48 for i in x)


def _cut(x: object) -> str:
    """What came, shortly. What is nested may be so deep that it cannot be written."""
    if isinstance(x, dict) or (isinstance(x, list) and any(isinstance(i, list | dict) for i in x)):
        return "an object" if isinstance(x, dict) else "a list of lists or objects"
    return repr(x)[:80]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name twice")
    return names


def _no_number(name: str) -> None:
    raise ValueError(name)


def _bytes(x: Array) -> memoryview:
    """The data of a tensor, contiguous and little-endian."""
    if is_torch(x):
        import torch

        x = x.detach().cpu().contiguous().reshape(-1)
        return memoryview(x.view(torch.uint8).numpy()) if x.numel() else memoryview(b"")
    x = np.ascontiguousarray(x).reshape(-1)
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    return memoryview(x.view(np.uint8)) if x.size else memoryview(b"")
