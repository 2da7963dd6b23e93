"""A converted model is the subword model's trunk with rows copied from it, and loads by the Auto classes."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from converted_models import expected_sources, load
from goldens_io import GOLDENS
from hypothesis import given
from hypothesis import strategies as st
from subword_models import CORPUS, KINDS, WITHOUT_TOKEN, sentencepiece_bpe, subword_model
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from byte_llama import ByteGemma2ForCausalLM, ByteLlamaForCausalLM
from byte_llama.conversion import convert
from byte_llama.counterparts import find_counterparts
from byte_llama.tokenization_byte_llama import (
    GEMMA2_TEMPLATE_WORDS,
    LLAMA3_TEMPLATE_WORDS,
    ByteLlamaTokenizer,
    byte_tokenizer_from,
)

MODEL_CLASSES = {"llama": ByteLlamaForCausalLM, "gemma2": ByteGemma2ForCausalLM}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """By kind: the subword model and tokenizer, and the byte-level ones. Do not change them: tests share them."""

    @cache
    def make(kind):
        model, tokenizer = subword_model(kind)
        folder = tmp_path_factory.mktemp(kind)
        convert(model, folder, tokenizer=tokenizer)
        return model, tokenizer, *load(folder)

    return make


def longest_subwords(kind, tokenizer, byte_tokenizer, ids):
    """The subword that ends at each byte id, by trying all starts."""
    sources = expected_sources(kind, tokenizer, byte_tokenizer)
    spelled = {}
    characters = {character: byte for byte, character in bytes_to_unicode().items()}
    for token, index in tokenizer.get_vocab().items():
        if index not in tokenizer.all_special_ids and token != "<|im_start|>" and not token.startswith("<0x"):
            text = bytes(map(characters.get, token)) if kind == "llama" else token.replace("▁", " ").encode()
            spelled[text] = index
    subwords = []
    for end, last in enumerate(ids, start=1):
        found = sources[last] or 0
        for start in range(max(0, end - 16), end - 1):
            piece = ids[start:end]
            if max(piece) < 256 and bytes(piece) in spelled:
                found = spelled[bytes(piece)]
                break
        subwords.append(found)
    return torch.tensor([subwords])


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_the_subword_models(kind, converted):
    model, tokenizer, byte_model, byte_tokenizer = converted(kind)
    assert type(byte_model) is MODEL_CLASSES[kind]
    assert type(byte_tokenizer) is ByteLlamaTokenizer
    given, made = model.state_dict(), byte_model.state_dict()
    inputs, outputs = given.pop("model.embed_tokens.weight"), given.pop("lm_head.weight")
    sources = expected_sources(kind, tokenizer, byte_tokenizer)
    assert len(sources) == byte_model.config.vocab_size == len(byte_tokenizer)
    for name, table in (("model.embed_tokens.weight", inputs), ("lm_head.weight", outputs)):
        rows = made.pop(name)
        for index, source in enumerate(sources):
            torch.testing.assert_close(
                rows[index], table.mean(0) if source is None else table[source], rtol=0, atol=1e-7 * (source is None)
            )
    assert [byte for byte in range(256) if sources[byte] is None] == ([] if kind == "llama" else list(WITHOUT_TOKEN))
    assert torch.equal(made.pop("model.expand_embed_tokens.weight"), inputs)
    trunk = {name: weight for name, weight in made.items() if "subword_expansion" not in name}
    assert trunk.keys() == given.keys()
    assert all(torch.equal(trunk[name], weight) for name, weight in given.items())
    assert not byte_model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", KINDS)
@given(
    text=st.lists(st.sampled_from([*" ".join(CORPUS).split(" "), " ", "\n", "😀", "é", "A"]), min_size=1, max_size=8)
)
@torch.no_grad()
def test_it_computes_what_the_trunk_computes_on_the_sum_of_both_embeddings(kind, converted, text):
    model, tokenizer, byte_model, byte_tokenizer = converted(kind)
    ids = byte_tokenizer.encode("".join(text))
    subwords = longest_subwords(kind, tokenizer, byte_tokenizer, ids)
    sources = expected_sources(kind, tokenizer, byte_tokenizer)
    embed = model.get_input_embeddings()
    own = torch.tensor([[source or 0 for source in map(sources.__getitem__, ids)]])
    expected = model(inputs_embeds=embed(own) + embed(subwords), output_hidden_states=True)
    output = byte_model(torch.tensor([ids]), output_hidden_states=True)
    for mine, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    with_token = [index for index, source in enumerate(sources) if source is not None]
    their_logits = expected.logits[..., [sources[index] for index in with_token]]
    torch.testing.assert_close(output.logits[..., with_token], their_logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_again_changes_nothing(kind, converted, tmp_path):
    _, _, byte_model, byte_tokenizer = converted(kind)
    byte_model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    again, tokenizer = load(tmp_path)
    ids = tokenizer(CORPUS[1], return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == byte_tokenizer.encode(CORPUS[1])
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == CORPUS[1]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, byte_model(ids).logits)
    assert (tmp_path / "config.json").stat().st_size < 100_000
    greedy = {"do_sample": False, "max_new_tokens": 12}
    assert torch.equal(again.generate(ids, **greedy), byte_model.generate(ids, **greedy))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_folder_is_converted_like_a_model(kind, converted, tmp_path):
    model, tokenizer = subword_model(kind)
    model.save_pretrained(tmp_path / "subword")
    tokenizer.save_pretrained(tmp_path / "subword")
    convert(tmp_path / "subword", tmp_path / "byte", max_shard_size="20KB")
    assert len(list((tmp_path / "byte").glob("*.safetensors"))) > 1
    byte_model, byte_tokenizer = load(tmp_path / "byte")
    ids = byte_tokenizer(CORPUS[2], return_tensors="pt")["input_ids"]
    assert torch.equal(byte_model(ids).logits, converted(kind)[2](ids).logits)


def test_the_trunk_is_not_copied_in_memory(tmp_path, monkeypatch):
    model, tokenizer = subword_model("llama")
    shared = []

    def look(byte_model, *args, **kwargs):
        own, theirs = dict(byte_model.named_parameters()), dict(model.named_parameters())
        shared.extend(own[name].data_ptr() == theirs[name].data_ptr() for name in theirs if ".layers." in name)
        raise InterruptedError

    monkeypatch.setattr(ByteLlamaForCausalLM, "save_pretrained", look)
    with pytest.raises(InterruptedError):
        convert(model, tmp_path, tokenizer=tokenizer)
    assert shared and all(shared)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fewer_layers(kind, converted, tmp_path):
    model, tokenizer = subword_model(kind)
    convert(model, tmp_path, tokenizer=tokenizer, num_layers=1)
    byte_model, byte_tokenizer = load(tmp_path)
    ids = byte_tokenizer(CORPUS[0], return_tensors="pt")["input_ids"]
    hidden_states = []
    byte_model.model.layers[0].register_forward_hook(lambda _, __, output: hidden_states.append(output))
    byte_model(ids)
    everything = converted(kind)[2](ids, output_hidden_states=True).hidden_states
    assert len(byte_model.model.layers) == byte_model.config.num_hidden_layers == 1
    assert torch.equal(hidden_states[0], everything[1])


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(dtype, tmp_path):
    model, tokenizer = subword_model("llama")
    convert(model, tmp_path, tokenizer=tokenizer, dtype=dtype)
    byte_model, _ = load(tmp_path)
    assert byte_model.dtype == torch.bfloat16
    rows = byte_model.get_input_embeddings().weight
    assert torch.equal(
        rows[ord("e")], model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("e")].bfloat16()
    )


def test_template_words_take_the_rows_of_words(tmp_path):
    model, tokenizer = subword_model("llama")
    words = [" user", "user", "\n\n", "zebra"]
    convert(model, tmp_path, tokenizer=tokenizer, template_words=words)
    byte_model, byte_tokenizer = load(tmp_path)
    table = model.get_input_embeddings().weight
    expansion = byte_model.model.subword_expansion
    for word in words:
        (entry,) = byte_tokenizer.encode(word, add_special_tokens=False)
        pieces = tokenizer.encode(word, add_special_tokens=False)
        assert (len(pieces) == 1) == ("user" in word)
        torch.testing.assert_close(byte_model.get_input_embeddings().weight[entry], table[pieces].mean(0))
        (found,) = expansion(expansion.as_symbols(torch.tensor([[entry]]))).tolist()
        assert found == (pieces if len(pieces) == 1 else [0])


def test_generation_config_speaks_of_bytes(tmp_path):
    model, tokenizer = subword_model("llama")
    unknown, end, start = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<|unused|>", "<|im_end|>", "<|im_start|>")
    )
    given = model.generation_config
    given.update(eos_token_id=[unknown, start, end], do_sample=True, temperature=0.6, top_k=40, max_length=512)
    given.update(suppress_tokens=[300], repetition_penalty=1.1)
    convert(model, tmp_path, tokenizer=tokenizer, pad_token="<|unused|>")
    byte_model, byte_tokenizer = load(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    written.pop("transformers_version")
    names = ["<|unused|>", "<|im_start|>", "<|im_end|>"]
    assert written == {
        "bos_token_id": byte_tokenizer.convert_tokens_to_ids("<|start|>"),
        "eos_token_id": byte_tokenizer.convert_tokens_to_ids(names),
        "pad_token_id": byte_tokenizer.convert_tokens_to_ids("<|unused|>"),
        "do_sample": True,
        "temperature": 0.6,
    }
    for role in ("bos", "eos", "pad"):
        assert getattr(byte_model.config, f"{role}_token_id") == written[f"{role}_token_id"]
    assert byte_tokenizer.pad_token == "<|unused|>"

    convert(model, tmp_path, tokenizer=tokenizer, overwrite=True)  # now the byte vocabulary has no <|unused|>
    byte_model, byte_tokenizer = load(tmp_path)
    assert byte_model.generation_config.eos_token_id == byte_tokenizer.convert_tokens_to_ids(names[1:])
    assert byte_model.config.pad_token_id is None and byte_tokenizer.pad_token is None


def test_tokens_without_embedding_count_as_absent():
    tokenizer = sentencepiece_bpe()
    byte_tokenizer = byte_tokenizer_from(tokenizer, template_words=["the"])
    last = tokenizer.convert_tokens_to_ids("the")
    found = find_counterparts(byte_tokenizer, tokenizer, num_subwords=last)
    (word,) = byte_tokenizer.encode("the", add_special_tokens=False)
    assert last not in found.sources[word] and max(max(source, default=0) for source in found.sources) < last
    assert len(found.tokens) == last


@pytest.mark.parametrize(
    ("source", "words", "pad"),
    [("llama3_1", LLAMA3_TEMPLATE_WORDS, "<|end_of_text|>"), ("gemma2", GEMMA2_TEMPLATE_WORDS, None)],
)
def test_the_published_models_start_from_these_rows(source, words, pad):
    folder = os.environ.get(f"{source.upper()}_TOKENIZER")
    if folder is None:
        pytest.skip(f"set {source.upper()}_TOKENIZER to the folder with the source's tokenizer.json")
    golden = GOLDENS / "byte_llama" / "tokenizer" / source
    subword_tokenizer = AutoTokenizer.from_pretrained(folder)
    chat_template = json.loads((golden / "chat.json").read_text())["chat_template"]
    arguments = {} if pad is None else {"pad_token": pad}
    byte_tokenizer = byte_tokenizer_from(
        subword_tokenizer, template_words=words, chat_template=chat_template, **arguments
    )
    sources = find_counterparts(byte_tokenizer, subword_tokenizer, len(subword_tokenizer)).sources
    expected = json.loads((golden / "fvt.json").read_text())["original_to_new_indices"]
    assert sources == [[row] for row in expected]


def test_the_card_says_what_it_is_and_carries_the_licence(tmp_path):
    model, tokenizer = subword_model("gemma2")
    folder = tmp_path / "Little-Gemma"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: gemma\nlanguage: [de, en]\ntags: [secret]\n---\n# Little Gemma\n")
    convert(folder, tmp_path / "byte", num_layers=2, template_words=["model"])
    card = (tmp_path / "byte" / "README.md").read_text()
    for fact in (
        "license: gemma\n",
        "- de\n",
        "Little-Gemma",
        "untrained",
        "first 2 of 3 layers",
        "`'model'`",
        "`<bos>`",
    ):
        assert fact in card, fact
    assert "secret" not in card and str(tmp_path) not in card and "base_model" not in card
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    convert(folder, tmp_path / "byte", overwrite=True)
    assert "license:" not in (tmp_path / "byte" / "README.md").read_text()


LOAD_ALONE = """
import importlib.abc, sys, torch

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("evabyte", "byte_llama"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("the lazy dog", return_tensors="pt")["input_ids"]
assert torch.equal(model(ids).logits, torch.load(f"{folder}/logits.pt"))
print(type(model).__module__.split(".")[0], type(tokenizer).__module__.split(".")[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_loads_where_nothing_of_ours_is_installed(kind, tmp_path):
    model, tokenizer = subword_model(kind)
    folder = tmp_path / "byte"
    convert(model, folder, tokenizer=tokenizer)
    byte_model, byte_tokenizer = load(folder)
    ids = byte_tokenizer("the lazy dog", return_tensors="pt")["input_ids"]
    torch.save(byte_model(ids).logits.detach(), folder / "logits.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, str(folder)],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["transformers_modules"] * 2
