"""Bits per byte: what a language model needs to write a text, comparable between models whatever their tokenizers.

A text is scored by -log2 of the probability of each of its ids, summed and divided by its length in UTF-8 bytes. Long
texts are read in overlapping windows, in which every id is scored once, with as much text before it as the stride
leaves.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DEFAULT_CONTEXT = 4096  # ids; models that know longer texts gain little beyond it, and full attention is slow there
LOGITS_AT_ONCE = 2**24  # logits in float32 at a time: 64 MiB, and as much again for their logarithm


@dataclass(frozen=True)
class TextBits:
    """What a model needs for one text.

    Attributes:
        bits: sum of -log2 of the probabilities of its ids.
        bytes: its length in bytes.
        ids: its length in ids.
        lossless: whether the ids decode to exactly this text. Where they do not, the bits leave something out.
    """

    bits: float
    bytes: int
    ids: int
    lossless: bool

    @property
    def bits_per_byte(self) -> float | None:
        """None for an empty text."""
        return self.bits / self.bytes if self.bytes else None


def bits_per_byte(
    model: Any,
    tokenizer: Any,
    data: bytes,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> TextBits:
    """Score a text with a causal language model, byte-level or subword.

    Every window begins with the beginning-of-text token (the end-of-text token where a tokenizer has no other), so that
    the first id is scored too.

    Args:
        model: a model such as `AutoModelForCausalLM` loads.
        tokenizer: its tokenizer.
        data: the text. Byte-level tokenizers take any bytes, others valid UTF-8.
        context: ids that the model reads at once, that token included. Default: as many as the model is made for, at
            most 4096.
        stride: ids that a window is ahead of the one before. Default: half of `context`, so that at least half a
            context stands before every scored id but those of the first window. `context` itself is twice as fast, and
            scores the first ids of each window without any text before them.
        batch_size: windows in one forward.

    Raises:
        ValueError: `data` is not UTF-8 and the tokenizer takes nothing else, the tokenizer has neither a beginning nor
            an end, or `context`, `stride` or `batch_size` is out of range.
    """
    context = default_context(model.config) if context is None else context
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError("`tokenizer` has neither a bos nor an eos token to score the first id from: set `bos_token`.")
    ids, lossless = text_ids(tokenizer, data)
    return TextBits(bits_of_ids(model, ids, first, context, stride, batch_size), len(data), len(ids), lossless)


def default_context(config: Any) -> int:
    """The `context` of `bits_per_byte` for a model's configuration."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def text_ids(tokenizer: Any, data: bytes) -> tuple[list[int], bool]:
    """The ids of a text without special tokens, and whether they decode to it; special strings in it are plain text.

    Raises:
        ValueError: `data` is not UTF-8, and this is not a byte-level tokenizer.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if hasattr(tokenizer, "encode_bytes"):
            return tokenizer.encode_bytes(data, add_special_tokens=False), True
        raise ValueError(
            f"`data` is not UTF-8 from byte {error.start} on, which only byte-level tokenizers take: leave it out or "
            "convert it."
        ) from error
    if not text:
        return [], True
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if hasattr(tokenizer, "decode_bytes"):
        return ids, tokenizer.decode_bytes(ids, skip_special_tokens=False) == data
    return ids, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


class Window(NamedTuple):
    """`ids[begin:end]`, of which the last `scored` ones are scored; the very last is not read."""

    begin: int
    end: int
    scored: int


def windows(count: int, context: int, stride: int, with_first: bool) -> Iterator[Window]:
    """Windows that score each of `count` ids once, or all but the first unless every window begins `with_first`."""
    done = 0 if with_first else 1
    room = context if with_first else context + 1
    begin = 0
    while done < count:
        end = min(begin + room, count)
        yield Window(begin, end, end - done)
        done = end
        begin += stride


@torch.no_grad()
def bits_of_ids(
    model: Any,
    ids: Sequence[int],
    first: int | None,
    context: int,
    stride: int | None = None,
    batch_size: int = 1,
) -> float:
    """Bits that a model needs for ids.

    Args:
        first: the id that every window begins with. None: windows hold nothing but `ids`, whose first is not scored.
        context, stride, batch_size: as in `bits_per_byte`.
    """
    stride = max(context // 2, 1) if stride is None else stride
    if context < 1 or batch_size < 1:
        raise ValueError(f"`context` and `batch_size` must be at least 1, got {context} and {batch_size}.")
    if not 1 <= stride <= context:
        raise ValueError(f"`stride` must be from 1 to `context` ({context}), or ids would be left out; got {stride}.")
    tokens = torch.tensor(ids, dtype=torch.int64)
    begins_with = torch.tensor([] if first is None else [first], dtype=torch.int64)
    training = model.training
    model.eval()
    try:
        nats = 0.0
        # Only the last window is shorter than the others, so batches need no padding.
        alike = groupby(windows(len(ids), context, stride, first is not None), lambda window: window.end - window.begin)
        for _, group in alike:
            while batch := list(islice(group, batch_size)):
                nats += _nats(model, tokens, begins_with, batch)
        return nats / math.log(2)
    finally:
        model.train(training)


def _nats(model: Any, tokens: Tensor, begins_with: Tensor, batch: Sequence[Window]) -> float:
    """-log of the probability of what a batch of windows scores."""
    rows = [torch.cat((begins_with, tokens[window.begin : window.end - 1])) for window in batch]
    kept = max(window.scored for window in batch)
    # The logits of a large vocabulary at all positions can take more memory than the model.
    options = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=torch.stack(rows).to(model.device), use_cache=False, **options).logits
    at_once = max(LOGITS_AT_ONCE // logits.shape[-1], 1)
    nats = 0.0
    for row, window in zip(logits, batch, strict=True):
        targets = tokens[window.end - window.scored : window.end].to(row.device)
        pieces = zip(row[-window.scored :].split(at_once), targets.split(at_once), strict=True)
        nats += sum(nn.functional.cross_entropy(some.float(), ids, reduction="sum").item() for some, ids in pieces)
    return nats


__all__ = ["TextBits", "bits_of_ids", "bits_per_byte", "default_context", "text_ids"]
