"""Folders as published load through the Auto classes; damaged ones say what is wrong."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_config import PUBLISHED
from tiny import random_ids
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from evabyte import EvaByteConfig, EvaByteForCausalLM, EvaByteModel, EvaByteTokenizer

TOKENIZER_CONFIG = {
    "tokenizer_class": "EvaByteTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_evabyte.EvaByteTokenizer", None]},
    "bos_token": "<bos>",
    "eos_token": "<|eot_id|>",
    "pad_token": "<pad>",
    "model_max_length": 32768,
    "clean_up_tokenization_spaces": False,
}


def published_shapes(config):
    """Names and shapes of a published checkpoint's tensors, written down from its model card, not from our model."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["num_pred_heads"] * config["vocab_size"], hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("adaptive_phi", "adaptive_mu_k"):
            shapes[f"{layer}.self_attn.{name}"] = (1, heads, 1, 1, hidden // heads)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{layer}.mlp.{name}.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (hidden,)
    return shapes


def write_published_folder(folder, **changes):
    """A folder that looks exactly like the published one: bf16 shards, index, their two configuration files."""
    config = {**PUBLISHED, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 11, "pad_token_id": 0})
    )
    generator = torch.Generator().manual_seed(0)
    shapes = list(published_shapes(config).items())
    weight_map, total, shards = {}, 0, 3
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for key, shape in shapes[shard::shards]:
            tensors[key] = torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02
            weight_map[key] = name
            total += tensors[key].numel() * 2
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "window_size": 64,
}


@pytest.fixture
def small_folder(tmp_path):
    write_published_folder(tmp_path, **SMALL)
    return tmp_path


def test_published_folder_through_the_auto_classes(small_folder):
    model = AutoModelForCausalLM.from_pretrained(small_folder)
    tokenizer = AutoTokenizer.from_pretrained(small_folder)
    assert type(model) is EvaByteForCausalLM and type(tokenizer) is EvaByteTokenizer
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 11
    state, stored = model.state_dict(), {}
    for shard in small_folder.glob("*.safetensors"):
        stored |= load_file(shard)
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)
    inputs = tokenizer(["Bytes.", "No tokens."], return_tensors="pt", padding=True, padding_side="left")
    greedy = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.multi_byte_generate(**inputs, max_new_tokens=20, do_sample=False), greedy)
    assert type(AutoModel.from_pretrained(small_folder)) is EvaByteModel


def test_saving_keeps_names_and_numbers(small_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = random_ids(2, 30)
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(published_shapes({**PUBLISHED, **SMALL}))


def change_weight(folder, name, change):
    """Put `change(weight)` in place of a weight, or nothing if that is None."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(folder / weight_map[name])
    weight = change(tensors.pop(name))
    save_file(tensors if weight is None else {**tensors, name: weight}, folder / weight_map[name], {"format": "pt"})


def test_missing_weights(small_folder):
    change_weight(small_folder, "model.layers.1.self_attn.adaptive_phi", lambda weight: None)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.adaptive_phi \(missing\)"):
        AutoModelForCausalLM.from_pretrained(small_folder)
    AutoModelForCausalLM.from_pretrained(small_folder, ignore_mismatched_sizes=True)
    _, info = AutoModelForCausalLM.from_pretrained(small_folder, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.1.self_attn.adaptive_phi"}


def test_misshapen_weights(small_folder):
    change_weight(small_folder, "model.layers.0.mlp.up_proj.weight", lambda weight: weight.T.contiguous())
    with pytest.raises(ValueError, match=r"up_proj\.weight \(shape \(64, 96\), expected \(96, 64\)\)"):
        AutoModelForCausalLM.from_pretrained(small_folder)


def test_truncated_file(small_folder):
    shard = next(small_folder.glob("model-00003*"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(OSError, match="damaged or cut short"):
        AutoModelForCausalLM.from_pretrained(small_folder)


def test_missing_shard(small_folder):
    next(small_folder.glob("model-00001*")).unlink()
    with pytest.raises(OSError, match="model-00001"):
        AutoModelForCausalLM.from_pretrained(small_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "empty"),
        ({"input_ids": torch.tensor([[64, 320]])}, "0..319"),
        ({"input_ids": torch.tensor([[-1, 70]])}, "0..319"),
        ({"input_ids": random_ids(2, 5), "attention_mask": torch.ones(2, 4)}, "attention_mask"),
        ({"input_ids": random_ids(2, 5), "attention_mask": torch.ones(2, 1, 5, 5)}, "attention_mask"),
        ({"input_ids": random_ids(2, 5), "position_ids": torch.arange(4)[None]}, "position_ids"),
        ({}, "exactly one"),
        ({"input_ids": random_ids(1, 3), "output_attentions": True}, "output_attentions"),
        ({"input_ids": random_ids(1, 3), "draft_tree": torch.ones(1, 3, 3, dtype=torch.bool)}, "draft_tree"),
    ],
)
def test_bad_input(arguments, message):
    model = EvaByteForCausalLM(EvaByteConfig(**{**SMALL, "num_pred_heads": 2}))
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_empty_prompt():
    model = EvaByteForCausalLM(EvaByteConfig(**SMALL))
    with pytest.raises(ValueError, match="empty"):
        model.multi_byte_generate(torch.zeros(1, 0, dtype=torch.int64), bos_token_id=None, max_new_tokens=3)


def test_length_beyond_the_trained_one_warns(caplog):
    config = EvaByteConfig(**SMALL, max_position_embeddings=20)
    with caplog.at_level("WARNING"):
        from transformers.utils import logging

        logging.enable_propagation()
        EvaByteForCausalLM(config)(random_ids(1, 30))
        logging.disable_propagation()
    assert "max_position_embeddings" in caplog.text


LOAD = """
import resource, sys, torch
from transformers import AutoModelForCausalLM
import evabyte
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
def test_full_width_folder(tmp_path):
    """Two layers of the 6.5B model's width, 0.8 GB: loads within 1.2x of its size, and generates."""
    size = write_published_folder(tmp_path, num_hidden_layers=2)
    output = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(output.stdout) <= 1.2 * size
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = AutoTokenizer.from_pretrained(tmp_path)("Hello", return_tensors="pt")
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert greedy.shape[1] <= inputs["input_ids"].shape[1] + 8
