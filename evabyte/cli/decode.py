"""Command line: run a model on a prompt as the options say, and measure."""

import time
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..modeling_evabyte import EvaByteForCausalLM
from ..multibyte_output import Step
from ..tokenization_evabyte import EvaByteTokenizer
from .output import ForwardStreamer


@dataclass
class Generation:
    """What one run of a model gave.

    Attributes:
        ids: the new ids.
        forwards, seconds: what they took, the prompt included.
        cache: has read the prompt and all new ids but the last; None when Ctrl-C ended the run.
        trace: what every forward of multibyte decoding brought; empty byte by byte.
    """

    ids: list[int]
    forwards: int
    seconds: float
    cache: Cache | None
    trace: list[Step] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        return self.cache is None

    @property
    def bytes_per_second(self) -> float:
        return len(self.ids) / self.seconds

    def summary(self) -> str:
        """Speed and forwards, in one line."""
        return (
            f"{len(self.ids)} bytes in {self.seconds:.1f} s ({self.bytes_per_second:.0f} bytes/s), "
            f"{self.forwards} forwards, {len(self.ids) / max(self.forwards, 1):.1f} bytes per forward"
        )


def sampling_arguments(options: Namespace, tokenizer: EvaByteTokenizer) -> dict[str, Any]:
    """The arguments for `generate` that the sampling options stand for."""
    arguments: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature > 0}
    if options.temperature > 0:
        arguments |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k or 0}
    if options.stop:
        arguments |= {"stop_strings": options.stop, "tokenizer": tokenizer}
    return arguments


def set_seed(seed: int | None) -> None:
    """Seed PyTorch, with a seed of its own choice for None: unseeded, it draws the same numbers in every process."""
    if seed is None:
        torch.seed()
    else:
        torch.manual_seed(seed)


def decode(
    model: EvaByteForCausalLM,
    prompt: list[int],
    streamer: ForwardStreamer,
    byte_by_byte: bool = False,
    draft: str | None = None,
    **arguments: Any,
) -> Generation:
    """Continue a prompt, by multibyte decoding or by plain `generate`. Ctrl-C ends this, and not the program.

    Args:
        prompt: ids, at least one.
        draft: the draft tree of multibyte decoding.
        **arguments: for `generate`.
    """
    inputs = torch.tensor([prompt], device=model.device)
    arguments |= {"attention_mask": torch.ones_like(inputs), "streamer": streamer, "return_dict_in_generate": True}
    cache, trace = None, []
    start = time.perf_counter()
    try:
        output: Any
        if byte_by_byte:
            output = model.generate(inputs, **arguments)
        else:
            output = model.multi_byte_generate(inputs, draft=draft, return_trace=True, **arguments)
            trace = output.trace[0]
        cache = output.past_key_values
    except KeyboardInterrupt:
        streamer.end()
    return Generation(streamer.ids, streamer.forwards, time.perf_counter() - start, cache, trace)
