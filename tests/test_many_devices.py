"""Models spread over processes and places give what one process gives: real processes, on CPU."""

import os
import subprocess
import sys
from pathlib import Path

import device_process
import pytest
import torch
from test_features import every_model, fresh_model, random_ids
from transformers import AutoModelForCausalLM

SCRIPT = Path(device_process.__file__)


@pytest.fixture
def folder(name, tmp_path):
    """A saved model whose heads can be divided among two processes, and inputs for it."""
    heads = {"num_attention_heads": 4} if name == "EvaByte" else {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = fresh_model(name, num_hidden_layers=3, **heads)
    model.save_pretrained(tmp_path)
    torch.save(random_ids(name, 2, 40), tmp_path / "ids.pt")
    return str(tmp_path)


def on_two_processes(how: str, folder: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, how, folder]
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, f"{folder}/two.pt"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(f"{folder}/two.pt")


def assert_same(two: dict, one: dict) -> None:
    torch.testing.assert_close(two["logits"], one["logits"], atol=1e-4, rtol=1e-4)
    for text in {"text", "multibyte"} & set(two):
        assert torch.equal(two[text], one[text])
    if "loss" in two:
        torch.testing.assert_close(two["loss"], one["loss"])
        assert set(two["gradients"]) == set(one["gradients"])
        for parameter, gradient in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][parameter], gradient, atol=1e-4, rtol=1e-3, msg=parameter)


@pytest.mark.slow
@every_model("Tensor parallelism (`tp_plan`), two processes")
def test_tensor_parallelism(name, folder):
    one, two = device_process.everything("one", folder), on_two_processes("tensor", folder)
    assert_same(two, one)
    assert two["held"] < 0.8 * one["held"]


@pytest.mark.slow
@every_model("Pipeline of two processes (`pp_size`), `generate`")
def test_pipeline(name, folder):
    one, two = device_process.everything("one", folder), on_two_processes("pipeline", folder)
    assert_same(two, one)
    assert two["held"] < 0.8 * one["held"]


@pytest.mark.slow
@every_model("FSDP2, two processes: forward, gradients, `generate`")
def test_sharded(name, folder):
    one, two = device_process.everything("one", folder), on_two_processes("sharded", folder)
    assert_same(two, one)
    assert two["held"] < 0.6 * one["held"]


def assert_offloaded_alike(folder: str, scratch: Path, **how) -> None:
    """A model partly on disk computes and decodes what it does in memory."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    spread = AutoModelForCausalLM.from_pretrained(folder, offload_folder=scratch, **how)
    assert "disk" in spread.hf_device_map.values() and next(spread.model.layers[2].parameters()).is_meta
    ids, greedy = torch.load(f"{folder}/ids.pt"), device_process.GREEDY
    with torch.no_grad():
        torch.testing.assert_close(spread(ids).logits, whole(ids).logits)
    assert torch.equal(spread.generate(ids, **greedy), whole.generate(ids, **greedy))
    assert torch.equal(spread.multi_byte_generate(ids, **greedy), whole.generate(ids, **greedy))


@every_model("`device_map` with layers offloaded to disk")
def test_offload_to_disk(name, folder, tmp_path):
    parts = {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    parts |= {part: "cpu" for part, _ in model.named_children() if part not in ("lm_head", "model")}
    parts |= {f"model.{part}": "cpu" for part, _ in model.model.named_children() if part != "layers"}
    assert_offloaded_alike(folder, tmp_path / "offload", device_map=parts)


@every_model('`device_map="auto"` in too little memory')
def test_automatic_offload(name, folder, tmp_path):
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    assert_offloaded_alike(folder, tmp_path / "offload", device_map="auto", max_memory={"cpu": size // 2})
