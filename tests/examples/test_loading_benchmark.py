"""The loading benchmark runs, and refuses to time what is not correct."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from evabyte import EvaByteConfig, EvaByteForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("loading")


@pytest.fixture
def folder(tmp_path):
    EvaByteForCausalLM(EvaByteConfig(**SIZES)).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def test_result(script, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("measure.RESULTS", tmp_path / "results")
    script.main(["--model", str(folder), "--repeats", "2", "--save", "tiny"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert result["files"] > 2 and result["seconds"].keys() == {"read", "tensors", "from_pretrained"}
    assert result["bytes"] == sum(weight.nbytes for weight in script.load(folder).state_dict().values())
    assert str(tmp_path) not in json.dumps(result)


def test_other_weights_are_not_timed(script, folder, monkeypatch):
    def load(folder):
        model = EvaByteForCausalLM.from_pretrained(folder)
        torch.nn.init.zeros_(model.lm_head.weight)
        return model

    monkeypatch.setattr(script, "load", load)
    with pytest.raises(RuntimeError, match="not those of the files"):
        script.measure(folder, 1)
