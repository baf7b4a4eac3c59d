"""Whom one device is measured against: torch's own attention and, where it can be imported, FlashAttention-3."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringfa3_launch.bench.case import Case

Outputs = tuple[Tensor, ...]  # out, or (out, dq, dk, dv), [B, S, H, D] each


class Missing(RuntimeError):
    """A peer that cannot run a case here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """One rank's shard: q [1, n, Hq, D]; k, v [1, n, Hkv, D]. Backward they ask for gradients, and dout is as q."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.q, self.k, self.v, self.dout))


@dataclass(frozen=True)
class Peer:
    """A peer ready to be called: `call()` gives what `ours` gives, in the positions' order of the inputs."""

    call: Callable[[], Outputs]
    session: Callable[[], AbstractContextManager[Any]] = nullcontext


def prepare(name: str, case: Case, inputs: Inputs) -> Peer:
    """The one-device peer of that name on the whole sequence.

    Raises:
        Missing: it cannot run the case here.
    """
    return _fa3(case, inputs) if name == "fa3" else _sdpa(name, case, inputs)


def both(attend: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case, inputs: Inputs) -> Callable[[], Outputs]:
    """A call that runs attend on [B, S, H, D] forward, or forward and backward."""
    x = inputs
    if case.direction == "fwd":

        def forward() -> Outputs:
            with torch.no_grad():
                return (attend(x.q, x.k, x.v),)

        return forward

    def forward_backward() -> Outputs:
        out = attend(x.q, x.k, x.v)
        return (out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v), x.dout))

    return forward_backward


def _sdpa(name: str, case: Case, inputs: Inputs) -> Peer:
    cuda = inputs.q.device.type == "cuda"
    if name == "sdpa-cudnn" and not cuda:
        raise Missing("cuDNN needs an NVIDIA GPU")
    backend = {
        "sdpa-math": SDPBackend.MATH,
        "sdpa-flash": SDPBackend.FLASH_ATTENTION,
        "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    }[name]
    plain = case.mask in ("causal", "full")
    mask: Tensor | None = None
    if name == "sdpa-math":
        _refuse_quadratic(case, inputs)
        if not plain:
            mask = _mask(case, inputs.q.device)
    elif not plain:
        raise Missing(f"takes no mask but causal (mask {case.mask})")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=case.mask == "causal", enable_gqa=grouped)
        return out.transpose(1, 2)

    return Peer(both(attend, case, inputs), lambda: sdpa_kernel(backend))


def _refuse_quadratic(case: Case, inputs: Inputs) -> None:
    """The maths backend holds S x S scores in fp32, and as much again for the softmax; three times that backward."""
    need = 8.0 * case.Hq * case.seqlen**2 * (3 if case.direction == "fwd+bwd" else 1)
    free = free_bytes(inputs.q.device)
    if need > 0.5 * free:
        raise Missing(f"S x S scores would need about {need / 2**30:.0f} GiB of {free / 2**30:.0f} GiB free")


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation could still get."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _mask(case: Case, device: torch.device) -> Tensor:
    import numpy as np

    from ringfa3_kernels import Visible

    bounds = case.visible.bounds(np.arange(case.seqlen), case.seqlen)
    lo, hi = (torch.from_numpy(x).to(device, torch.int32) for x in bounds)
    return Visible(lo, hi).mask(case.seqlen)


def _fa3(case: Case, inputs: Inputs) -> Peer:
    try:
        fa3 = importlib.import_module("flash_attn_interface")
    except (ImportError, OSError, RuntimeError) as error:
        raise Missing(f"flash_attn_interface cannot be imported: {error}") from None
    kind, _, value = case.mask.partition("=")
    if kind == "documents":
        raise Missing("packed documents go through another function of its")
    options: dict[str, Any] = {"causal": case.mask != "full"}
    if kind == "window":
        options["window_size"] = (int(value) - 1, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fa3.flash_attn_func(q, k, v, **options)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    if case.direction == "fwd" or _differentiable(attend(inputs.q, inputs.k, inputs.v)):
        return Peer(both(attend, case, inputs))
    if not hasattr(fa3, "_flash_attn_backward"):
        raise Missing("this flash_attn_interface has no backward")
    x = inputs

    def forward_backward() -> Outputs:  # a build without autograd: its two halves by hand
        with torch.no_grad():
            out, lse = fa3._flash_attn_forward(x.q, x.k, x.v, **options)[:2]
            grads = [torch.empty_like(t) for t in (x.q, x.k, x.v)]
            named = dict(zip(("dq", "dk", "dv"), grads, strict=True))
            fa3._flash_attn_backward(x.dout, x.q, x.k, x.v, out, lse, **named, softmax_scale=case.D**-0.5, **options)
        return (out, *grads)

    return Peer(forward_backward)


def _differentiable(out: Tensor) -> bool:
    """Whether backward would work: torch gives operators that have none a node that says so when it is too late."""
    return out.grad_fn is not None and "NotImplemented" not in type(out.grad_fn).__name__
