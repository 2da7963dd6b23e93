"""The tokenizer of byte-level Llama and Gemma 2: byte ``b`` at id ``b``, special tokens and template words behind."""

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from evabyte.byte_tokenizer import BYTE_CHARACTERS, ByteTokenizer

from .token_bytes import byte_level_bytes, rust_backend

# What the published tokenizers hold besides bytes and special tokens: see `template_words` of `byte_tokenizer_from`.
LLAMA3_TEMPLATE_WORDS = ("assistant", "system", "user", "\n\n")
GEMMA2_TEMPLATE_WORDS = ("model", "user")


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


class ByteLlamaTokenizer(ByteTokenizer):
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

    byte_offset = 0
    decoding_errors = "replace"

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

        added_tokens = {token.content for token in added}
        vocabulary = backend.get_vocab(with_added_tokens=False).items()
        self.bytes_of_id = {index: byte_level_bytes(token) for token, index in vocabulary if token not in added_tokens}

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keep `tokenizer_file`: transformers would take it apart, and leave the added tokens out."""
        return kwargs


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
