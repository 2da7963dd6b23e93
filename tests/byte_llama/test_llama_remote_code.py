"""A saved folder brings all the code it needs, this package's and that of `evabyte`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import KINDS, fresh_model
from torch.distributed.fsdp import FSDPModule, fully_shard

from byte_llama import ByteLlamaTokenizer

TOKENIZER = Path(__file__).parents[1] / "goldens" / "byte_llama" / "tokenizer" / "llama3_1"

LOAD = """
import importlib.abc, sys, torch

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("evabyte", "byte_llama"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.load(f"{folder}/ids.pt")
assert torch.equal(model(ids).logits, torch.load(f"{folder}/logits.pt"))
how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
greedy = model.generate(ids, **how)
for draft in ("dynamic", "lookup"):
    assert torch.equal(model.multi_byte_generate(ids, draft=draft, **how), greedy)
assert tokenizer.decode(tokenizer("déjà vu")["input_ids"], skip_special_tokens=True) == "déjà vu"
model.save_pretrained(again)
tokenizer.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert torch.equal(model.generate(ids, **how), greedy)
print(type(model).__module__.split(".")[0], type(tokenizer).__module__.split(".")[0])
"""


@pytest.mark.parametrize("kind", KINDS)
def test_self_contained_folder(kind, tmp_path):
    model, ids = fresh_model(kind, num_pred_heads=3), torch.randint(0, 4, (1, 30))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    ByteLlamaTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    assert (folder / "config.json").stat().st_size < 100_000
    torch.save(ids, folder / "ids.pt")
    torch.save(model(ids).logits.detach(), folder / "logits.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["transformers_modules"] * 2


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
