"""The benchmark scripts run, and refuse to time what is not correct."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from evabyte import EvaByteConfig, EvaByteForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def decode_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("decode")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = EvaByteConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        window_size=32,
        chunk_size=4,
    )
    folder = tmp_path_factory.mktemp("benchmarks") / "tiny"
    EvaByteForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_arguments(model: Path) -> list[str]:
    sizes = "--repeats 1 --prompts 2 --prompt-bytes 20 40 --new-bytes 9 --contexts 64 128 --steps 3"
    return ["--model", str(model), *sizes.split()]


def test_decode_gives_one_json_line_with_its_provenance(decode_script, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("measure.RESULTS", tmp_path / "results")
    plot = tmp_path / "context.png"
    arguments = [*tiny_arguments(tiny_model), "--batch", "1", "2", "--plot", str(plot), "--save", "tiny"]
    decode_script.main(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert json.loads((tmp_path / "results" / "tiny.json").read_text()) == result
    assert plot.stat().st_size > 0
    assert result["equal_to_generate_in_float32"] is True
    assert result["provenance"]["command"][2:] == arguments
    assert {"date", "git_commit", "device", "cpu", "threads", "versions"} <= result["provenance"].keys()
    assert result["provenance"]["versions"]["torch"] == torch.__version__

    cases = {(row["batch"], row["temperature"], row["source"], row["draft"]) for row in result["multibyte"]}
    assert len(cases) == len(result["multibyte"]) == 2 * 2 * 2 * len(decode_script.DRAFTS)
    for row in result["multibyte"]:
        assert row["pairs"] == 2 // row["batch"]
        assert 1 <= row["bytes_per_forward"] <= 8
        assert 0 < row["speedup"]["min"] <= row["speedup"]["median"] <= row["speedup"]["max"]

    assert [row["context"] for row in result["context"]] == [64, 128]
    for row in result["context"]:
        assert all(times["min"] > 0 for times in row["milliseconds_per_byte"].values())
        assert row["milliseconds_per_byte"].keys() == {"evabyte", "llama", "llama_static"}


def test_decode_measures_nothing_when_the_bytes_differ(decode_script, tiny_model, monkeypatch, capsys):
    lossless = EvaByteForCausalLM.multi_byte_generate

    def with_one_wrong_byte(self, *args, **kwargs):
        ids, lengths = lossless(self, *args, **kwargs)
        ids[:, -3] += 1
        return ids, lengths

    monkeypatch.setattr(EvaByteForCausalLM, "multi_byte_generate", with_one_wrong_byte)
    with pytest.raises(SystemExit, match=r"No speed is measured.*'chain'.*from new byte 6 on"):
        decode_script.main(tiny_arguments(tiny_model))
    assert capsys.readouterr().out == ""


def test_static_copy_writes_what_the_dynamic_cache_writes(decode_script):
    growth = importlib.import_module("context_growth")
    config = EvaByteConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    dynamic = growth.CachedModel(growth.llama_of_same_shape(EvaByteForCausalLM(config), positions=64))
    with torch.no_grad():
        dynamic.prefill(growth.heldout_ids(20, torch.device("cpu")))
        static = dynamic.copy_to_static_cache(steps=2)
        for each in (dynamic, static):
            each.write(2)
    for index, layer in enumerate(dynamic.cache.layers):
        torch.testing.assert_close(static.cache.layers[index].keys, layer.keys)


def test_prompts_that_do_not_fill_the_batches_are_refused(decode_script):
    with pytest.raises(SystemExit, match="--prompts 3 must be a multiple of every --batch"):
        decode_script.prompt_batches(per_source=3, sizes=[10], batch=2, device=torch.device("cpu"))
