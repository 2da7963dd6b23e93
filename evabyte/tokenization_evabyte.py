"""The byte tokenizer of EvaByte: 64 special tokens at ids 0 to 63, then byte ``b`` at id ``64 + b``."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .byte_tokenizer import BYTE_CHARACTERS, ByteTokenizer

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


def _byte_vocabulary() -> dict[str, int]:
    return {token: index for index, token in enumerate((*SPECIAL_TOKENS, *BYTE_CHARACTERS))}


def _byte_backend() -> Tokenizer:
    # BPE without merges is the model that gives one id per character and stays linear in the length of the text.
    backend = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return backend


class EvaByteTokenizer(ByteTokenizer):
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

    byte_offset = BYTE_OFFSET
    decoding_errors = "ignore"
    bytes_of_id = {BYTE_OFFSET + byte: bytes([byte]) for byte in range(256)}

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


__all__ = ["EvaByteTokenizer"]
