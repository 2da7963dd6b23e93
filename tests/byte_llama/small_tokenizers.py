"""Published byte tokenizers of the goldens, and small subword tokenizers to derive others from."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from byte_llama.tokenization_byte_llama import (
    GEMMA2_TEMPLATE_WORDS,
    LLAMA3_TEMPLATE_WORDS,
    ByteLlamaTokenizer,
    byte_tokenizer_from,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "byte_llama"
SOURCES = ("llama3_1", "gemma2")
WORDS = {"llama3_1": LLAMA3_TEMPLATE_WORDS, "gemma2": GEMMA2_TEMPLATE_WORDS}


@cache
def golden(source, name):
    return json.loads((GOLDENS / "tokenizer" / source / f"{name}.json").read_text(encoding="utf-8"))


def published_folder(source):
    return GOLDENS / "tokenizer" / source


@cache
def published(source):
    """The tokenizer of a published folder. Do not change it: tests share it."""
    tokenizer = ByteLlamaTokenizer.from_pretrained(published_folder(source))
    tokenizer.chat_template = golden(source, "chat")["chat_template"]
    return tokenizer


def cases(name, key):
    return [
        pytest.param(source, case, id=f"{source}-{index}")
        for source in SOURCES
        for index, case in enumerate(golden(source, name)[key])
    ]


CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Der flinke Fuchs springt über den faulen Hund.\n\nNaïve cafés: 42 €!",
    "the user asked the system <|im_start|>, and the model said: 😀\t",
]
CHATML = (
    "{% for message in messages %}\n\n{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
)


def byte_level_bpe():
    """GPT-2 and Qwen style."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image|>"):
        backend.add_special_tokens([token])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "<tool>", "\n\n", "éé", "m")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def sentencepiece_bpe():
    """Llama 2 and Gemma style: spaces written as U+2581, byte fallback, bos in front."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    parts = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **parts)


def sentencepiece_unigram():
    """T5 style, with byte fallback: a Metaspace decoder, eos behind."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(pieces, special.index("<unk>"), True))
    backend.pre_tokenizer = trained.pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", truncation_side="left"
    )


FAMILIES = {make.__name__: cache(make) for make in (byte_level_bpe, sentencepiece_bpe, sentencepiece_unigram)}


@cache
def tokenizer_named(name):
    return published(name) if name in SOURCES else byte_tokenizer_from(FAMILIES[name]())


ALL = [*SOURCES, *FAMILIES]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PIECES = (*LLAMA3_TEMPLATE_WORDS, *GEMMA2_TEMPLATE_WORDS, "\n", "<", "|", "<|eot_id|>", "<|start_header_id|>", "<bos>")
PIECES += ("<end_of_turn>", "<|im_end|>", "<think>", "</s>", "use", "<<bos>>")
TEXT_WITH_PIECES = st.lists(TEXT | st.sampled_from(PIECES)).map("".join)
CHAT = [{"role": "user", "content": "hi"}]


def assert_same_tokenizer(one, other):
    assert type(one) is type(other)
    assert other.get_vocab() == one.get_vocab()
    assert other.special_tokens_map == one.special_tokens_map
    assert sorted(other.all_special_ids) == sorted(one.all_special_ids)
    assert other.added_tokens_decoder == one.added_tokens_decoder
    assert other.chat_template == one.chat_template
    for attribute in ("padding_side", "truncation_side", "add_bos_token", "add_eos_token", "split_special_tokens"):
        assert getattr(other, attribute) == getattr(one, attribute)
    for text in ("", "héllo user\n\n\n", "".join(PIECES)):
        ids = one.encode(text)
        assert other.encode(text) == ids
        assert other.encode(text, "pair") == one.encode(text, "pair")
        assert other.encode(text, split_special_tokens=True) == one.encode(text, split_special_tokens=True)
        assert other.decode(ids, skip_special_tokens=True) == one.decode(ids, skip_special_tokens=True)
