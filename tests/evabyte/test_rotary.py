"""Rotary tables against transformers' Llama, whose scaling by yarn and llama3 is the same."""

import pytest
import torch
from tiny import fresh_model, random_ids
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ORIGINAL = 64
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_tables_are_llamas(scaling):
    rope = {**scaling, "rope_theta": 1000.0}
    model = fresh_model(rope_parameters=rope, max_position_embeddings=256)
    config = model.config
    llama = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        rope_parameters=rope,
        max_position_embeddings=256,
    )
    positions = torch.arange(200)[None]
    hidden_states = torch.zeros(1, 200, config.hidden_size)
    layout = model.model.build_layout(hidden_states.shape)
    ours = model.model.rotary_emb(hidden_states, positions, layout)
    for table, expected in zip(ours, LlamaRotaryEmbedding(llama)(hidden_states, positions), strict=True):
        torch.testing.assert_close(table, expected)


@pytest.mark.parametrize("scaling", SCALINGS[2:], ids=lambda scaling: scaling["rope_type"])
def test_a_scaled_model_on_a_cache(scaling):
    model, ids = fresh_model(rope_parameters={**scaling, "rope_theta": 1000.0}), random_ids(1, 40)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, **how)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **how))
    assert torch.equal(cached, model.multi_byte_generate(ids, **how))
