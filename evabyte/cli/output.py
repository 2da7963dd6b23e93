"""Command line: write text while it is generated, in colours that show what each forward brought."""

import os
from itertools import cycle
from typing import Any, TextIO

from ..byte_streamer import ByteStreamer
from ..tokenization_evabyte import EvaByteTokenizer

CYAN, MAGENTA, DIM, RESET = "\x1b[36m", "\x1b[35m", "\x1b[2m", "\x1b[0m"
# A model may write any character, and a terminal obeys some: those of control, but for \n and \t, are shown instead.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
CONTROL_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour what goes to `stream`: it is a terminal that has colours, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def dim(text: str, stream: TextIO) -> str:
    """`text`, toned down if `stream` has colours."""
    return f"{DIM}{text}{RESET}" if wants_colour(stream) else text


class ForwardStreamer(ByteStreamer):
    """Writes the text a model generates, character by character, and keeps what the forwards brought.

    Args:
        tokenizer: the byte tokenizer of the model.
        stream: where to write. A terminal gets control characters as pictures; all else gets the text as it is.
        colour: change the colour with each forward; a character has the colour of the forward that completed it.

    Attributes:
        ids: the new ids so far.
        forwards: the forwards so far, the prompt's included.
    """

    def __init__(self, tokenizer: EvaByteTokenizer, stream: TextIO, colour: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, errors="replace")
        self.stream = stream
        self.to_terminal = stream.isatty()
        self.colours = cycle((CYAN, MAGENTA)) if colour else None
        self.ids: list[int] = []
        self.forwards = 0

    def put(self, value: Any) -> None:
        """Take the ids of the prompt, then a tensor with those of each forward."""
        if not self.next_tokens_are_prompt:
            self.forwards += 1
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write `text`, which one forward completed."""
        if self.to_terminal:
            text = text.translate(CONTROL_PICTURES)
        if text and self.colours is not None:
            text = f"{next(self.colours)}{text}{RESET}"
        self.stream.write(text)
        self.stream.flush()
