"""ringfa3.ring_flash_attn: ring-flash-attn's argument lists, layouts and returns, against one device in fp64."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ringfa3 import ring_flash_attn as rfa
from ringfa3.ring_flash_attn.varlen import ByDocument
from tests.kernels.oracle import assert_close, plain

# ring-flash-attn 0.1.8's published argument lists. ... are those that all functions end with.
COMMON = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
    "group": None,
}
INPUTS = {"func": ["q", "k", "v"], "kvpacked_func": ["q", "kv"], "qkvpacked_func": ["qkv"]}
LLAMA3 = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "heads_k_stride", "local_k_slice"]
FAMILIES = {
    "ring_flash_attn_": [],
    "zigzag_ring_flash_attn_": [],
    "stripe_flash_attn_": [],
    "ring_flash_attn_varlen_": ["cu_seqlens", "max_seqlen"],
    "zigzag_ring_flash_attn_varlen_": ["cu_seqlens", "max_seqlen"],
    "llama3_flash_attn_varlen_": LLAMA3,
}
OTHERS = {
    "llama3_flash_attn_prepare_cu_seqlens": ["cu_seqlens", "causal", "rank", "world_size"],
    "substitute_hf_flash_attn": ["process_group", "heads_k_stride"],
    "update_ring_flash_attn_params": ["cu_seqlens", "process_group"],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", INPUTS)
def test_signature_is_the_published_one(family, form):
    parameters = inspect.signature(getattr(rfa, family + form)).parameters
    required = INPUTS[form] + FAMILIES[family]
    assert list(parameters) == required + list(COMMON)
    assert {p.name: p.default for p in parameters.values() if p.default is not p.empty} == COMMON
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", OTHERS)
def test_signatures_without_defaults(name):
    parameters = inspect.signature(getattr(rfa, name)).parameters
    assert list(parameters) == OTHERS[name]
    assert all(p.default is p.empty for p in parameters.values())


def test_every_published_name_is_there():
    names = {family + form for family in FAMILIES for form in INPUTS} | set(OTHERS)
    assert names <= set(rfa.__all__)


# --- results ---------------------------------------------------------------------------------------------------------

D, HKV = 16, 2


def inputs(total: int, Hq: int, B: int = 1) -> dict[str, Tensor]:
    """Whole q, k, v and gradients of out and lse, the same on every rank."""
    g = torch.Generator().manual_seed(total + Hq)
    heads = {"q": Hq, "k": HKV, "v": HKV, "dout": Hq}
    made = {name: torch.randn(B, total, H, D, generator=g) for name, H in heads.items()}
    return made | {"dlse": torch.randn(B, Hq, total, generator=g)}


def positions(name: str, documents: list[int], world: int, rank: int) -> list[int]:
    """Which positions of the packed sequence a rank holds, as ring-flash-attn's documentation and tests deal them."""
    total = sum(documents)
    if name.startswith(("ring_flash_attn_varlen", "zigzag_ring_flash_attn_varlen")):
        starts = itertools.accumulate(documents, initial=0)
        own = name.replace("_varlen", "")
        return [
            start + i for start, n in zip(starts, documents, strict=False) for i in positions(own, [n], world, rank)
        ]
    if name.startswith("stripe"):
        return list(range(rank, total, world))
    if name.startswith("zigzag"):
        pieces = torch.arange(total).chunk(2 * world)
        return torch.cat([pieces[rank], pieces[2 * world - 1 - rank]]).tolist() if total else []
    n = total // world
    return list(range(rank * n, (rank + 1) * n))


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def one_rank(rank: int, size: int, name: str, documents: list[int], Hq: int, B: int, options: dict[str, Any]) -> Any:
    """One rank's call, on its share of the whole; returns its results and gradients."""
    mine = positions(name, documents, size, rank)
    varlen, form = "varlen" in name, name.rsplit("_", 2)[-2]
    x = inputs(sum(documents), Hq, B)
    q, k, v, dout = (x[n][:, mine].requires_grad_(n != "dout") for n in ("q", "k", "v", "dout"))
    dlse = x["dlse"][..., mine]
    given: list[Any] = [q, k, v]
    if form == "kvpacked":
        given = [q, torch.stack((k, v), 2)]
    elif form == "qkvpacked":
        given = [torch.stack((q, k, v), 2)]
    if varlen:
        given = [t[0] for t in given]
    if name.startswith("llama3"):
        prepared = rfa.llama3_flash_attn_prepare_cu_seqlens(cu(documents), options["causal"], rank, size)
        given += [*prepared[:4], 1, prepared[4]]
    elif varlen:
        given += [cu([n // size for n in documents]), max(documents) // size]
    out, lse, probabilities = getattr(rfa, name)(*given, return_attn_probs=True, **options)
    assert probabilities is None
    alone = getattr(rfa, name)(*given, **options)
    assert torch.equal(alone, out)
    assert out.shape == (q[0] if varlen else q).shape
    assert out.dtype == q.dtype
    assert lse.shape == (dlse[0] if varlen else dlse).shape
    torch.autograd.backward([out, lse], [dout[0], dlse[0]] if varlen else [dout, dlse])
    return (
        mine,
        (out[None] if varlen else out).detach(),
        (lse[None] if varlen else lse).detach(),
        q.grad,
        k.grad,
        v.grad,
    )


def visible(documents: list[int], causal: bool, window: tuple[int, int]) -> Tensor:
    """bool [1, total, total] by the definition."""
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    p = torch.arange(sum(documents))
    mask = document[:, None] == document
    ahead = p - p[:, None]  # of the row, the key is
    if causal:
        mask = mask & (ahead <= 0)
    left, right = window
    mask = mask if left == -1 else mask & (ahead >= -left)
    return (mask if right == -1 or causal else mask & (ahead <= right))[None]


def check(
    world: Any, size: int, name: str, documents: list[int], causal: bool = True, window: tuple[int, int] = (-1, -1),
    Hq: int = 4, B: int = 1, **options: Any,
) -> None:  # fmt: skip
    """All ranks' results, put together, against plain attention."""
    options |= {"causal": causal, "window_size": window}
    documents = documents if "varlen" in name else [sum(documents)]
    Hq = HKV if "_qkvpacked" in name else Hq
    ranks = world(size)(one_rank, name, documents, Hq, B, options)
    x = inputs(sum(documents), Hq, B)
    whole = {
        n: torch.full_like(x[like], torch.nan) for n, like in zip(NAMES, ("q", "dlse", "q", "k", "v"), strict=True)
    }
    for mine, *parts in ranks:
        for n, part in zip(NAMES, parts, strict=True):
            whole[n].transpose(1, 2 if n == "lse" else 1)[:, mine] = part.transpose(1, 2 if n == "lse" else 1)
    mask = visible(documents, causal, window).expand(B, -1, -1)
    kwargs = {"scale": options.get("softmax_scale"), "softcap": 0.0}
    truth, yardstick = (plain(*x.values(), mask, dtype=dtype, **kwargs) for dtype in (torch.float64, torch.float32))
    for n in NAMES:
        assert_close(n, whole[n], getattr(truth, n), getattr(yardstick, n), torch.float32)


NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["ring_flash_attn_", "zigzag_ring_flash_attn_", "stripe_flash_attn_"])
def test_batch_functions(world, family, size):
    form = list(INPUTS)[(size + list(FAMILIES).index(family)) % 3]
    check(world, size, family + form, [24 * size], B=2)


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form(world, family, form):
    check(world, 2, family + form, [16, 4, 28], softmax_scale=0.3, deterministic=True)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["ring_flash_attn_varlen_", "zigzag_ring_flash_attn_varlen_"])
def test_documents_that_are_each_dealt(world, family, size):
    lengths = [7, 0, 1, 12, 3]
    if family.startswith("zigzag"):
        lengths = [2 * n for n in lengths]
    check(world, size, family + "func", [n * size for n in lengths])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_documents_that_are_cut_where_ranks_meet(world, size, causal):
    check(world, size, "llama3_flash_attn_varlen_func", [5, 31, 0, 1, 12, 11], causal)


@pytest.mark.parametrize(
    ("name", "causal", "window"),
    [
        ("ring_flash_attn_func", True, (9, 9)),
        ("ring_flash_attn_func", False, (5, 11)),
        ("zigzag_ring_flash_attn_func", True, (9, -1)),
        ("stripe_flash_attn_func", True, (7, 0)),
        ("ring_flash_attn_varlen_func", False, (4, 2)),
        ("zigzag_ring_flash_attn_varlen_func", True, (5, 0)),
        ("llama3_flash_attn_varlen_func", True, (6, 6)),
        ("llama3_flash_attn_varlen_func", False, (3, 8)),
    ],
)
def test_windows_count_positions_of_the_whole_sequence(world, name, causal, window):
    check(world, 3, name, [18, 36, 6], causal, window)


@pytest.mark.parametrize("causal", [True, False])
def test_full_and_causal_are_told_apart(world, causal):
    check(world, 2, "ring_flash_attn_func", [20], causal)
    check(world, 2, "ring_flash_attn_varlen_func", [20, 8], causal)


# --- llama3's preparation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("documents", [[30], [7, 8, 15], [15, 15], [1] * 30, [10, 10, 10], [4, 0, 26], [0, 30, 0]])
def test_prepared_lengths_say_what_each_rank_sees(documents, world_size, causal):
    """From each rank's answer alone, which pairs of the whole sequence its rows see."""
    n = 30 // world_size
    edges = cu(documents).tolist()
    for rank in range(world_size):
        cu_q, cu_k, longest_q, longest_k, keys = rfa.llama3_flash_attn_prepare_cu_seqlens(
            cu(documents), causal, rank, world_size
        )
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (cu_q[0], cu_q[-1], cu_k[0], cu_k[-1]) == (0, n, 0, keys.stop - keys.start)
        assert (longest_q, longest_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        for i, j in itertools.pairwise(range(len(cu_q))):
            if cu_q[i] == cu_q[j]:
                continue
            first, last = rank * n + int(cu_q[i]), rank * n + int(cu_q[j]) - 1
            document = max(d for d in range(len(documents)) if edges[d] <= first)
            assert edges[document] <= first <= last < edges[document + 1]
            assert keys.start + int(cu_k[i]) == edges[document]
            end = edges[document + 1] if not causal else min(edges[document + 1], (rank + 1) * n)
            assert keys.start + int(cu_k[j]) == end


# --- refusals --------------------------------------------------------------------------------------------------------


def call(name: str, rows: int = 8, **options: Any) -> Any:
    q, k, v = (torch.randn(1, rows, H, D) for H in (4, HKV, HKV))
    given: list[Any] = [q, k, v]
    if "varlen" in name:
        given = [t[0] for t in given]
    if name.startswith("llama3"):
        cu_q, cu_k, longest_q, longest_k, keys = rfa.llama3_flash_attn_prepare_cu_seqlens(cu([rows]), True, 0, 1)
        kept = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
        options = kept | {"heads_k_stride": 1, "local_k_slice": keys} | options
    elif "varlen" in name:
        options = {"cu_seqlens": cu([rows]), "max_seqlen": rows} | options
    return getattr(rfa, name)(*given, **({"causal": True} | options))


@pytest.mark.parametrize("name", [family + "func" for family in FAMILIES])
@pytest.mark.parametrize(("argument", "value"), [("dropout_p", 1.0), ("alibi_slopes", torch.ones(3))])
def test_wrong_dropout_and_slopes_are_refused_by_name(name, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: wanted"):
        call(name, **{argument: value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zigzag_ring_flash_attn_func", {"causal": False}, "^causal: wanted True"),
        ("stripe_flash_attn_func", {"causal": False}, "^causal: wanted True"),
        ("zigzag_ring_flash_attn_varlen_func", {"causal": False}, "^causal: wanted True"),
        ("zigzag_ring_flash_attn_varlen_func", {"cu_seqlens": cu([3, 5])}, "^cu_seqlens: wanted even lengths"),
        ("ring_flash_attn_func", {"window_size": 4}, "^window_size: wanted"),
        ("ring_flash_attn_func", {"window_size": (-2, 0)}, "^window_size: wanted"),
        ("ring_flash_attn_func", {"causal": 2}, "^causal: wanted True or False, got 2"),
        ("ring_flash_attn_func", {"deterministic": "no"}, "^deterministic: wanted True or False, got 'no'"),
        ("zigzag_ring_flash_attn_func", {"causal": "yes"}, "^causal: wanted True or False"),
        ("stripe_flash_attn_func", {"return_attn_probs": "no"}, "^return_attn_probs: wanted True or False"),
        ("ring_flash_attn_varlen_func", {"deterministic": "no"}, "^deterministic: wanted True or False"),
        ("llama3_flash_attn_varlen_func", {"deterministic": "no"}, "^deterministic: wanted True or False"),
        ("ring_flash_attn_varlen_func", {"cu_seqlens": cu([3, 4])}, "^cu_seqlens: wanted q's 8 rows"),
        ("ring_flash_attn_varlen_func", {"cu_seqlens": cu([3, -1, 6])}, "^cu_seqlens: wanted 0 first"),
        ("ring_flash_attn_varlen_func", {"cu_seqlens": [0, 8]}, "^cu_seqlens: wanted torch.int32"),
        ("ring_flash_attn_varlen_func", {"max_seqlen": 7}, "^max_seqlen: wanted at least"),
        ("ring_flash_attn_varlen_func", {"max_seqlen": 8.0}, "^max_seqlen: wanted an integer"),
        ("llama3_flash_attn_varlen_func", {"heads_k_stride": 3}, "^heads_k_stride: wanted a divisor"),
        ("llama3_flash_attn_varlen_func", {"local_k_slice": slice(1, 8)}, "^local_k_slice: wanted"),
        ("llama3_flash_attn_varlen_func", {"local_k_slice": 8}, "^local_k_slice: wanted a slice"),
        ("llama3_flash_attn_varlen_func", {"cu_seqlens_q": cu([7])}, "^cu_seqlens_q: wanted 8 at the end"),
        ("llama3_flash_attn_varlen_func", {"max_seqlen_k": 7}, "^max_seqlen_k: wanted at least"),
    ],
)
def test_wrong_arguments_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        call(name, **options)


def test_wrong_lengths_and_ranks_are_refused_when_preparing():
    with pytest.raises(ValueError, match="cu_seqlens: wanted a multiple of 4 ranks"):
        rfa.llama3_flash_attn_prepare_cu_seqlens(cu([10]), True, 0, 4)
    with pytest.raises(ValueError, match="rank: wanted"):
        rfa.llama3_flash_attn_prepare_cu_seqlens(cu([8]), True, 4, 4)


def wrong_on_one(rank: int, size: int) -> str:
    """What each rank raises, when rank 1 alone gave something wrong; then, a call that is right."""
    with pytest.raises(ValueError, match="max_seqlen") as raised:
        call("ring_flash_attn_varlen_func", max_seqlen=7 if rank == 1 else 8)
    with pytest.raises(ValueError, match="causal: wanted True or False, got 'no'"):
        call("ring_flash_attn_func", causal="no" if rank == 1 else True)
    call("zigzag_ring_flash_attn_func", causal=1 if rank == 1 else True)  # the same
    call("ring_flash_attn_func")
    return str(raised.value)


def test_a_wrong_argument_of_one_rank_is_raised_on_all(world):
    for message in world(3)(wrong_on_one):
        assert "max_seqlen: wanted at least" in message


def on_meshes(rank: int, size: int) -> None:
    """A line of ranks is a group; a 2-D mesh deals heads too, which these functions' pieces know nothing of."""
    line = init_device_mesh("cpu", (size,))
    x = torch.arange(8 * 4 * D).view(1, 8, 4, D).sin()
    q, k, v = x, x.cos(), x.square()
    assert torch.equal(
        rfa.ring_flash_attn_func(q, k, v, group=line), rfa.ring_flash_attn_func(q, k, v, group=dist.group.WORLD)
    )
    plane = init_device_mesh("cpu", (1, size), mesh_dim_names=("ulysses", "ring"))
    for name in ("ring_flash_attn_func", "zigzag_ring_flash_attn_varlen_func", "llama3_flash_attn_varlen_func"):
        with pytest.raises(ValueError, match="group: wanted a ProcessGroup or a 1-D"):
            call(name, group=plane)


def test_meshes(world):
    world(2)(on_meshes)


def other_documents(rank: int, size: int) -> str:
    with pytest.raises(ValueError, match="disagree") as raised:
        call("ring_flash_attn_varlen_func", cu_seqlens=cu([4, 4] if rank else [3, 5]))
    return str(raised.value)


def test_ranks_whose_documents_differ_all_raise(world):
    assert all("ranks disagree on mask" in message for message in world(2)(other_documents))


def changed_in_place(rank: int, size: int) -> list[Tensor]:
    """cu_seqlens changed in place between two calls: the second must see the new documents."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 8, HKV, D)
    edges = cu([4, 4])
    results = []
    for middle in (4, 6):
        edges[1] = middle
        results.append(rfa.ring_flash_attn_varlen_func(q, k, v, edges, 8, causal=True))
        results.append(rfa.ring_flash_attn_varlen_func(q, k, v, cu([middle, 8 - middle]), 8, causal=True))
    return results


def test_lengths_that_were_read_are_read_again_when_they_change(world):
    for first, fresh_first, second, fresh_second in world(2)(changed_in_place):
        assert torch.equal(first, fresh_first)
        assert torch.equal(second, fresh_second)
        assert not torch.equal(first, second)


def test_by_document_deals_every_position_once():
    from ringfa3.layout import Zigzag, deal

    layout = ByDocument((12, 0, 4, 8), Zigzag())
    dealing = deal(layout, 24, 2)
    assert dealing.positions(0).tolist() == [0, 1, 2, 9, 10, 11, 12, 15, 16, 17, 22, 23]
    with pytest.raises(ValueError, match="sum to 23"):
        layout.runs(23, 2, 0)


# --- Hugging Face ----------------------------------------------------------------------------------------------------

DOCUMENTS = [11, 0, 6, 7]


def tiny(window: int | None = None) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, attn_implementation="eager",
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def documents_mask(window: int | None) -> Tensor:
    mask = visible(DOCUMENTS, True, (-1 if window is None else window - 1, 0))
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None]


def hugging_face_rank(rank: int, size: int, window: int | None) -> Any:
    """Logits and gradients of this rank's piece of a packed sequence."""
    from transformers import modeling_flash_attention_utils as flash
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = flash._flash_attention_forward, {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS}
    group = dist.group.WORLD
    rfa.substitute_hf_flash_attn(group, 1)
    try:
        model = tiny(window)
        model.config._attn_implementation = "flash_attention_2"
        total = sum(DOCUMENTS)
        ids = (torch.arange(total) * 7 % 61)[None].chunk(size, 1)[rank]
        position_ids = torch.cat([torch.arange(n) for n in DOCUMENTS])[None].chunk(size, 1)[rank]
        with pytest.raises(ValueError, match="cu_seqlens: wanted update_ring_flash_attn_params"):
            model(input_ids=ids, position_ids=position_ids, use_cache=False)
        rfa.update_ring_flash_attn_params(cu(DOCUMENTS), group)
        logits = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
        logits.square().sum().backward()
        gradient = model.model.embed_tokens.weight.grad
        dist.all_reduce(gradient)
        refused = []
        for wrong in ({"attention_mask": torch.zeros_like(ids)}, {"input_ids": ids.expand(2, -1)}):
            with pytest.raises(ValueError, match="wanted") as raised:
                model(**({"input_ids": ids, "use_cache": False} | wrong))
            refused.append(str(raised.value))
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        model.train()
        dropped = []
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            dropped.append(model(input_ids=ids, position_ids=position_ids, use_cache=False).logits)
        assert torch.equal(dropped[0], dropped[2])
        assert not torch.equal(dropped[0], dropped[1])
        assert not torch.equal(dropped[0], logits)
        q, k, v = torch.randn(3, 1, ids.shape[1], 2, 16)
        direct = flash._flash_attention_forward(q, k, v, None, ids.shape[1], True)
        same = rfa.ring_flash_attn_func(q, k, v, causal=True)
        assert direct.shape == same.shape
        assert torch.equal(direct, same) is False  # which knows no documents
        with pytest.raises(ValueError, match="flag: wanted True or False, got 'no'"):
            rfa.use_ring_attn("no")
        rfa.use_ring_attn(False)
        alone = ALL_ATTENTION_FUNCTIONS["flash_attention_2"].__wrapped__
        assert alone is own[1]["flash_attention_2"]
        return logits.detach(), gradient, refused
    finally:
        rfa.use_ring_attn(True)
        flash._flash_attention_forward = own[0]
        for name, function in own[1].items():
            ALL_ATTENTION_FUNCTIONS[name] = function
        rfa.hugging_face._NOW.substituted, rfa.hugging_face._NOW.documents = False, None


@pytest.mark.parametrize(("size", "window"), [(2, None), (2, 5)])
def test_hugging_face_model(world, size, window):
    ranks = world(size)(hugging_face_rank, window)
    logits = torch.cat([rank[0] for rank in ranks], 1)
    model = tiny(window)
    ids = (torch.arange(sum(DOCUMENTS)) * 7 % 61)[None]
    position_ids = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    expected = model(input_ids=ids, position_ids=position_ids, attention_mask=documents_mask(window)).logits
    expected.square().sum().backward()
    torch.testing.assert_close(logits, expected.detach(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ranks[0][1], model.model.embed_tokens.weight.grad, atol=2e-4, rtol=1e-3)
    for rank in ranks:
        assert "attention_mask: wanted None" in rank[2][0]
        assert "q: wanted batch size 1" in rank[2][1]
