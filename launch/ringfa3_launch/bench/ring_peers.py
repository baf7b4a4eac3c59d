"""Whom a world of ranks is measured against: torch's context_parallel and, where importable, two ring libraries."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringfa3_launch.bench.case import RING_PEERS, Case
from ringfa3_launch.bench.peers import Inputs, Missing, Peer, both

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def applies(name: str, world: int) -> bool:
    """Whether the peer is made for worlds of this size: rings for several ranks, the others for one."""
    return (world > 1) == (name in RING_PEERS)


def layout_of(name: str) -> str:
    """How the peer wants the sequence dealt."""
    return {"ring-flash-attn-stripe": "striped", "yunchang-ulysses": "contiguous"}.get(name, "zigzag")


def prepare(name: str, case: Case, inputs: Inputs, group: dist.ProcessGroup) -> Peer:
    """The peer of that name (one of RING_PEERS) on this rank's shard, dealt as `layout_of` says.

    Raises:
        Missing: it cannot run the case here.
    """
    if case.mask != "causal":
        raise Missing(f"compared under causal masks only (mask {case.mask})")
    if case.seqlen % (2 * case.world):
        raise Missing(f"wants a length divisible by {2 * case.world}, got {case.seqlen}")
    if name.startswith("context-parallel"):
        return _context_parallel(name, case, inputs, group)
    find = _ring_flash_attn if name.startswith("ring-flash-attn") else _yunchang
    try:
        attend = find(name, case, group)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # what packages raise that lack another one
        raise Missing(f"cannot be imported: {type(error).__name__}: {error}") from None
    tell_device(inputs.q.device)
    return Peer(both(attend, case, inputs))


def _ring_flash_attn(name: str, case: Case, group: dist.ProcessGroup) -> Attend:
    # its adapters patch parts of transformers that not every version has; attention itself needs none of them
    adapters = types.ModuleType("ring_flash_attn.adapters")
    for unused in ("substitute_hf_flash_attn", "update_ring_flash_attn_params"):
        setattr(adapters, unused, None)
    sys.modules.setdefault(adapters.__name__, adapters)
    library: Any = importlib.import_module("ring_flash_attn")
    call = library.stripe_flash_attn_func if name.endswith("stripe") else library.zigzag_ring_flash_attn_func
    return lambda q, k, v: _first(call(q, k, v, causal=True, group=group))


def _yunchang(name: str, case: Case, group: dist.ProcessGroup) -> Attend:
    library: Any = importlib.import_module("yunchang")
    kernels: Any = importlib.import_module("yunchang.kernels")
    if name.endswith("ulysses"):
        if case.Hkv % case.world:
            raise Missing(f"wants key/value heads divisible by {case.world} ranks, got {case.Hkv}")
        layer = library.UlyssesAttention(group, attn_type=kernels.AttnType.FA)
        return lambda q, k, v: _first(layer(q, k, v, causal=True))
    ring: Any = importlib.import_module("yunchang.ring")
    call, kind = ring.zigzag_ring_flash_attn_func, kernels.AttnType.FA
    return lambda q, k, v: _first(call(q, k, v, causal=True, group=group, attn_type=kind))


def _first(out: Any) -> Tensor:
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _context_parallel(name: str, case: Case, inputs: Inputs, group: dist.ProcessGroup) -> Peer:
    device = inputs.q.device
    if device.type != "cuda":
        raise Missing("torch's ring covers CUDA's attention operators only")
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel

    if "fa3" in name:
        tell_device(device)
        with fa3_behind_torch():
            pass  # an import that fails does so here
    mesh = DeviceMesh.from_group(group, device.type)
    backend = SDPBackend.CUDNN_ATTENTION if name.endswith("cudnn") else SDPBackend.FLASH_ATTENTION
    # its native layout is [B, H, S, D]
    backward = case.direction == "fwd+bwd"
    q, k, v = (x.detach().transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    dout = inputs.dout.transpose(1, 2).contiguous() if backward else inputs.dout
    native = Inputs(q.requires_grad_(backward), k.requires_grad_(backward), v.requires_grad_(backward), dout)
    # shards are made by the caller; entering the context with a small buffer is what turns its attention on
    buffer = torch.zeros(1, 2 * case.world, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    @contextmanager
    def ring() -> Iterator[None]:
        torchs = context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1])
        with _rotation("alltoall" if name.endswith("alltoall") else "allgather"), sdpa_kernel(backend), torchs:
            yield

    @contextmanager
    def session() -> Iterator[None]:
        if "fa3" in name:
            with fa3_behind_torch(), ring():
                yield
        else:
            with ring():
                yield

    call = both(attend, case, native)
    return Peer(lambda: tuple(x.transpose(1, 2) for x in call()), session)


@contextmanager
def _rotation(method: str) -> Iterator[None]:
    """How torch's ring moves keys and values; it is a setting of the process."""
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(method)
    try:
        yield
    finally:
        set_rotate_method("allgather")  # torch's default


@contextmanager
def fa3_behind_torch() -> Iterator[None]:
    """torch's flash attention operators run FlashAttention-3.

    Raises:
        Missing: this torch cannot, or it is not installed.
    """
    from torch.nn import attention

    if not hasattr(attention, "activate_flash_attention_impl"):
        raise Missing("this torch cannot put FlashAttention-3 behind its operators")
    try:
        attention.activate_flash_attention_impl("FA3")
    except Exception as error:
        raise Missing(f"FlashAttention-3 behind torch: {type(error).__name__}: {error}") from None
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


def tell_device(device: torch.device) -> None:
    """Point a prebuilt FlashAttention-3 that brings a CUDA runtime of its own at this rank's GPU."""
    try:
        official: Any = importlib.import_module("fa3_official")
    except (ImportError, OSError):
        return
    if device.type == "cuda":
        official.set_device(device.index)
