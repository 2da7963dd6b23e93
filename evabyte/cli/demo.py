"""`evabyte demo`: the same text byte by byte and by multibyte decoding."""

import io
import os
import sys
from argparse import Namespace
from itertools import takewhile

from .decode import Generation, decode
from .model import load_model
from .output import ForwardStreamer, dim, wants_colour

PROMPT = "The President of the United States"


def run(options: Namespace) -> int:
    """Write both texts, their speeds and the comparison; the status is 1 if the texts differ."""
    model, tokenizer = load_model(options.model, options.device, options.dtype)
    text = PROMPT if options.prompt is None else options.prompt
    prompt = tokenizer.encode_bytes(os.fsencode(text))
    colour = wants_colour(sys.stdout)
    arguments = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "draft": options.draft}

    def generate(title: str, byte_by_byte: bool) -> Generation:
        warm_up = arguments | {"max_new_tokens": 8}
        decode(model, prompt, ForwardStreamer(tokenizer, io.StringIO()), byte_by_byte, **warm_up)
        print(f"{title}\n\n{dim(text, sys.stdout)}", end="", flush=True)
        result = decode(model, prompt, ForwardStreamer(tokenizer, sys.stdout, colour), byte_by_byte, **arguments)
        print(f"\n\n{dim(result.summary(), sys.stdout)}\n", flush=True)
        if result.interrupted:
            raise KeyboardInterrupt
        return result

    millions = model.num_parameters() / 1e6
    print(f"A model of {millions:.1f} million parameters on {model.device}, always taking its most probable byte.")
    print("The colour changes with each forward of the model.\n" if colour else "")
    single = generate("One byte per forward", byte_by_byte=True)
    multi = generate("Multibyte decoding: heads draft the next bytes, one forward checks them", byte_by_byte=False)
    print(compare(single, multi))
    return 0 if single.ids == multi.ids else 1


def compare(single: Generation, multi: Generation) -> str:
    """Whether byte by byte and multibyte decoding gave the same bytes, and how their speeds compare."""
    speed = f"multibyte decoding was {multi.bytes_per_second / single.bytes_per_second:.1f} times as fast"
    if single.ids == multi.ids:
        return f"The same {len(multi.ids)} bytes; {speed}."
    pairs = zip(single.ids, multi.ids, strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return (
        f"The first {same} bytes are the same; then the texts part, as they may where two bytes are equally probable "
        f"within rounding; {speed}."
    )
