"""A training step over torch's context_parallel, for examples/train_long.py --peer: the same model, data and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringfa3_launch.bench.ring_peers import fa3_behind_torch, tell_device


@contextmanager
def torchs(name: str, model: Any, mesh: DeviceMesh) -> Iterator[Callable[[dict[str, Any]], float]]:
    """Within, the function runs forward and backward over whole sequences, and returns the loss of all ranks'.

    Args:
        name: "torch" (flash attention), "torch-cudnn" or "torch-fa3".
        model: with attn_implementation "sdpa"; its gradients are averaged over all ranks of the mesh.
        mesh: dp x cp; lengths are divided by 2 * cp.

    Raises:
        Missing: this torch cannot.
    """
    from torch.distributed.tensor.experimental import context_parallel

    backend = SDPBackend.CUDNN_ATTENTION if name.endswith("cudnn") else SDPBackend.FLASH_ATTENTION
    hooks = [layer.self_attn.register_forward_pre_hook(_causal, with_kwargs=True) for layer in model.model.layers]

    def compute(batch: dict[str, Any]) -> float:
        ids = batch["input_ids"].clone()
        targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        positions = torch.arange(ids.shape[1], device=ids.device)[None].repeat(ids.shape[0], 1)
        count = (targets != -100).sum()
        dist.all_reduce(count, group=mesh.get_group("dp"))
        buffers = [ids, targets, positions]  # sharded in place
        torchs_own = context_parallel(
            mesh["cp"], buffers=buffers, buffer_seq_dims=[1] * 3, no_restore_buffers=set(buffers)
        )
        with torchs_own, sdpa_kernel(backend):
            # a mask of four dimensions is handed on as it is; the layers then drop it
            skipped = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
            logits = model(input_ids=ids, position_ids=positions, attention_mask=skipped).logits
            loss = model.loss_function(
                logits=logits, labels=targets, vocab_size=model.config.vocab_size, shift_labels=targets,
                num_items_in_batch=count.float() / mesh.size(),
            )  # fmt: skip
            loss.backward()
        value = loss.detach().clone()
        dist.all_reduce(value)
        return float(value) / mesh.size()

    with ExitStack() as stack:
        stack.callback(lambda: [hook.remove() for hook in hooks])
        if name.endswith("fa3"):
            tell_device(next(model.parameters()).device)
            stack.enter_context(fa3_behind_torch())
        yield compute


def _causal(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """No mask: torch's ring knows plain causal attention alone."""
    return args, kwargs | {"attention_mask": None, "is_causal": True}
