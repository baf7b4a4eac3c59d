"""context_parallel: loss and gradients at any cp equal one rank's, under DDP and FSDP2; wrong arguments are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ringfa3
from ringfa3.integrations.context_parallel import context_parallel
from ringfa3.integrations.ranks import ranks_of
from ringfa3.integrations.transformers import sequence_parallel
from tests.ring.test_transformers import CONFIGS, DOCUMENTS, TOLERANCE, S, build, build_hybrid, worst

B = 2  # sequences on a dp rank


def batch(row: int, case: str) -> dict[str, Tensor]:
    """What a dp rank's cp ranks are given: valid targets are spread unevenly over positions, and over dp ranks."""
    generator = torch.Generator().manual_seed(100 + row)
    ids = torch.randint(1, 61, (B, S), generator=generator)
    labels = ids.clone()
    given = {"input_ids": ids, "labels": labels}
    labels[:, 3 : 9 + 9 * row] = -100
    if case == "packed":
        given["position_ids"] = torch.cat([torch.arange(n) for n in DOCUMENTS])[None].expand(B, -1)
        labels[:, [0, *torch.tensor(DOCUMENTS).cumsum(0)[:-1].tolist()]] = -100
    elif case == "late":  # one rank holds all targets: another's mean would be 0 / 0
        labels[:, :-2] = -100
    elif case == "left":
        given["attention_mask"] = torch.ones(B, S, dtype=torch.long)
        given["attention_mask"][1, :13] = 0
        labels[1, :14] = -100  # the first token too: a padded row would predict it, from nothing
    return given


