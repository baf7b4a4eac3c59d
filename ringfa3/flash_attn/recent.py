"""Recent: the last few things that were made of tensors and options, while those tensors live unchanged."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ringfa3_kernels.lasting import lasting

T = TypeVar("T")


class Recent(Generic[T]):
    """A bounded memory for what every layer of a model would otherwise make again: bounds of rows, host copies.

    A tensor is known by its identity and its version counter, which every in-place operation moves on, so that
    nothing is read from the device. What is made on one CUDA stream is not handed to another, and while a CUDA graph
    is captured, or torch.compile traces, everything is made anew inside: a replay sees the tensors' values of its day.

    Args:
        most: entries kept; the one that was longest unused goes first.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._made: OrderedDict[Hashable, tuple[tuple[weakref.ref[Tensor], ...], T]] = OrderedDict()

    def get(self, tensors: tuple[Tensor, ...], options: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """What `make` returned for these tensors and options last time, or returns now; it lies on the device."""
        if torch.compiler.is_compiling():
            return make()
        stream: Hashable = None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return make()
            stream = torch.cuda.current_stream(device)
        if any(x.is_inference() for x in tensors):  # they have no version
            return make()
        key = (*((id(x), x._version) for x in tensors), options, device, stream)
        found = self._made.pop(key, None)
        if found is None or any(ref() is not x for ref, x in zip(found[0], tensors, strict=True)):  # an id used again
            found = tuple(map(weakref.ref, tensors)), lasting(make, device)
        self._made[key] = found
        while len(self._made) > self._most:
            self._made.popitem(last=False)
        return found[1]
