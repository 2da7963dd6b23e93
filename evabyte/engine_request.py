"""A prompt that an engine continues: what its caller sees of it, and how it takes its bytes."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .byte_tree import walk_tree
from .next_byte import GrowingRows, NextByte, RowNoise
from .prepared_call import PreparedCall

WAITING, RUNNING, DONE, CANCELLED, FAILED = "waiting", "running", "done", "cancelled", "failed"
# What says how long a text may become, not how a byte is taken.
LENGTHS = ("max_length", "max_new_tokens", "max_time", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id")


class Request:
    """What [`ByteEngine.submit`] returns; iterate over it for the new ids as they come.

    Attributes:
        status: "waiting", "running", "done", "cancelled" or "failed".
        number: counts the engine's requests from 0.
    """

    def __init__(
        self,
        engine: Any,
        number: int,
        call: PreparedCall,
        options: dict[str, Any],
        seed: int,
        on_bytes: Callable[[list[int]], Any] | None,
    ) -> None:
        self.number, self.status, self.error = number, WAITING, None
        self.config = call.generation_config
        self._engine, self._on_bytes = engine, on_bytes
        self._rows = GrowingRows(call.input_ids, call.stopping_criteria)
        self._next_byte = NextByte(call.logits_processor, bool(self.config.do_sample))
        self._noise: RowNoise | None = None
        if self._next_byte.do_sample:
            self._noise = RowNoise(seed, engine.model.config.vocab_size, call.input_ids.device)
        self._new: list[int] = []  # what the caller knows of
        self._cancelled = False
        self.sampler = sampler_key(self._next_byte, self.config, options)

    number: int
    status: str
    error: BaseException | None

    # -- what its caller does with it ----------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in (DONE, CANCELLED, FAILED)

    @property
    def new_ids(self) -> list[int]:
        """The new ids so far."""
        return list(self._new)

    def result(self, timeout: float | None = None) -> Tensor:
        """int64 [prompt + new ids], once the request has ended; if cancelled, as far as it came.

        Args:
            timeout: seconds to wait while another thread runs the engine; None for as long as it takes.

        Raises:
            TimeoutError: the request has not ended by then.
            Exception: what the request failed of.
        """
        self._engine.wait(lambda: self.ended, timeout)
        if self.error is not None:
            raise self.error
        return torch.tensor(self._rows.texts[0][: self._rows.prompt_length] + self._new)

    def __iter__(self) -> Iterator[int]:
        """The new ids as they come, from the first on.

        Raises:
            Exception: what the request failed of, after the ids before that.
        """
        seen, ended = 0, False
        while not ended:
            self._engine.wait(partial(self._has_more, seen))
            ended, new = self.ended, self._new[seen:]
            yield from new
            seen += len(new)
        if self.error is not None:
            raise self.error

    def _has_more(self, seen: int) -> bool:
        return self.ended or len(self._new) > seen

    def cancel(self) -> None:
        """Let the request end where it is; it leaves the batch before the next step."""
        self._cancelled = True

    # -- what the engine does with it ----------------------------------------------------------------------------------

    @property
    def text(self) -> list[int]:
        """All ids, prompt first."""
        return self._rows.texts[0]

    @property
    def wants_to_leave(self) -> bool:
        return self._cancelled

    def noise(self, count: int) -> Tensor:
        """Of the next draws, float32 [count, vocab]."""
        if self._noise is None:
            raise ValueError("A greedy request draws nothing.")
        return self._noise.ahead(count)

    def process_nodes(self, logits: Tensor) -> Tensor:
        """Scores of logits [B, T, vocab], of this request and others of the same `sampler`."""
        return self._next_byte.process_nodes(logits)

    def take_first(self, logits: Tensor) -> None:
        """Emit the byte after the prompt, of logits float32 [vocab]."""
        self.walk([0], [-1], lambda node: self._pick(logits, 0))

    def walk_byte_by_byte(self, ids: list[int], parents: list[int], logits: Tensor) -> list[int]:
        """`walk` where processors look at the text so far; logits float32 [T, vocab]."""
        before = len(self.text)
        return self.walk(ids, parents, lambda node: self._pick(logits[node], len(self.text) - before))

    def _pick(self, logits: Tensor, draw: int) -> int:
        scores = self._next_byte.process_rows(logits[None], self._rows, [0])
        if self._noise is not None:
            scores = scores.softmax(-1) / self.noise(draw + 1)[draw]
        return int(scores.argmax(-1))

    def walk(self, ids: list[int], parents: list[int], pick: Callable[[int], int]) -> list[int]:
        """Emit the bytes along a path of a tree; -> its nodes. An error in what the caller passed fails the request."""
        try:
            path = walk_tree(ids, parents, pick, lambda byte: self._rows.append(0, byte))
        except Exception as error:
            self.fail(error)
            return []
        if self._noise is not None:
            self._noise.use(len(path))
        return path

    def deliver(self) -> None:
        """Hand on what has been emitted since the last time, and note whether the text has ended."""
        if self.ended:
            return
        new = self.text[self._rows.prompt_length + len(self._new) :]
        self._new.extend(new)
        if self._on_bytes is not None and new:
            try:
                self._on_bytes(new)
            except Exception as error:
                self.fail(error)
                return
        if self._rows.finished[0]:
            self.status = DONE

    def fail(self, error: BaseException) -> None:
        self.status, self.error = FAILED, error


def sampler_key(next_byte: NextByte, config: GenerationConfig, options: dict[str, Any]) -> Any:
    """Requests of the same key have their scores processed together; None for one whose processors look at its text."""
    if not next_byte.prefix_free:
        return None
    if not next_byte.processors:
        return next_byte.do_sample
    own = tuple(id(processor) for processor in options.get("logits_processor") or ())
    settings = {name: value for name, value in config.to_dict().items() if name not in LENGTHS}
    return json.dumps(settings, sort_keys=True, default=str), own


__all__ = ["Request"]
