"""The tokenizer of byte-level Llama and Gemma 2: byte ``b`` at id ``b``, special tokens and template words behind."""

import codecs
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import to_py_obj

from .token_bytes import BYTE_CHARACTERS, byte_level_bytes, rust_backend

# What the published tokenizers hold besides bytes and special tokens: see `template_words` of `byte_tokenizer_from`.
LLAMA3_TEMPLATE_WORDS = ("assistant", "system", "user", "\n\n")
GEMMA2_TEMPLATE_WORDS = ("model", "user")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _in_angle_brackets(token: str) -> bool:
    return token.startswith("<") and token.endswith(">")


def _byte_backend(state: dict[str, Any]) -> Tokenizer:
    """The Rust tokenizer of a tokenizer.json, its special tokens marked as such and taken from no other text."""
    vocabulary = [token for token, _ in state["model"]["vocab"]] if state["model"].get("type") == "Unigram" else []
    if tuple(vocabulary[:256]) != BYTE_CHARACTERS:
        raise ValueError(
            "tokenizer.json does not begin with the 256 bytes: derive a byte tokenizer from a subword tokenizer with "
            "byte_tokenizer_from, or load this folder with PreTrainedTokenizerFast."
        )
    # The published files say nowhere which tokens are special, but write these, and only these, in angle brackets.
    added = {token["content"] for token in state["added_tokens"]}
    unmarked = [token for token in vocabulary[256:] if _in_angle_brackets(token) and token not in added]
    # All segmentations into tokens of score 0 tie, and the first start wins. With any lower score the model itself
    # never picks a special token: then `split_special_tokens` really splits them.
    scores = [(token, -1.0 if token in added or token in unmarked else 0.0) for token in vocabulary]
    # Padding and truncation were those of the last call before saving, and would change every later one.
    state = {**state, "model": {**state["model"], "vocab": scores}, "padding": None, "truncation": None}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unmarked])
    return backend