def alone(name: str, rows: int, case: str, num_items: int | None) -> tuple[float, dict[str, Tensor]]:
    """The loss of all rows' sequences in one process, and its gradients: sums over targets, divided once."""
    model = build(name)
    total, count = torch.zeros(()), 0
    for row in range(rows):
        given = batch(row, case)
        if case == "packed" and name in ("gpt_oss", "llama4"):  # their masks do not notice packed documents
            parts = [given[key].split(DOCUMENTS, 1) for key in ("input_ids", "labels")]
            pieces = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*parts, strict=True)]
        else:
            pieces = [given]
        for piece in pieces:
            total = total + model(**piece, use_cache=False, num_items_in_batch=1).loss
            count += int((piece["labels"][:, 1:] != -100).sum())
    loss = total / (num_items or count)
    loss.backward()
    return loss.item(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def step(
    rank: int, size: int, name: str, dp: int, case: str, wrapper: str, options: dict[str, Any]
) -> tuple[float, float, float]:
    """This rank's loss, one process's, and the largest difference of any gradient."""
    num_items, device = options.pop("num_items_in_batch", None), options.pop("device", "cpu")
    cp = size // dp
    loss_wanted, wanted = alone(name, dp, case, num_items)
    model: Any = build(name).to(device)
    mesh: Any = init_device_mesh(device, (dp, cp), mesh_dim_names=("dp", "cp"))
    context: Any = mesh
    if options.pop("ulysses", False):
        context = init_device_mesh(device, (dp, 2, cp // 2), mesh_dim_names=("dp", "ulysses", "ring"))
    if dp == 1 and options.pop("group", False):
        context = mesh.get_group("cp")
    if wrapper == "ddp":
        outer = DistributedDataParallel(model)
    elif wrapper in ("fsdp", "hsdp", "mixed"):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if wrapper == "mixed" else None)
        shard_over = mesh if wrapper == "hsdp" else mesh["dp", "cp"]._flatten("all")
        for layer in model.model.layers:
            fully_shard(layer, mesh=shard_over, mp_policy=policy)
        outer = fully_shard(model, mesh=shard_over, mp_policy=policy)
    else:
        outer = model
    given: dict[str, Any] = {key: x.to(device) for key, x in batch(rank // cp, case).items()}
    if num_items is not None:
        given["num_items_in_batch"] = num_items
    if options.pop("documents", False):
        del given["position_ids"]
        given["documents"] = DOCUMENTS
    with context_parallel(outer, context, **options) as ranks:
        out = outer(**given)
        out.loss.backward()
        assert ranks.plan is not None
        assert out.logits.shape[1] == ranks.plan.lengths[ranks.plan.rank]
        assert sum(ranks.plan.lengths) == S
    assert model.config._attn_implementation == "eager"
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(wanted)
    if wrapper == "none":
        for grad in grads.values():
            dist.all_reduce(grad)
    differences = [worst(full(grads[key].detach()).cpu(), wanted[key]) for key in wanted]
    return out.loss.item(), loss_wanted, max(differences)


def judged(results: list[tuple[float, float, float]]) -> None:
    for loss, wanted, difference in results:
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert loss == results[0][0]  # the same on every rank, to the bit
        assert difference < TOLERANCE


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_packed_documents_with_masked_labels(world: Any, cp: int, wrapper: str) -> None:
    judged(world(cp)(step, "llama", 1, "packed", wrapper, {}, timeout=500))  # the first calls import for a while


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "hsdp"])
def test_beside_data_parallelism(world: Any, wrapper: str) -> None:
    """Two dp ranks with different numbers of targets: each target counts the same."""
    judged(world(4)(step, "llama", 2, "packed", wrapper, {}))


@pytest.mark.parametrize("case", ["plain", "late", "left"])
def test_masks_and_targets(world: Any, case: str) -> None:
    judged(world(3)(step, "llama", 1, case, "ddp", {}))


@pytest.mark.parametrize("layout", ["contiguous", "striped", "balanced"])
def test_layouts(world: Any, layout: str) -> None:
    judged(world(2)(step, "gemma2", 1, "packed", "ddp", {"layout": layout}))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama"])
def test_families(world: Any, name: str) -> None:
    judged(world(2)(step, name, 1, "packed", "ddp", {}))


@pytest.mark.parametrize("dp", [1, 2])
def test_ulysses_and_ring(world: Any, dp: int) -> None:
    judged(world(4)(step, "llama", dp, "packed", "ddp", {"ulysses": True}))


def test_summed_gradients(world: Any) -> None:
    judged(world(4)(step, "llama", 2, "packed", "none", {"gradients": "sum"}))


def test_mixed_precision_of_fsdp(world: Any) -> None:
    """It casts what layers are given: counts of targets, masks and positions must come through."""
    ((_, _, alone),) = world(1)(step, "llama", 1, "packed", "mixed", {})  # bf16's own error
    for loss, wanted, difference in world(2)(step, "llama", 1, "packed", "mixed", {}):
        assert loss == pytest.approx(wanted, rel=0.02)
        assert difference < 2 * alone


def test_num_items_in_batch(world: Any) -> None:
    judged(world(4)(step, "llama", 2, "packed", "ddp", {"num_items_in_batch": 531}))


def test_documents_and_a_group(world: Any) -> None:
    judged(world(2)(step, "llama", 1, "packed", "ddp", {"documents": True, "group": True}))


def test_without_comparing(world: Any) -> None:
    judged(world(2)(step, "llama", 1, "packed", "ddp", {"agree": False}))


def test_one_process() -> None:
    wanted, gradients = alone("llama", 1, "packed", None)
    model = build("llama")
    with context_parallel(model):
        loss = model(**batch(0, "packed")).loss
        loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert max(worst(p.grad, gradients[key]) for key, p in model.named_parameters()) < TOLERANCE


def wrong(rank: int, size: int, case: str) -> list[str]:
    """What every rank raises, twice: the model can be called again."""
    model = build("llama")
    given: dict[str, Any] = batch(0, "packed")
    names: tuple[str, ...] = ("dp", "cp") if case.startswith("dp") else ("cp",)
    mesh = init_device_mesh("cpu", (2, size // 2) if len(names) == 2 else (size,), mesh_dim_names=names)
    if case == "tokens":
        given["input_ids"] = given["input_ids"] + rank % 2
    elif case == "dp tokens":  # in one row of the mesh alone
        given["input_ids"] = given["input_ids"] + (rank == 3)
    elif case == "labels":
        given["labels"][0, 20] = rank
    elif case == "documents":
        given["position_ids"] = torch.arange(S)[None] if rank else given["position_ids"]
    elif case == "length":
        given = {key: x[:, : S - rank] for key, x in given.items()}
    elif case == "error" and rank == 1:
        given["labels"] = given["labels"][:, 1:]
    elif case == "num_items":
        given["num_items_in_batch"] = [5, torch.tensor(6)][rank % 2]
    elif case == "dp labels" and rank < 2:  # the other row would wait for the sum of targets
        del given["labels"]
    elif case == "dp num_items" and rank < 2:
        given["num_items_in_batch"] = 5
    messages = []
    with context_parallel(model, mesh):
        for _ in range(2):
            with pytest.raises(ValueError) as caught:  # noqa: PT011  # the test looks at what it says
                model(**given)
            messages.append(str(caught.value))
        dist.barrier()
        assert torch.isfinite(model(**batch(0, "packed")).loss)
    return messages


def too_short(rank: int, size: int) -> None:
    """One position for the two ranks of a row, beside a row that has enough: both must hear of it."""
    model = build("llama").train()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "cp"))
    wanted = "input_ids: wanted positions for all 2 ranks, got 1" if rank < 2 else "got an error on another rank"
    with context_parallel(model, mesh), pytest.raises(ValueError, match=wanted):
        model(input_ids=torch.ones(1, 1 if rank < 2 else 8, dtype=torch.long))
    plan = ringfa3.plan(ringfa3.Mask(), "zigzag", size - 1)
    with pytest.raises(ValueError, match="plan: wanted positions for all 4 ranks"), sequence_parallel(model, plan):
        pass


def test_a_rank_without_positions_is_refused_on_every_rank(world: Any) -> None:
    """Models fail on an empty shard, and the other ranks would wait for its keys."""
    world(4)(too_short)


@pytest.mark.parametrize("case", ["tokens", "labels", "documents", "length", "error", "num_items"])
def test_ranks_that_differ_are_refused_on_every_rank(world: Any, case: str) -> None:
    results = world(3)(wrong, case)
    for rank, messages in enumerate(results):
        if case == "error":
            wanted = r"labels: wanted the whole" if rank == 1 else "got an error on another rank"
        else:
            wanted = "the same whole sequence on every rank of the cp axis"
        assert all(wanted in message for message in messages)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ("dp tokens", "the same whole sequence"),
        ("dp labels", "labels: wanted them on all dp ranks or on none"),
        ("dp num_items", "num_items_in_batch: wanted them on all dp ranks or on none"),
    ],
)
def test_another_row_of_the_mesh_hears_of_it(world: Any, case: str, wanted: str) -> None:
    for messages in world(4)(wrong, case):
        assert all(wanted in message for message in messages)


