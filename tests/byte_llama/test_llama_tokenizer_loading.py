"""Saving and loading ByteLlamaTokenizer: its own class, plain `tokenizers`, the Auto classes, remote code."""

import pickle
import shutil
import subprocess
import sys

import pytest
from small_tokenizers import (
    ALL,
    PIECES,
    SOURCES,
    assert_same_tokenizer,
    byte_level_bpe,
    published,
    published_folder,
    tokenizer_named,
)
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto

from byte_llama.tokenization_byte_llama import ByteLlamaTokenizer

REMOTE = """
import importlib.abc, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("evabyte", "byte_llama"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert tokenizer.encode("é user<|eot_id|>") == [256, 195, 169, 32, 263, 259]
assert tokenizer.encode("<|eot_id|>", split_special_tokens=True) == [256, *b"<|eot_id|>"]
assert tokenizer.decode_bytes([255]) == b"\\xff"
print(type(tokenizer).__module__.split(".")[0], type(tokenizer).__name__)
"""


class TestSaveAndLoad:
    @pytest.mark.parametrize("name", ALL)
    def test_saved(self, name, tmp_path):
        tokenizer = tokenizer_named(name)
        tokenizer.save_pretrained(tmp_path)
        loaded = ByteLlamaTokenizer.from_pretrained(tmp_path)
        assert_same_tokenizer(tokenizer, loaded)
        loaded.save_pretrained(tmp_path / "again")
        assert_same_tokenizer(tokenizer, ByteLlamaTokenizer.from_pretrained(tmp_path / "again"))
        assert_same_tokenizer(tokenizer, pickle.loads(pickle.dumps(tokenizer)))

    @pytest.mark.parametrize("name", ALL)
    def test_saved_file_needs_no_class(self, name, tmp_path):
        tokenizer = tokenizer_named(name)
        tokenizer.save_pretrained(tmp_path)
        plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        text = "".join(PIECES)
        for split in (False, True):
            ids = tokenizer.encode(text, split_special_tokens=split)
            assert plain.encode(text, split_special_tokens=split) == ids
        assert sorted(plain.all_special_ids) == sorted(tokenizer.all_special_ids)

    def test_changed(self, tmp_path):
        tokenizer = ByteLlamaTokenizer.from_pretrained(
            published_folder("llama3_1"),
            pad_token="<new>",
            extra_special_tokens=["[stop]"],
            add_eos_token=True,
            padding_side="left",
            split_special_tokens=True,
        )
        tokenizer.add_tokens(["word"])
        assert tokenizer.encode("word[stop]", split_special_tokens=False) == [256, 267, 266, 259]
        assert tokenizer.pad_token_id == 265 and tokenizer.vocab_size == 265 and len(tokenizer) == 268
        assert tokenizer.decode([265, 267, 266, 97], skip_special_tokens=True) == "worda"
        tokenizer(["a", "bc"], padding="max_length", max_length=9, truncation=True)
        tokenizer.save_pretrained(tmp_path)
        loaded = ByteLlamaTokenizer.from_pretrained(tmp_path)
        assert_same_tokenizer(tokenizer, loaded)
        assert loaded.backend_tokenizer.encode("user").ids == [256, 263, 259]

    def test_named_extra_token(self):
        arguments = {"extra_special_tokens": {"image_token": "<|end_of_text|>"}}
        tokenizer = ByteLlamaTokenizer.from_pretrained(published_folder("llama3_1"), **arguments)
        assert tokenizer.image_token_id == 258 and len(tokenizer) == 265
        direct = ByteLlamaTokenizer(str(published_folder("llama3_1") / "tokenizer.json"), **arguments)
        assert direct.image_token_id == 258

    def test_unknown_words(self):
        tokenizer = ByteLlamaTokenizer.from_pretrained(published_folder("gemma2"), unk_token="<pad>")
        assert tokenizer.unk_token_id == 259
        assert published("gemma2").convert_tokens_to_ids("<nope>") is None

    def test_another_vocabulary(self, tmp_path):
        with pytest.raises(ValueError, match="needs a tokenizer_file"):
            ByteLlamaTokenizer()
        byte_level_bpe().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="does not begin with the 256 bytes: derive"):
            ByteLlamaTokenizer.from_pretrained(tmp_path)

    @pytest.mark.parametrize("source", SOURCES)
    def test_auto_tokenizer(self, source, tmp_path, monkeypatch):
        """With its model type named to AutoTokenizer, a published folder gives this class, whatever class it names."""

        class Config(PreTrainedConfig):
            model_type = f"byte_tokenizer_test_{source}"

        AutoConfig.register(Config.model_type, Config, exist_ok=True)
        AutoTokenizer.register(Config, tokenizer_class=ByteLlamaTokenizer, exist_ok=True)
        monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, Config.model_type, "ByteLlamaTokenizer")
        types = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS | {Config.model_type}
        monkeypatch.setattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", types)
        shutil.copytree(published_folder(source), tmp_path, dirs_exist_ok=True)
        Config().save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        loaded.chat_template = published(source).chat_template
        assert_same_tokenizer(published(source), loaded)
        loaded.save_pretrained(tmp_path)
        assert_same_tokenizer(loaded, AutoTokenizer.from_pretrained(tmp_path))

    def test_remote_code(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ByteLlamaTokenizer, "_auto_class", "AutoTokenizer")
        folder = tmp_path / "folder"
        published("llama3_1").save_pretrained(folder)
        brought = {"token_bytes.py", "tokenization_byte_llama.py", "byte_tokenizer.py", "hub.py", "model_card.py"}
        assert {path.name for path in folder.glob("*.py")} == brought
        (folder / "config.json").write_text('{"model_type": "byte_llama"}')
        environment = {"PATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(
            [sys.executable, "-c", REMOTE, str(folder)], env=environment, capture_output=True, text=True
        )
        assert run.stdout.split() == ["transformers_modules", "ByteLlamaTokenizer"], run.stderr
