"""Folders as published load through the Auto classes, and what we save stays small and loads again."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from goldens_io import GOLDENS, load_golden
from safetensors.torch import load_file, save_file
from small_models import KINDS, letters, tiny_model
from test_expansion import read_vocabulary
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from byte_llama import (
    ByteGemma2Config,
    ByteGemma2ForCausalLM,
    ByteGemma2Model,
    ByteLlamaConfig,
    ByteLlamaForCausalLM,
    ByteLlamaModel,
)
from byte_llama.subword_table import entries_from_tokens, to_dictionary

CASES = {"llama_expand_rope3": ByteLlamaForCausalLM, "gemma2_expand": ByteGemma2ForCausalLM}
CONFIGS = {ByteLlamaForCausalLM: ByteLlamaConfig, ByteGemma2ForCausalLM: ByteGemma2Config}
DECODERS = {ByteLlamaForCausalLM: ByteLlamaModel, ByteGemma2ForCausalLM: ByteGemma2Model}


def write_published_folder(folder, case, **changes):
    """A folder as the reference writes it: its own class names and files, and the dictionary in config.json."""
    golden = load_golden(case, "byte_llama/model")
    config = {**golden.facts["config"], **changes}
    assert config["model_type"].startswith("tpu_") and config["architectures"][0].startswith("TPU")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if "generation_config" in golden.facts:
        (folder / "generation_config.json").write_text(json.dumps(golden.facts["generation_config"]))
    weights = {name.removeprefix("weights."): t for name, t in golden.tensors.items() if name.startswith("weights.")}
    rows = config["expand_input_ids_vocab_size"]
    embedding = torch.zeros(rows, config["hidden_size"])
    embedding[: len(weights["model.expand_embed_tokens.weight"])] = weights["model.expand_embed_tokens.weight"]
    save_file(
        {**weights, "model.expand_embed_tokens.weight": embedding}, folder / "model.safetensors", {"format": "pt"}
    )
    return golden


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_published_folder_through_the_auto_classes(case, tmp_path, capsys):
    golden = write_published_folder(tmp_path, case)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is CASES[case] and type(model.config) is CONFIGS[CASES[case]]
    logits = model(golden["in.ids_L33"]).logits
    torch.testing.assert_close(logits, golden["out.logits_L33"], atol=2e-4, rtol=2e-4)
    greedy = model.generate(golden["in.gen_prompt"], do_sample=False, max_new_tokens=24)
    assert torch.equal(greedy, golden["out.gen_ids"])
    assert type(AutoModel.from_pretrained(tmp_path)) is DECODERS[CASES[case]]
    directly, info = CASES[case].from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(directly(golden["in.ids_L33"]).logits, logits)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "subword_expansion" not in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_saved_folder(case, tmp_path):
    golden = write_published_folder(tmp_path, case)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), golden["in.ids_L33"]
    model.save_pretrained(tmp_path / "ours")
    text = (tmp_path / "ours" / "config.json").read_text()
    stored = json.loads(text)
    assert stored["model_type"] == model.config.model_type and stored["architectures"] == [type(model).__name__]
    assert "expand_input_ids_dict" not in stored and "tpu" not in text.lower() and len(text) < 2000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == stored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(kind, dtype, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="cpu")
    assert half.dtype == dtype
    for name, tensor in half.model.subword_expansion.named_buffers():
        expected = model.model.subword_expansion.get_buffer(name)
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == dtype
    assert torch.equal(again(letters(1, 9)).logits, half(letters(1, 9)).logits)


def test_offloaded_to_disk(tmp_path):
    model, ids = tiny_model(), letters(2, 20)
    model.save_pretrained(tmp_path)
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    parts |= {"model.rotary_emb": "cpu", "lm_head": "cpu", "model.expand_embed_tokens": "disk"}
    parts |= {"model.subword_expansion": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=parts, offload_folder=tmp_path / "offload")
    assert torch.equal(offloaded(ids).logits, model(ids).logits)


def test_a_folder_without_table_and_dictionary(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "subword_expansion" not in name}
    assert len(weights) - len(kept) == 4
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks `subword_expansion"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expand_input_ids_dict"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))


def test_without_expansion(tmp_path):
    golden = load_golden("llama_plain", "byte_llama/model")
    (tmp_path / "config.json").write_text(json.dumps(golden.facts["config"]))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ByteLlamaConfig and not config.expand_input_ids
    model = AutoModelForCausalLM.from_config(config)
    assert not hasattr(model.model, "subword_expansion") and not hasattr(model.model, "expand_embed_tokens")
    model.save_pretrained(tmp_path / "saved")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) is ByteLlamaForCausalLM


@pytest.mark.slow
@pytest.mark.parametrize(("case", "source"), [("llama_expand_rope3", "llama3_1"), ("gemma2_expand", "gemma2")])
@torch.no_grad()
def test_published_folder_with_the_whole_dictionary(case, source, tmp_path):
    """The dictionary of 5 (10) MB in config.json; loading it takes a second or two, saved it is gone from there."""
    tokens, units = read_vocabulary(source)
    dictionary = to_dictionary(entries_from_tokens(tokens, units, longer="cut"), range(256, 261))
    changes = {"expand_input_ids_dict": dictionary, "expand_input_ids_vocab_size": len(tokens)}
    write_published_folder(tmp_path, case, **changes)
    assert (tmp_path / "config.json").stat().st_size > 5_000_000
    began = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    seconds = time.process_time() - began
    assert seconds < 5  # of this process; far more than it takes, since others may slow the machine
    pairs = json.loads((GOLDENS / "byte_llama" / "expand" / f"pairs_{source}.json").read_text())["pairs"]
    expansion = model.model.subword_expansion
    for pair in pairs:
        ambiguous = {place["position"]: place["candidates"] for place in pair.get("ambiguous_positions", ())}
        symbols = expansion.as_symbols(torch.tensor([pair["byte_ids"]], dtype=torch.int64))
        for position, (found, expected) in enumerate(
            zip(expansion(symbols)[0].tolist(), pair["expanded"], strict=True)
        ):
            assert found == expected or found in ambiguous[position]
    model.save_pretrained(tmp_path / "ours")
    assert os.path.getsize(tmp_path / "ours" / "config.json") < 100_000
    again = AutoModelForCausalLM.from_pretrained(Path(tmp_path) / "ours")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