def refused(match: str, *, name: str = "llama", options: dict[str, Any] | None = None, **given: Any) -> None:
    model = build(name, **(options or {}))
    whole: dict[str, Any] = {**batch(0, "packed"), **given}
    with context_parallel(model), pytest.raises(ValueError, match=match):
        model(**whole)
    assert model.config._attn_implementation == "eager"
    assert "_loss_function" not in model.__dict__


def test_refusals_of_the_model_call() -> None:
    ids = batch(0, "plain")["input_ids"]
    refused("use_cache: wanted False", use_cache=True)
    refused("inputs_embeds: wanted input_ids", input_ids=None)
    refused("labels: wanted the whole sequences'", labels=ids[:, :4])
    refused("shift_labels: wanted the whole sequences'", shift_labels=ids[:, :4])
    refused("position_ids: wanted the whole sequences'", position_ids=ids[:, :4])
    refused("position_ids: wanted positions of the whole sequence", position_ids=torch.arange(S)[None] * 2)
    refused("position_ids: wanted positions of the whole sequence", documents=[S - 5, 5])
    refused("documents: wanted lengths that sum to seqlen 37, got 36", documents=[S - 1], position_ids=None)
    masks = dict.fromkeys(("full_attention", "sliding_attention"), torch.ones(2, 1, S, S))  # by kind of layer
    for name in ("llama", "gemma3"):
        refused("attention_mask: wanted the whole sequences'.* got dict", name=name, attention_mask=masks)
    refused("attention_mask: wanted ones beside documents", attention_mask=batch(0, "left")["attention_mask"],
            documents=[S], position_ids=None)  # fmt: skip
    refused("documents: wanted lengths, or lengths for each of 2 batch rows, got 3 rows", documents=[[S]] * 3,
            position_ids=None)  # fmt: skip
    refused("logits_to_keep: wanted 0", logits_to_keep=1)
    refused("logits_to_keep: wanted 0", logits_to_keep=torch.tensor([0]), labels=None)
    refused("num_items_in_batch: wanted one number", num_items_in_batch=torch.ones(2))
    refused("pixel_values: wanted none", pixel_values=torch.zeros(1, 3, 4, 4))
    refused("attn_temperature_tuning: wanted False", name="llama4", options={"floor_scale": S})
    refused("token_type_ids: wanted none", token_type_ids=ids)
    refused("output_attentions: wanted False", output_attentions=True)
    refused("output_router_logits: wanted False", name="gpt_oss", output_router_logits=True)
    rope = {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": 16,
    }
    refused("model: wanted rotary embeddings that do not depend", options=rope)


