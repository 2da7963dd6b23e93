"""The tokenizers derived by byte_tokenizer_from, and token_bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import (
    CHAT,
    CHATML,
    CORPUS,
    FAMILIES,
    SOURCES,
    TEXT,
    WORDS,
    assert_same_tokenizer,
    byte_level_bpe,
    golden,
    published,
    tokenizer_named,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from byte_llama.token_bytes import BYTE_CHARACTERS, token_bytes
from byte_llama.tokenization_byte_llama import byte_tokenizer_from


class TestDerived:
    @pytest.mark.parametrize("source", SOURCES)
    def test_published(self, source):
        """From a subword tokenizer with the special tokens of the real one comes the published tokenizer."""
        specials = golden(source, "facts")["all_special_tokens"]
        subword = byte_level_bpe().backend_tokenizer
        subword.add_special_tokens([*specials, "<|reserved_special_token_0|>", "<unk>"])
        bos = published(source).bos_token
        subword.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, subword.token_to_id(bos))]
        )
        parts = {part: getattr(published(source), part) for part in ("bos_token", "eos_token")}
        tokenizer = byte_tokenizer_from(
            PreTrainedTokenizerFast(tokenizer_object=subword, unk_token="<unk>", **parts),
            template_words=WORDS[source],
            pad_token=published(source).pad_token,
            chat_template=published(source).chat_template,
        )
        assert_same_tokenizer(published(source), tokenizer)

    def test_byte_level_bpe(self):
        tokenizer = tokenizer_named("byte_level_bpe")
        added = {"<think>": 256, "<|endoftext|>": 257, "<|im_end|>": 258, "<|im_start|>": 259}
        assert tokenizer.get_vocab() == {**{c: b for b, c in enumerate(BYTE_CHARACTERS)}, **added}
        assert tokenizer.vocab_size == len(tokenizer) == 260
        assert tokenizer.special_tokens_map == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        assert sorted(tokenizer.all_special_ids) == [257, 258, 259]
        assert tokenizer.encode("a<think>\n\n") == [97, 256, 10, 10]
        assert tokenizer.decode([256, 97, 258], skip_special_tokens=True) == "<think>a"
        assert tokenizer.chat_template == CHATML
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == byte_level_bpe().apply_chat_template(
            CHAT, tokenize=False
        )

    def test_sentencepiece(self):
        bpe, unigram = tokenizer_named("sentencepiece_bpe"), tokenizer_named("sentencepiece_unigram")
        assert bpe.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        assert bpe.convert_ids_to_tokens([256, 257, 258]) == ["</s>", "<pad>", "<s>"]
        assert bpe.encode("é", "b") == [258, 195, 169, 258, 98]
        assert bpe.padding_side == "left" and bpe.add_bos_token and not bpe.add_eos_token
        assert unigram.encode("a") == [97, 256]
        assert unigram.truncation_side == "left" and unigram.add_eos_token and not unigram.add_bos_token

    def test_choices(self):
        subword = FAMILIES["byte_level_bpe"]()
        few = byte_tokenizer_from(subword, special_tokens=[], bos_token="<|image|>", template_words=["user", "\n\n"])
        assert few.convert_ids_to_tokens(list(range(256, len(few)))) == [
            "<|endoftext|>",
            "<|im_end|>",
            "<|image|>",
            "user",
            "ĊĊ",
        ]
        assert few.encode("\n\n\nuser<|im_start|>") == [10, 260, 259, *b"<|im_start|>"]
        assert few.bos_token_id == 258 and few.add_bos_token is False
        assert byte_tokenizer_from(subword, bos_token="<|image|>", add_bos_token=True).encode("a") == [260, 97]
        own = byte_tokenizer_from(subword, chat_template={"default": "<tool>", "other": "<|image|>"})
        assert own.convert_ids_to_tokens(list(range(256, len(own)))) == [
            "<tool>",
            "<|endoftext|>",
            "<|im_end|>",
            "<|image|>",
        ]

    def test_replaced_bos_stays_in_front(self):
        subword = FAMILIES["sentencepiece_bpe"]()
        tokenizer = byte_tokenizer_from(subword, bos_token="<start>")
        assert tokenizer.encode("a") == [tokenizer.bos_token_id, 97]
        assert "<s>" not in tokenizer.get_vocab() and tokenizer.add_bos_token

    def test_tokens_that_swallow_spaces(self):
        subword = byte_level_bpe()
        subword.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, rstrip=True)})
        tokenizer = byte_tokenizer_from(subword, special_tokens=["<mask>"])
        assert tokenizer.mask_token == "<mask>"
        assert tokenizer.decode(tokenizer.encode("a <mask> b")) == "a <mask> b"

    def test_non_ascii_special_token(self):
        tokenizer = byte_tokenizer_from(FAMILIES["byte_level_bpe"](), special_tokens=["<｜User｜>", "éé"])
        ids = tokenizer.encode("éé<｜User｜>ü", split_special_tokens=False)
        assert len(ids) == 4
        assert tokenizer.decode(ids) == "éé<｜User｜>ü"
        with pytest.raises(ValueError, match="special_tokens holds 'é'"):
            byte_tokenizer_from(FAMILIES["byte_level_bpe"](), special_tokens=["é"])

    @pytest.mark.parametrize("word", ["", "a", "<|im_end|>", "<new>"])
    def test_wrong_template_words(self, word):
        with pytest.raises(ValueError, match="template_words holds"):
            byte_tokenizer_from(FAMILIES["byte_level_bpe"](), template_words=[word])

    def test_wrong_arguments(self):
        with pytest.raises(TypeError, match="must be lists of strings"):
            byte_tokenizer_from(FAMILIES["byte_level_bpe"](), template_words="user")
        with pytest.raises(TypeError, match="subword_tokenizer must be backed by the tokenizers library"):
            byte_tokenizer_from(object())


class TestTokenBytes:
    @pytest.mark.parametrize("name", FAMILIES)
    @given(text=TEXT.map(lambda text: text.replace("▁", "")) | st.sampled_from(CORPUS))
    def test_tokens_of_a_text_are_its_bytes(self, name, text):
        subword = FAMILIES[name]()
        table = token_bytes(subword)
        ids = subword.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert b"".join(table[i] for i in ids) == text.encode()

    @pytest.mark.parametrize("name", FAMILIES)
    def test_each_token(self, name):
        subword = FAMILIES[name]()
        table = token_bytes(subword)
        assert len(table) == len(subword)
        special = {token.content for token in subword.added_tokens_decoder.values() if token.special}
        assert {subword.convert_ids_to_tokens(i) for i, data in enumerate(table) if data is None} == special
        for token_id, data in enumerate(table):
            token = subword.convert_ids_to_tokens(token_id)
            if token == "éé":  # an added token is its own text, but a byte-level decoder takes it for a byte
                assert data == "éé".encode()
            elif data is not None:
                assert subword.decode([token_id]) == data.decode("utf-8", "replace")
        for byte in range(256):
            assert bytes([byte]) in table

    def test_byte_tokens_of_sentencepiece(self):
        subword = FAMILIES["sentencepiece_bpe"]()
        table = token_bytes(subword)
        assert [table[subword.convert_tokens_to_ids(f"<0x{b:02X}>")] for b in (0, 10, 255)] == [b"\0", b"\n", b"\xff"]
        assert table[subword.convert_tokens_to_ids("▁")] == b" "

    def test_ids_left_out(self):
        backend = Tokenizer(models.BPE(vocab={"Ġ": 1, "é": 4}, merges=[]))
        backend.decoder = decoders.ByteLevel()
        assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) == [None, b" ", None, None, b"\xe9"]

    def test_tokenizers_without_bytes(self):
        wordpiece = Tokenizer(models.WordPiece({"a": 0, "##a": 1, "[UNK]": 2}))
        wordpiece.decoder = decoders.WordPiece()
        with pytest.raises(ValueError, match=r"tokenizer must be .* WordPiece model with the decoder WordPiece"):
            token_bytes(PreTrainedTokenizerFast(tokenizer_object=wordpiece))
        with pytest.raises(ValueError, match="decoder None"):
            token_bytes(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))))
        clip = Tokenizer(models.BPE(vocab={"a": 0, "a</w>": 1}, merges=[], end_of_word_suffix="</w>"))
        clip.decoder = decoders.ByteLevel()
        with pytest.raises(ValueError, match="do not say which bytes"):
            token_bytes(PreTrainedTokenizerFast(tokenizer_object=clip))
        with pytest.raises(TypeError, match="tokenizer must be backed by the tokenizers library"):
            token_bytes(object())
