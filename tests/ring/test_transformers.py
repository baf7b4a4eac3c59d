"""transformers models in sequence_parallel equal eager attention in one process; what cannot be honoured is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, masking_utils

import ringfa3
from ringfa3 import Mask
from ringfa3.integrations import transformers as integration
from ringfa3.integrations.context_parallel import context_parallel
from ringfa3.integrations.transformers import Sight, attention, padding_documents, sequence_parallel
from ringfa3.integrations.words import has_loss_function

S = 37  # uneven on 2 and on 3 ranks
TOLERANCE = 2e-5  # of logits and gradients, relative to the largest: fp32 through two layers
SMALL: dict[str, Any] = dict(
    vocab_size=61, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0,
)  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 4,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 4}),
    "gpt_oss": ("GptOssConfig", {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "llama4": (
        "Llama4TextConfig",
        {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]},
    ),
}
DOCUMENTS = (11, 20, 6)


def build(name: str, **options: Any) -> Any:
    """The tiny model, alike on every rank, with eager attention."""
    kind, more = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(SMALL | more | options))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):
                parameter.normal_()
    return model


HYBRID: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("Qwen3NextConfig", {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0}),
    "minimax": ("MiniMaxConfig", {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2}),
}


def build_hybrid(name: str) -> Any:
    """A tiny model some of whose layers are recurrent or convolve."""
    kind, more = HYBRID[name]
    return AutoModelForCausalLM.from_config(getattr(transformers, kind)(**(SMALL | more)), attn_implementation="eager")


def inputs(case: str) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """ids [2, S], attention_mask, position_ids for one process, and which rows count [2, S]."""
    ids = torch.randint(1, 61, (2, S), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, S, dtype=torch.long)
    if case == "packed":
        position_ids = torch.cat([torch.arange(n) for n in DOCUMENTS])[None].expand(2, -1)
        return ids, None, position_ids, mask.bool()
    if case == "left":
        mask[1, :13] = 0
    elif case == "right":
        mask[0, -9:] = 0
    return ids, None if case == "plain" else mask, None, mask.bool()


def gradients(model: Any, logits: Tensor, rows: Tensor, weights: Tensor) -> dict[str, Tensor]:
    (logits * weights)[rows].sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)) if wanted.numel() else 0.0


def compare(rank: int, size: int, name: str, case: str, layout: str, checkpointing: bool) -> dict[str, float]:
    """Largest relative differences of this rank's logits, and of all ranks' summed gradients, from one process."""
    model = build(name)
    ids, mask, position_ids, rows = inputs(case)
    weights = torch.randn(2, S, 61, generator=torch.Generator().manual_seed(2))
    whole = copy.deepcopy(model)
    lengths = DOCUMENTS if case == "packed" else (S,)  # documents apart: not every model notices that they are packed
    masks = [None] * 3 if mask is None else mask.split(lengths, 1)
    parts = zip(ids.split(lengths, 1), masks, strict=False)
    wanted = torch.cat([whole(input_ids=part, attention_mask=m, use_cache=False).logits for part, m in parts], 1)
    wanted_grads = gradients(whole, wanted, rows, weights)

    plan = ringfa3.plan(Mask(documents=DOCUMENTS if case == "packed" else None), layout, S)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    with sequence_parallel(model, plan):
        given = {} if position_ids is None else {"position_ids": plan.shard(position_ids)}
        logits = model(input_ids=plan.shard(ids), attention_mask=mask, **given).logits
        mine = plan.shard(rows)
        grads = gradients(model, logits, mine, plan.shard(weights))
    differences = {"logits": worst(logits[mine], plan.shard(wanted)[mine])}
    for key, wanted_grad in wanted_grads.items():
        grad = grads[key]
        dist.all_reduce(grad)
        differences[key] = worst(grad, wanted_grad)
    assert set(grads) == set(wanted_grads)
    return differences


@pytest.mark.parametrize("case", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_eager(world: Any, name: str, case: str) -> None:
    for differences in world(2)(compare, name, case, "zigzag", False):
        assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("layout", ["contiguous", "striped", "balanced"])
def test_equals_eager_in_every_layout(world: Any, layout: str) -> None:
    for differences in world(3)(compare, "gemma2", "left", layout, False):
        assert max(differences.values()) < TOLERANCE, differences


def test_gradient_checkpointing(world: Any) -> None:
    for differences in world(2)(compare, "gemma2", "plain", "zigzag", True):
        assert max(differences.values()) < TOLERANCE, differences


def step_by_step(rank: int, size: int, name: str, case: str) -> tuple[list[float], list[int]]:
    """Differences from one process of the last logits of the prefill and of tokens after it; keys held by this rank."""
    model = build(name)
    ids, mask, _, _ = inputs(case)
    prefill = S - 7
    ids_in, mask_in = ids[:, :prefill], None if mask is None else mask[:, :prefill]
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        plan = ringfa3.plan(Mask(), "zigzag", prefill)
        differences = []
        with sequence_parallel(model, plan):
            out = model(input_ids=plan.shard(ids_in), attention_mask=mask_in, use_cache=True)
            last = torch.zeros(2, 61)
            if int(plan.positions[-1]) == prefill - 1:
                last = out.logits[:, -1].contiguous()
            dist.all_reduce(last)
            differences.append(worst(last, wanted[:, prefill - 1]))
            done = prefill
            for n in (1, 1, 3, 1, 1):  # several at once, too
                step = model(input_ids=ids[:, done : done + n], past_key_values=out.past_key_values).logits
                differences.append(worst(step, wanted[:, done : done + n]))
                done += n
    return differences, [layer.keys.shape[2] for layer in out.past_key_values.layers]


@pytest.mark.parametrize("case", ["plain", "left"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "llama4"])
def test_tokens_after_the_prefill(world: Any, name: str, case: str) -> None:
    results = world(3)(step_by_step, name, case)
    for differences, _ in results:
        assert max(differences) < TOLERANCE, differences
    held = [keys for _, keys in results]
    assert [sum(keys) for keys in zip(*held, strict=True)] == [S, S]  # nothing twice, nothing lost
    assert max(keys[0] for keys in held) <= S // 3 + 3


def train(rank: int, size: int) -> tuple[float, float]:
    """The loss over all ranks with shift_labels, and one process's."""
    model = build("llama")
    ids, *_ = inputs("plain")
    wanted = model(input_ids=ids, labels=ids).loss
    plan = ringfa3.plan(Mask(), "zigzag", S)
    labels = plan.labels(ids)
    with sequence_parallel(model, plan):
        loss = model(input_ids=plan.shard(ids), shift_labels=labels).loss * plan.loss_weight(labels) / size
    loss = loss.detach()
    dist.all_reduce(loss)
    return float(loss), float(wanted)


