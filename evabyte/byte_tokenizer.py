"""What byte tokenizers have in common: the way from ids back to bytes, and chats in which nobody can forge a turn."""

import codecs
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import to_py_obj

from .hub import SelfContainedMixin

# The printable character by which byte-level tokenizers write each byte, in byte order.
BYTE_CHARACTERS = tuple(character for _, character in sorted(bytes_to_unicode().items()))

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def check_error_handler(errors: str) -> str:
    """Return `errors`, or raise a `ValueError` when it does not name a way of treating bytes that are not UTF-8."""
    try:
        codecs.lookup_error(errors)
    except LookupError:
        raise ValueError(
            f'errors={errors!r} is not known: use "ignore", "replace", "backslashreplace" or "strict".'
        ) from None
    return errors


class ByteTokenizer(SelfContainedMixin, PreTrainedTokenizerFast):
    """Base of tokenizers that give each byte of the UTF-8 text an id of its own, `byte_offset` + the byte.

    Attributes:
        byte_offset (`int`): The id of byte 0; the other bytes follow.
        decoding_errors (`str`): What [`decode`] does with bytes that are not UTF-8 unless told.
        bytes_of_id (`dict[int, bytes]`): The bytes that each id stands for, special and added tokens left out.
    """

    _auto_class = "AutoTokenizer"
    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    byte_offset: int
    decoding_errors: str
    bytes_of_id: dict[int, bytes]

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        try:
            return super()._encode_plus(text, text_pair, **kwargs)
        except (TypeError, UnicodeEncodeError) as error:
            if _LONE_SURROGATE.search(json.dumps([text, text_pair], ensure_ascii=False, default=str)):
                raise ValueError(
                    "text holds a lone surrogate, which has no UTF-8 form: encode it yourself (for example with "
                    'text.encode("utf-8", "surrogatepass")) and pass the bytes to encode_bytes.'
                ) from error
            raise

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        errors = check_error_handler(self.decoding_errors if errors is None else errors)
        text = self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors)
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, errors: str | None = None, **kwargs: Any
    ) -> Any:
        """Turn ids into text. A special token that is not skipped ends the run of bytes before it.

        Args:
            token_ids (`int`, `list[int]`, `list[list[int]]`, array or tensor): One sequence, or a batch.
            skip_special_tokens (`bool`): Leave out special tokens; the bytes around them then join.
            errors (`str`, *optional*): What becomes of bytes that are not UTF-8: `"ignore"` drops them, `"replace"`
                and `"backslashreplace"` show them, `"strict"` raises; by default as `decoding_errors` says.
                [`decode_bytes`] keeps them.
            kwargs: `clean_up_tokenization_spaces=True` takes spaces before punctuation out, as the published byte-level
                Llama tokenizer did unasked.

        Returns:
            `str`, or `list[str]` for a batch.

        Raises:
            ValueError: an id is not in the vocabulary, or `errors` is not known.
            UnicodeDecodeError: the bytes are not UTF-8 and `errors` is `"strict"`.
        """
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens, errors=errors, **kwargs)

    def iter_segments(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> Iterator[bytes | str]:
        """Yield the runs of text in `token_ids` as `bytes`, and each special or added token between them as `str`.

        Args:
            token_ids (`Iterable[int]`): One sequence of ids.
            skip_special_tokens (`bool`): Leave out special tokens; the runs around them then join.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        run = bytearray()
        added_tokens: dict[int, AddedToken] | None = None
        for token_id in token_ids:
            if token_id in self.bytes_of_id:
                run += self.bytes_of_id[token_id]
                continue
            if added_tokens is None:
                added_tokens = self.added_tokens_decoder
            if token_id not in added_tokens:
                raise ValueError(f"token id {token_id} is not in the vocabulary: ids go from 0 to {len(self) - 1}.")
            token = added_tokens[token_id]
            if skip_special_tokens and token.special:
                continue
            if run:
                yield bytes(run)
                run.clear()
            yield token.content
        if run:
            yield bytes(run)

    def encode_bytes(self, data: bytes, add_special_tokens: bool = True) -> list[int]:
        """Turn any bytes, valid UTF-8 or not, into ids, one each. Nothing in them is read as a token of more bytes.

        Args:
            data (`bytes`): What to encode; any bytes-like object.
            add_special_tokens (`bool`): Add `bos_token` and `eos_token` where `encode` does.

        Raises:
            TypeError: `data` is a `str`, or not bytes-like.
        """
        if isinstance(data, str):
            raise TypeError("encode_bytes takes bytes, but data is a str: use encode for text.")
        ids = [self.byte_offset + byte for byte in bytes(memoryview(data))]
        if add_special_tokens:
            frame = self.encode("a")
            middle = frame.index(self.byte_offset + ord("a"))
            ids = frame[:middle] + ids + frame[middle + 1 :]
        return ids

    def decode_bytes(self, token_ids: Any, skip_special_tokens: bool = True) -> bytes:
        """Turn ids into the bytes they stand for, without loss: the inverse of [`encode_bytes`].

        Args:
            token_ids (`list[int]`, array or tensor): One sequence of ids.
            skip_special_tokens (`bool`): Leave out special tokens, rather than write them as their text.

        Raises:
            ValueError: an id is not in the vocabulary, or `token_ids` is a batch.
        """
        ids = to_py_obj(token_ids)
        if len(ids) > 0 and isinstance(ids[0], (list, tuple)):
            raise ValueError("decode_bytes takes one sequence, but token_ids is a batch: call it for each row.")
        segments = self.iter_segments(ids, skip_special_tokens)
        return b"".join(part.encode() if isinstance(part, str) else part for part in segments)

    def special_strings_in(self, text: str) -> list[str]:
        """The special strings that occur in `text`, in order: what `encode` would turn into special ids.

        To refuse such text rather than split it, raise an error when the list is not empty.
        """
        return [match[1] for match in self._special_string_pattern().finditer(text)]

    def _special_string_pattern(self) -> re.Pattern[str]:
        """Matches before every special string, overlapping ones too; group 1 is the string, the longest there is."""
        strings = sorted(self.added_tokens_encoder, key=len, reverse=True)
        return re.compile(f"(?=({'|'.join(map(re.escape, strings)) or '(?!)'}))")

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Turn a chat into ids, with special ids only where the chat template itself writes them.

        Special strings inside the messages stay plain text, so nobody can end a turn or forge another from within a
        message; nor does a template that looks for such a string in a message find it. When no message holds one, this
        is what `apply_chat_template` gives.

        Args:
            messages (`list[dict]`): One chat: dicts with a `"role"` and a `"content"`.
            add_generation_prompt (`bool`): End with the header of the assistant's answer.
            continue_final_message (`bool`): Leave the last message open, for the model to go on with it.

        Returns:
            `list[int]`: the ids, ready for the model.

        Raises:
            TypeError: `messages` is not one list of dicts of plain data.
        """
        # A random mark inside each special string of the messages keeps the backend from recognising it. Without it
        # the ids of the pieces are the ids of the whole, since no token spans it. Digits pass any template filter.
        mark = f"{secrets.randbits(128):039d}"
        special_string = re.compile(f"{self._special_string_pattern().pattern}(.)", re.DOTALL)

        def break_up(value: Any) -> Any:
            if isinstance(value, str):
                return special_string.sub(rf"\g<2>{mark}", value)
            if isinstance(value, dict):
                return {break_up(key): break_up(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [break_up(item) for item in value]
            if value is None or isinstance(value, (int, float)):
                return value
            raise TypeError(f"messages must hold plain data (str, dict, list, numbers), but holds a {type(value)}.")

        if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
            raise TypeError("messages must be one list of dicts: call encode_chat for each chat of a batch.")
        chat = self.apply_chat_template(
            break_up(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
        )
        ids = []
        for piece in chat.split(mark):
            ids.extend(self.encode(piece, add_special_tokens=False, split_special_tokens=False))
        return ids


__all__ = ["BYTE_CHARACTERS", "ByteTokenizer", "check_error_handler"]
