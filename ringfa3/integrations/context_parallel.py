"""context_parallel: a transformers model is given whole sequences, which ranks share; no loss is to be rescaled.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "cp"))
    with context_parallel(model, mesh):  # model: plain, in DistributedDataParallel, or after fully_shard
        loss = model(input_ids=ids, labels=ids, position_ids=position_ids).loss
        loss.backward()

A pass: check what the model is given, compare it along the cp axis, give the model this rank's shard of it
(`sequence_parallel`'s machinery), and let its loss function divide by what makes averaged gradients right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ringfa3.fp8 import Fp8
from ringfa3.integrations.ranks import Ranks, ranks_of
from ringfa3.integrations.transformers import SHARDED, Call
from ringfa3.integrations.whole import IGNORED, Whole, read
from ringfa3.integrations.words import check_call, check_rows, implementations
from ringfa3.layout import Layout
from ringfa3.mask import Mask
from ringfa3.plan import Plan
from ringfa3.plan import plan as make_plan
from ringfa3.shards import Group


@contextmanager
def context_parallel(
    model: torch.nn.Module,
    mesh: Group = None,
    *,
    layout: str | Layout = "zigzag",
    gradients: str = "mean",
    transport: str = "auto",
    deterministic: bool = False,
    impl: str = "auto",
    fp8: Fp8 | None = None,
    agree: bool = True,
) -> Iterator[ContextParallel]:
    """Within, model(...) takes whole sequences, the same on every rank of the cp axis; each rank computes its shard.

    The model's arguments, all of the whole sequence:

    - input_ids [B, S] (or inputs_embeds [B, S, hidden]), the same on each rank of the cp axis (compared).
    - labels [B, S] as transformers has them: they are shifted here, once, before they are sharded. Or shift_labels
      [B, S]. -100 counts nowhere.
    - position_ids [1 or B, S]: where they restart at 0, packed documents begin. Or documents, as `Mask` has them
      (lengths, or lengths per batch row), which need not be read back from a GPU.
    - attention_mask [B, S]: padding. Ones beside position_ids that restart do not join the documents.
    - num_items_in_batch: the number of targets to divide by, in the place of those of this pass.

    The loss that comes back has, on every rank of the mesh, the value and (with `gradients`) the gradients that one
    rank would have computed from all the mesh's sequences:

    - its value is sum(loss of each valid target) / valid targets, over all ranks of the mesh: with a cp axis alone (a
      1-D mesh, a ProcessGroup) those of this sequence, with a dp axis too those of all dp ranks' sequences, so that a
      target counts the same wherever it lies. With num_items_in_batch that is the divisor.
    - its gradients are right once they are averaged over the mesh's ranks, which is what DistributedDataParallel over
      all ranks and `fully_shard` (over the mesh, flattened or 2-D) do. Ranks beyond the mesh (a 1-D cp mesh inside a
      larger data-parallel group) are averaged like those of any data-parallel job: a mean of the sequences' means.
      gradients="sum": right once they are summed over the mesh's ranks (your own all-reduce; a gradient divide
      factor of 1).

    So neither loss nor gradients are to be multiplied by anything. Logits are this rank's rows:
    `context.plan.unshard(out.logits)` has all of them, `context.plan.positions` says which these are.

    A backward pass that recomputes (activation checkpointing) belongs within as well.

    Args:
        model: a transformers model, or DistributedDataParallel or a compiled module around one.
        mesh: a DeviceMesh with an axis "cp" (or "ulysses" and "ring") and any of "dp", "dp_replicate", "dp_shard"; a
            1-D mesh, a ProcessGroup or None (all ranks): cp alone.
        layout: how the sequence is dealt to the ranks of the cp axis; see `ringfa3.plan`.
        gradients: "mean" or "sum": what is done with them over the ranks of the mesh.
        transport, deterministic, impl, fp8: as `ring_attention` has them.
        agree: compare what the ranks of the cp axis are given, every pass (an all-reduce of some bytes, and the host
            waits for it). False: ranks given different tokens compute something that means nothing.

    Raises:
        ValueError: another model or mesh. Calls of the model raise it, on every rank of the mesh, for arguments that
            are wrong somewhere or cannot be honoured, and name them.
    """
    if gradients not in ("mean", "sum"):
        raise ValueError(f"gradients: wanted 'mean' or 'sum', got {gradients!r}")
    inner = unwrapped(model)
    check_rows(inner)
    ranks = ranks_of(mesh)
    options = {"transport": transport, "deterministic": deterministic, "impl": impl, "fp8": fp8}
    context = ContextParallel(inner, ranks, layout, ranks.size if gradients == "mean" else 1, options, agree)
    before = implementations(inner.config)
    inner.set_attn_implementation(SHARDED)
    if inner.config._attn_implementation != SHARDED:
        raise ValueError(f"model: wanted one that uses transformers' AttentionInterface, got {type(inner).__name__}")
    own_loss = inner.__dict__.get("_loss_function")
    inner.loss_function = context.loss_function
    hooks = (
        inner.register_forward_pre_hook(context.begin, with_kwargs=True),
        inner.register_forward_hook(context.end, always_call=True),
    )
    try:
        yield context
    finally:
        for hook in hooks:
            hook.remove()
        if own_loss is None:
            del inner._loss_function
        else:
            inner.loss_function = own_loss
        inner.set_attn_implementation(before)


def unwrapped(model: torch.nn.Module) -> Any:
    """The transformers model in DistributedDataParallel or a compiled module.

    Raises:
        ValueError: there is none.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        held = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if not isinstance(held, torch.nn.Module):
            raise ValueError(f"model: wanted a transformers.PreTrainedModel, got {type(inner).__name__}")
        inner = held
    return inner