def test_loss_counts_every_token_once(world: Any) -> None:
    for loss, wanted in world(2)(train):
        assert loss == pytest.approx(wanted, rel=1e-5)


class Shifting(transformers.LlamaPreTrainedModel):  # type: ignore[misc]
    """A language model that shifts its labels itself, as some older ones do."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: Any = None, position_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.head(self.model(input_ids=input_ids, position_ids=position_ids, **kwargs).last_hidden_state)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss, logits


class Overriding(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A forward of its own in the place of one that heeds shift_labels."""

    forward = Shifting.forward


class Calling(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A forward that calls the one that heeds them."""

    def forward(self, **given: Any) -> Any:
        return super().forward(**given)


def test_who_heeds_shift_labels() -> None:
    model = build("llama")
    heeding = []
    for kind in (type(model), Calling, Overriding, Shifting):
        model.__class__ = kind
        heeding.append(has_loss_function(model))
    assert heeding == [True, True, False, False]


def test_a_loss_that_would_shift_labels_again_is_refused() -> None:
    model = Shifting(transformers.LlamaConfig(**SMALL))
    ids, *_ = inputs("plain")
    plan = ringfa3.plan(Mask(), "zigzag", S)
    with sequence_parallel(model, plan), pytest.raises(ValueError, match=r"shift_labels: .* got Shifting"):
        model(input_ids=ids, shift_labels=plan.labels(ids))


def test_no_quadratic_mask() -> None:
    """A layer gets a few bytes a row: a mask of S x S would be 16 GiB here."""
    long = 1 << 17
    model = build("llama", max_position_embeddings=long)
    seen = []

    def catch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["attention_mask"])
        raise KeyboardInterrupt  # the layer itself would take a while

    model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    plan = ringfa3.plan(Mask(), "zigzag", long)
    with sequence_parallel(model, plan), torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(input_ids=torch.ones(1, long, dtype=torch.long))
    assert isinstance(seen[0], Sight)
    assert sum(hop.visible.lo.numel() + hop.visible.hi.numel() for hop in seen[0].plan.hops) == 2 * long


def refused(match: str, *, name: str = "llama", documents: Any = None, seqlen: int = S, **given: Any) -> None:
    model = build(name)
    plan = ringfa3.plan(Mask(documents=documents), "zigzag", seqlen)
    with sequence_parallel(model, plan), pytest.raises(ValueError, match=match):
        model(**({"input_ids": inputs("plain")[0]} | given))
    assert model.config._attn_implementation == "eager"


def test_refusals_of_the_model_call() -> None:
    ids = inputs("plain")[0]
    holes = torch.ones(2, S, dtype=torch.long)
    holes[1, 4] = 0
    refused("attention_mask: wanted the ones of a row in one run", attention_mask=holes)
    refused("attention_mask: wanted 0 and 1", attention_mask=holes * 2)
    refused("attention_mask: wanted the whole sequence's", attention_mask=holes[:, :9])
    refused("attention_mask: wanted the whole sequence's", attention_mask=torch.ones(2, 1, S, S))
    masks = dict.fromkeys(("full_attention", "sliding_attention"), torch.ones(2, 1, S, S))  # by kind of layer
    for name in ("llama", "gemma3"):
        refused("attention_mask: wanted the whole sequence's.* got dict", name=name, attention_mask=masks)
    refused("attention_mask: wanted ones where the plan has documents", attention_mask=inputs("left")[1], documents=[S])
    refused("attention_mask: wanted padding on the left", attention_mask=inputs("right")[1], use_cache=True)
    refused("input_ids: wanted this rank's 40 of 40 positions", seqlen=40)
    refused("input_ids: wanted them or inputs_embeds", input_ids=None)
    refused("position_ids: wanted this rank's positions", position_ids=torch.arange(S)[None] // 2)
    refused("position_ids: wanted this rank's positions", position_ids=inputs("packed")[2])
    refused("position_ids: wanted", position_ids=torch.zeros(3, 2, S, dtype=torch.long))
    refused("labels: wanted shift_labels", labels=ids)
    refused("past_key_values: wanted a ShardedCache", past_key_values=DynamicCache())
    refused("output_attentions", output_attentions=True)
    refused("output_router_logits: wanted False beside", name="gpt_oss", output_router_logits=True, shift_labels=ids)


ELSEWHERE: list[tuple[str, Any, str]] = [
    ("logits_to_keep", 1, "the last rows of a shard are not the sequence's"),
    ("logits_to_keep", torch.tensor([0]), "the last rows of a shard are not the sequence's"),
    ("num_logits_to_keep", 2, "the last rows of a shard are not the sequence's"),
    ("pixel_values", torch.zeros(1, 3, 4, 4), r"nobody says how it is sharded.*\[1, 3, 4, 4\]"),
    ("cache_position", torch.arange(S), "nobody says how it is sharded"),
    ("token_type_ids", torch.zeros(2, S, dtype=torch.long), "nobody says how it is sharded"),
    ("mm_token_type_ids", torch.zeros(2, S, dtype=torch.long), "nobody says how it is sharded"),
    ("encoder_hidden_states", torch.zeros(2, S, 64), "nobody says how it is sharded"),
    ("per_layer_inputs", [torch.zeros(1)], "nobody says how it is sharded.*list"),
    ("anything", True, "nobody says how it is sharded.*bool"),
]


@pytest.mark.parametrize(("name", "value", "why"), ELSEWHERE, ids=lambda x: x if isinstance(x, str) else "")
def test_arguments_that_mean_something_else_on_a_shard(name: str, value: Any, why: str) -> None:
    """They are refused before the model sees them, by both ways to shard it; None, False and 0 are nothing."""
    match = f"^{name}: wanted .*{why}"
    refused(match, **{name: value})
    model = build("llama")
    with context_parallel(model), pytest.raises(ValueError, match=match):
        model(input_ids=inputs("plain")[0], **{name: value})
    with sequence_parallel(model, ringfa3.plan(Mask(), "zigzag", S)), torch.no_grad():
        nothing = {"logits_to_keep": 0, "pixel_values": None, "output_attentions": False, "return_dict": True}
        assert model(input_ids=inputs("plain")[0], **nothing).logits.shape == (2, S, 61)


def embedded(rank: int, size: int) -> float:
    """Embeddings in the place of tokens, without position_ids: the difference from one process."""
    model = build("gemma3")
    ids, *_ = inputs("plain")
    rows = model.get_input_embeddings()(ids).detach()
    plan = ringfa3.plan(Mask(), "zigzag", S)
    with torch.no_grad():
        wanted = model(inputs_embeds=rows, use_cache=False).logits
        with sequence_parallel(model, plan):
            return worst(model(inputs_embeds=plan.shard(rows)).logits, plan.shard(wanted))


def test_embeddings_without_position_ids(world: Any) -> None:
    assert max(world(2)(embedded)) < TOLERANCE


BERT: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3, max_position_embeddings=64,
)  # fmt: skip


def typed(rank: int, size: int) -> float:
    """An encoder whose tokens are of two types, each rank's its own."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT, attn_implementation="eager")).eval()
    ids, *_ = inputs("plain")
    types = (torch.arange(S) > 20).long().expand(2, -1)
    plan = ringfa3.plan(Mask(causal=False), "zigzag", S)
    with torch.no_grad():
        wanted = model(input_ids=ids, token_type_ids=types).logits
        with sequence_parallel(model, plan):
            with pytest.raises(ValueError, match="token_type_ids: wanted input_ids's rows"):
                model(input_ids=plan.shard(ids), token_type_ids=types)
            return worst(model(input_ids=plan.shard(ids), token_type_ids=plan.shard(types)).logits, plan.shard(wanted))


def test_token_types_that_are_embedded(world: Any) -> None:
    assert max(world(2)(typed)) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        ("LlamaForSequenceClassification", lambda: transformers.LlamaConfig(**SMALL), "a head or pooler"),
        ("LlamaForQuestionAnswering", lambda: transformers.LlamaConfig(**SMALL), "a head or pooler"),
        ("BertModel", lambda: transformers.BertConfig(**BERT), "a head or pooler"),
        ("RobertaForMaskedLM", lambda: transformers.RobertaConfig(**BERT), "counts past its padding_idx"),
    ],
)
def test_models_that_count_or_pool_rows_are_refused(kind: str, config: Any, why: str) -> None:
    """Of a shard they would be its last token's class, its first row, positions that nobody counts so."""
    model = getattr(transformers, kind)(config())
    plan = ringfa3.plan(Mask(), "zigzag", S)
    for sharded in (sequence_parallel(model, plan), context_parallel(model)):
        with pytest.raises(ValueError, match=f"model: wanted .*{why}"), sharded:
            pass


