"""A saved folder brings all the code it needs, this package's and that of `evabyte`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import KINDS, fresh_model

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
