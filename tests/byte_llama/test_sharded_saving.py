"""The code that goes with a sharded model."""

import json

import torch
from small_models import fresh_model
from torch.distributed.fsdp import FSDPModule, fully_shard


def test_code_of_a_sharded_model(tmp_path):
    """`fully_shard` gives a model another class; the saved code is that of the real one."""
    model = fresh_model("llama")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model)
        weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items() if "lm_head" in name}
        model.save_pretrained(tmp_path, state_dict=weights)
    finally:
        torch.distributed.destroy_process_group()
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    assert saved == "modeling_byte_llama.ByteLlamaForCausalLM"
    assert (tmp_path / "modeling_byte_llama.py").exists() and not list(tmp_path.glob("_fsdp*"))
    assert isinstance(model, FSDPModule)
