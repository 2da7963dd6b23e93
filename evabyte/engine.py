"""Many requests at once: they join and leave a batch between steps of multibyte decoding, in one process.

    engine = ByteEngine(model, max_batch_size=8)
    requests = [engine.submit(ids, max_new_tokens=200) for ids in prompts]
    texts = [request.result() for request in requests]

Every step reads a piece of the waiting prompts, drafts a tree of bytes for each running row, verifies all trees in one
forward and commits. Each request gets the bytes that it gets alone: greedy, those of `generate`; sampled, those of
`generate` from the same seed.
"""

import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .drafters import Drafter, choose_drafter
from .engine_batch import Prefill, RunningRows
from .engine_request import CANCELLED, Request
from .multibyte_generation import OWN_ARGUMENTS

INSTEAD = {
    "streamer": "iterate over the request, or pass `on_bytes` (such as a streamer's `put`)",
    "num_return_sequences": "submit the prompt several times",
    "cache_implementation": "the engine has a cache of its own",
    "return_dict_in_generate": "a request's result is its ids",
    "assistant_model": "the engine drafts by itself, see its `draft`",
    "prompt_lookup_num_tokens": "make the engine with draft='dynamic+lookup'",
    **dict.fromkeys(("custom_generate", "multibyte"), "the engine decodes by multibyte decoding"),
    **dict.fromkeys(OWN_ARGUMENTS, "what is drafted is said when the engine is made"),
}


