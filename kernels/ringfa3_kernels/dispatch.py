"""Which implementation serves a call, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache, lru_cache
from types import ModuleType

import torch

from ringfa3_kernels.call import Call
from ringfa3_kernels.types import Unsupported

# In the order in which "auto" tries them on a GPU; elsewhere the other way round, because on the CPU Triton is its slow
# interpreter. The reference is never chosen unless named: it is quadratic in memory.
AUTO = ("hopper", "portable", "aten")
IMPLEMENTATIONS = (*AUTO, "reference")


@cache
def load(name: str) -> ModuleType | str:
    """The implementation's module, or the reason why it cannot be imported here."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl: wanted 'auto' or one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {name!r}")
    if name in ("hopper", "portable") and not has_triton():
        return "triton is not installed"
    return importlib.import_module(f"ringfa3_kernels.{name}")


@cache
def has_triton() -> bool:
    """Whether kernels written in Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def why_not(name: str, call: Call) -> str | None:
    """What the implementation lacks for this call, or None if it serves it."""
    module = load(name)
    if isinstance(module, str):
        return module
    if call.direction == "decode" and not hasattr(module, "decode"):
        return "it has no decode"
    if call.blocks and not hasattr(module, "attend_quantized"):
        return "it reads no fp8"
    reason: str | None = module.unsupported(call)
    return reason


@lru_cache(maxsize=4096)
def choose(call: Call, impl: str = "auto") -> ModuleType:
    """The module that serves the call: the named one or, for "auto", the first that does.

    Raises:
        Unsupported: the named implementation, or every one, lacks something; the message says what.
        ValueError: no implementation has that name.
    """
    reasons = []
    order = AUTO if call.device == "cuda" else AUTO[::-1]
    for name in order if impl == "auto" else (impl,):
        reason = why_not(name, call)
        if reason is None:
            module = load(name)
            assert isinstance(module, ModuleType)
            return module
        reasons.append(f"{name}: {reason}")
    who = "no implementation serves" if impl == "auto" else f"{impl!r} was named and does not serve"
    raise Unsupported(f"{who} this {call.direction} call ({'; '.join(reasons)})")


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability of a device, (0, 0) for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
