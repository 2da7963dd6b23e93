"""Published folders exported: other code, the same weights, the same logits."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hub_folders import MODELS, expect, load_without_packages
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from evabyte.cli import main
from evabyte.exporting import export_folder

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens" / "byte_llama"
CARD = "---\nlicense: apache-2.0\ntags:\n- bytes\n---\n\n# As published\n"


def published(name, folder, monkeypatch):
    """A folder as published, with a card and a licence."""
    monkeypatch.syspath_prepend(HERE / "evabyte")
    monkeypatch.syspath_prepend(HERE / "byte_llama")
    if name == "EvaByte":
        from test_loading import SMALL, write_published_folder

        folder.mkdir()
        write_published_folder(folder, **SMALL)
    elif name == "byte Llama":
        shutil.copytree(GOLDENS / "checkpoint", folder)
    else:
        from test_llama_loading import write_published_folder

        shutil.copytree(GOLDENS / "tokenizer" / "gemma2", folder)
        for path in folder.iterdir():
            if path.name not in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                path.unlink()
        write_published_folder(folder, "gemma2_expand")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Terms.")
    (folder / "modeling_old.py").write_text("raise ImportError")
    return folder


def stored(folder):
    """All tensors of a folder's safetensors files."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.compatibility("Published folder exported", name)) for name in MODELS]
)
def test_exported_folder(name, tmp_path, monkeypatch):
    folder, output = published(name, tmp_path / "published", monkeypatch), tmp_path / "deep" / "out"
    assert export_folder(folder, output) == output
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, output))
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, output)]
    ids, again = (tokenizer("bytes, déjà vu", return_tensors="pt")["input_ids"] for tokenizer in tokenizers)
    assert torch.equal(ids, again) and type(tokenizers[0]) is type(tokenizers[1])
    assert type(after) is type(before) and after.dtype == before.dtype
    assert torch.equal(after(ids).logits, before(ids).logits)
    assert after.generation_config.to_dict() == before.generation_config.to_dict()

    tensors, published_tensors = stored(output), stored(folder)
    assert tensors.keys() == after.state_dict().keys() - after.all_tied_weights_keys.keys()
    assert all(torch.equal(tensors[key], value) for key, value in published_tensors.items())
    inodes = {path.stat().st_ino for path in output.glob("*.safetensors")}
    assert {path.stat().st_ino for path in folder.glob("*.safetensors")} <= inodes
    config = (output / "config.json").read_text()
    assert "expand_input_ids_dict" not in config and "tpu" not in config.lower() and len(config) < 3000
    assert not (output / "modeling_old.py").exists() and (output / "LICENSE").read_text() == "Terms."
    card = ModelCard.load(output / "README.md")
    assert card.data.license == "apache-2.0" and "# As published" in card.text and "`evabyte export`" in card.text
    assert str(tmp_path) not in card.content
    assert os.listdir(output.parent) == ["out"]


@pytest.mark.slow
def test_exported_folders_without_the_packages(tmp_path, monkeypatch):
    triples = []
    for name in MODELS:
        folder, output = published(name, tmp_path / f"published {name}", monkeypatch), tmp_path / name
        export_folder(folder, output, copy=True)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        expect(model, tokenizer, tmp_path / f"{name}.pt")
        shutil.rmtree(folder)
        triples.append((output, tmp_path / f"{name}.pt", tmp_path / "again" / name))
    sources, said = load_without_packages(triples, tmp_path)
    assert sources == [str(tmp_path / name) for name in MODELS], said


def test_copies_where_links_fail(tmp_path, monkeypatch):
    folder = published("byte Llama", tmp_path / "published", monkeypatch)
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("another disk")))
    export_folder(folder, tmp_path / "linked")
    monkeypatch.undo()
    export_folder(folder, tmp_path / "copied", copy=True)
    for output in (tmp_path / "linked", tmp_path / "copied"):
        assert all(path.stat().st_nlink == 1 for path in output.glob("*.safetensors"))
        assert stored(output).keys() == stored(tmp_path / "linked").keys()


def test_what_is_refused_leaves_nothing(tmp_path, monkeypatch):
    folder, output = published("EvaByte", tmp_path / "published", monkeypatch), tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())

    def refused(error, message, **changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=message):
            export_folder(folder, output)
        assert sorted(os.listdir(tmp_path)) == ["published"]

    refused(ValueError, "lacks 11 weights", num_hidden_layers=3)
    # Which of the weights is named first depends on the release of transformers.
    shapes = r"_proj.weight of shape \[.*96.*\]; its config.json asks for \[.*100.*\]"
    refused(ValueError, shapes, intermediate_size=100)
    refused(ValueError, "is a 'llama' model", model_type="llama", auto_map={})
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(OSError, "damaged or cut short")


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    folder = published("EvaByte", tmp_path / "published", monkeypatch)
    (folder / "tokenizer_config.json").write_text('{"extra_special_tokens": 3}')
    with pytest.raises(Exception, match="int"):
        export_folder(folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["published"]


def test_an_output_that_is_not_free(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        export_folder(tmp_path, tmp_path / "out")


def test_command(tmp_path, monkeypatch, capsys):
    folder = published("byte Llama", tmp_path / "published", monkeypatch)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert "out: " in capsys.readouterr().out
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
