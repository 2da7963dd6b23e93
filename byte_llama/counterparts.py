"""Which subwords the entries of a byte vocabulary correspond to: their embeddings start from these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .subword_table import entries_from_tokens, to_dictionary
from .token_bytes import token_bytes
from .tokenization_byte_llama import ByteLlamaTokenizer


@dataclass(frozen=True)
class Counterparts:
    """A byte vocabulary and the subword vocabulary it was derived from, entry by entry.

    Attributes:
        sources: per id of the byte vocabulary the subword ids whose rows, averaged, it starts from: that of the single
            byte, as text where there is such a token and else its byte-fallback token (`<0x0A>`); that of the same
            special token; that of the same word, or the subwords it is cut into. None at all where nothing corresponds.
        specials: subword id -> byte-vocabulary id of the special tokens that both have.
        tokens: the bytes of each subword id, None for those that stand for no text and for byte-fallback tokens of
            bytes that are written otherwise.
        words: bytes -> byte-vocabulary id of the template words.
    """

    sources: list[list[int]]
    specials: dict[int, int]
    tokens: Sequence[bytes | None]
    words: dict[bytes, int]

    def expansion_dictionary(self, maxlen: int) -> list[Any]:
        """The `expand_input_ids_dict` of a model: every subword of at most `maxlen` byte-vocabulary ids."""
        entries = entries_from_tokens(self.tokens, self.words, counterparts=self.specials, maxlen=maxlen)
        return to_dictionary(entries)


def find_counterparts(
    byte_tokenizer: ByteLlamaTokenizer, subword_tokenizer: PreTrainedTokenizerBase, num_subwords: int
) -> Counterparts:
    """Match the vocabularies of a byte tokenizer and of the subword tokenizer it was derived from.

    Args:
        num_subwords: number of embeddings of the subword model; tokens beyond them count as absent.

    Raises:
        TypeError, ValueError: as `token_bytes`.
    """
    tokens = token_bytes(subword_tokenizer)[:num_subwords]
    ids_of: dict[bytes, list[int]] = {}
    for subword, token in enumerate(tokens):
        if token is not None:
            ids_of.setdefault(token, []).append(subword)

    sources = []
    for byte in range(256):
        same = ids_of.get(bytes([byte]), [])
        fallback = f"<0x{byte:02X}>"
        as_text = [subword for subword in same if subword_tokenizer.convert_ids_to_tokens(subword) != fallback]
        chosen = max(as_text or same, default=None)
        for subword in same:
            if subword != chosen:
                tokens[subword] = None
        sources.append([] if chosen is None else [chosen])

    vocabulary = subword_tokenizer.get_vocab()
    added = byte_tokenizer.added_tokens_decoder
    specials: dict[int, int] = {}
    words: dict[bytes, int] = {}
    for entry in range(256, len(byte_tokenizer)):
        if entry in added:
            text = added[entry].content
            found = [vocabulary[text]] if text in vocabulary else []
            specials.update((subword, entry) for subword in found if subword < num_subwords)
        else:
            word = byte_tokenizer.decode_bytes([entry])
            words[word], text = entry, word.decode()
            found = ids_of.get(word, [])[-1:]
        pieces = found or subword_tokenizer.encode(text, add_special_tokens=False)
        sources.append([subword for subword in pieces if subword < num_subwords])
    return Counterparts(sources, specials, tokens, words)


__all__ = ["Counterparts", "find_counterparts"]
