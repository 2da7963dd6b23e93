"""The conversion benchmark counts every byte once, and records what it did."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "tests" / "byte_llama")
    return importlib.import_module("conversion")


@torch.no_grad()
def test_bits_are_those_of_the_models_distribution(script):
    from subword_models import subword_model

    model, _ = subword_model("llama")
    ids = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    for context in (5, 23, 100):
        expected = 0.0
        for place in range(1, len(ids)):
            begin = (place - 1) // context * context
            logits = model(torch.tensor([ids[begin:place]])).logits[0, -1]
            expected -= logits.log_softmax(-1)[ids[place]].item() / math.log(2)
        assert script.bits(model, ids, context) == pytest.approx(expected, rel=1e-5)


def test_run(script, tmp_path, monkeypatch, capsys):
    from subword_models import CORPUS, subword_model

    model, tokenizer = subword_model("llama")
    model.save_pretrained(tmp_path / "Little")
    tokenizer.save_pretrained(tmp_path / "Little")
    (tmp_path / "text").write_text("".join(CORPUS))
    monkeypatch.setattr(sys.modules["measure"], "RESULTS", tmp_path / "results")
    script.main([str(tmp_path / "Little"), "--text", str(tmp_path / "text"), "--bytes", "100", "--save", "conversion"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "results" / "conversion.json").read_text())
    assert json.loads(lines[-1]) == result
    assert result["text_bytes"] == 100 and result["model"] == "Little"
    assert str(tmp_path) not in json.dumps(result)
    assert result["byte_untrained"]["vocabulary"] == 259
    assert result["subword"]["bits_per_byte"] > 0 and result["byte_untrained"]["bits_per_byte"] > 0
