"""transformers' Trainer within context_parallel: the recipe of docs/training.md, at any dp x cp, equals one process."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ringfa3.integrations.context_parallel import context_parallel
from tests.ring.test_context_parallel import alone, batch
from tests.ring.test_transformers import DOCUMENTS, TOLERANCE, S, build, worst

pytest.importorskip("accelerate")

ROWS = 8
LONG = 500.0  # seconds that importing accelerate may take on a busy machine


class Packed(Dataset[dict[str, Tensor]]):
    """Packed sequences, whose numbers of targets differ."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 61, (S,), generator=torch.Generator().manual_seed(i))
        position_ids = torch.cat([torch.arange(n) for n in DOCUMENTS])
        labels = ids.masked_fill(position_ids == 0, -100)
        labels[2 : 3 + 3 * i] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": position_ids}


def surroundings(rank: int, size: int) -> dict[str, str]:
    """What torchrun would tell accelerate; the ranks have met already."""
    who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 1}
    return {name: str(value) for name, value in who.items()} | {"MASTER_ADDR": "127.0.0.1"}


def trained(rank: int, size: int, dp: int, folder: str) -> tuple[list[float], dict[str, Tensor]]:
    """The losses that Trainer logs over two steps of two accumulated batches each, and the weights after them."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    class Recipe(Trainer):  # type: ignore[misc]  # transformers is untyped
        """As in docs/training.md: sequences are dealt to dp ranks, and the ranks of a cp axis get the same."""

        mesh: DeviceMesh

        def get_train_dataloader(self) -> DataLoader[Any]:
            dp = self.mesh["dp"]
            sampler = DistributedSampler(
                self.train_dataset, num_replicas=dp.size(), rank=dp.get_local_rank(), shuffle=False
            )
            return DataLoader(
                self.train_dataset, batch_size=self.args.train_batch_size, sampler=sampler,
                collate_fn=self.data_collator,
            )  # fmt: skip

    with mock.patch.dict(os.environ, surroundings(rank, size)):
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=ROWS // dp // 2, gradient_accumulation_steps=2, max_steps=2,
            learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
            save_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True, use_cpu=True,
            ddp_find_unused_parameters=False,
        )  # fmt: skip
        model = build("llama")
        trainer = Recipe(model=model, args=arguments, train_dataset=Packed())
        trainer.mesh = init_device_mesh("cpu", (dp, size // dp), mesh_dim_names=("dp", "cp"))
        with context_parallel(model, trainer.mesh["cp"]):
            trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process, which other tests use
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def accelerated(rank: int, size: int, precision: str) -> tuple[float, float, float]:
    """With accelerate alone: this rank's loss, one process's, and the largest difference of any gradient."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    wanted, gradients = alone("llama", 1, "packed", None)
    with mock.patch.dict(os.environ, surroundings(rank, size)):
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model = build("llama")
        wrapped, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        with context_parallel(wrapped):
            loss = wrapped(**batch(0, "packed")).loss
            accelerator.backward(loss)
    AcceleratorState._reset_state(reset_partial_state=True)
    difference = max(worst(p.grad, gradients[name]) for name, p in model.named_parameters())
    return loss.item(), wanted, difference


def test_accelerate(world: Any) -> None:
    for loss, wanted, difference in world(2)(accelerated, "no", timeout=LONG):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert difference < TOLERANCE
    for loss, wanted, _ in world(2)(accelerated, "bf16", timeout=LONG):  # autocast
        assert loss == pytest.approx(wanted, rel=0.02)


def test_trainer(world: Any, tmp_path: Any) -> None:
    ((wanted, weights),) = world(1)(trained, 1, str(tmp_path), timeout=LONG)
    before = dict(build("llama").named_parameters())
    assert max(worst(weights[name], before[name].detach()) for name in weights) > 0.01
    assert len(wanted) == 2
    for size, dp in ((2, 1), (4, 2)):
        for losses, got in world(size)(trained, dp, str(tmp_path), timeout=LONG):
            assert losses == pytest.approx(wanted, rel=1e-5)
            assert max(worst(got[name], weights[name]) for name in weights) < TOLERANCE
