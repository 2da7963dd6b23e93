"""What conversion refuses, before it reads weights or writes anything."""

import json

import pytest
from converted_models import load
from subword_models import sentencepiece_bpe, subword_model
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    PythonBackend,
)

from byte_llama import conversion
from byte_llama.conversion import convert


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


def test_byte_level_models(tmp_path):
    model, tokenizer = subword_model("llama")
    convert(model, tmp_path / "byte", tokenizer=tokenizer)
    byte_model, byte_tokenizer = load(tmp_path / "byte")
    with pytest.raises(ValueError, match="ByteLlamaForCausalLM, which has no byte-level form"):
        convert(byte_model, tmp_path / "again", tokenizer=byte_tokenizer)


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
