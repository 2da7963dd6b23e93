"""The byte tokenizer of EvaByte: 64 special tokens at ids 0 to 63, then byte ``b`` at id ``64 + b``."""

import codecs
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import to_py_obj

BYTE_OFFSET = 64
VOCAB_SIZE = BYTE_OFFSET + 256

SPECIAL_TOKENS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<sep>",
    "<repo_name>",
    "<file_sep>",
    "<t2v_token>",
    "<v2t_token>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    *(f"<extra_id_{i}>" for i in range(12, BYTE_OFFSET)),
)

# The Llama-3 chat format. A system header is always written, with empty content when the chat has no system message.
# `generation` marks what the assistant says, so that `return_assistant_tokens_mask` works for training.
CHAT_TEMPLATE = r"""
{%- macro render(message) -%}
    {%- set content = message['content'] -%}
    {%- if message['tool_calls'] -%}
        {{- raise_exception('This chat format has no tool calls: write them into the message content.') -}}
    {%- elif content is string -%}
        {{- content -}}
    {%- elif content is not defined or content is none or content is mapping or content is not iterable -%}
        {{- raise_exception('Each message needs a "content": a string, or a list of text and image parts.') -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- elif part['type'] == 'image' -%}
                {{- '<image_placeholder>\n' -}}
            {%- else -%}
                {{- raise_exception('The parts of a message must have type "text" or "image".') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- raise_exception('This chat format has no tools: describe them in the system message.') -}}
{%- endif -%}
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in ['user', 'assistant'] and not (loop.first and message['role'] == 'system') -%}
        {{- raise_exception('The role of a message must be "user" or "assistant"; the first may be "system".') -}}
    {%- endif -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- render(message) + '<|eot_id|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message) + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
""".strip()


def check_error_handler(errors: str) -> str:
    """Return `errors`, or raise a `ValueError` when it does not name a way of treating bytes that are not UTF-8."""
    try:
        codecs.lookup_error(errors)
    except LookupError:
        raise ValueError(
            f'errors={errors!r} is not known: use "ignore", "replace", "backslashreplace" or "strict".'
        ) from None
    return errors


