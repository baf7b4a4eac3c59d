"""Streams: which one work is given to, and another one for a moment, without torch looking up devices each time.

torch.cuda finds a device's index, asks whether CUDA runs and builds a new object whenever it is asked for the current
stream: microseconds, some of them several times a hop.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


def current(device: int) -> torch.cuda.Stream:
    """The stream that work for this device is given to now."""
    return _stream(*torch._C._cuda_getCurrentStream(device))


class On:
    """As torch.cuda.stream: work in the block is given to this stream.

    Args:
        device: the stream's, by number.
    """

    __slots__ = ("_before", "_device", "_stream")

    def __init__(self, stream: torch.cuda.Stream, device: int) -> None:
        self._stream, self._device = stream, device
        self._before: Any = None  # a context of torch's, or which stream was current

    def __enter__(self) -> None:
        if torch.cuda.current_device() != self._device:  # then two streams change, and the device
            self._before = torch.cuda.stream(self._stream)
            self._before.__enter__()
            return
        self._before = torch._C._cuda_getCurrentStream(self._device)
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *error: object) -> None:
        if isinstance(self._before, tuple):
            number, device, kind = self._before
            torch._C._cuda_setStream(stream_id=number, device_index=device, device_type=kind)
        else:
            self._before.__exit__(*error)


@lru_cache(maxsize=64)
def _stream(number: int, device: int, kind: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(stream_id=number, device_index=device, device_type=kind)