def test_refusals_of_models_and_plans() -> None:
    plan = ringfa3.plan(Mask(), "zigzag", S)
    torch.manual_seed(0)
    bloom = AutoModelForCausalLM.from_config(
        transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=2)
    )
    with pytest.raises(ValueError, match="model: wanted one that takes position_ids"), sequence_parallel(bloom, plan):
        pass
    small = transformers.CodeGenConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4, rotary_dim=8, n_positions=64)
    codegen = AutoModelForCausalLM.from_config(small)
    with pytest.raises(ValueError, match="model: wanted one that uses"), sequence_parallel(codegen, plan):
        pass
    with (
        pytest.raises(ValueError, match="model: wanted a transformers"),
        sequence_parallel(torch.nn.Linear(1, 1), plan),
    ):
        pass
    for mask in (Mask(window=(3, 0)), Mask(prefix=4), Mask(chunk=8)):
        other = ringfa3.plan(mask, "zigzag", S)
        with (
            pytest.raises(ValueError, match="plan: wanted a mask of documents alone"),
            sequence_parallel(build("llama"), other),
        ):
            pass
    both_ways = ringfa3.plan(Mask(causal=False), "zigzag", S)
    model = build("llama")
    with sequence_parallel(model, both_ways), pytest.raises(ValueError, match="plan: wanted a mask with causal=True"):
        model(input_ids=inputs("plain")[0])


