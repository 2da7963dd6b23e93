"""The tree cache with buffers of fixed size: fixed addresses for `torch.compile` and CUDA graphs.

As in `tree_cache.py` each row's tokens lie one behind the other and its next nodes are written behind them, but where
a row stands is a tensor, and a node sees all columns of the buffer through a mask. A sliding layer has a full buffer,
too: its mask goes by the difference of positions. The byte ids that subwords depend on are kept in the same columns.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from evabyte.eva_cache import KeptPaths

from .byte_history import ByteHistory
from .tree_cache import slot_mask


class PromptCache(DynamicCache):
    """What prompts are read into before they move to a [`StaticTreeCache`].

    Args:
        config: the model's configuration.
        max_cache_len: most tokens of a row that the static cache is to have room for, padding included.
        tree_nodes: nodes of the largest draft tree, the root included.
    """

    def __init__(self, config: Any, max_cache_len: int, tree_nodes: int) -> None:
        super().__init__(config=config)
        self.sizes = (max_cache_len, tree_nodes)


class StaticRows:
    """Where each row of a batch stands; shared by the layers of a `StaticTreeCache`.

    Attributes:
        lengths: slots of each row that are filled, padding at its start included.
        past: int64 [B, 1], the slot of each row's next node; written within compiled steps.
        padding: int64 [B, 1], how many slots are padding.
    """

    def __init__(self, lengths: list[int], padding: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.past = torch.tensor(lengths, device=device)[:, None]
        self.padding = torch.tensor(padding, device=device)[:, None]
        self.numbers = torch.arange(len(lengths), device=device)[:, None]
        for tensor in (self.past, self.padding, self.numbers):
            torch._dynamo.mark_static_address(tensor)

    def places(self, count: int) -> Tensor:
        """int64 [B, count], the slots that the next `count` nodes of each row go to."""
        return self.past + torch.arange(count, device=self.past.device)


class StaticTreeLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, [B, H_kv, columns, D]; a slot is its column.

    Args:
        prompts: a layer that holds the prompts; it is emptied.
        max_cache_len, tree_nodes: as in [`PromptCache`].
    """

    is_compileable = True
    is_sliding = False
    is_croppable = False
    origin = 0  # the column of a row's first slot

    def __init__(self, prompts: DynamicLayer, rows: StaticRows, max_cache_len: int, tree_nodes: int) -> None:
        super().__init__()
        self.rows, self.max_cache_len, self.tree_nodes = rows, max_cache_len, tree_nodes
        columns = buffer_columns(max_cache_len, tree_nodes)
        self.window: int | None = getattr(prompts, "sliding_window", None)
        self.keys, self.values = self._moved(prompts.keys, columns), self._moved(prompts.values, columns)
        prompts.keys = prompts.values = prompts.keys.new_empty(0)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def _moved(self, states: Tensor, columns: int) -> Tensor:
        end = self.rows.lengths[0]
        buffer = states.new_zeros(*states.shape[:2], columns, states.shape[3])
        buffer[:, :, end - states.shape[2] : end] = states  # of a sliding layer the last ones
        torch._dynamo.mark_static_address(buffer)
        return buffer

    @property
    def lengths(self) -> list[int]:
        return self.rows.lengths

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a layer is made from one that holds the prompts."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new nodes [B, H_kv, T, D] behind each row's tokens, uncounted; -> all columns."""
        places = self.rows.places(key_states.shape[2])
        self.keys[self.rows.numbers, :, places] = key_states.transpose(1, 2)
        self.values[self.rows.numbers, :, places] = value_states.transpose(1, 2)
        return self.keys, self.values

    def open_column(self, past: Tensor) -> Tensor:
        """int64 [B], the column behind the tokens of rows of these lengths."""
        return past

    def take_paths(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy columns `source` to columns `target`, both int64 [B, P], in each of the rows [B, 1]."""
        for states in (self.keys, self.values):
            states[rows, :, target] = states[rows, :, source]

    def check_nodes(self, nodes: int) -> None:
        """Refuse trees of so many nodes if there is no room for them."""
        if nodes > self.tree_nodes:
            raise ValueError(
                f"The static cache has room for draft trees of {self.tree_nodes} nodes, and this one has {nodes}: give "
                "the drafter `bounds` that say how large its trees are, or draft fewer."
            )

    def get_seq_length(self) -> int:
        return max(self.rows.lengths)

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0


class StaticTreeHistory(ByteHistory):
    """The symbols (see `subword_expansion.py`) of all columns: int64 [B, width + columns], zeros in front.

    Args:
        prompts: the history of the prompts; it is emptied.
    """

    is_compileable = True

    def __init__(self, prompts: ByteHistory, rows: StaticRows, columns: int) -> None:
        super().__init__([], prompts.width)
        self.rows, read = rows, prompts.keys[:, 0, :, 0]
        self.symbols = torch.nn.functional.pad(read, (self.width, columns - read.shape[1]))
        torch._dynamo.mark_static_address(self.symbols)
        prompts.keys = prompts.values = prompts.keys.new_empty(0)

    def tail(self) -> Tensor:
        return self.symbols.gather(1, self.rows.places(self.width))  # that far in front of the columns

    def note(self, symbols: Tensor) -> None:
        """Write the symbols [B, T] of the new nodes."""
        self.symbols[self.rows.numbers, self.rows.places(symbols.shape[1]) + self.width] = symbols

    def take_paths(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """As `StaticTreeLayer.take_paths`."""
        self.symbols[rows, target + self.width] = self.symbols[rows, source + self.width]


class StaticTreeCache(Cache):
    """What compiled steps verify trees against, made of the cache that holds the prompts.

    Args:
        prompts: of full or sliding layers on one device; its content moves here.
        padding: per row, the slots of padding at its start.

    Raises:
        ValueError: for prompts longer than there is room for.
    """

    def __init__(self, prompts: PromptCache, padding: list[int]) -> None:
        self.most_tokens, self.source = prompts.sizes[0], prompts
        slots = prompts.get_seq_length()
        self.check_length(slots)
        self.rows = StaticRows([slots] * len(padding), padding, prompts.layers[0].keys.device)
        histories = [layer for layer in prompts.layers if type(layer) is ByteHistory]
        decoder = [layer for layer in prompts.layers if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)]
        self.histories = [
            StaticTreeHistory(history, self.rows, buffer_columns(*prompts.sizes)) for history in histories
        ]
        self.decoder_layers = [StaticTreeLayer(layer, self.rows, *prompts.sizes) for layer in decoder]
        super().__init__(layers=[*self.decoder_layers, *self.histories])

    def masks(self, ancestors: Tensor, depth: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The mask of the nodes for each kind of layer, see `slot_mask`: "full_attention", "sliding_attention"."""
        found: dict[str, Tensor] = {}
        for layer in self.decoder_layers:
            kind = "full_attention" if layer.window is None else "sliding_attention"
            if kind not in found:
                slots = torch.arange(layer.keys.shape[2], device=depth.device)
                rows = self.rows
                found[kind] = slot_mask(slots, rows.past, rows.padding, ancestors, depth, dtype, layer.window)
        return found

    def check_length(self, length: int) -> None:
        """Refuse a row of so many tokens if there is no room for it."""
        if length > self.most_tokens:
            raise ValueError(
                f"The static cache has room for {self.most_tokens} tokens a row, padding included, and {length} are "
                "needed: pass a larger `max_length` or `max_cache_len`."
            )

    def count(self, kept: KeptPaths) -> None:
        """Count kept nodes as tokens."""
        lengths = [length + count for length, count in zip(self.rows.lengths, kept.counts, strict=True)]
        self.check_length(max(lengths))
        self.rows.lengths = lengths

    def restore(self) -> Cache | None:
        """A dynamic cache of what has been counted; None for rows of unequal length."""
        if len(set(self.rows.lengths)) > 1:
            return None
        end = self.rows.lengths[0]
        histories = [layer for layer in self.source.layers if type(layer) is ByteHistory]
        decoder = [layer for layer in self.source.layers if type(layer) is not ByteHistory]
        for history, source in zip(self.histories, histories, strict=True):
            symbols = history.symbols[:, history.width : history.width + end]
            source.keys = symbols[:, None, :, None].clone()
            source.values = symbols.new_empty(*source.keys.shape[:3], 0)
        for layer, source in zip(self.decoder_layers, decoder, strict=True):
            begin = 0 if layer.window is None else max(0, end - layer.window + 1)
            source.keys, source.values = (each[:, :, begin:end].clone() for each in (layer.keys, layer.values))
            if layer.window is not None:
                source.cumulative_length = end
        restored = DynamicCache()
        restored.layers = self.source.layers
        return restored


def buffer_columns(max_cache_len: int, tree_nodes: int) -> int:
    """Columns of a layer's buffer: at most an eighth, or 64, more than needed, so that few graphs serve all lengths."""
    needed = max_cache_len + tree_nodes
    step = max(64, 1 << needed.bit_length() >> 4)
    return -(-needed // step) * step


def static_tree_cache_bytes(
    config: Any, batch_size: int, max_cache_len: int, tree_nodes: int, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Memory of a `StaticTreeCache` in bytes: keys and values of every layer, and the ids for the subwords.

    Args:
        config: the model's configuration.
        max_cache_len: most tokens of a row, padding included.
        tree_nodes: nodes of a row's draft tree, the root included.
    """
    columns = buffer_columns(max_cache_len, tree_nodes)
    states = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * columns * dtype.itemsize
    symbols = torch.int64.itemsize * (columns + config.expand_input_ids_maxlen) if config.expand_input_ids else 0
    return batch_size * (states + symbols)


__all__ = ["PromptCache", "StaticTreeCache", "buffer_columns", "static_tree_cache_bytes"]
