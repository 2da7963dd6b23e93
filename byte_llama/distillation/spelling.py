"""What the tokens of a tokenizer spell: where each ends in a text, which are special, which are space-like."""

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..token_bytes import rust_backend, token_bytes
from .alignment import Bools, Ints


class Spelling:
    """Encodes texts into ids together with the place where each token ends.

    Args:
        tokenizer: backed by the `tokenizers` library: byte-level BPE, of SentencePiece style, or a byte tokenizer.
        split_special_tokens: whether special strings inside a text are spelled out rather than become special tokens.

    Attributes:
        special: bool [V], which ids are special tokens, or no token at all.
        starts_with_space: bool [V], which ids spell something that starts with a space.

    Raises:
        TypeError: `tokenizer` has no Rust backend.
        ValueError: the tokens of `tokenizer` do not say which bytes they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool = True) -> None:
        table = token_bytes(tokenizer)
        backend = rust_backend(tokenizer, "tokenizer")
        added = backend.get_added_tokens_decoder()
        self.special: Bools = np.array([text is None for text in table], dtype=np.bool_)
        self.starts_with_space: Bools = np.array([text is not None and text[:1] == b" " for text in table], np.bool_)
        self._bytes = [text or (added[i].content.encode() if i in added else b"") for i, text in enumerate(table)]
        self._lengths = np.array([len(text) for text in self._bytes], dtype=np.int64)
        self._may_rewrite = backend.normalizer is not None
        self._tokenizer = tokenizer
        self._options = {
            "add_special_tokens": False,
            "split_special_tokens": split_special_tokens,
            "return_attention_mask": False,
            "verbose": False,  # no warning of texts beyond `model_max_length`: they are cut later
        }

    def encode(self, texts: Sequence[str]) -> list[tuple[Ints, Ints]]:
        """Ids int64 [T] of each text, and where each of its tokens ends, int64 [T], in bytes, never decreasing."""
        if not texts:
            return []
        encoded = []
        for text, row in zip(texts, self._tokenizer(list(texts), **self._options)["input_ids"], strict=True):
            ids = np.array(row, dtype=np.int64)
            ends, data = np.cumsum(self._lengths[ids]), text.encode()
            # A tokenizer may rewrite the text (Unicode normalisation, a space in front): then lengths do not tell.
            spelled = (ends[-1] if len(ends) else 0) == len(data)
            if spelled and self._may_rewrite:
                spelled = b"".join(map(self._bytes.__getitem__, row)) == data
            encoded.append((ids, ends if spelled else self._ends_by_offsets(text)))
        return encoded

    def _ends_by_offsets(self, text: str) -> Ints:
        """Ends of tokens from the characters they stand for, where they do not spell the text."""
        offsets = self._tokenizer(text, return_offsets_mapping=True, **self._options)["offset_mapping"]
        if not offsets:
            return np.zeros(0, dtype=np.int64)
        starts, ends = np.array(offsets, dtype=np.int64).T
        # What lies between two tokens (an accent that was joined with its letter) belongs to the first, but for spaces
        # in front of the second. A token that ends behind the start of the next one ends within a character, and so
        # does one in front of an accent: normalization may have changed the order of accents.
        spaces = np.array([character.isspace() for character in text], dtype=np.bool_)
        stripped = np.maximum.accumulate(np.where(np.append(True, spaces), 0, np.arange(len(text) + 1)))
        accents = np.array([unicodedata.combining(character) > 0 for character in text], dtype=np.bool_)
        within = ends[:-1] > starts[1:]
        ends[:-1] = np.maximum(ends[:-1], stripped[starts[1:]])
        ends[:-1][within | np.append(accents, False)[ends[:-1]]] = 0
        ends = np.maximum.accumulate(ends)
        ends[-1] = len(text)
        characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        byte_counts = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
        return np.append(0, np.cumsum(byte_counts))[ends]


def space_mask(
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: Iterable[str] | None = None,
    starts: tuple[bytes, ...] = (b" ", b"\n", b"\t"),
    vocab_size: int | None = None,
) -> Tensor:
    """Which ids are space-like: no token of either tokenizer reaches across the place in front of them.

    These are tokens that start with a space, newline or tab, and special tokens (outcome chunk debiasing of ALM, arXiv
    2503.20083).

    Args:
        tokenizer: as for `Spelling`.
        special_tokens: the special tokens to count. Default: all. The published models were trained with those of the
            byte tokenizer on both sides.
        starts: what space-like tokens start with.
        vocab_size: length of the mask, where the model has more rows than the tokenizer has ids.

    Returns:
        bool [vocab_size].

    Raises:
        TypeError: `tokenizer` has no Rust backend.
        ValueError: `vocab_size` is less than the tokenizer's, or a special token is not in its vocabulary.
    """
    table, vocabulary = token_bytes(tokenizer), tokenizer.get_vocab()
    mask = torch.tensor([text is not None and text.startswith(starts) for text in table])
    if special_tokens is None:
        special_tokens = [token for token, index in vocabulary.items() if table[index] is None]
    for token in special_tokens:
        if token not in vocabulary:
            raise ValueError(f"special_tokens holds {token!r}, which is not in the vocabulary of the tokenizer.")
        mask[vocabulary[token]] = True
    if vocab_size is None:
        return mask
    if vocab_size < len(mask):
        raise ValueError(f"vocab_size must be at least the {len(mask)} ids of the tokenizer, but is {vocab_size}.")
    return torch.nn.functional.pad(mask, (0, vocab_size - len(mask)))


__all__ = ["Spelling", "space_mask"]
