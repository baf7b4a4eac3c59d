"""Weights shared along tp, caches along cp: tokens are transformers' own, for every family that has a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ringfa3.inference.engine import Engine
from ringfa3.inference.ranks import Ranks
from ringfa3.inference.runner import Runner
from ringfa3.inference.sampling import Sampling
from ringfa3.inference.tensor import split
from ringfa3_kernels import Unsupported
from tests.inference import tiny
from tests.inference.families import CONFIGS, build
from tests.inference.test_runner import answer, asked, fill, judge, references
from tests.inference.toy import Heard

SPLIT = [name for name in CONFIGS if name != "gpt_oss"]
LENGTHS = (5, 33, 17, 40)
SHAPES = ((1, 2), (2, 1), (2, 2))
_meshes: dict[tuple[int, int], DeviceMesh] = {}  # of this process: groups are not made again for every test


def mesh_of(cp: int, tp: int) -> DeviceMesh:
    if (cp, tp) not in _meshes:
        _meshes[cp, tp] = init_device_mesh("cpu", (cp, tp), mesh_dim_names=("cp", "tp"))
    return _meshes[cp, tp]


def converse(rank: int, size: int, name: str, shape: tuple[int, int], chunk: int) -> dict[str, Any]:
    runner = Runner(
        build(name), group=mesh_of(*shape), pages=60, page_size=4, prefill="auto" if chunk > 99 else "pass-q"
    )
    said: dict[str, Any] = {}
    prompts = [asked(number, count) for number, count in enumerate((37, 1, 12))]
    for number in range(3):
        runner.create(number)
    first = torch.stack([fill(runner, number, ids, chunk) for number, ids in enumerate(prompts)])
    tokens, logits = answer(runner, range(3), first, 6)
    for number, ids in enumerate(prompts):
        said[f"prompt {number}"] = ids, tokens[number], logits[number]
    runner.fork(0, 5)
    more = [tokens[0][-1], *asked(9, 10)]
    (again,), logits = answer(runner, [5], fill(runner, 5, more, chunk)[None], 5)
    said["fork"] = prompts[0] + tokens[0][:-1] + more, again, logits[0]
    for number in (0, 1, 2, 5):
        runner.free(number)
    assert [runner.pages.used(r) for r in range(runner.pages.world)] == [0] * shape[0]
    return said


@pytest.mark.parametrize(
    ("name", "shape"), [("llama", (2, 1)), *((name, shape) for shape in ((1, 2), (2, 2)) for name in SPLIT)]
)
def test_tokens_are_those_of_transformers(world: Any, name: str, shape: tuple[int, int]) -> None:
    chunk = (1 << 20, 8)[(sum(shape) + SPLIT.index(name)) % 2]
    said, *others = world(shape[0] * shape[1])(converse, name, shape, chunk)
    single, exact = references(name)
    for before, tokens, logits in said.values():
        judge(single, exact, before, tokens, logits)
    for other in others:  # bitwise: any rank could sample
        for key, (_, tokens, logits) in said.items():
            assert other[key][1] == tokens
            assert torch.equal(other[key][2], logits)


def biased(rank: int, size: int) -> list[float]:
    """A model of qwen2's kind whose biases are not zeros, and with tied embeddings; its logits' largest error."""
    model, whole = (build("qwen2") for _ in range(2))
    for each in (model, whole):
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        each.lm_head.weight = each.model.embed_tokens.weight
    ids = asked(3, 20)
    runner = Runner(model, group=mesh_of(1, size), pages=8, page_size=4)
    runner.create(0)
    logits = runner.prefill(0, ids)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        wanted = whole(torch.tensor([ids])).logits[0, -1]
    return [float((logits - wanted).abs().max()), float(wanted.std())]


def test_biases_are_added_once_and_tied_weights_stay_tied(world: Any) -> None:
    for error, spread in world(2)(biased):
        assert error < 1e-3 * spread


def sizes(rank: int, size: int, shape: tuple[int, int]) -> tuple[int, int, int, Any]:
    """Bytes of the weights and of the cache on this rank, and its KV heads; the vocabulary's rows."""
    model = build("llama")
    runner = Runner(model, group=mesh_of(*shape), pages=8, page_size=4)
    assert Runner(model, group=mesh_of(*shape), pages=8, page_size=4).cache.nbytes == runner.cache.nbytes  # not again
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights, runner.cache.nbytes, runner.cache.kv_heads, model.model.embed_tokens.weight.shape[0]


