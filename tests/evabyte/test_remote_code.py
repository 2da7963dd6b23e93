"""A folder saved with its code loads by trust_remote_code where this package is not installed."""

import subprocess
import sys

import torch
from tiny import fresh_model, random_ids

from evabyte import EvaByteTokenizer

LOAD = """
import importlib.abc, sys, torch

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("evabyte", "byte_llama"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.load(f"{folder}/ids.pt")
assert torch.equal(model(ids).logits, torch.load(f"{folder}/logits.pt"))
greedy = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
assert torch.equal(model.multi_byte_generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None), greedy)
assert tokenizer.decode(tokenizer("déjà vu")["input_ids"], skip_special_tokens=True) == "déjà vu"
print(type(model).__module__.split(".")[0])
"""


def test_self_contained_folder(tmp_path):
    model, ids = fresh_model(), random_ids(1, 30)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    EvaByteTokenizer().save_pretrained(folder)
    torch.save(ids, folder / "ids.pt")
    torch.save(model(ids).logits.detach(), folder / "logits.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["transformers_modules"]
