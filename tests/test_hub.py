"""Saved folders load by trust_remote_code where the packages are not installed: from disk, and through a Hub."""

import json

import pytest
from hub_folders import MODELS, expect, load_without_packages, model_and_tokenizer, run_with_packages
from hub_server import HubServer
from huggingface_hub import ModelCard, constants

from evabyte import EvaByteImageProcessor, EvaByteProcessor, EvaByteTokenizer


def for_each_model(feature):
    marks = {model: pytest.mark.compatibility(feature, model) for model in MODELS}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marks.items()])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The folders of which everything holds after loading without the packages, and what was said."""
    home = tmp_path_factory.mktemp("home")
    for name in MODELS:
        model, tokenizer = model_and_tokenizer(name)
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
        expect(model, tokenizer, home / f"{name}.pt")
    triples = [(home / name, home / f"{name}.pt", home / "again" / name) for name in MODELS]
    return home, *load_without_packages(triples, home)


@for_each_model("Self-contained Hub folder (trust_remote_code)")
def test_self_contained_folder(name, loaded):
    home, sources, said = loaded
    assert str(home / name) in sources, said
    config = json.loads((home / name / "config.json").read_text())
    assert config["auto_map"].keys() >= {"AutoConfig", "AutoModelForCausalLM"}
    assert (home / name / "config.json").stat().st_size < 10_000


PUSH = """
import sys
from hub_folders import MODELS, expect, model_and_tokenizer
for name in MODELS:
    model, tokenizer = model_and_tokenizer(name)
    repo = "someone/" + name.replace(" ", "-")
    expect(model, tokenizer, sys.argv[1] + "/" + repo.split("/")[1])
    tokenizer.push_to_hub(repo)
    model.push_to_hub(repo, max_shard_size="20KB")
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What a Hub holds after pushing in one process, and the repositories that another could load."""
    home = tmp_path_factory.mktemp("home")
    repos = {name: "someone/" + name.replace(" ", "-") for name in MODELS}
    with HubServer() as hub:
        run_with_packages(PUSH, home, **hub.environment(home / "pushing"))
        for repo in repos.values():
            shards = [etag for path, etag in hub.at(repo, "main")[1].items() if path.endswith(".safetensors")]
            hub.cut_short |= {f'"{etag}"' for etag in shards[:2]}
        triples = [(repo, home / repo.split("/")[1], home / "again" / repo) for repo in repos.values()]
        environment = hub.environment(home / "loading")
        sources, said = load_without_packages(triples, home, **environment)
        assert not hub.cut_short
        yield {name: hub.files(repo) for name, repo in repos.items()}, repos, sources, said


@for_each_model("push_to_hub and back")
@pytest.mark.slow
def test_through_the_hub(name, pushed):
    """Two shards of each break off half way while they are downloaded."""
    files, repos, sources, said = pushed
    assert repos[name] in sources, said
    assert len([path for path in files[name] if path.endswith(".safetensors")]) > 2
    assert {"tokenizer.json", "generation_config.json", "README.md"} <= files[name].keys()
    assert f'source = "{repos[name]}"' in files[name]["README.md"].decode()


# -- what is pushed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_dummy")
        yield server


def test_card(hub, tmp_path):
    model, _ = model_and_tokenizer("EvaByte")
    model.save_pretrained(tmp_path / "here")
    assert 'source = "here"' in (tmp_path / "here" / "README.md").read_text()

    EvaByteTokenizer().push_to_hub("somebody/bytes")
    EvaByteProcessor(EvaByteImageProcessor(), EvaByteTokenizer()).push_to_hub("somebody/bytes")
    assert {"processing_evabyte.py", "image_processing_evabyte.py", "hub.py"} <= hub.files("somebody/bytes").keys()
    assert "README.md" not in hub.files("somebody/bytes")
    model.push_to_hub("bytes", tags=["mine"])
    card = ModelCard(hub.files("somebody/bytes")["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["byte-level", "evabyte", "mine"],
    }
    assert 'source = "somebody/bytes"' in card.text


def test_a_card_on_the_hub_stays(hub):
    model, tokenizer = model_and_tokenizer("EvaByte")
    model.push_to_hub("somebody/bytes")
    written = "---\nlicense: apache-2.0\n---\n\n# By hand\n"
    hub.commit(
        "somebody/bytes", "main", {**hub.at("somebody/bytes", "main")[1], "README.md": hub.store(written.encode())}
    )
    model.push_to_hub("somebody/bytes")
    tokenizer.push_to_hub("somebody/bytes")
    assert hub.files("somebody/bytes")["README.md"].decode() == written
    model.push_to_hub("somebody/bytes", tags=["mine"], revision="trial")
    assert hub.files("somebody/bytes")["README.md"].decode() == written
    card = ModelCard(hub.files("somebody/bytes", "trial")["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.tags == ["mine"] and "# By hand" in card.text


def test_saving_and_pushing_at_once(hub, tmp_path):
    model, tokenizer = model_and_tokenizer("byte Llama")
    (tmp_path / "notes.txt").write_text("not part of the model")
    (tmp_path / "README.md").write_text("# By hand\n")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="somebody/llama", commit_message="First")
    pushed = hub.files("somebody/llama")
    assert pushed["README.md"] == b"# By hand\n" and "notes.txt" not in pushed
    assert {"byte_tokenizer.py", "hub.py"} & pushed.keys() == {"hub.py"}
    saved = tokenizer.save_pretrained(tmp_path, push_to_hub=True, repo_id="somebody/llama")
    assert str(tmp_path / "tokenizer.json") in map(str, saved)
    assert {"byte_tokenizer.py", "tokenizer.json", "model.safetensors"} <= hub.files("somebody/llama").keys()


def test_the_licence_of_the_source_is_kept(tmp_path):
    model, _ = model_and_tokenizer("EvaByte")
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# First\n")
    type(model).from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    card = ModelCard.load(tmp_path / "second" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.language == "en" and "First" not in card.text
    assert str(tmp_path) not in card.content
