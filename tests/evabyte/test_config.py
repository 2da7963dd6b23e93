"""The configuration takes published files as they are and refuses what EVA cannot compute."""

import pytest
from transformers import AutoConfig

from evabyte import EvaByteConfig

PUBLISHED = {
    "_name_or_path": None,
    "architectures": ["EvaByteForCausalLM"],
    "attention_bias": False,
    "attention_class": "eva",
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_evabyte.EvaByteConfig",
        "AutoModelForCausalLM": "modeling_evabyte.EvaByteForCausalLM",
    },
    "bos_token_id": 1,
    "chunk_size": 16,
    "eos_token_id": 11,
    "fp32_ln": False,
    "fp32_logits": True,
    "fp32_skip_add": True,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "init_cutoff_factor": None,
    "init_fn": "v2",
    "init_std": 0.01275,
    "initializer_range": 0.01275,
    "intermediate_size": 11008,
    "lazy_init": True,
    "max_position_embeddings": 32768,
    "max_seq_length": 32768,
    "mixedp_attn": True,
    "model_type": "evabyte",
    "norm_add_unit_offset": True,
    "num_attention_heads": 32,
    "num_chunks": None,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "num_pred_heads": 8,
    "pad_token_id": 0,
    "return_dict": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.1",
    "use_cache": True,
    "vocab_size": 320,
    "window_size": 2048,
}


def test_published_config_is_taken_and_kept(tmp_path):
    config = EvaByteConfig.from_dict(dict(PUBLISHED))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000}
    assert config.return_dict is True  # the published models return output classes all the same
    converted = {"_name_or_path", "return_dict", "rope_scaling", "rope_theta", "torch_dtype", "transformers_version"}
    for name in PUBLISHED.keys() - converted:
        assert getattr(config, name) == PUBLISHED[name], name
    assert EvaByteConfig(return_dict=False).return_dict is True
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, EvaByteConfig)
    assert {**again.to_dict(), "_name_or_path": None} == config.to_dict()


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0}])
def test_rope_scaling_round_trips(scaling, tmp_path):
    config = EvaByteConfig(rope_scaling=scaling, rope_theta=5000.0)
    config.save_pretrained(tmp_path)
    rope = EvaByteConfig.from_pretrained(tmp_path).rope_parameters
    assert rope["rope_type"] == scaling.get("type", scaling.get("rope_type"))
    assert (rope["factor"], rope["rope_theta"]) == (scaling["factor"], 5000.0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"chunk_size": 15}, "chunk_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"window_size": 0}, "window_size"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"hidden_size": 96, "num_attention_heads": 32}, "even"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"num_pred_heads": 0}, "num_pred_heads"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_class": "mha"}, "attention_class"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
    ],
)
def test_impossible_values_are_refused_by_name(changes, field):
    with pytest.raises(Exception, match=field):
        EvaByteConfig(**{**PUBLISHED, **changes})