def test_each_rank_keeps_its_slice(world: Any) -> None:
    whole = build("llama")
    norms = sum(p.nbytes for name, p in whole.named_parameters() if "norm" in name)
    weights = sum(p.nbytes for p in whole.parameters()) - norms
    single = Runner(build("llama"), pages=8, page_size=4).cache.nbytes
    vocab = 4 * 64 * 2  # bytes of a row in both tables: 97 rows are not even
    for at, (kept, cache, kv_heads, rows) in enumerate(world(2)(sizes, (1, 2))):
        assert (rows, kv_heads, cache) == ((49, 48)[at], 1, single // 2)
        assert abs(kept - norms - weights / 2) <= vocab / 2
    (kept, cache, kv_heads, rows), *_ = world(2)(sizes, (2, 1))
    assert (kept, cache, kv_heads, rows) == (weights + norms, single, 2, 97)
    for kept, cache, kv_heads, _ in world(4)(sizes, (1, 4)):  # more ranks than heads of keys: two hold the same
        assert (kv_heads, cache) == (1, single // 2)
        assert kept < norms + weights * 0.3


def test_more_ranks_than_key_heads(world: Any) -> None:
    said, *_ = world(4)(converse, "llama", (1, 4), 8)
    single, exact = references("llama")
    for before, tokens, logits in said.values():
        judge(single, exact, before, tokens, logits)


def refusals(rank: int, size: int) -> None:
    mesh = mesh_of(1, size)
    with pytest.raises(Unsupported, match=r"model 'gpt_oss': transformers' tensor-parallel plan.*self_attn.q_proj"):
        Runner(build("gpt_oss"), group=mesh, pages=8)
    model = build("llama")
    model._tp_plan = {name: style for name, style in model.tp_plan.items() if "down_proj" not in name}
    with pytest.raises(Unsupported, match=r"leaves out mlp.down_proj"):
        Runner(model, group=mesh, pages=8)
    model._tp_plan = model.tp_plan | {"model.norm": "sequence_parallel"}
    with pytest.raises(Unsupported, match=r"plan has \{'model.norm': 'sequence_parallel'\}"):
        Runner(model, group=mesh, pages=8)
    with pytest.raises(Unsupported, match="its 4 heads of queries and 2 of keys cannot be dealt evenly to 3 ranks"):
        split(build("llama"), Ranks(None, 3, 0))
    model = build("llama")
    Runner(model, group=mesh, pages=8)
    with pytest.raises(ValueError, match="group: wanted the mesh that the model was cut for, got tp 1"):
        Runner(model, pages=8)
    with pytest.raises(ValueError, match="group: wanted a ProcessGroup or a 1-D DeviceMesh"):
        Runner(build("llama"), group=init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp")), pages=8)


def test_refusals(world: Any) -> None:
    world(2)(refusals)


def served(rank: int, size: int, shape: tuple[int, int]) -> None:
    """Prompts together, a session of two turns, a prefill and a decode that are cancelled; nothing is left."""
    torch.set_num_threads(1)
    model = tiny.llama()
    engine = Engine(Runner(tiny.llama(), group=mesh_of(*shape), pages=40, page_size=4), chunk=16)
    if rank != 0:
        engine.serve()
        assert not engine.runner.pages.sequences
        return
    prompts = [torch.randint(1, tiny.VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
    for ids, completion in zip(prompts, engine.generate(prompts, Sampling(max_tokens=8)), strict=True):
        tiny.same_greedy(model, ids, completion.tokens, 8)
    said = prompts[1]
    for turn in range(2):
        heard = Heard()
        engine.submit(said, Sampling(max_tokens=6), session="talk", on_event=heard)
        while engine.advance():
            pass
        tiny.same_greedy(model, said, heard.tokens, 6)
        assert (heard[-1].cached_tokens > 0) == (turn > 0)
        said = said + heard.tokens + prompts[0]
    for before in (2, 12):
        cancelled = Heard()
        number = engine.submit(prompts[3], Sampling(max_tokens=60), on_event=cancelled)
        for _ in range(before):
            engine.advance()
        assert bool(cancelled) == (before == 12)
        engine.cancel(number)
        engine.advance()
        assert cancelled.finish == "cancelled"
    engine.close_session("talk")
    engine.close()
    assert not engine.runner.pages.sequences
    assert engine.stats()["pages_used"] == [0] * shape[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_engine_on_a_mesh(world: Any, shape: tuple[int, int]) -> None:
    world(shape[0] * shape[1])(served, shape)
