"""`evabyte bpb`: bits per byte of a model on text files."""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..bits_per_byte import TextBits, bits_per_byte, default_context
from .model import CommandError, load_causal_lm, told_in_one_line


def run(options: Namespace) -> int:
    """Print a line per file, and one for all of them, to standard output."""
    texts = [(name, read(name)) for name in options.files]
    model, tokenizer = load_causal_lm(options.model, options.device, options.dtype, options.trust_remote_code)
    context = options.context or default_context(model.config)
    stride = options.stride or max(context // 2, 1)
    scores: list[tuple[str, TextBits]] = []
    began = time.perf_counter()
    for name, data in texts:
        with told_in_one_line(name):
            scores.append((name, bits_per_byte(model, tokenizer, data, context, stride, options.batch_size)))
        if not scores[-1][1].lossless:
            print(f"evabyte bpb: {name}: the tokenizer does not give this text back exactly", file=sys.stderr)
    seconds = time.perf_counter() - began
    if options.json:
        how = {"model": options.model, "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        print(json.dumps({**how, "context": context, "stride": stride, **report(scores, seconds)}))
    else:
        print(*lines(scores, seconds), sep="\n")
    return 0


def read(name: str) -> bytes:
    """A file's bytes.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise CommandError(f"{name}: {error.strerror}") from error


def together(scores: Sequence[tuple[str, TextBits]]) -> TextBits:
    """The score of all texts, each read by itself."""
    found = [score for _, score in scores]
    return TextBits(
        bits=sum(score.bits for score in found),
        bytes=sum(score.bytes for score in found),
        ids=sum(score.ids for score in found),
        lossless=all(score.lossless for score in found),
    )


def report(scores: Sequence[tuple[str, TextBits]], seconds: float) -> dict[str, Any]:
    """What `--json` prints of the scores."""

    def facts(score: TextBits) -> dict[str, Any]:
        return {**vars(score), "bits_per_byte": score.bits_per_byte}

    total = together(scores)
    speed = {"seconds": round(seconds, 3), "bytes_per_second": round(total.bytes / seconds, 1)}
    return {"files": [{"file": name, **facts(score)} for name, score in scores], "total": {**facts(total), **speed}}


def lines(scores: Sequence[tuple[str, TextBits]], seconds: float) -> Iterator[str]:
    """The lines for people to read."""
    total = together(scores)
    rows = [*scores, ("all", total)] if len(scores) > 1 else scores
    yield f"{'bits/byte':>9}  {'bytes':>13}  {'bytes/id':>8}  file"
    for name, score in rows:
        per_byte = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        per_id = f"{score.bytes / score.ids:.2f}" if score.ids else "-"
        yield f"{per_byte:>9}  {score.bytes:>13,}  {per_id:>8}  {name}"
    yield f"{total.bytes / seconds:,.0f} bytes/s"


__all__ = ["run"]
