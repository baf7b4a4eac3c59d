"""attn_implementation="ringfa3" on one rank equals transformers' eager attention; what it cannot honour is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from ringfa3.integrations.one_rank import View, see
from ringfa3.integrations.transformers import NAME
from ringfa3_kernels import Visible
from tests.ring.test_transformers import (
    CONFIGS,
    DOCUMENTS,
    HYBRID,
    SMALL,
    TOLERANCE,
    S,
    build,
    build_hybrid,
    gradients,
    inputs,
    worst,
)

OWN_PACKING = [name for name in CONFIGS if name not in ("gpt_oss", "llama4")]  # whose masks notice packed position_ids


def ours(model: Any) -> Any:
    model = copy.deepcopy(model)
    model.set_attn_implementation(NAME)
    return model


def eager_logits(model: Any, name: str, case: str, given: dict[str, Any]) -> Tensor:
    """What eager attention makes of it; packed documents one by one where the model does not notice them."""
    if case != "packed" or name in OWN_PACKING:
        logits: Tensor = model(**given).logits
        return logits
    parts = given["input_ids"].split(DOCUMENTS, 1)
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], 1)


@pytest.mark.parametrize("case", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_eager(name: str, case: str) -> None:
    whole = build(name)
    model = ours(whole)
    ids, mask, position_ids, rows = inputs(case)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids, "use_cache": False}
    weights = torch.randn(2, S, 61)
    wanted = eager_logits(whole, name, case, given)
    logits = model(**given).logits
    assert worst(logits[rows].detach(), wanted[rows].detach()) < TOLERANCE
    wanted_grads, grads = gradients(whole, wanted, rows, weights), gradients(model, logits, rows, weights)
    assert set(grads) == set(wanted_grads)
    assert max(worst(grads[key], wanted_grads[key]) for key in grads) < TOLERANCE


@pytest.mark.parametrize("case", ["plain", "left"])
@pytest.mark.parametrize("name", HYBRID)
def test_layers_without_attention_see_the_whole_sequence(name: str, case: str) -> None:
    """What is refused across ranks is served on one."""
    whole = build_hybrid(name).eval()
    ids, mask, _, rows = inputs(case)
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        wanted, logits = whole(**given).logits[rows], ours(whole)(**given).logits[rows]
    assert worst(logits, wanted) < TOLERANCE


def test_documents_that_differ_between_batch_rows() -> None:
    whole = build("gemma2")
    ids, *_ = inputs("plain")
    rows = ([10, 27], [30, 3, 4])
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    given = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}
    with torch.no_grad():
        assert worst(ours(whole)(**given).logits, whole(**given).logits) < TOLERANCE


def test_documents_beside_a_mask_of_ones() -> None:
    """As flash attention has it: eager attention would let such documents see each other."""
    model = ours(build("llama"))
    ids, _, position_ids, _ = inputs("packed")
    with torch.no_grad():
        wanted = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
        given = {"position_ids": position_ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        assert torch.equal(model(input_ids=ids, **given).logits, wanted)


@pytest.mark.parametrize("case", ["plain", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_step_by_step(name: str, case: str) -> None:
    """Prefill in two pieces, then tokens one by one and several at once: the logits of one eager pass over it all."""
    whole = build(name).eval()
    model = ours(whole)
    ids, mask, _, rows = inputs(case)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        wanted = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
        done = 0
        for n in (14, 11, 1, 1, 3, 1, S - 31):
            seen = None if mask is None else mask[:, : done + n]
            got = model(input_ids=ids[:, done : done + n], attention_mask=seen, past_key_values=cache).logits
            kept = rows[:, done : done + n]
            assert worst(got[kept], wanted[:, done : done + n][kept]) < TOLERANCE
            done += n
    assert done == S


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_generate(name: str) -> None:
    whole = build(name).eval()
    ids, mask, *_ = inputs("left")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = whole.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours(whole).generate(ids, attention_mask=mask, **options), wanted)


def test_from_pretrained(tmp_path: Path) -> None:
    whole = build("llama").eval()
    whole.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="ringfa3")
    ids, *_ = inputs("plain")
    with torch.no_grad():
        assert worst(model(input_ids=ids).logits, whole(input_ids=ids).logits) < TOLERANCE


def test_gradient_checkpointing() -> None:
    whole = build("gemma2").train()
    model = ours(whole)
    # renamed in transformers 5.23
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    ids, *_ = inputs("plain")
    losses = [m(input_ids=ids, labels=ids, use_cache=False).loss for m in (whole, model)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for wanted, got in zip(whole.parameters(), model.parameters(), strict=True):
        assert worst(got.grad, wanted.grad) < TOLERANCE


def test_autocast() -> None:
    """Rotary embeddings leave q and k in fp32 beside v in bf16: all three are cast."""
    model = ours(build("llama"))
    ids, *_ = inputs("plain")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    wanted = model(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(wanted.item(), rel=0.05)


def config(kind: str, **options: Any) -> Any:
    return getattr(transformers, kind)(**options)


LITTLE: dict[str, Any] = {key: SMALL[key] for key in ("vocab_size", "num_hidden_layers", "num_attention_heads")} | {
    "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Encoders, cross attention, keys wider than values
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", LITTLE),
    "modernbert": (
        "ModernBertConfig",
        LITTLE | {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "bart": (
        "BartConfig",
        {"vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
         "forced_eos_token_id": None},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        LITTLE | {"moe_intermediate_size": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1,
                  "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 16,
                  "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_models(name: str) -> None:
    kind, options = OTHERS[name]
    torch.manual_seed(0)
    whole = transformers.AutoModel.from_config(config(kind, **options), attn_implementation="eager").eval()
    model = ours(whole)
    ids, mask, _, rows = inputs("right")
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "bart":
        given["decoder_input_ids"] = ids[:, :9]
    with torch.no_grad():
        wanted, got = whole(**given)[0], model(**given)[0]
    if name != "bart":
        wanted, got = wanted[rows], got[rows]
    assert worst(got, wanted) < TOLERANCE


def test_layers_without_a_mask() -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = config("CLIPVisionConfig", image_size=16, patch_size=4, **small)
    whole = transformers.AutoModel.from_config(vision, attn_implementation="eager").eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert worst(ours(whole)(pixel_values=pixels)[0], whole(pixel_values=pixels)[0]) < TOLERANCE


def test_a_view_is_a_few_bytes_a_row() -> None:
    model = ours(build("llama"))
    seen: list[Any] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    ids, mask, *_ = inputs("left")
    with torch.no_grad():
        model(input_ids=ids)
        model(input_ids=ids, attention_mask=mask)
    hook.remove()
    plain, padded = (view.visible for view in seen)
    assert isinstance(seen[0], View)
    assert plain.kind == "causal"
    assert padded.lo.shape == (2, S)
    assert padded.lo.dtype == torch.int32
    assert padded.lo[1, 20] == 13  # the padding's end


def refused(match: str, *, name: str = "llama", options: dict[str, Any] | None = None, **given: Any) -> None:
    model = ours(build(name, **(options or {}))).train()
    with pytest.raises(ValueError, match=match):
        model(**({"input_ids": inputs("plain")[0]} | given))


def test_refusals() -> None:
    position_ids = inputs("packed")[2]
    holes = torch.ones(2, S, dtype=torch.long)
    holes[1, 4] = 0
    refused(
        "attention_mask: wanted the ones of a row in one run, got zeros between them in row 1", attention_mask=holes
    )
    refused(r"attention_mask: wanted \[B, S\] of 0 and 1", attention_mask=torch.zeros(2, 1, S, S))
    refused("use_cache: wanted False where position_ids restart", position_ids=position_ids, use_cache=True)
    padded = inputs("right")[1]
    refused(
        "attention_mask: wanted ones where position_ids restart", attention_mask=padded, position_ids=position_ids,
        use_cache=False,
    )  # fmt: skip
    refused("output_attentions: wanted none", output_attentions=True)
    refused("dropout: wanted 0", options={"attention_dropout": 0.1})
    refused(
        "position_ids: wanted documents that begin at 0 where layers see chunks", name="llama4",
        position_ids=torch.cat([torch.arange(3, 20), torch.arange(S - 17)])[None], use_cache=False,
    )  # fmt: skip


def test_static_caches_are_refused() -> None:
    for name in ("llama", "mistral"):
        with pytest.raises(ValueError, match="past_key_values: wanted"):
            ours(build(name)).generate(inputs("plain")[0], max_new_tokens=3, cache_implementation="static")


def test_static_caches_of_older_versions_are_refused() -> None:
    """transformers 5.17 hands the mask that it made for such a cache to the model, in the place of padding."""
    model, ids = ours(build("mistral")), inputs("plain")[0]
    cache = transformers.StaticCache(config=model.config, max_cache_len=S + 3)
    view = transformers.masking_utils.create_masks_for_generate(
        config=model.config, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=None, past_key_values=cache
    )
    assert isinstance(view, View)
    with pytest.raises(ValueError, match="past_key_values: wanted a cache that grows, as DynamicCache, got a static"):
        model(input_ids=ids, attention_mask=view, past_key_values=cache)


def test_biases_are_refused() -> None:
    torch.manual_seed(0)
    small = config("T5Config", vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    model = transformers.AutoModel.from_config(small, attn_implementation=NAME).eval()
    ids = inputs("plain")[0]
    with pytest.raises(ValueError, match="position_bias: wanted none"):
        model(input_ids=ids, decoder_input_ids=ids[:, :5])


def test_refusals_of_the_attention_function() -> None:
    from ringfa3.integrations.one_rank import attention

    q = torch.zeros(1, 2, S, 16)
    module = torch.nn.Identity()
    view = see(q_length=S, kv_length=S, device="cpu", mask_function=transformers.masking_utils.causal_mask_function)
    for name in ("head_mask", "position_bias", "alibi", "cu_seq_lens_q", "anything"):
        with pytest.raises(ValueError, match=f"^{name}: wanted none"):
            attention(module, q, q, q, view, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match="sliding_window: wanted"):
        attention(module, q, q, q, view, sliding_window=4)
    with pytest.raises(ValueError, match="is_causal: wanted"):
        attention(module, q, q, q, view, is_causal=False)
    with pytest.raises(ValueError, match="key: wanted the mask's 37 rows"):
        attention(module, q, q[:, :, :5], q[:, :, :5], view)
    with pytest.raises(ValueError, match="attention_mask: wanted one, made by"):
        attention(module, q, q, q, None)
    with pytest.raises(ValueError, match="attention_mask: wanted one, made by"):
        attention(module, q, q, q, None, is_causal=True, sliding_window=4)
    with pytest.raises(ValueError, match="key: wanted the query's 37 rows"):
        attention(module, q, q[:, :, :5], q[:, :, :5], None, is_causal=True)
    out, _ = attention(module, q[:, :, :1], q, q, None, is_causal=True)
    assert out.shape == (1, 1, 2, 16)
    assert isinstance(view.visible, Visible)


def test_packed_masks_of_older_versions() -> None:
    """transformers 5.17 keeps the documents' numbers alone."""
    utils = transformers.masking_utils
    numbers = torch.tensor([[0] * 3 + [1] * (S - 3), [0] * S])
    function = utils.and_masks(utils.causal_mask_function, utils.packed_sequence_mask_function(numbers))
    view = see(q_length=S, kv_length=S, device="cpu", mask_function=function)
    assert view.visible.lo.tolist() == [[0] * 3 + [3] * (S - 3), [0] * S]
    chunked = utils.and_masks(utils.chunked_overlay(4, torch.zeros(2, dtype=torch.int)), function)
    with pytest.raises(ValueError, match="wanted no packed documents where layers see chunks, with this version"):
        see(q_length=S, kv_length=S, device="cpu", mask_function=chunked)
