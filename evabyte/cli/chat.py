"""`evabyte chat`: talk with a chat model."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from transformers.cache_utils import Cache

from ..modeling_evabyte import EvaByteForCausalLM
from ..tokenization_evabyte import EvaByteTokenizer
from .decode import Generation, decode, sampling_arguments, set_seed
from .model import end_ids, load_model
from .output import ForwardStreamer, dim

END_OF_TURN = "<|eot_id|>"


def run(options: Namespace) -> int:
    """Answer each line of standard input, until it ends."""
    model, tokenizer = load_model(options.model, options.device, options.dtype)
    set_seed(options.seed)
    arguments = sampling_arguments(options, tokenizer)
    chat = Chat(model, tokenizer, options.system, options.byte_by_byte, options.draft, **arguments)
    if not chat.model_is_tuned:
        print("evabyte chat: this is a base model, it continues texts rather than answers", file=sys.stderr)
    for line in turns():
        if line == "/exit":
            break
        if line == "/reset":
            chat.reset()
        elif line:
            chat.answer(line, ForwardStreamer(tokenizer, sys.stdout))
            print(flush=True)
    return 0


def turns() -> Iterator[str]:
    """What the user says, line by line, without the spaces around it."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield line.decode(errors="replace").strip()
        return
    print(dim("/reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops an answer.", sys.stdout))
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


class Chat:
    """A conversation with a model, whose cache is kept from turn to turn.

    Args:
        system: the system message, if any.
        byte_by_byte, draft: as in [`decode`].
        **arguments: for `generate`.

    Attributes:
        messages: what was said so far.
    """

    def __init__(
        self,
        model: EvaByteForCausalLM,
        tokenizer: EvaByteTokenizer,
        system: str | None = None,
        byte_by_byte: bool = False,
        draft: str | None = None,
        **arguments: Any,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        ends = end_ids(model, tokenizer)
        end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.model_is_tuned = end_of_turn in ends  # a base model ends documents, not turns
        self.arguments = {
            "byte_by_byte": byte_by_byte,
            "draft": draft,
            "eos_token_id": sorted({*ends, end_of_turn}),
            **arguments,
        }
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.cache: Cache | None = None
        self.read: list[int] = []  # the ids in the cache

    def answer(self, text: str, streamer: ForwardStreamer) -> Generation:
        """Let the model answer `text`; what it says until Ctrl-C, or the limit of bytes, counts as its answer."""
        self.messages.append({"role": "user", "content": text})
        ids = self.tokenizer.encode_chat(self.messages, add_generation_prompt=True)
        # What was read may not be how the chat begins now: an answer can hold bytes that are not text.
        reusable = self.cache is not None and ids[: len(self.read)] == self.read
        result = decode(self.model, ids, streamer, past_key_values=self.cache if reusable else None, **self.arguments)
        self.cache, self.read = result.cache, [*ids, *result.ids[:-1]]
        said = self.tokenizer.decode(result.ids, skip_special_tokens=True, errors="replace")
        self.messages.append({"role": "assistant", "content": said})
        return result