def _byte_characters() -> list[str]:
    """The printable character by which the byte-level pre-tokenizer and decoder write each byte, in byte order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _byte_vocabulary() -> dict[str, int]:
    return {token: index for index, token in enumerate((*SPECIAL_TOKENS, *_byte_characters()))}


def _byte_backend() -> Tokenizer:
    # BPE without merges is the model that gives one id per character and stays linear in the length of the text.
    backend = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return backend


def _has_lone_surrogate(text: Any) -> bool:
    if isinstance(text, str):
        return any("\ud800" <= character <= "\udfff" for character in text)
    return isinstance(text, (list, tuple)) and any(_has_lone_surrogate(item) for item in text)


class EvaByteTokenizer(PreTrainedTokenizerFast):
    """Byte tokenizer: 64 special tokens at ids 0 to 63, then byte `b` of the UTF-8 text at id `64 + b`.

    Encoding puts `<bos>` in front (and before the second text of a pair) and adds no `<eos>`. The vocabulary is fixed,
    so no file is needed; `len(tokenizer)` and `vocab_size` are 320. Token *strings* of bytes follow the byte-level
    alphabet of the `tokenizers` library (a space is `"Ġ"`); a string that is no token has the id of `unk_token`.

    Special strings inside a text (`"<|eot_id|>"`) become their special ids. For text from strangers pass
    `split_special_tokens=True`, here or in the call, and use [`encode_chat`] for chats.

    Args:
        bos_token, eos_token, pad_token, unk_token, sep_token (`str` or `AddedToken`):
            Which special token plays which part. The chat-tuned model ends its turns with `eos_token="<|eot_id|>"`.
        extra_special_tokens (`list` or `dict`, *optional*):
            Further special tokens, which get ids from 320 on. The 64 built-in ones are always there.
        add_bos_token (`bool`, *optional*): Put `bos_token` in front. Default: as saved, else `True`.
        add_eos_token (`bool`, *optional*): Put `eos_token` at the end. Default: as saved, else `False`.
        chat_template (`str` or `dict`, *optional*): A Jinja chat template in place of the built-in one.
        kwargs: Passed on to [`PreTrainedTokenizerFast`].

    Raises:
        ValueError: the files this tokenizer is loaded from hold another vocabulary.
    """

    _auto_class = "AutoTokenizer"
    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        bos_token: str | AddedToken = "<bos>",
        eos_token: str | AddedToken = "<eos>",
        pad_token: str | AddedToken = "<pad>",
        unk_token: str | AddedToken = "<unk>",
        sep_token: str | AddedToken = "<sep>",
        extra_special_tokens: list[str | AddedToken] | dict[str, str | AddedToken] | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        chat_template: str | dict[str, str] | None = None,
        **kwargs: Any,
    ):
        backend = _byte_backend()

        # What `from_pretrained` reads from a saved tokenizer.json: all of it is known here but the text template.
        kwargs.pop("merges", None)
        vocabulary = kwargs.pop("vocab", None)
        if vocabulary is not None and vocabulary != _byte_vocabulary():
            raise ValueError(
                "tokenizer.json holds another vocabulary than the 320 ids of EvaByteTokenizer: "
                "load this folder with PreTrainedTokenizerFast, or remove the file."
            )
        backend.post_processor = kwargs.pop("post_processor", None)
        ids = backend.encode("a").ids
        if add_bos_token is None:
            add_bos_token = backend.post_processor is None or ids[0] < BYTE_OFFSET
        if add_eos_token is None:
            add_eos_token = ids[-1] < BYTE_OFFSET

        added_tokens = kwargs.pop("added_tokens_decoder", {})
        for token_id, token in added_tokens.items():
            if token_id < VOCAB_SIZE and backend.id_to_token(token_id) != str(token):
                raise ValueError(
                    f"added_tokens_decoder gives id {token_id} to {str(token)!r}, but this id is "
                    f"{backend.id_to_token(token_id)!r}: pass the token in extra_special_tokens instead."
                )
        kwargs["added_tokens_decoder"] = {i: token for i, token in added_tokens.items() if i >= VOCAB_SIZE}

        further = list(kwargs.pop("additional_special_tokens", None) or [])
        if isinstance(extra_special_tokens, dict):
            named = {**kwargs.pop("model_specific_special_tokens", {}), **extra_special_tokens}
            kwargs["model_specific_special_tokens"] = named
        else:
            further.extend(extra_special_tokens or [])
        # Every built-in token stays a special one, also when another token plays its part.
        parts = {str(token) for token in (bos_token, eos_token, pad_token, unk_token, sep_token)}
        built_in = [token for token in SPECIAL_TOKENS if token not in parts]
        further = [token for token in further if str(token) not in SPECIAL_TOKENS]

        super().__init__(
            tokenizer_object=backend,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            unk_token=unk_token,
            sep_token=sep_token,
            extra_special_tokens=built_in + further,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            chat_template=CHAT_TEMPLATE if chat_template is None else chat_template,
            **kwargs,
        )

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        try:
            return super()._encode_plus(text, text_pair, **kwargs)
        except (TypeError, UnicodeEncodeError) as error:
            if _has_lone_surrogate(text) or _has_lone_surrogate(text_pair):
                raise ValueError(
                    "text holds a lone surrogate, which has no UTF-8 form: encode it yourself (for example with "
                    'text.encode("utf-8", "surrogatepass")) and pass the bytes to encode_bytes.'
                ) from error
            raise

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,  # spaces are bytes like any other: never touched
        errors: str = "ignore",
        **kwargs: Any,
    ) -> str:
        check_error_handler(errors)
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        segments = self.iter_segments([token_ids] if isinstance(token_ids, int) else token_ids, skip_special_tokens)
        return "".join(part if isinstance(part, str) else part.decode("utf-8", errors) for part in segments)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, errors: str = "ignore", **kwargs: Any) -> Any:
        """Turn ids into text. A special token that is not skipped ends the run of bytes before it.

        Args:
            token_ids (`int`, `list[int]`, `list[list[int]]`, array or tensor): One sequence, or a batch.
            skip_special_tokens (`bool`): Leave out special tokens; the bytes around them then join.
            errors (`str`): What becomes of bytes that are not UTF-8: `"ignore"` drops them, `"replace"` and
                `"backslashreplace"` show them, `"strict"` raises. [`decode_bytes`] keeps them.

        Returns:
            `str`, or `list[str]` for a batch.

        Raises:
            ValueError: an id is not in the vocabulary, or `errors` is not known.
            UnicodeDecodeError: the bytes are not UTF-8 and `errors` is `"strict"`.
        """
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens, errors=errors, **kwargs)

    def iter_segments(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> Iterator[bytes | str]:
        """Yield the runs of bytes in `token_ids` as `bytes`, and each special or added token between them as `str`.

        Args:
            token_ids (`Iterable[int]`): One sequence of ids.
            skip_special_tokens (`bool`): Leave out special tokens; the runs around them then join.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        run = bytearray()
        added_tokens: dict[int, AddedToken] | None = None
        for token_id in token_ids:
            if BYTE_OFFSET <= token_id < VOCAB_SIZE:
                run.append(token_id - BYTE_OFFSET)
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
        """Turn any bytes, valid UTF-8 or not, into ids. Nothing in them is read as a special token.

        Args:
            data (`bytes`): What to encode; any bytes-like object.
            add_special_tokens (`bool`): Add `<bos>` (and `<eos>`, if this tokenizer adds it) as `encode` does.

        Raises:
            TypeError: `data` is a `str`, or not bytes-like.
        """
        if isinstance(data, str):
            raise TypeError("encode_bytes takes bytes, but data is a str: use encode for text.")
        ids = [BYTE_OFFSET + byte for byte in bytes(memoryview(data))]
        if add_special_tokens and self.add_bos_token:
            ids.insert(0, self.bos_token_id)
        if add_special_tokens and self.add_eos_token:
            ids.append(self.eos_token_id)
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

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Turn a chat into ids, with special ids only where the chat template itself writes them.

        Special strings inside the messages stay plain text, so nobody can end a turn or forge another from within a
        message. When no message holds such a string, this is what `apply_chat_template` gives.

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
        # the ids of the pieces are the ids of the whole, since each byte has its own. Digits pass any template filter.
        mark = f"{secrets.randbits(128):039d}"
        special_string = re.compile(f"(?=(?:{'|'.join(map(re.escape, self.added_tokens_encoder))}))(.)", re.DOTALL)

        def break_up(value: Any) -> Any:
            if isinstance(value, str):
                return special_string.sub(rf"\g<1>{mark}", value)
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


__all__ = ["EvaByteTokenizer"]