@dataclass
class _Loss:
    """The loss of one pass: what its targets are, and what has come of it."""

    targets: Tensor  # int64 [B, n], this rank's
    divisor: Tensor  # of the sum of this rank's losses
    result: Tensor | None = None


class ContextParallel:
    """The passes of the model given to context_parallel; yielded, for its plan.

    Attributes:
        plan: of the latest pass; None before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ranks: Ranks,
        layout: str | Layout,
        averaged: int,
        options: dict[str, Any],
        agree: bool,
    ) -> None:
        self.plan: Plan | None = None
        self._names = list(inspect.signature(model.forward).parameters)
        self._own_loss: Callable[..., Tensor] = model.loss_function
        self._ranks, self._layout, self._averaged = ranks, layout, averaged
        self._options, self._agree = options, agree
        self._call: Call | None = None
        self._loss: _Loss | None = None

    def begin(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """From whole sequences to this rank's shard of them; torch's forward pre-hook."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        whole: Whole | None = None
        plan: Plan | None = None
        error: Exception | None = None
        try:
            check_call(model.config, given, also=("documents",))
            whole = read(given)
            if whole.targets is not None:
                self._check_loss(model, given)
            plan = self._planned(model, whole)
        except Exception as wrong:  # whatever it is, the others must hear of it before it is raised here
            error = wrong
        device = next(model.parameters()).device if whole is None else whole.x.device
        if self._agree:
            self._ranks.compare(None if whole is None else whole.fingerprint(), error, device)
        if whole is None or plan is None or error is not None:
            assert error is not None
            raise error
        self.plan = plan
        given |= {whole.name: plan.shard(whole.x), "position_ids": whole.shard_positions(plan), "labels": None}
        self._loss = None
        if whole.targets is not None:
            targets = plan.shard(whole.targets)
            self._loss = _Loss(targets, self._divisor(whole.targets, whole.num_items))
            given["labels"] = given["shift_labels"] = targets
        self._call = Call(model, plan, self._options)
        _, given = self._call.begin(model, (), {name: x for name, x in given.items() if x is not None})
        given.pop("shift_labels", None)  # the loss function has them, and not every model passes them on
        return (), given

    def end(self, model: PreTrainedModel, args: Any, output: Any) -> Any:
        """The loss of all ranks in the place of this one's; torch's forward hook (no output: the pass has failed)."""
        call, self._call = self._call, None
        if call is not None:
            call.end(model, args, output)
        loss, self._loss = self._loss, None
        if output is None or loss is None:
            return None
        mine: Tensor = output[0]
        if loss.result is None or (mine is not loss.result and mine.dtype == loss.result.dtype):
            raise ValueError(
                f"model: wanted one whose loss is model.loss_function's and nothing else (a router's loss is not a sum "
                f"over targets), got {type(model).__name__}"
            )
        whole = _Value.apply(mine, self._ranks.total(mine.detach()) / self._averaged)
        if isinstance(output, tuple):
            return whole, *output[1:]
        output["loss"] = whole
        return output

    def loss_function(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        """What the model calls as its loss function: its own, with this pass's targets and divisor."""
        loss = self._loss
        if loss is None:  # not a pass of ours
            return self._own_loss(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        kwargs |= {"shift_labels": loss.targets, "num_items_in_batch": loss.divisor}
        loss.result = self._own_loss(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return loss.result

    def _check_loss(self, model: PreTrainedModel, given: dict[str, Any]) -> None:
        """Raise ValueError where the loss is no sum over targets that this rank's share can be taken of."""
        missing = {"shift_labels", "num_items_in_batch"} - set(inspect.signature(self._own_loss).parameters)
        if missing:  # **kwargs do not say that it heeds them
            raise ValueError(
                f"labels: wanted a causal language model's, whose loss_function names {' and '.join(sorted(missing))} "
                f"among its parameters, got them for {type(model).__name__}"
            )

    def _planned(self, model: PreTrainedModel, whole: Whole) -> Plan:
        """How the sequence is dealt. Raises ValueError where a rank would get none of it, as models fail on that."""
        mask = Mask(causal=getattr(model.config, "is_causal", True), documents=whole.documents)
        x = whole.x
        plan = make_plan(mask, self._layout, x.shape[1], self._ranks.sequence, device=x.device)
        if 0 in plan.lengths:
            raise ValueError(f"{whole.name}: wanted positions for all {plan.world} ranks, got {x.shape[1]}")
        return plan

    def _divisor(self, targets: Tensor, num_items: Tensor | None) -> Tensor:
        """What the sum of this rank's losses is divided by: all valid targets, by how many ranks are averaged."""
        valid = (targets != IGNORED).sum()
        total = self._ranks.data_total(valid).clamp(min=1) if num_items is None else num_items
        return (total.double() / self._averaged).float()


class _Value(torch.autograd.Function):
    """A tensor with the value of another: the gradient goes to the first."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, value: Tensor) -> Tensor:
        return value.to(mine.dtype, copy=True)  # the caller may scale it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
