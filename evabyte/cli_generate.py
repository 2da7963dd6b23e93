"""`evabyte generate`: continue a text."""

import os
import sys
from argparse import Namespace

from .cli_decode import decode, sampling_arguments, set_seed
from .cli_model import load_model
from .cli_output import ForwardStreamer, dim, wants_colour


def run(options: Namespace) -> int:
    """Write the continuation to standard output, and the speed to standard error."""
    prompt = read_prompt(options.prompt)
    model, tokenizer = load_model(options.model, options.device, options.dtype)
    if not prompt:
        print("evabyte generate: the prompt is empty, so this is a text from its beginning", file=sys.stderr)
    set_seed(options.seed)
    streamer = ForwardStreamer(tokenizer, sys.stdout, colour=wants_colour(sys.stdout))
    # Whatever stands in the prompt is text: a "<eos>" in it is five characters, not the end.
    ids = tokenizer.encode_bytes(prompt)
    arguments = sampling_arguments(options, tokenizer)
    result = decode(model, ids, streamer, options.byte_by_byte, options.draft, **arguments)
    if streamer.to_terminal:
        print(flush=True)
    print(dim(result.summary(), sys.stderr), file=sys.stderr)
    if result.interrupted:
        raise KeyboardInterrupt
    return 0


def read_prompt(argument: str | None) -> bytes:
    """The bytes of the prompt: the argument's own, or standard input's for None and "-"."""
    if argument not in (None, "-"):
        return os.fsencode(argument)
    if sys.stdin.isatty():
        print("Type the beginning of a text, then Ctrl-D.", file=sys.stderr)
    return sys.stdin.buffer.read()