@pytest.mark.parametrize("name", HYBRID)
def test_layers_that_would_see_a_shard_alone_are_refused(name: str) -> None:
    kind = "conv" if name == "lfm2" else "linear_attention"
    model = build_hybrid(name)
    match = f"model: wanted attention in all layers .* got {type(model).__name__} with {kind}"
    with pytest.raises(ValueError, match=match), sequence_parallel(model, ringfa3.plan(Mask(), "zigzag", S)):
        pass


def test_recurrent_state_is_refused() -> None:
    model = build("llama")
    model._is_stateful = True
    plan = ringfa3.plan(Mask(), "zigzag", S)
    with pytest.raises(ValueError, match="with recurrent state"), sequence_parallel(model, plan):
        pass


@pytest.mark.parametrize("floor_scale", [S, 2 * S, 2 * S + 1])
def test_temperatures_that_are_counted_within_a_shard(floor_scale: int) -> None:
    """Llama 4 scales queries from floor_scale positions on; with a cache it begins after all that the cache has."""
    model = build("llama4", floor_scale=floor_scale)
    given = {"input_ids": inputs("plain")[0]}
    match = f"attn_temperature_tuning: wanted False, or fewer than floor_scale = {floor_scale}"
    with sequence_parallel(model, ringfa3.plan(Mask(), "zigzag", S)), torch.no_grad():
        for use_cache, counted in ((False, S), (True, 2 * S)):
            if counted < floor_scale:
                model(**given, use_cache=use_cache)
                continue
            with pytest.raises(ValueError, match=match):
                model(**given, use_cache=use_cache)


