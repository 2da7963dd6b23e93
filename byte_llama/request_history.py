"""The bytes before each request's new ones, where transformers batches requests continuously (`generate_batch`).

A batch is one row there, the new ids of many requests one after the other, and its paged cache keeps nothing but keys
and values. The scheduler knows every id of a request, though, and sends the arguments of per-request logits processors
along with each batch: int32 rows with a column per request. The requests' last bytes travel as further rows behind
those, so that they are where the batch is, with two batches in flight, in padded batches and in CUDA graphs, and are
right for whatever may have happened to a request's keys and values (shared, forked, swapped out, computed again).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList


class ProcessorsAndHistories(ContinuousBatchingLogitsProcessorList):
    """The logits processors of continuous batching; their arguments end in `width` rows of the requests' last symbols.

    Args:
        processors: as the manager made them.
        width: how many symbols of each request.
    """

    def __init__(self, processors: ContinuousBatchingLogitsProcessorList, width: int) -> None:
        self.__dict__ = dict(vars(processors))  # made a second time, they would warn a second time
        self.width = width
        self.tensors_required += width

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        super().fill_defaults(int32_tensor)
        int32_tensor[-self.width :].zero_()

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        super().prepare_tensor_args(requests_in_batch, arg_storage)
        histories = torch.tensor([last_symbols(each, self.width) for each in requests_in_batch], dtype=torch.int32)
        arg_storage[-self.width :, : len(requests_in_batch)] = histories.T.to(arg_storage.device)
        return arg_storage


def last_symbols(request: Any, width: int) -> list[int]:
    """The symbols before the new ones of a scheduled request (a `FutureRequestState`), newest last, 0 where none are.

    Raises:
        RuntimeError: when the request's state lacks ids that were computed already.
    """
    state = request.state
    past = state.position_offset - request.query_length  # the scheduler has counted the new ids already
    first, prompt = max(past - width, 0), len(state.initial_tokens)
    ids = state.initial_tokens[first:past] + state.generated_tokens[max(first - prompt, 0) : max(past - prompt, 0)]
    if len(ids) != past - first:
        raise RuntimeError(f"Request {state.request_id!r} has computed {past} ids but knows fewer.")
    return [0] * (width - len(ids)) + [index + 1 for index in ids]


def request_windows(symbols: Tensor, borders: Tensor, histories: Tensor) -> Tensor:
    """Each new symbol and those before it in its own request, newest first.

    Args:
        symbols: int64 [1, N], the new symbols of all requests one after the other; then maybe padding.
        borders: int [R + 1], where each request begins and the last one ends. Requests that are padding have no symbols
            and come last.
        histories: int [width, R], what came before each request's new symbols, newest last.

    Returns:
        int64 [1, N, width + 1].
    """
    width, requests = histories.shape
    request = torch.arange(requests, device=symbols.device)
    token = torch.arange(symbols.shape[1], device=symbols.device)
    borders = borders.long()
    owner = torch.searchsorted(borders[1:], token, right=True).clamp(max=requests - 1)
    # One text, in which every request's history stands before its new symbols.
    place = token + (owner + 1) * width
    text = symbols.new_zeros(len(token) + requests * width)
    text[place] = symbols[0]
    text[(borders[:-1] + request * width)[:, None] + torch.arange(width, device=symbols.device)] = histories.T.long()
    return text[place[:, None] - torch.arange(width + 1, device=symbols.device)][None]


__all__ = ["ProcessorsAndHistories", "last_symbols", "request_windows"]
