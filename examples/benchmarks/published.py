"""The published EvaByte code, timed where it runs: `engine.py --published` starts this with another Python.

    python -m venv published && published/bin/pip install torch transformers==4.47.1 triton
    python examples/benchmarks/engine.py --device cuda --dtype bfloat16 --shape 6.5b \\
        --published FOLDER --published-python published/bin/python --save engine-cuda-published

It needs a CUDA device and an environment with transformers 4.47, in which nothing of this repository can be imported,
so this file stands alone. FOLDER holds the published modules. The task comes as JSON on standard input: `weights` (a
folder with config.json and safetensors), `ids` (of one prompt), `new_bytes`, `repeats`, `device`, `dtype`; the answer
is the last line on standard output.
"""

import importlib
import json
import sys
import time
import types
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def load(code: str, task: dict):
    """The published model with the weights of a folder that this repository wrote."""
    package = types.ModuleType("published_evabyte")
    package.__path__ = [code]
    sys.modules[package.__name__] = package
    settings = json.loads(Path(task["weights"], "config.json").read_text())
    settings["rope_theta"] = settings.pop("rope_parameters")["rope_theta"]
    for name in ("auto_map", "architectures", "model_type", "dtype", "transformers_version"):
        settings.pop(name, None)
    config = importlib.import_module("published_evabyte.configuration_evabyte").EvaByteConfig(**settings)
    torch.set_default_dtype(getattr(torch, task["dtype"]))
    with torch.device(task["device"]):
        model = importlib.import_module("published_evabyte.modeling_evabyte").EvaByteForCausalLM(config)
    weights = {}
    for file in Path(task["weights"]).glob("*.safetensors"):
        weights.update(load_file(file, device=task["device"]))
    model.load_state_dict(weights)
    model.generation_config.eos_token_id = -1  # nothing ends a text early
    return model.eval()


@torch.no_grad()
def timed(run, repeats: int) -> list:
    """Seconds of each run, after a warm-up."""
    seconds = []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat:
            seconds.append(time.perf_counter() - began)
    return seconds


def measure(model, task: dict) -> dict:
    """Seconds of greedy calls for all bytes and for one, and forwards, of both ways of decoding."""
    ids = torch.tensor([task["ids"]], device=task["device"])
    result = {}
    for name in ("generate", "multi_byte_generate"):
        greedy = {"do_sample": False} if name == "generate" else {"temperature": 0.0}

        def write(count: int, name: str = name, greedy: dict = greedy, **how):
            return getattr(model, name)(ids, max_new_tokens=count, **greedy, **how)

        forwards = task["new_bytes"]
        if name == "multi_byte_generate":
            forwards = len(write(task["new_bytes"], return_acc_lengths=True)[1])
        result[name] = {
            "forwards": forwards,
            "seconds": timed(lambda: write(task["new_bytes"]), task["repeats"]),
            "seconds_of_one_byte": timed(lambda: write(1), task["repeats"]),
        }
    return result


if __name__ == "__main__":
    task = json.load(sys.stdin)
    rows = measure(load(sys.argv[1], task), task)
    print(json.dumps({"transformers": transformers.__version__, "torch": str(torch.__version__), **rows}))
