"""The byte ids that a cache has seen, kept in it beside the keys and values.

One layer behind the decoder's own: whatever is done to a cache as a whole (`crop`, `reorder_cache`, choosing and
repeating rows, `reset`) is done to it, too. The model appends to it after the decoder ran, so that layers which a cache
creates as they are first written keep their indices.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .subword_expansion import align_right


class _BehindTheLastLayer:
    """An offloading cache that is through with its last layer fetches what comes behind: again its first layers."""

    layers: list[Any]

    def prefetch(self) -> None:
        for layer in self.layers:
            layer.prefetch()
            if not layer.is_sliding:
                return


class ByteHistory(_BehindTheLastLayer, DynamicLayer):
    """The history of a growing cache: every slot's symbol (see `subword_expansion.py`) as `keys`, int64 [B, 1, N, 1].

    Args:
        layers: the cache's layers.
        width: how many symbols `tail` returns.
    """

    def __init__(self, layers: list[Any], width: int) -> None:
        super().__init__()
        self.layers, self.width = layers, width
        self.padded = False

    def append(self, symbols: Tensor, padded: bool = False) -> None:
        """Add the symbols of new slots, int64 [B, N], some of which may be `padded`."""
        self.padded |= padded
        self.update(symbols[:, None, :, None], symbols.new_empty(symbols.shape[0], 1, symbols.shape[1], 0))

    def tail(self) -> Tensor | None:
        """The last real symbols of each row, int64 [B, width], newest last, 0 where there are fewer; None if empty."""
        if not self.get_seq_length():
            return None
        symbols = self.keys[:, 0, :, 0]
        if self.padded:
            return align_right(symbols, self.width)[0]
        recent = symbols[:, -self.width :]
        missing = self.width - recent.shape[1]
        return torch.nn.functional.pad(recent, (missing, 0)) if missing else recent


class StaticByteHistory(_BehindTheLastLayer, CacheLayerMixin):
    """The history of a static cache, which cannot be cropped: its tail alone, `keys` int64 [B, width], in one place.

    Args:
        layers, width: as in [`ByteHistory`].
    """

    keys: Tensor
    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, layers: list[Any], width: int) -> None:
        super().__init__()
        self.layers, self.width = layers, width

    def append(self, symbols: Tensor, padded: bool = False) -> None:
        """Add the symbols of new slots, int64 [B, N], some of which may be `padded`."""
        self.update(symbols, symbols, padded)

    def tail(self) -> Tensor | None:
        """The last real symbols of each row, int64 [B, width], newest last, 0 where there are fewer; None if empty."""
        return self.keys if self.is_initialized else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.keys = self.values = key_states.new_zeros(key_states.shape[0], self.width)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.keys)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, padded: bool = False) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        text = torch.cat((self.keys, key_states), dim=1)
        self.keys.copy_(align_right(text, self.width)[0] if padded else text[:, -self.width :])
        return self.keys, self.keys

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            self.keys.copy_(self.keys.index_select(0, beam_idx.to(self.device)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width + query_length, 0

    def get_seq_length(self) -> int:
        return 0  # it counts nothing

    def get_max_length(self) -> int:
        return -1


def byte_history(cache: Cache | None) -> ByteHistory | StaticByteHistory | None:
    """The history in a cache; None when there is none yet."""
    for layer in reversed(cache.layers if cache is not None else ()):
        if isinstance(layer, (ByteHistory, StaticByteHistory)):
            return layer
    return None


def add_byte_history(cache: Cache, width: int) -> ByteHistory | StaticByteHistory:
    """Put a history behind the layers of a cache, once these exist."""
    kind = StaticByteHistory if cache.is_compileable else ByteHistory
    history = kind(cache.layers, width)
    cache.layers.append(history)
    return history


__all__ = ["ByteHistory", "StaticByteHistory", "add_byte_history", "byte_history"]
