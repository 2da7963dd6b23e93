"""The models against the public reference's numbers."""

import pytest
import torch
from goldens_io import GOLDENS, assert_close, load_golden
from small_models import golden_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

CASES = sorted(path.stem for path in (GOLDENS / "byte_llama" / "model").glob("*.json"))
DECODED = [case for case in CASES if "in.dec_ids" in load_golden(case, "byte_llama/model").tensors]


def models(case):
    """The golden, and its model with every attention that runs here; only the eager one has Gemma's soft caps."""
    golden, model = golden_model(case)
    for backend in ["eager"] if case.startswith("gemma2") else ["eager", "sdpa"]:
        model.set_attn_implementation(backend)
        yield golden, model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward(case):
    for golden, model in models(case):
        tolerance = golden.facts["tolerances"]
        for name in [name for name in golden.tensors if name.startswith("in.ids_L")]:
            length = name.removeprefix("in.ids_")
            output = model(golden[name], use_cache=False, output_hidden_states=True)
            assert_close(output.logits, golden[f"out.logits_{length}"], **tolerance["logits"])
            if f"out.hidden_states_{length}.0" in golden.tensors:
                for layer, hidden in enumerate(output.hidden_states):
                    assert_close(hidden, golden[f"out.hidden_states_{length}.{layer}"], **tolerance["hidden_states"])
            if f"out.expanded_{length}" in golden.tensors:
                expansion = model.model.subword_expansion
                subwords = expansion(expansion.as_symbols(golden[name]))
                assert torch.equal(subwords, golden[f"out.expanded_{length}"].long())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_explicit_positions(case):
    for golden, model in models(case):
        logits = model(golden["in.pos_ids"], position_ids=golden["in.pos_position_ids"]).logits
        assert_close(logits, golden["out.pos_logits"], **golden.facts["tolerances"]["logits"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_padding(case):
    for golden, model in models(case):
        calls = [("rpad", "rpad_logits", {})]
        if "in.lpad_ids" in golden.tensors:
            positions = golden["in.lpad_position_ids"]
            calls += [
                ("lpad", "lpad_logits", {"position_ids": positions}),
                ("lpad", "lpad_logits_default_positions", {}),
            ]
        for side, expected, arguments in calls:
            mask = golden[f"in.{side}_mask"]
            logits = model(golden[f"in.{side}_ids"], attention_mask=mask, **arguments).logits
            real = mask.bool()
            assert_close(logits[real], golden[f"out.{expected}"][real], **golden.facts["tolerances"]["logits"])


@pytest.mark.parametrize("case", DECODED)
@torch.no_grad()
def test_cached_decoding(case):
    for golden, model in models(case):
        ids = golden["in.dec_ids"]
        for cache in (DynamicCache(config=model.config), DynamicCache(), StaticCache(model.config, max_cache_len=40)):
            pieces = [ids[:, :20], *ids[:, 20:].split(1, dim=1)]
            logits = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)
            assert_close(logits, golden["out.dec_logits"], **golden.facts["tolerances"]["logits"])


@pytest.mark.parametrize("case", DECODED)
def test_greedy_generation(case):
    for golden, model in models(case):
        greedy = model.generate(golden["in.gen_prompt"], do_sample=False, max_new_tokens=24)
        assert torch.equal(greedy, golden["out.gen_ids"])
        if "out.genb_ids" in golden.tensors:
            mask = golden["in.lpad_mask"]
            batch = model.generate(golden["in.lpad_ids"], attention_mask=mask, do_sample=False, max_new_tokens=16)
            assert torch.equal(batch, golden["out.genb_ids"])


@torch.no_grad()
def test_checkpoint_folder():
    golden, _ = golden_model("llama_expand_rope3")
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "byte_llama" / "checkpoint")
    logits = model(golden["in.ids_L33"]).logits
    assert_close(logits, golden["out.logits_L33"], **golden.facts["tolerances"]["logits"])
    greedy = model.generate(golden["in.gen_prompt"], do_sample=False, max_new_tokens=24)
    assert torch.equal(greedy, golden["out.gen_ids"])
