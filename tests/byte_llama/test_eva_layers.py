"""EVA layers in a byte-level Llama: against EvaByte, against full attention, against each sequence alone."""

import json

import pytest
import torch
from hub_folders import expect, load_without_packages, model_and_tokenizer
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import PAD, VOCABULARY, fresh_model, letters, logits_alone, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from byte_llama import ByteGemma2Config, ByteLlamaConfig, ByteLlamaForCausalLM
from evabyte import EvaByteConfig, EvaByteForCausalLM

MIXED = {"num_hidden_layers": 3, "eva_layers": (0, 2)}
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "eva_window_size": 8, "eva_chunk_size": 4}
HOW = {"do_sample": False, "eos_token_id": None}
LAYERS = st.sampled_from([{"eva_layers": "all"}, MIXED, {**MIXED, "eva_layers": (1,), "add_qk_norm": True}])
NEAR = {"atol": 3e-5, "rtol": 1e-4}


def model_of(**overrides):
    return tiny_model(**{**SIZES, **overrides})


def padded(lengths, side, seed=0):
    """Rows [B, N] of so many letters, their mask, and the rows alone."""
    longest, rows = max(lengths), [letters(n, seed=seed + place) for place, n in enumerate(lengths)]
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, text in enumerate(rows):
        place = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[row, place], mask[row, place] = text, 1
    return ids, mask, rows


