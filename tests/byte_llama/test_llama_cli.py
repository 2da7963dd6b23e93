"""`byte-llama convert` does what `convert` does, and answers mistakes in one line."""

import subprocess
import sys

import pytest
import torch
from subword_models import subword_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from byte_llama.cli import main
from byte_llama.conversion import convert
from evabyte import __version__
from evabyte_cli.parsing import INTERRUPTED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, tokenizer = subword_model("llama")
    folder = tmp_path_factory.mktemp("subword")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_convert(folder, tmp_path, capsys):
    output = tmp_path / "byte"
    options = ["--num-layers", "2", "--template-word", "fox", "--template-word", "dog", "--pad-token", "<|unused|>"]
    assert main(["convert", str(folder), str(output), "--dtype", "bfloat16", "--max-shard-size", "20KB", *options]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: ")
    arguments = {"num_layers": 2, "template_words": ["fox", "dog"], "pad_token": "<|unused|>", "dtype": "bfloat16"}
    convert(folder, tmp_path / "same", max_shard_size="20KB", **arguments)
    names = {path.name for path in output.iterdir() if path.is_file()}
    assert names == {path.name for path in (tmp_path / "same").iterdir() if path.is_file()}
    for name in names - {"README.md"}:
        assert (output / name).read_bytes() == (tmp_path / "same" / name).read_bytes(), name
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(output).encode("fox")) == 2  # bos, "fox"


@torch.no_grad()
def test_convert_with_eva_layers(folder, tmp_path):
    """Weights as without; texts within one window are read alike."""
    options = ["--eva-layers", "0,2", "--eva-window", "24", "--eva-chunk", "8"]
    assert main(["convert", str(folder), str(tmp_path / "eva"), *options]) == 0
    convert(folder, tmp_path / "full")
    eva, full = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("eva", "full"))
    config = eva.config
    assert (config.eva_layers, config.eva_window_size, config.eva_chunk_size) == ([0, 2], 24, 8)
    ids = torch.randint(0, 256, (1, 40))
    near, far = (eva(ids).logits - full(ids).logits).abs().amax((0, 2)).split((24, 16))
    assert near.max() < 1e-5 < far.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{folder}", "{full}"], "is not empty"),
        (["convert", "{full}", "{new}"], "has no config.json"),
        (["convert", "{folder}", "{new}", "--num-layers", "9"], "`num_layers` must be from 1 to 3"),
        (["convert", "{folder}", "{new}", "--gguf-file", "x.gguf"], "x.gguf is not in"),
        (["convert", "nobody/nothing", "{new}"], "nobody/nothing"),
        (["convert", "{folder}", "{new}", "--num-layers", "0"], "must be a whole number, at least 1"),
        (["convert", "{folder}"], "required: OUT"),
        (["convert", "{folder}", "{new}", "--dtype", "int8"], "invalid choice"),
        (["convert", "{folder}", "{new}", "--eva-layers", "first"], "neither 'all' nor numbers"),
        (["convert", "{folder}", "{new}", "--eva-layers", "1,3"], "`eva_layers` must be 'all' or numbers in 0..2"),
        (["convert", "{folder}", "{new}", "--eva-layers", "all", "--eva-window", "9"], "must divide"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    places = {"folder": folder, "full": tmp_path / "full", "new": tmp_path / "new"}
    try:
        status = main([word.format(**places) for word in arguments])
    except SystemExit as exit_:
        status = exit_.code
    written = capsys.readouterr()
    assert status == 2 and written.out == ""
    assert message in written.err and written.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_interrupted(folder, tmp_path, monkeypatch):
    def interrupted(**arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("byte_llama.cli.convert.convert", interrupted)
    assert main(["convert", str(folder), str(tmp_path / "byte")]) == INTERRUPTED


def test_without_a_command(capsys):
    assert main([]) == 2
    assert "convert" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"byte-llama {__version__}\n"


@pytest.mark.slow
def test_as_a_module():
    run = subprocess.run([sys.executable, "-m", "byte_llama", "convert", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--gguf-file" in run.stdout