class ByteEngine:
    """Decodes requests together, with a model that has `multi_byte_generate`.

    There is no thread of its own: whoever waits for a request runs the engine's steps, one thread at a time, and
    `step` or `run` do it explicitly. Requests may be submitted from any thread, and from `on_bytes`.

    Args:
        model: an EvaByte, byte-level Llama or byte-level Gemma 2, in eval mode.
        max_batch_size: rows decoded together; further requests wait, in order.
        max_length: prompt and new bytes of a request at most, which bounds the cache; None for the model's
            `max_position_embeddings`.
        prefill_chunk_size: ids of prompts read in a step at most, so that a long prompt does not hold up running rows.
        nodes_per_step: drafted nodes of all rows in a step together, about; each row's tree has nodes_per_step // rows.
            None for what `default_nodes` says of device and rows.
        draft: as in `multi_byte_generate`. Trees of another kind than "dynamic" keep their size.
        tokenizer: for requests with `stop_strings`.

    Raises:
        ValueError: for sizes below 1, and a draft the model cannot make.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch_size: int = 8,
        max_length: int | None = None,
        prefill_chunk_size: int = 512,
        nodes_per_step: int | None = None,
        draft: str | Drafter | None = None,
        tokenizer: Any = None,
    ) -> None:
        if max_length is None:
            max_length = model.config.max_position_embeddings
        sizes = {"max_batch_size": max_batch_size, "max_length": max_length, "prefill_chunk_size": prefill_chunk_size}
        for name, size in {**sizes, "nodes_per_step": nodes_per_step}.items():
            if size is not None and size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.max_length, self.prefill_chunk_size = max_batch_size, max_length, prefill_chunk_size
        self._running = RunningRows(model, choose_drafter(model, max_batch_size, draft, None, None), nodes_per_step)
        self._waiting: deque[Request] = deque()
        self._reading: Prefill | None = None
        self._submitted = 0
        self._closed = False
        self._changed = threading.Condition(threading.Lock())  # guards `_waiting` and `_driver`
        self._driver: int | None = None  # the thread that runs a step

    def submit(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        generation_config: GenerationConfig | None = None,
        seed: int | None = None,
        on_bytes: Callable[[list[int]], Any] | None = None,
        **options: Any,
    ) -> Request:
        """Add a request; it begins when there is a row for it.

        Args:
            input_ids: the prompt, int64 [N] or [1, N].
            seed: with sampling, of the request's own random generator; None to draw one from PyTorch's.
            on_bytes: called with the new ids of every step, in the thread that runs it; if it raises, the request fails
                with that and no other does.
            **options: what `generate` takes for greedy decoding and sampling: `max_new_tokens`, `do_sample`,
                `temperature` (0 is greedy), `top_p`, `stop_strings`, `eos_token_id`, `logits_processor`, ...

        Raises:
            ValueError: for a prompt that is empty, has ids that the model lacks or is with its new bytes longer than
                `max_length`, and options that are unknown or not the engine's.
            RuntimeError: after `close`.
        """
        ids = self._prompt(input_ids)
        if options.get("temperature") == 0:
            options = {**options, "temperature": None, "do_sample": False}
        self._check_options(options)
        if self.tokenizer is not None:
            options.setdefault("tokenizer", self.tokenizer)
        mask = torch.ones_like(ids)
        call = self.model._prepared_call(ids, generation_config=generation_config, attention_mask=mask, **options)
        if call.input_ids.shape[0] > 1:
            raise ValueError(f"`num_return_sequences`: {INSTEAD['num_return_sequences']}.")
        most = call.generation_config.max_length
        if most > self.max_length:
            raise ValueError(
                f"A prompt of {ids.shape[1]} ids and up to {most - ids.shape[1]} new ones are {most}, more than the "
                f"engine's `max_length` ({self.max_length}): ask for fewer, or make the engine with a larger one."
            )
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        with self._changed:
            if self._closed:
                raise RuntimeError("The engine is closed: make a new one.")
            request = Request(self, self._submitted, call, options, seed, on_bytes)
            self._submitted += 1
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def _prompt(self, input_ids: Tensor | Sequence[int]) -> Tensor:
        ids = torch.as_tensor(input_ids)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point():
            raise ValueError(f"`input_ids` must be one prompt of integer ids, [N] or [1, N], got {tuple(ids.shape)}.")
        low, high = (int(each) for each in ids.aminmax())
        if low < 0 or high >= self.model.config.vocab_size:
            raise ValueError(f"`input_ids` must lie in 0..{self.model.config.vocab_size - 1}, got {low}..{high}.")
        return ids.to(self.model.device, torch.int64)

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in INSTEAD.keys() & options.keys():
            raise ValueError(f"`{name}` is not for an engine: {INSTEAD[name]}.")
        for name in inspect.signature(self.model.forward).parameters.keys() & options.keys():
            raise ValueError(f"`{name}` is not for an engine: it takes prompts as ids, without padding, and no more.")

    # -- who runs the steps --------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + (self._reading is not None) + len(self._running.requests)

    def step(self) -> bool:
        """Read some of the waiting prompts and decode once; -> whether there is more to do."""
        with self._changed:
            self._refuse_nesting()
            while self._driver is not None:
                self._changed.wait()
            self._drive()
        return self.pending > 0

    def run(self) -> None:
        """Decode until all requests have ended."""
        while self.step():
            pass

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        """Run steps until `ready()`, or let another thread that does.

        Raises:
            TimeoutError: after `timeout` seconds.
            RuntimeError: from within a step (`on_bytes`), which cannot wait for later ones.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not ready():
                self._refuse_nesting()
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"The request has not ended after {timeout} seconds.")
                if self._driver is None:
                    with suppress(Exception):  # the requests that it ended have it
                        self._drive()
                else:
                    self._changed.wait(left)

    def _refuse_nesting(self) -> None:
        if self._driver == threading.get_ident():
            raise RuntimeError("`on_bytes` runs within a step of the engine: it cannot wait for another one.")

    def _drive(self) -> None:
        """Run a step, as the only thread; the lock is held before and after, and free during it."""
        self._driver = threading.get_ident()
        self._changed.release()
        try:
            self._step()
        finally:
            self._changed.acquire()
            self._driver = None
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel what has not ended, and take no more requests."""
        with self._changed:
            self._closed = True
            for request in [*self._waiting, *self._running.requests]:
                request.cancel()
            if self._reading is not None:
                self._reading.request.cancel()
        if self._driver != threading.get_ident():
            self.run()

    def __enter__(self) -> "ByteEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- a step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self) -> None:
        self._drop_cancelled()
        arrivals: list[Prefill] = []
        try:
            self._read_prompts(arrivals)
            self._running.join(arrivals)
            if self._running.requests:
                self._running.step()
        except BaseException as error:  # the rows may stand anywhere now
            for request in [*self._running.requests, *(arrival.request for arrival in arrivals)]:
                request.fail(error)
            self._running.drop_ended()
            raise
        for request in self._running.requests:
            request.deliver()
        self._running.drop_ended()

    def _drop_cancelled(self) -> None:
        with self._changed:
            reading = [] if self._reading is None else [self._reading.request]
            for request in [*self._waiting, *reading, *self._running.requests]:
                if request.wants_to_leave:
                    request.status = CANCELLED
            self._waiting = deque(request for request in self._waiting if not request.ended)
        if self._reading is not None and self._reading.request.ended:
            self._reading = None
        self._running.drop_ended()

    def _read_prompts(self, complete: list[Prefill]) -> None:
        """Read as many ids of prompts as a step may; those that are read and go on are added to `complete`."""
        budget = self.prefill_chunk_size
        while budget > 0:
            if self._reading is None:
                with self._changed:
                    if not self._waiting or len(self._running.requests) + len(complete) >= self.max_batch_size:
                        return
                    self._reading = Prefill(self.model, self._waiting.popleft())
            reading = self._reading
            try:
                budget -= reading.advance(budget)
                if not reading.complete:
                    return
                reading.request.take_first(reading.logits[0, 0, 0])
            except BaseException as error:  # of this prompt alone: the running rows have not been touched
                self._reading = None
                reading.request.fail(error)
                if not isinstance(error, Exception):
                    raise
                continue
            self._reading = None
            reading.request.deliver()
            if not reading.request.ended:
                complete.append(reading)


__all__ = ["ByteEngine", "Request"]