class ByteLlamaTokenizer(PreTrainedTokenizerFast):
    """Byte tokenizer: byte `b` of the UTF-8 text is id `b`; special tokens, then template words, have the ids from 256.

    Template words are pieces of plain text that are one id wherever they occur. The published tokenizers have them
    (`"user"`, for one); in runs of such words the earliest start wins at each end: three newlines are `"\\n"`, then
    `"\\n\\n"`. New tokenizers, made by [`byte_tokenizer_from`], have none unless asked.

    Token *strings* of bytes follow the byte-level alphabet of the `tokenizers` library (a space is `"Ġ"`). Special
    strings inside a text (`"<|eot_id|>"`) become their special ids. For text from strangers pass
    `split_special_tokens=True`, here or in the call, use [`encode_chat`] for chats, or refuse the text by what
    [`special_strings_in`] finds.

    Args:
        tokenizer_file (`str`, *optional*): A tokenizer.json, as published or as saved by this class.
        tokenizer_object (`Tokenizer`, *optional*): The Rust tokenizer, in place of the file.
        bos_token, eos_token, pad_token, ... (`str` or `AddedToken`, *optional*): Which token plays which part.
        unk_token (`str` or `AddedToken`, *optional*):
            Dropped unless the vocabulary has it, as no text is unknown. (The published Gemma 2 lacks the one it names.)
        extra_special_tokens (`list` or `dict`, *optional*):
            Further special tokens; those not in the vocabulary get ids behind it.
        add_bos_token, add_eos_token (`bool`, *optional*):
            Put `bos_token` in front, `eos_token` at the end. Default: as in the file.
        kwargs: Passed on to [`PreTrainedTokenizerFast`].

    Raises:
        ValueError: there is no vocabulary, or it does not begin with the 256 bytes.
    """

    _auto_class = "AutoTokenizer"
    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        tokenizer_file: str | None = None,
        tokenizer_object: Tokenizer | None = None,
        unk_token: str | AddedToken | None = None,
        extra_special_tokens: list[str | AddedToken] | dict[str, str | AddedToken] | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        **kwargs: Any,
    ):
        if tokenizer_object is not None:
            state = json.loads(tokenizer_object.to_str())
        elif tokenizer_file is not None:
            with open(tokenizer_file, encoding="utf-8") as file:
                state = json.load(file)
        else:
            raise ValueError(
                "ByteLlamaTokenizer needs a tokenizer_file: load a folder with from_pretrained, or derive a tokenizer "
                "from a subword tokenizer with byte_tokenizer_from."
            )
        backend = _byte_backend(state)

        if unk_token is not None and backend.token_to_id(str(unk_token)) is not None:
            kwargs["unk_token"] = unk_token
        if isinstance(extra_special_tokens, dict):
            named = {**kwargs.pop("model_specific_special_tokens", {}), **extra_special_tokens}
            kwargs["model_specific_special_tokens"] = named
            extra_special_tokens = None
        further = [*(extra_special_tokens or []), *(kwargs.pop("additional_special_tokens", None) or [])]
        listed = {*map(str, further), *(str(kwargs.get(part)) for part in self.SPECIAL_TOKENS_ATTRIBUTES)}
        added = backend.get_added_tokens_decoder().values()
        further += [token.content for token in added if token.special and token.content not in listed]

        first, *_, last = backend.encode("a").tokens * 2
        as_in_file = add_bos_token is None and add_eos_token is None
        if add_bos_token is None:
            add_bos_token = first == str(kwargs.get("bos_token"))
        if add_eos_token is None:
            add_eos_token = last == str(kwargs.get("eos_token"))
        if not as_in_file:
            kwargs.update(add_bos_token=add_bos_token, add_eos_token=add_eos_token)
        # Cleaning up spaces is for tokens that lose them: here it would change bytes, so the files do not decide it.
        kwargs["clean_up_tokenization_spaces"] = False
        super().__init__(tokenizer_object=backend, extra_special_tokens=further, **kwargs)
        if as_in_file:
            # transformers would read False: it knows what these options say, but not what the file's template does.
            self._add_bos_token, self._add_eos_token = add_bos_token, add_eos_token

        plain = backend.get_vocab(with_added_tokens=False).keys() - {token.content for token in added}
        self._bytes_of_id = {backend.token_to_id(token): byte_level_bytes(token) for token in plain}

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keep `tokenizer_file`: transformers would take it apart, and leave the added tokens out."""
        return kwargs

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
        errors: str = "replace",
        **kwargs: Any,
    ) -> str:
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        text = self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors)
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, errors: str = "replace", **kwargs: Any) -> Any:
        """Turn ids into text.

        Args:
            token_ids (`int`, `list[int]`, `list[list[int]]`, array or tensor): One sequence, or a batch.
            skip_special_tokens (`bool`): Leave out special tokens; the bytes around them then join.
            errors (`str`): What becomes of bytes that are not UTF-8: `"replace"` and `"backslashreplace"` show them,
                `"ignore"` drops them, `"strict"` raises. [`decode_bytes`] keeps them.
            kwargs: `clean_up_tokenization_spaces=True` takes spaces before punctuation out, as the published Llama
                tokenizer did unasked.

        Returns:
            `str`, or `list[str]` for a batch.

        Raises:
            ValueError: an id is not in the vocabulary, or `errors` is not known.
            UnicodeDecodeError: the bytes are not UTF-8 and `errors` is `"strict"`.
        """
        try:
            codecs.lookup_error(errors)
        except LookupError:
            raise ValueError(
                f'errors={errors!r} is not known: use "replace", "ignore", "backslashreplace" or "strict".'
            ) from None
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
            if token_id in self._bytes_of_id:
                run += self._bytes_of_id[token_id]
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
        """Turn any bytes, valid UTF-8 or not, into the ids of the single bytes: no special tokens, no template words.

        Args:
            data (`bytes`): What to encode; any bytes-like object.
            add_special_tokens (`bool`): Add `bos_token` and `eos_token` where `encode` does.

        Raises:
            TypeError: `data` is a `str`, or not bytes-like.
        """
        if isinstance(data, str):
            raise TypeError("encode_bytes takes bytes, but data is a str: use encode for text.")
        ids = list(bytes(memoryview(data)))
        if add_special_tokens:
            frame = self.encode("a")
            middle = frame.index(ord("a"))
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


def byte_tokenizer_from(
    subword_tokenizer: PreTrainedTokenizerBase,
    special_tokens: Iterable[str] | None = None,
    template_words: Iterable[str] = (),
    **kwargs: Any,
) -> ByteLlamaTokenizer:
    """Derive the byte tokenizer of a model whose subword tokenizer is backed by the `tokenizers` library.

    Byte `b` is id `b`; from 256 on come the special tokens and then the template words, each sorted. Special tokens are
    the ones that play the part of bos, eos and pad, the ones that encoding puts around a text, and `special_tokens`.
    What encoding puts around a text, the chat template, and the sides of padding and truncation are those of the
    subword tokenizer; its maximum length, counted in subwords, is not.

    The published tokenizers result from (Llama 3 names no padding token, so one is chosen)

        byte_tokenizer_from(llama3, pad_token="<|end_of_text|>", template_words=LLAMA3_TEMPLATE_WORDS)
        byte_tokenizer_from(gemma2, template_words=GEMMA2_TEMPLATE_WORDS)

    Args:
        subword_tokenizer (`PreTrainedTokenizerBase`): The subword tokenizer.
        special_tokens (`Iterable[str]`, *optional*):
            Special tokens to keep besides those that always stay. Default: the added tokens that the chat template
            writes out (`"<|im_start|>"`), blanks and single letters excepted. Tokens that are added but not special
            (`"<think>"`) remain so: `skip_special_tokens` keeps them, `split_special_tokens` does not split them.
        template_words (`Iterable[str]`):
            Pieces of plain text that are one id wherever they occur. Default: none, as this makes the ids of a text
            depend on words in it.
        kwargs: Passed on to [`ByteLlamaTokenizer`], in place of what the subword tokenizer says: `pad_token`, say, or
            `chat_template`, which then decides the special tokens too.

    Raises:
        TypeError: `subword_tokenizer` has no Rust backend, or a list of strings is one string.
        ValueError: a template word is a single byte, or a special token or like one; a special token is one letter.
    """
    source = rust_backend(subword_tokenizer, "subword_tokenizer")
    if isinstance(special_tokens, str) or isinstance(template_words, str):
        raise TypeError("special_tokens and template_words must be lists of strings, but one of them is a string.")

    added = {token.content: token.special for token in source.get_added_tokens_decoder().values()}
    chat_template = kwargs.setdefault("chat_template", subword_tokenizer.chat_template)
    if special_tokens is None:
        templates = chat_template.values() if isinstance(chat_template, dict) else [chat_template or ""]
        written = sorted((token for token in added if len(token.strip()) > 1), key=len, reverse=True)
        special_tokens = re.findall("|".join(map(re.escape, written)) or "(?!)", "\n".join(templates))

    # The tokens that encoding puts before and after a text.
    framed = subword_tokenizer("a", return_special_tokens_mask=True)
    mask = framed["special_tokens_mask"]
    tokens = subword_tokenizer.convert_ids_to_tokens(framed["input_ids"])
    before, after = tokens[: mask.index(0)], tokens[len(mask) - mask[::-1].index(0) :]

    parts = {part: getattr(subword_tokenizer, part) for part in subword_tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    asked_for = {part: str(kwargs.pop(part)) for part in parts if kwargs.get(part) is not None}
    before = [asked_for.get("bos_token", token) if token == parts["bos_token"] else token for token in before]
    after = [asked_for.get("eos_token", token) if token == parts["eos_token"] else token for token in after]
    parts.update(asked_for)
    always = {parts[part] for part in ("bos_token", "eos_token", "pad_token", *asked_for)} - {None}
    specials = sorted({*special_tokens, *before, *after, *always})
    words = {"".join(BYTE_CHARACTERS[byte] for byte in word.encode()): word for word in template_words}
    for token, word in words.items():
        if len(token) < 2 or token in specials or _in_angle_brackets(word):
            raise ValueError(
                f"template_words holds {word!r}, which is a single byte or a special token: leave it out, or name it "
                "in special_tokens."
            )
    for token in specials:
        if token in BYTE_CHARACTERS:
            raise ValueError(f"special_tokens holds {token!r}, which is how a byte is written: give it a longer name.")

    vocabulary = [*BYTE_CHARACTERS, *specials, *sorted(words)]
    backend = Tokenizer(models.Unigram([(token, 0.0) for token in vocabulary], None, False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # `lstrip` and `rstrip` of the source are left behind: they would swallow bytes.
    for token in specials:
        backend.add_tokens([AddedToken(token, special=token in always or added.get(token, True), normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
    )
    for side in ("padding_side", "truncation_side"):
        kwargs.setdefault(side, getattr(subword_tokenizer, side))
    kept_parts = {part: token for part, token in parts.items() if token in specials}
    return ByteLlamaTokenizer(tokenizer_object=backend, **kept_parts, **kwargs)


__all__ = ["ByteLlamaTokenizer", "byte_tokenizer_from"]
