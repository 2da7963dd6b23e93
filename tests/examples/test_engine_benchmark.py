"""The benchmark of the fast path: it checks before it measures, and asks the published code in a process of its own."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"

CONFIGURATION = """
class EvaByteConfig:
    def __init__(self, **settings):
        self.__dict__.update(settings)
"""
# Stands for the published modules, which need a CUDA device: a step of its decoding takes no time at all.
MODELING = """
import torch
from types import SimpleNamespace


class EvaByteForCausalLM(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lm_head = torch.nn.Linear(config.hidden_size, config.num_pred_heads * config.vocab_size, bias=False)
        self.generation_config = SimpleNamespace()

    def load_state_dict(self, weights):
        assert weights["lm_head.weight"].shape == self.lm_head.weight.shape

    def generate(self, ids, max_new_tokens, do_sample):
        assert not do_sample
        return ids

    def multi_byte_generate(self, ids, max_new_tokens, temperature, return_acc_lengths=False):
        assert temperature == 0.0
        return (ids, [2, 3, 3]) if return_acc_lengths else ids
"""


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("engine")


def test_published_code_is_asked_in_its_own_process(engine, tmp_path):
    (tmp_path / "configuration_evabyte.py").write_text(CONFIGURATION)
    (tmp_path / "modeling_evabyte.py").write_text(MODELING)
    options = engine.parse_arguments(["--published", str(tmp_path), "--new-bytes", "8", "--repeats", "2"])
    result = engine.measure_published(options, engine.load(options))
    assert result["generate"]["forwards"] == 8 and result["multi_byte_generate"]["forwards"] == 3
    assert result["generate"]["ms_per_step"]["median"] < 1000
    (tmp_path / "modeling_evabyte.py").write_text("raise RuntimeError('needs CUDA')")
    with pytest.raises(SystemExit, match="needs CUDA"):
        engine.measure_published(options, engine.load(options))


def test_bytes_that_differ_are_not_timed(engine, monkeypatch):
    monkeypatch.setattr(engine, "agreement", lambda *_: {"dynamic": 1.0, "compiled": 0.9})
    with pytest.raises(SystemExit, match="Nothing is timed"):
        engine.main(["--nodes", "0", "--new-bytes", "4", "--threads", str(torch.get_num_threads())])


@pytest.mark.slow
def test_a_whole_run():
    command = [sys.executable, SCRIPTS / "engine.py", "--nodes", "4", "--new-bytes", "24", "--repeats", "1"]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    (row,) = result["rows"]
    assert result["equal_to_generate_in_float32"] and result["provenance"]["git_commit"]
    assert set(row["ms_per_step"]) == {"dynamic", "static", "compiled"} and row["forwards"]["compiled"] <= 24