def test_models_within_a_model_get_their_own_attention_back() -> None:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    with sequence_parallel(model, ringfa3.plan(Mask(), "zigzag", S)):
        assert model.config.text_config._attn_implementation == integration.SHARDED
    kept = [part._attn_implementation for part in (model.config, model.config.text_config, model.config.vision_config)]
    assert kept == ["eager", "sdpa", "eager"]


def test_dropout_is_refused() -> None:
    model = build("llama", attention_dropout=0.1).train()
    with (
        sequence_parallel(model, ringfa3.plan(Mask(), "zigzag", S)),
        pytest.raises(ValueError, match="dropout: wanted 0"),
    ):
        model(input_ids=inputs("plain")[0])


def test_outside_of_sequence_parallel() -> None:
    model = build("llama")
    model.set_attn_implementation(integration.SHARDED)
    with pytest.raises(ValueError, match="within sequence_parallel"):
        model(input_ids=inputs("plain")[0])


def test_inner_model_is_not_the_given_one() -> None:
    """model.model(...) would pass by the checks of what the model is given."""
    model = build("llama")
    with (
        sequence_parallel(model, ringfa3.plan(Mask(), "zigzag", S)),
        pytest.raises(ValueError, match="attn_implementation"),
    ):
        model.model(input_ids=inputs("plain")[0])


def test_a_failed_pass_leaves_no_cache_to_go_on_with() -> None:
    model = build("llama")
    ids = inputs("plain")[0]
    with sequence_parallel(model, ringfa3.plan(Mask(), "zigzag", S)), torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="position_ids"):  # before anything is cached: no harm
            model(input_ids=ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[3]]))
        model(input_ids=ids[:, :1], past_key_values=cache)
        with pytest.raises(IndexError):
            model(input_ids=ids[:, :1] + 100, past_key_values=cache)  # no such token
        with pytest.raises(ValueError, match="past_key_values: wanted a cache whose passes all ended"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="attention_mask: wanted None after the prefill"):
            model(input_ids=ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, S + 1))


def test_gradients_after_the_prefill_are_refused() -> None:
    model = build("llama")
    ids = inputs("plain")[0]
    with sequence_parallel(model, ringfa3.plan(Mask(), "zigzag", S)):
        out = model(input_ids=ids, use_cache=True)
        with pytest.raises(ValueError, match=r"past_key_values: wanted torch\.no_grad"):
            model(input_ids=ids[:, :1], past_key_values=out.past_key_values)


def test_refusals_of_the_attention_function() -> None:
    q = torch.zeros(1, 2, S, 16)
    module = torch.nn.Identity()
    sight = Sight(Mask(), ringfa3.plan(Mask(), "zigzag", S), {})
    for name in ("head_mask", "position_bias", "alibi", "cu_seq_lens_q", "anything"):
        with pytest.raises(ValueError, match=f"^{name}: wanted none"):
            attention(module, q, q, q, sight, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match="sliding_window: wanted"):
        attention(module, q, q, q, sight, sliding_window=4)
    with pytest.raises(ValueError, match="attention_mask: wanted the model to make"):
        attention(module, q, q, q, torch.zeros(1, 1, S, S))
    with pytest.raises(ValueError, match="is_causal: wanted what"):
        attention(module, q, q, q, Sight(Mask(causal=False), sight.plan, {}), is_causal=True)
    with pytest.raises(ValueError, match="is_causal: wanted what"):
        attention(module, q, q, q, sight, is_causal=False)
    with pytest.raises(ValueError, match="key: wanted the query's"):
        attention(module, q, q[:, :, :5], q[:, :, :5], sight)


def test_unknown_mask_functions_are_refused() -> None:
    rules = integration.rules
    assert rules(masking_utils.sliding_window_causal_mask_function(5)) == {"causal": True, "window": (4, -1)}
    with pytest.raises(ValueError, match="or_masks"):
        rules(masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function))
    with pytest.raises(ValueError, match="test_transformers"):
        rules(masking_utils.and_masks(masking_utils.causal_mask_function, inputs))
    with pytest.raises(ValueError, match="one window a layer"):
        rules(masking_utils.and_masks(masking_utils.sliding_window_overlay(4), masking_utils.sliding_window_overlay(5)))


def test_padding_documents() -> None:
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert padding_documents(padding) == ((2, 2), (4,), (1, 3), (1, 2, 1), (4,))
    assert padding_documents(padding[1:2]) is None