def test_a_loss_of_its_own_is_refused() -> None:
    """What would not be divided by all targets must not pass for a loss."""
    model = build("llama")
    own = model.forward

    def forward(input_ids: Any = None, position_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        out = own(input_ids=input_ids, position_ids=position_ids, labels=labels, **kwargs)
        out["loss"] = out.loss + 1
        return out

    model.forward = forward
    with context_parallel(model), pytest.raises(ValueError, match=r"whose loss is model\.loss_function's"):
        model(**batch(0, "plain"))


def test_a_loss_function_that_does_not_name_its_divisor_is_refused() -> None:
    """It would be a mean of this rank's targets."""

    def mean(logits: Tensor, labels: Tensor, vocab_size: int, shift_labels: Tensor, **kwargs: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten())

    model = build("llama")
    model.loss_function = mean
    with context_parallel(model), pytest.raises(ValueError, match="whose loss_function names num_items_in_batch"):
        model(**batch(0, "plain"))
    assert model.loss_function is mean


def test_refusals_of_models_and_meshes() -> None:
    hybrid = build_hybrid("lfm2")
    with context_parallel(hybrid), pytest.raises(ValueError, match="model: wanted attention in all layers"):
        hybrid(**batch(0, "plain"))
    with pytest.raises(ValueError, match="model: wanted a transformers"), context_parallel(torch.nn.Linear(1, 1)):
        pass
    with pytest.raises(ValueError, match="gradients: wanted"), context_parallel(build("llama"), gradients="max"):
        pass


def meshes(rank: int, size: int) -> None:
    for names in (("dp", "tp"), ("cp", "tp"), ("dp", "ring"), ("dp", "dp_shard")):
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=names)
        if names == ("dp", "ring"):
            assert ranks_of(mesh).size == size
            continue
        with pytest.raises(ValueError, match="mesh: wanted an axis 'cp'"):
            ranks_of(mesh)
    with pytest.raises(ValueError, match="mesh: wanted an axis 'cp'"):
        ranks_of(DeviceMesh("cpu", torch.arange(size), mesh_dim_names=("dp",)))
    assert ranks_of(DeviceMesh("cpu", torch.arange(size))).data == ()


def test_meshes(world: Any) -> None:
    world(4)(meshes)