@torch.no_grad()
def test_is_what_evabyte_computes():
    """The same weights under EvaByte's names; one learned vector a head, since EvaByte's heads are not grouped."""
    model = fresh_model(
        num_attention_heads=2, num_key_value_heads=2, expand_input_ids=False, eva_layers="all", eva_window_size=8,
        eva_chunk_size=4, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    config = EvaByteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        window_size=8, chunk_size=4, num_pred_heads=1, norm_add_unit_offset=False, pad_token_id=PAD,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    evabyte = EvaByteForCausalLM(config).eval()
    for name, weight in model.state_dict().items():
        evabyte.get_parameter(name.replace(".summary", "")).view_as(weight).copy_(weight)
    ids = letters(2, 45)
    torch.testing.assert_close(model(ids).logits, evabyte(ids).logits, **NEAR)


@torch.no_grad()
def test_one_window_is_full_attention():
    whole, eva = model_of(**MIXED, eva_window_size=64), fresh_model(**{**SIZES, "num_hidden_layers": 3})
    weights = {name: weight for name, weight in whole.state_dict().items() if ".summary." not in name}
    eva.load_state_dict(weights)
    ids = letters(2, 60)
    torch.testing.assert_close(whole(ids).logits, eva(ids).logits, **NEAR)
    assert not torch.allclose(model_of(**MIXED)(ids).logits, eva(ids).logits, atol=1e-2)


@settings(max_examples=20)
@given(
    layers=LAYERS,
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_padded_rows_are_each_row_alone(layers, lengths, side, seed):
    model = model_of(**layers)
    ids, mask, rows = padded(lengths, side, seed)
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for row, text in enumerate(rows):
        torch.testing.assert_close(logits[row, mask[row].bool()], logits_alone(model, text), **NEAR)


@settings(max_examples=20)
@given(layers=LAYERS, pieces=st.lists(st.integers(1, 14), min_size=2, max_size=5), seed=st.integers(0, 99))
@torch.no_grad()
def test_cached_is_full(layers, pieces, seed):
    model, ids = model_of(**layers), letters(2, sum(pieces), seed=seed)
    cache = DynamicCache(config=model.config)
    logits = [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits, **NEAR)


@torch.no_grad()
def test_packed_documents_are_each_alone():
    model, lengths = model_of(**MIXED), (13, 9, 20)
    ids = letters(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    logits = model(ids, position_ids=positions, use_cache=False).logits[0]
    for found, text in zip(logits.split(lengths), ids[0].split(lengths), strict=True):
        torch.testing.assert_close(found, logits_alone(model, text), **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("layers", [{"eva_layers": "all"}, MIXED])
def test_backends_agree(layers):
    ids, mask, _ = padded((30, 11), "left")
    found = []
    for name in ("eager", "sdpa"):
        model = fresh_model(**SIZES, **layers)
        model.set_attn_implementation(name)
        found.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*found, **NEAR)


@pytest.mark.compatibility("EVA layers in place of full attention", "byte Llama")
@settings(max_examples=8)
@given(
    layers=LAYERS,
    draft=st.sampled_from(["dynamic", "chain", "lookup", "dynamic+lookup"]),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_trees_bring_what_generate_writes(layers, draft, lengths, seed):
    """Each row alone, a padded batch, and drafts on caches with layers of both kinds."""
    model = model_of(**layers, num_pred_heads=4)
    ids, mask, rows = padded(lengths, "left", seed)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=25, **HOW)
    for row, text in enumerate(rows):
        alone = model.generate(text[None], max_new_tokens=25, **HOW)
        assert torch.equal(written[row, -25:], alone[0, -25:])
    found = model.multi_byte_generate(ids, attention_mask=mask, draft=draft, max_new_tokens=25, **HOW)
    assert torch.equal(found, written)


@torch.no_grad()
def test_the_cache_goes_on_after_trees():
    model, text = model_of(**MIXED, num_pred_heads=3), letters(1, 19)
    cache = DynamicCache(config=model.config)
    how = {**HOW, "past_key_values": cache, "return_dict_in_generate": True, "max_new_tokens": 14}
    out = model.multi_byte_generate(text, **how)
    seen = out.past_key_values.get_seq_length()
    logits = model(out.sequences[:, seen:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(logits, model(out.sequences).logits[:, seen:], **NEAR)


def test_beams_and_assistants():
    model, text = model_of(**MIXED), letters(2, 14)
    beams = model.generate(text, num_beams=3, max_new_tokens=20, use_cache=True, **HOW)
    assert torch.equal(beams, model.generate(text, num_beams=3, max_new_tokens=20, use_cache=False, **HOW))
    assisted = model.generate(text[:1], assistant_model=model_of(eva_layers="all"), max_new_tokens=20, **HOW)
    assert torch.equal(assisted, model.generate(text[:1], max_new_tokens=20, **HOW))


def test_the_cache_grows_with_chunks():
    model, ids = model_of(eva_layers="all"), letters(1, 200)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in ids.split(40, dim=1):
            model(piece, past_key_values=cache)
    kept = cache.layers[0]
    assert kept.keys.shape[1] == 2  # key-value heads, not query heads
    assert kept.keys.shape[2] <= 2 * (200 // 4 + 2 * 8)


def test_summaries_begin_as_means_and_learn(tmp_path):
    """A full model's folder, loaded with EVA layers; gradients reach the vectors, checkpointing changes nothing."""
    folder = tmp_path / "full"
    fresh_model(**SIZES).save_pretrained(folder)
    model = ByteLlamaForCausalLM.from_pretrained(folder, eva_layers=[1], eva_window_size=8, eva_chunk_size=4)
    vectors = [weight for name, weight in model.named_parameters() if ".summary." in name]
    assert len(vectors) == 2 and all(not weight.any() for weight in vectors)
    ids, gradients = letters(2, 40), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(weight.grad.abs().sum() > 0 for weight in vectors)
    torch.testing.assert_close(*gradients)

    with torch.no_grad():
        for weight in vectors:
            weight.normal_()
    model.save_pretrained(tmp_path / "eva")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "eva")
    assert again.config.eva_layers == [1] and again.config.layer_types == ["full_attention", "eva_attention"]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision(dtype):
    model, ids = fresh_model(dtype=dtype, **SIZES, **MIXED), letters(2, 40)
    exact = fresh_model(**SIZES, **MIXED)
    torch.testing.assert_close(model(ids).logits.float(), exact(ids).logits, atol=0.35, rtol=0.1)


def test_autocast():
    """As in mixed-precision training: weights in float32, products in bfloat16, cached or not."""
    model, ids = fresh_model(**SIZES, **MIXED).train(), letters(2, 40)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids, use_cache=True)
    assert {layer.keys.dtype for layer in outputs.past_key_values.layers[:3:2]} == {torch.bfloat16}
    torch.testing.assert_close(outputs.logits.float(), exact, atol=0.35, rtol=0.1)
    outputs.loss.backward()
    assert all(weight.grad.isfinite().all() for name, weight in model.named_parameters() if ".summary." in name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"eva_layers": "every"}, "eva_layers"),
        ({"eva_layers": [2]}, "0..1"),
        ({"eva_layers": "all", "eva_chunk_size": 3, "eva_window_size": 8}, "eva_chunk_size"),
        ({"eva_layers": "all", "attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_wrong_configurations_are_refused(wrong, said):
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        ByteLlamaConfig(num_hidden_layers=2, **wrong)


def test_without_eva_layers_a_config_is_llamas():
    config = ByteLlamaConfig(num_hidden_layers=2, eva_layers=[])
    assert config.eva_layers is None and not hasattr(config, "layer_types")


@pytest.mark.compatibility("EVA layers in place of full attention", "byte Gemma 2", refused="`eva_layers`: Gemma 2")
def test_gemma_is_refused():
    with pytest.raises(ValueError, match="`eva_layers`: Gemma 2"):
        ByteGemma2Config(eva_layers="all")


def test_what_does_not_fit_is_named():
    model, ids = model_of(**MIXED, num_pred_heads=2), letters(1, 9)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="must be 2D"):
        model(ids, attention_mask=torch.ones(1, 1, 9, 9))
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, cache_implementation="static", max_new_tokens=3, **HOW)
    model.skip_layers([1])
    with pytest.raises(ValueError, match="eva_layers"):
        model.multi_byte_generate(ids, draft="self", max_new_tokens=3, **HOW)
    with pytest.raises(NotImplementedError, match="eva_layers"):
        model.init_continuous_batching()


@pytest.mark.slow
def test_a_folder_brings_its_code(tmp_path):
    full, tokenizer = model_and_tokenizer("byte Llama")
    config = full.config
    config.eva_layers, config.eva_window_size, config.eva_chunk_size = [1], 8, 4
    model, folder = ByteLlamaForCausalLM(config).eval(), tmp_path / "model"
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    expect(model, tokenizer, tmp_path / "expected.pt")
    sources, said = load_without_packages([(folder, tmp_path / "expected.pt", tmp_path / "again")], tmp_path)
    assert sources == [str(folder)], said
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eva_layers"] == [1]
