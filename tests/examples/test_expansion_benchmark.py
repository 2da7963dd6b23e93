"""The expansion benchmark runs on a small vocabulary, and measures nothing when the lookup is wrong."""

import importlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from byte_llama.subword_expansion import SubwordExpansion

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("expansion")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of a few hundred subwords."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([Path(__file__).read_text()], trainer)
    folder = tmp_path_factory.mktemp("vocabulary")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tokenizer):
    return [
        "--tokenizer",
        str(tokenizer),
        *"--bytes 200 --width 48 --layers 1 --total-layers 4 --repeats 2 --block 2".split(),
    ]


def test_one_json_line_with_its_provenance(script, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("measure.RESULTS", tmp_path / "results")
    script.main([*arguments, "--save", "tiny"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "results" / "tiny.json").read_text()) == result
    assert result["equal_to_the_scan"] is True
    assert {"date", "git_commit", "cpu", "threads", "versions"} <= result["provenance"].keys()
    assert str(tmp_path) not in json.dumps(result["settings"]) and result["vocabulary"]["entries"] > 256
    for row in result["prompt"].values():
        assert row["bytes"] == 200 and 0 < row["speedup"]["min"] <= row["speedup"]["max"]
    assert result["step"]["speedup_over"].keys() == {"scan of the context", "scan of the last position"}
    assert result["share"]["layers_measured"] == [1, 2] and result["share"]["layers"] == 4


def test_nothing_is_measured_when_a_subword_is_wrong(script, arguments, monkeypatch, capsys):
    expand = SubwordExpansion.forward

    def with_one_wrong_subword(self, symbols, past=None):
        subwords = expand(self, symbols, past)
        subwords[0, -3:] += symbols.shape[1] > 3
        return subwords

    monkeypatch.setattr(SubwordExpansion, "forward", with_one_wrong_subword)
    with pytest.raises(SystemExit, match=r"No speed is measured: at once, position 197"):
        script.main(arguments)
    assert capsys.readouterr().out == ""


def test_the_scan_prefers_the_longest(script):
    subword_of = {(1,): 7, (2,): 8, (1, 2): 9, (3, 1, 2): 10}
    assert script.scan([3, 1, 2, 4], subword_of, maxlen=16) == [0, 7, 10, 0]
    assert script.scan([3, 1, 2, 4], subword_of, maxlen=2) == [0, 7, 9, 0]
    assert script.scan([3, 1, 2], subword_of, maxlen=16, last=1) == [10]
