"""The benchmarks of byteification count what they say they count."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from byte_llama import ByteLlamaConfig, ByteLlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("eva_layers")


def models():
    eva = {"eva_layers": "all", "eva_window_size": 8, "eva_chunk_size": 4}
    return {
        name: ByteLlamaForCausalLM(ByteLlamaConfig(**SIZES, **HEADS, **own)).eval()
        for name, own in {"full": {}, "eva": eva}.items()
    }


def test_costs_at_each_length(script):
    ids = torch.randint(0, 20, (1, 260))
    found = script.costs(models(), ids, [32, 256], written=3, repeats=2)
    assert [entry["length"] for entry in found] == [32, 256]
    for entry in found:  # keys and values of two layers, one key-value head of 8 channels, 4 bytes each
        assert entry["cache_bytes"]["full"] == 2 * 2 * 8 * 4 * entry["length"]
        assert min(entry["ms_per_byte_read"].values()) > 0 and entry["times_as_fast_written"]["median"] > 0
    assert found[1]["cache_bytes"]["eva"] < found[1]["cache_bytes"]["full"]


@torch.no_grad()
def test_windows_set_aside_count(script):
    model = models()["eva"]
    cache = DynamicCache(config=model.config)
    model(torch.randint(0, 20, (1, 20)), past_key_values=cache)
    layer = cache.layers[0]
    buffers = 2 * layer.keys.numel() + 2 * 8 * 8  # one closed window of 8 keys and values of 8 channels
    assert script.cache_bytes(cache) == 2 * 4 * buffers
