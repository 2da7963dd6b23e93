"""The bytes that each token of a subword vocabulary stands for."""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from evabyte.byte_tokenizer import BYTE_CHARACTERS

_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a token written in the byte-level alphabet; a token with any other character is plain text."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def rust_backend(tokenizer: PreTrainedTokenizerBase, argument: str) -> Tokenizer:
    """The `tokenizers.Tokenizer` behind a tokenizer; a `TypeError` that names `argument` where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"{argument} must be backed by the tokenizers library, but is a {type(tokenizer).__name__}: load it with "
            "AutoTokenizer, or wrap a tokenizers.Tokenizer in PreTrainedTokenizerFast(tokenizer_object=...)."
        )
    return backend


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each token of a Rust-backed subword tokenizer stands for.

    Knows byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2), and SentencePiece style vocabularies, which write a space as
    U+2581 and may write a byte as `<0xNN>` (Llama 2, Gemma).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The subword tokenizer, backed by a `tokenizers.Tokenizer`.

    Returns:
        `list[bytes | None]`: item `i` holds the bytes of id `i`, up to the largest id; `None` for special tokens, which
        stand for no text, and for ids without a token. Different ids may hold the same bytes, as `A` and `<0x41>` do.
        Added tokens that are not special stand for their own text.

    Raises:
        TypeError: `tokenizer` has no Rust backend.
        ValueError: `tokenizer` writes bytes in neither of the two ways.
    """
    backend = rust_backend(tokenizer, "tokenizer")
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = {step.get("type"): step for step in _walk(decoder)}
    # A word's beginning or end written into the token (WordPiece, CLIP) leaves its spaces to guesswork.
    affixes = [getattr(backend.model, name, None) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    byte_level, space = "ByteLevel" in steps, _space_mark(steps)
    if any(affixes) or byte_level == bool(space):
        raise ValueError(
            f"tokenizer must be a byte-level BPE or of SentencePiece style, but it is a {type(backend.model).__name__} "
            f"model with the decoder {' + '.join(map(str, steps)) or None}: its tokens do not say which bytes they are."
        )

    byte_tokens = _BYTE_TOKENS if "ByteFallback" in steps else {}
    special_ids = set(tokenizer.all_special_ids)
    special_ids.update(index for index, token in backend.get_added_tokens_decoder().items() if token.special)
    own_tokens = backend.get_vocab(with_added_tokens=False)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index in special_ids:
            continue
        if token not in own_tokens:
            table[index] = token.encode()
        elif byte_level:
            table[index] = byte_level_bytes(token)
        else:
            table[index] = byte_tokens.get(token) or token.replace(space, " ").encode()
    return table


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every step of a serialised decoder."""
    if node.get("type") == "Sequence":
        for child in node["decoders"]:
            yield from _walk(child)
    elif node:
        yield node


def _space_mark(steps: dict[Any, dict[str, Any]]) -> str:
    """The character that the decoder turns into a space, or an empty string."""
    if "Metaspace" in steps:
        return steps["Metaspace"]["replacement"]
    replace = steps.get("Replace", {})
    return replace["pattern"].get("String", "") if replace.get("content") == " " else ""
