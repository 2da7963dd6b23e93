"""Streamers for `generate` that write text byte by byte and never half a character."""

import codecs
from collections.abc import Callable
from typing import Any

from transformers import TextIteratorStreamer, TextStreamer
from transformers.utils import to_py_obj

from .byte_tokenizer import ByteTokenizer, check_error_handler


class ByteStreamer(TextStreamer):
    """Hands on the text of a growing sequence of byte ids, each character as soon as its last byte is there.

    The texts joined are `tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, errors=errors)`.

    Args:
        tokenizer (`ByteTokenizer`): The byte tokenizer of the model.
        skip_prompt (`bool`): Leave out the prompt, which `generate` puts first.
        skip_special_tokens (`bool`): Leave out special tokens, rather than write them as their text.
        errors (`str`): What becomes of bytes that are not UTF-8, as in `ByteTokenizer.decode`.
        on_text (`Callable[[str, bool], None]`, *optional*): Called with each text, and with whether the stream ends
            there. Without it the text is printed, with a newline at the end.
        kwargs: Passed on to [`TextStreamer`].

    Raises:
        ValueError: `errors` is not known.
    """

    def __init__(
        self,
        tokenizer: ByteTokenizer,
        skip_prompt: bool = False,
        skip_special_tokens: bool = True,
        errors: str = "ignore",
        on_text: Callable[[str, bool], None] | None = None,
        **kwargs: Any,
    ):
        super().__init__(tokenizer, skip_prompt, **kwargs)
        self.next_tokens_are_prompt: bool = True
        self.skip_special_tokens = skip_special_tokens
        self.errors = check_error_handler(errors)
        self.on_text = on_text
        self._decoder = self._new_decoder()

    def put(self, value: Any) -> None:
        """Take the next ids.

        Args:
            value (tensor, array, `list[int]` or `int`): One or several ids; a batch of one row is taken too.

        Raises:
            ValueError: `value` has several rows, or an id is not in the vocabulary.
        """
        ids = to_py_obj(value)
        if isinstance(ids, int):
            ids = [ids]
        if len(ids) > 0 and isinstance(ids[0], (list, tuple)):
            if len(ids) > 1:
                raise ValueError(
                    f"{type(self).__name__} follows one sequence, but value has {len(ids)} rows: "
                    "generate with batch size 1 and num_return_sequences=1."
                )
            ids = ids[0]

        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if is_prompt and self.skip_prompt:
            return
        text = ""
        for segment in self.tokenizer.iter_segments(ids, self.skip_special_tokens):
            if isinstance(segment, str):
                text += self._decoder.decode(b"", final=True) + segment
            else:
                text += self._decoder.decode(segment)
        if text:
            self.on_finalized_text(text)

    def end(self) -> None:
        """End the stream: what is left of an unfinished character is treated as `errors` says."""
        decoder, self._decoder = self._decoder, self._new_decoder()
        self.next_tokens_are_prompt = True
        self.on_finalized_text(decoder.decode(b"", final=True), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand `text` to `on_text`, or print it."""
        if self.on_text is None:
            super().on_finalized_text(text, stream_end=stream_end)
        else:
            self.on_text(text, stream_end)

    def _new_decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8")(self.errors)


class ByteIteratorStreamer(ByteStreamer, TextIteratorStreamer):
    """A [`ByteStreamer`] to iterate over, while `generate` runs in another thread.

    Takes the arguments of [`ByteStreamer`], and `timeout`, the seconds to wait for the next text (default: for ever).
    """


__all__ = ["ByteIteratorStreamer", "ByteStreamer"]
