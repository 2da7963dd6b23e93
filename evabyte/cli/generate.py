"""`evabyte generate`: continue a text."""

import os
import sys
from argparse import Namespace

from ..multibyte_output import Step
from ..tokenization_evabyte import EvaByteTokenizer
from .decode import decode, sampling_arguments, set_seed
from .model import load_model
from .output import ForwardStreamer, dim, wants_colour


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
    if options.trace:
        print(trace_lines(result.trace, tokenizer), file=sys.stderr)
    print(dim(result.summary(), sys.stderr), file=sys.stderr)
    if result.interrupted:
        raise KeyboardInterrupt
    return 0


def trace_lines(trace: list[Step], tokenizer: EvaByteTokenizer) -> str:
    """A line per forward: the bytes it brought, how many of them were drafted by whom, and where the draft failed."""
    lines = ["forward  drafted  heads  lookup  bytes (the last one is the model's own)"]
    for number, step in enumerate(trace):
        heads, lookup = step.sources.count(0), step.sources.count(1)
        written = tokenizer.decode_bytes(step.bytes, skip_special_tokens=False)
        lines.append(f"{number:7}  {step.drafted:7}  {heads:5}  {lookup:6}  {written!r}")
    return "\n".join(lines)


def read_prompt(argument: str | None) -> bytes:
    """The bytes of the prompt: the argument's own, or standard input's for None and "-"."""
    if argument not in (None, "-"):
        return os.fsencode(argument)
    if sys.stdin.isatty():
        print("Type the beginning of a text, then Ctrl-D.", file=sys.stderr)
    return sys.stdin.buffer.read()
