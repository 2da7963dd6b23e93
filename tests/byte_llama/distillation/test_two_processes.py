"""Two processes with FSDP2 on CPU give what one gives, resume where they stopped, and save a whole student."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_recipe import recipe  # noqa: F401
from test_trainer import parts  # noqa: F401
from transformers import AutoModelForCausalLM

from byte_llama.distillation import Recipe, distill

SCRIPT = Path(__file__).with_name("two_processes.py")
# What `accelerate launch` sets for FSDP2.
FSDP = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def on_two(recipe_file, log, resume="anew", teacher_sharded=False):
    """The history of a run on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, **FSDP, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, SCRIPT, recipe_file, log, resume], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-40000:]
    result = json.loads(log.read_text())
    assert result["sharded"] and result["teacher_sharded"] == teacher_sharded
    return result["history"]


def write(recipe_file, processes, steps, **overrides):
    """The recipe for so many processes, whose batches together are one's."""
    given = yaml.safe_load(recipe_file.read_text())
    own = {"max_steps": steps, "save_steps": 3, "seed": 5, "per_device_train_batch_size": 4 // processes}
    overrides = {"output": f"{recipe_file.parent}/run{processes}", **overrides}
    file = recipe_file.with_name(f"recipe{processes}.yaml")
    file.write_text(yaml.safe_dump({**given, **overrides, "training": {**given["training"], **own}}))
    return file


def values(history, name):
    return [entry[name] for entry in history if name in entry]


def assert_alike(one, two):
    losses = ("loss", "loss_sft", "loss_alm", "loss_latents", "loss_heads")
    for name in (*losses, "eval_bits_per_byte", "eval_teacher_bits_per_byte"):
        assert values(one, name) and values(two, name) == pytest.approx(values(one, name), abs=2e-5, rel=2e-5), name


def trained(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


@pytest.mark.slow
def test_two_processes_are_one_and_resume(recipe, tmp_path):  # noqa: F811
    one = distill(Recipe.from_file(write(recipe, 1, 6))).state.log_history
    file = write(recipe, 2, 6)
    two = on_two(file, tmp_path / "log.json")
    assert_alike(one, two)
    assert values(two, "sample") == values(one, "sample") != []
    config = json.loads((tmp_path / "run2" / "final" / "config.json").read_text())
    assert config == json.loads((tmp_path / "run1" / "final" / "config.json").read_text())

    whole = trained(tmp_path / "run2")
    (tmp_path / "run2" / "checkpoint-6").rename(tmp_path / "later")
    resumed = on_two(file, tmp_path / "resumed.json", "resume")
    # Throughput is of the clock: the first three are the interrupted run's own.
    assert values(resumed, "bytes_per_second")[:3] == values(two, "bytes_per_second")[:3]
    for name in ("loss", "loss_sft", "loss_alm", "loss_latents", "loss_heads"):
        assert values(resumed, name) == values(two, name)
    again = trained(tmp_path / "run2")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_adapters_of_shards_are_merged(recipe, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    how = {"lora": {"r": 2}, "sample_prompts": []}
    one = distill(Recipe.from_file(write(recipe, 1, 2, **how))).state.log_history
    assert_alike(one, on_two(write(recipe, 2, 2, **how), tmp_path / "log.json"))
    expected, found = trained(tmp_path / "run1"), trained(tmp_path / "run2")
    assert expected.keys() == found.keys()
    for name in expected:  # an optimizer's first steps have one size, whatever the gradient's
        torch.testing.assert_close(found[name], expected[name], atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"eva_layers": [1], "eva_window_size": 16, "eva_chunk_size": 4}])
def test_a_sharded_teacher_says_the_same(recipe, tmp_path, own):  # noqa: F811
    how = {"shard_teacher": True, "sample_prompts": [], **own}
    one = distill(Recipe.from_file(write(recipe, 1, 4, **{**how, "shard_teacher": False}))).state.log_history
    assert_alike(one, on_two(write(recipe, 2, 4, **how), tmp_path / "log.json", teacher_sharded=True))
