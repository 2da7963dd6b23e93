"""Small models with real tokenizers, and what must hold where their folders load without the packages."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import fresh_model

from byte_llama import (
    ByteGemma2Config,
    ByteGemma2ForCausalLM,
    ByteLlamaConfig,
    ByteLlamaForCausalLM,
    ByteLlamaTokenizer,
)
from byte_llama.subword_table import entries_from_tokens, to_dictionary
from evabyte import EvaByteTokenizer

TOKENIZERS = Path(__file__).parent / "goldens" / "byte_llama" / "tokenizer"
MODELS = ("EvaByte", "byte Llama", "byte Gemma 2")
CHAT = [{"role": "user", "content": "the <|eot_id|> of <end_of_turn> déjà vu"}]
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"

# Its arguments are triples: a folder or Hub id, the file that `expect` wrote, and a folder to save to. It prints those
# sources of which everything held, and why the others did not.
LOAD = """
import importlib.abc, sys, torch, traceback
from pathlib import Path

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("evabyte", "byte_llama"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_grad_enabled(False)  # as in `expect`: in bfloat16 another attention kernel would be chosen

def load(source, expected):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    for loaded in (model, tokenizer):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    ids = tokenizer(expected["text"], return_tensors="pt")["input_ids"]
    assert ids.tolist() == expected["ids"].tolist()
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == expected["text"]
    assert torch.equal(model(ids).logits, expected["logits"])
    how = {"max_new_tokens": 12, "do_sample": False}
    assert model.generation_config.eos_token_id == expected["eos"]
    assert torch.equal(model.generate(ids, **how), expected["greedy"])
    for draft in ("dynamic", "lookup"):
        assert torch.equal(model.multi_byte_generate(ids, draft=draft, **how), expected["greedy"])
    chat = tokenizer.encode_chat(expected["chat"])
    assert chat == expected["chat_ids"]
    model.multi_byte_generate(torch.tensor([chat]), **how)
    return model, tokenizer

for source, expected, again in zip(*[iter(sys.argv[1:])] * 3):
    try:
        expected = torch.load(expected)
        for saved in load(source, expected):
            saved.save_pretrained(again)
        assert (Path(again) / "README.md").exists()
        load(again, expected)
        print(source)
    except Exception:
        print(f"\\n{source}:", traceback.format_exc(), file=sys.stderr)
"""


def model_and_tokenizer(name):
    """A random model, in eval mode, and the tokenizer of its vocabulary; `name` is one of `MODELS`."""
    if name == "EvaByte":
        return fresh_model(), EvaByteTokenizer()
    llama = name == "byte Llama"
    config_class, model_class = (
        (ByteLlamaConfig, ByteLlamaForCausalLM) if llama else (ByteGemma2Config, ByteGemma2ForCausalLM)
    )
    tokenizer = ByteLlamaTokenizer.from_pretrained(
        TOKENIZERS / ("llama3_1" if llama else "gemma2"), chat_template=TEMPLATE
    )
    subwords = [b"the", b"he ", "déjà".encode(), b" vu", b"bytes", b"s of"]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.5,
        num_pred_heads=3,
        expand_input_ids=True,
        expand_input_ids_vocab_size=len(subwords),
        expand_input_ids_dict=to_dictionary(entries_from_tokens(subwords, {})),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config).eval(), tokenizer


@torch.no_grad()
def expect(model, tokenizer, file, text="the bytes of déjà vu"):
    """Write to a file what [`LOAD`] compares with."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = {
        "text": text,
        "ids": ids,
        "logits": model(ids).logits,
        "eos": model.generation_config.eos_token_id,
        "greedy": model.generate(ids, max_new_tokens=12, do_sample=False),
        "chat": CHAT,
        "chat_ids": tokenizer.encode_chat(CHAT),
    }
    torch.save(expected, file)


def load_without_packages(triples, home, **environment):
    """Run [`LOAD`] in a fresh interpreter whose caches are in `home`: the sources that hold, and what was said."""
    settings = {"PATH": "", "HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD, *(str(item) for triple in triples for item in triple)],
        capture_output=True,
        text=True,
        cwd=home,
        env={**settings, **environment},
    )
    return run.stdout.splitlines(), run.stderr


def run_with_packages(code, *arguments, **environment):
    """Run `code` in a fresh interpreter that has the packages and the modules beside this one."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, env={**os.environ, **settings, **environment}
    )
