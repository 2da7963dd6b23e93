"""Texts with pictures as ids, and ids as texts with pictures.

A picture stands in the ids as the bytes of its JPEG stream between `<t2v_token>` and `<v2t_token>`.
"""

import secrets
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from transformers import BatchFeature, ProcessorMixin
from transformers.utils import to_py_obj

from .hub import SelfContainedMixin
from .image_processing_evabyte import EvaByteImageProcessor, flat_images
from .tokenization_evabyte import BYTE_OFFSET, VOCAB_SIZE, EvaByteTokenizer

PLACEHOLDER = "<image_placeholder>"
_IMAGE_KEYS = ("image", "url", "path", "base64")  # where transformers' chat format puts the image of a content part


class TextWithImages(NamedTuple):
    """A text with `<image_placeholder>` for each of its images (`PIL.Image.Image`, or None for one that is lost)."""

    text: str
    images: list[Any]


class EvaByteProcessor(SelfContainedMixin, ProcessorMixin):
    r"""The image processor and the tokenizer of EvaByte as one: texts with pictures in, texts with pictures out.

    Each `<image_placeholder>` in a text is where a picture goes. In the ids a picture is `<t2v_token>`, the bytes of
    its JPEG stream, `<v2t_token>`.

    Args:
        image_processor ([`EvaByteImageProcessor`]): Turns images into streams and back.
        tokenizer ([`EvaByteTokenizer`]): Turns text into ids and back.
        chat_template (`str` or `dict`, *optional*): A Jinja chat template in place of the tokenizer's.

    Raises:
        ValueError: the tokenizer does not have `<t2v_token>` and `<v2t_token>`.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | dict[str, str] | None = None
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        known = tokenizer.get_added_vocab()
        if "<t2v_token>" not in known or "<v2t_token>" not in known:
            raise ValueError("the tokenizer has no <t2v_token> and <v2t_token>: pass an EvaByteTokenizer.")
        self.image_token = PLACEHOLDER
        self.image_start_id: int = known["<t2v_token>"]
        self.image_end_id: int = known["<v2t_token>"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; images are read by the default settings where a folder of a text model has none."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError:
            tokenizer = EvaByteTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            return cls(EvaByteImageProcessor(), tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        return self.tokenizer.model_input_names

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        split_special_tokens: bool | None = None,
        return_attention_mask: bool | None = None,
        return_offsets_mapping: bool = False,
        allow_urls: bool = False,
        input_data_format: str | None = None,
        **settings: Any,
    ) -> BatchFeature:
        """Turn a text, or a batch of texts, with its images into ids.

        Args:
            images: The images for the placeholders, in order: one image, a list, or for a batch a list with a list for
                each text. [`EvaByteImageProcessor.preprocess`] says what an image may be.
            text (`str` or `list[str]`): With as many `<image_placeholder>` as there are images.
            videos, audio: Must be None.
            padding, max_length, pad_to_multiple_of, padding_side, return_tensors, return_attention_mask: As for a
                tokenizer.
            truncation: As for a tokenizer; but a text with images is refused when it is too long, never cut.
            add_special_tokens (`bool`): Put `<bos>` in front.
            split_special_tokens (`bool`, *optional*): Read special strings in the text as plain text; for text from
                strangers. For chats there is [`encode_chat`].
            return_offsets_mapping (`bool`): Also return the (start, end) characters of each id; all ids of an image
                belong to its placeholder.
            allow_urls (`bool`): Fetch http(s) URLs among the images.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays and tensors.
            settings: Settings of the image processor to change for this call, such as `jpeg_quality`.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask`, as lists of rows or int64 tensors [B, N]; a single text
            is a batch of one.

        Raises:
            ValueError: placeholders and images differ in number; a text with images is longer than `max_length`; an
                image is refused (see `load_image`).
            TypeError: an argument is of the wrong kind or unknown.
        """
        if videos is not None or audio is not None:
            raise TypeError("EvaByte reads text and images: leave videos and audio out.")
        if settings.pop("sanitize_control_tokens", False):
            raise ValueError("sanitize_control_tokens is not supported: encode_chat keeps messages plain text.")
        settings.pop("return_text_replacement_offsets", None)  # the offsets given here already are those of the text
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
            raise TypeError("text must be a str or a list of str: pass processor(text=..., images=...) by name.")
        image_processor = self.image_processor.with_settings(**settings)
        images_of_texts = _images_of_texts(images, [one.count(PLACEHOLDER) for one in texts])
        limit = None
        if truncation not in (None, False, "do_not_truncate"):
            limit = self.tokenizer.model_max_length if max_length is None else max_length

        rows, offsets = [], []
        for one, of_text in zip(texts, images_of_texts, strict=True):
            encoding = self.tokenizer(
                one,
                truncation=limit is not None and not of_text,
                max_length=limit,
                add_special_tokens=add_special_tokens,
                split_special_tokens=split_special_tokens,
                return_offsets_mapping=True,
                verbose=False,  # the length that counts is the one with the images
            )
            streams = [image_processor.encode(image, allow_urls, input_data_format) for image in of_text]
            row, spans = self._with_images(encoding["input_ids"], encoding["offset_mapping"], streams)
            if of_text and limit is not None and len(row) > limit:
                raise ValueError(
                    f"a text with its images has {len(row)} ids, more than max_length={limit}, and an image cannot be "
                    "cut: lower size or jpeg_quality, or shorten the text."
                )
            rows.append(row)
            offsets.append(spans)
        batch = self.tokenizer.pad(
            {"input_ids": rows},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            verbose=False,
        )
        if return_offsets_mapping:
            on_the_left = (padding_side or self.tokenizer.padding_side) == "left"
            nothing = [
                [(0, 0)] * (len(ids) - len(spans)) for ids, spans in zip(batch["input_ids"], offsets, strict=True)
            ]
            both = zip(nothing, offsets, strict=True)
            batch["offset_mapping"] = [pad + spans if on_the_left else spans + pad for pad, spans in both]
        return BatchFeature(dict(batch), tensor_type=return_tensors)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        allow_urls: bool = False,
        **settings: Any,
    ) -> list[int]:
        """Turn a chat with images into ids, with nothing in its texts read as a special token or a placeholder.

        Args:
            messages (`list[dict]`): One chat. Content parts of type `"image"` carry their image under `"image"`,
                `"url"`, `"path"` or `"base64"`.
            add_generation_prompt (`bool`): End with the header of the assistant's answer.
            continue_final_message (`bool`): Leave the last message open, for the model to go on with it.
            allow_urls (`bool`): Fetch http(s) URLs among the images.
            settings: Settings of the image processor to change.

        Returns:
            `list[int]`: the ids, ready for the model.

        Raises:
            ValueError: an image part has no image, or its image is refused.
            TypeError: `messages` is not one list of dicts; a setting is unknown.
        """
        if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
            raise TypeError("messages must be one list of dicts: call encode_chat for each chat of a batch.")
        image_processor = self.image_processor.with_settings(**settings)
        # A random mark in what looks like a placeholder keeps it apart from those that the template writes.
        mark = secrets.token_hex(16)
        images: list[Any] = []

        def plain(value: Any) -> Any:
            if isinstance(value, str):
                return value.replace(PLACEHOLDER, PLACEHOLDER[:1] + mark + PLACEHOLDER[1:])
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            if isinstance(value, dict) and value.get("type") == "image":
                images.append(_image_of(value))
                return {"type": "image"}
            return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

        ids = self.tokenizer.encode_chat(plain(messages), add_generation_prompt, continue_final_message)
        streams = [image_processor.encode(image, allow_urls) for image in images]
        row, _ = self._with_images(ids, [(0, 0)] * len(ids), streams)
        return list(map(ord, _as_characters(row).replace(_spelled(mark), "")))

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Turn ids into text, with `<image_placeholder>` for each picture; [`post_process`] gives the pictures too.

        Args:
            token_ids: One sequence of ids, or a batch; lists, arrays or tensors.
            skip_special_tokens (`bool`): Leave out special tokens.
            kwargs: Passed on to the tokenizer's `decode`, such as `errors`.

        Returns:
            `str`, or `list[str]` for a batch.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        token_ids = to_py_obj(token_ids)
        if len(token_ids) > 0 and isinstance(token_ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in token_ids]
        return self.tokenizer.decode(self._split(token_ids)[0], skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """[`decode`] for a batch."""
        return self.decode(*args, **kwargs)

    def post_process(
        self, token_ids: Any, allow_partial: bool = False, skip_special_tokens: bool = True, **settings: Any
    ) -> Any:
        """Turn ids, such as a model's answer, into text and pictures.

        A picture begins at `<t2v_token>` and ends at the first id that is no byte, normally `<v2t_token>`.

        Args:
            token_ids: One sequence of ids, or a batch; lists, arrays or tensors.
            allow_partial (`bool`): Show what there is of a picture that breaks off or is damaged; None stands for one
                of which there is nothing to show.
            skip_special_tokens (`bool`): Leave special tokens out of the text.
            settings: Settings of the image processor to change, such as the `jpeg_quality` of the pictures.

        Returns:
            [`TextWithImages`]: `text` has `<image_placeholder>` for each of the `images` (`PIL.Image.Image`); a list of
            these for a batch.

        Raises:
            ValueError: a picture breaks off or is damaged; an id is not in the vocabulary.
            TypeError: a setting is unknown.
        """
        token_ids = to_py_obj(token_ids)
        if len(token_ids) > 0 and isinstance(token_ids[0], (list, tuple)):
            return [self.post_process(row, allow_partial, skip_special_tokens, **settings) for row in token_ids]
        image_processor = self.image_processor.with_settings(**settings)
        ids, streams = self._split(token_ids)
        images = []
        for stream in streams:
            try:
                images.append(image_processor.decode(stream, allow_partial))
            except ValueError:
                if not allow_partial:
                    raise
                images.append(None)
        return TextWithImages(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens), images)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """The texts (`generation_mode` "text" or None) or the lists of pictures ("image") in a batch of answers."""
        if generation_mode == "image":
            answers = self.post_process(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
            return [answer.images for answer in answers]
        return super().post_process_multimodal_output(generated_outputs, skip_special_tokens, generation_mode, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """[`decode`], by the name that pipelines look for."""
        return self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def image_tokens_to_bytes(self, image_token_ids: Any, jpeg_quality: int | None = None) -> bytes:
        """Turn the ids of one picture into a JPEG file.

        Args:
            image_token_ids: The ids of its bytes, with or without `<t2v_token>` and `<v2t_token>` around them.
            jpeg_quality (`int`, *optional*): The quality it was written with; default: the image processor's.

        Returns:
            `bytes`: the stream with all its tables, for any viewer.

        Raises:
            ValueError: another id is among them; this is no JPEG stream, or it breaks off in its header.
        """
        ids = to_py_obj(image_token_ids)
        ids = ids[1:] if ids[:1] == [self.image_start_id] else ids
        ids = ids[:-1] if ids[-1:] == [self.image_end_id] else ids
        strangers = [token_id for token_id in ids if not BYTE_OFFSET <= token_id < VOCAB_SIZE]
        if strangers:
            raise ValueError(
                f"the ids of a picture are those of bytes, {BYTE_OFFSET} to 319, but {strangers[0]} is among them."
            )
        settings = {} if jpeg_quality is None else {"jpeg_quality": jpeg_quality}
        return self.image_processor.with_settings(**settings).add_tables(bytes(i - BYTE_OFFSET for i in ids))

    def _with_images(
        self, ids: list[int], offsets: list[tuple[int, int]], streams: list[bytes]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets with a stream in place of each placeholder. The ids of the parts are those of the whole."""
        row: list[int] = []
        spans: list[tuple[int, int]] = []
        done = 0
        characters = _as_characters(ids)
        for stream in streams:
            start = characters.index(_spelled(PLACEHOLDER), done)
            picture = [self.image_start_id, *(BYTE_OFFSET + byte for byte in stream), self.image_end_id]
            row += ids[done:start] + picture
            span = (offsets[start][0], offsets[start + len(PLACEHOLDER) - 1][1])
            spans += offsets[done:start] + [span] * len(picture)
            done = start + len(PLACEHOLDER)
        return row + ids[done:], spans + offsets[done:]

    def _split(self, ids: list[int]) -> tuple[list[int], list[bytes]]:
        """The ids of the text, with a placeholder for each picture, and the streams of the pictures."""
        text: list[int] = []
        streams = []
        position = 0
        while self.image_start_id in ids[position:]:
            start = ids.index(self.image_start_id, position)
            end = start + 1
            while end < len(ids) and BYTE_OFFSET <= ids[end] < VOCAB_SIZE:
                end += 1
            text += ids[position:start] + list(map(ord, _spelled(PLACEHOLDER)))
            streams.append(bytes(token_id - BYTE_OFFSET for token_id in ids[start + 1 : end]))
            position = end + (ids[end : end + 1] == [self.image_end_id])
        return text + ids[position:], streams


def _as_characters(ids: list[int]) -> str:
    """Ids as a string, one character each: strings are what Python searches fast."""
    return "".join(map(chr, ids))


def _spelled(text: str) -> str:
    """The ids of plain text, as characters."""
    return "".join(chr(BYTE_OFFSET + byte) for byte in text.encode())


def _images_of_texts(images: Any, counts: list[int]) -> list[list[Any]]:
    """The images of each text, which has `counts` placeholders for them."""
    if images is None:
        groups: list[list[Any]] = [[] for _ in counts]
    elif (
        isinstance(images, (list, tuple))
        and len(images) == len(counts)
        and all(isinstance(group, (list, tuple)) for group in images)
    ):
        groups = [flat_images(group) for group in images]
    else:
        flat = flat_images(images)
        if len(flat) != sum(counts):
            raise ValueError(
                f"the text has {sum(counts)} {PLACEHOLDER}, but there are {len(flat)} images: each image needs one."
            )
        borders = [0, *accumulate(counts)]
        groups = [flat[start:end] for start, end in pairwise(borders)]
    for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
        if len(group) != count:
            raise ValueError(
                f"text {number} has {count} {PLACEHOLDER}, but {len(group)} images: each image needs one, and each "
                "placeholder an image."
            )
    return groups


def _image_of(part: dict[str, Any]) -> Any:
    for key in _IMAGE_KEYS:
        if part.get(key) is not None:
            return part[key]
    raise ValueError(f"a content part of type image needs its image under one of the keys {_IMAGE_KEYS}.")


__all__ = ["EvaByteProcessor", "TextWithImages"]
