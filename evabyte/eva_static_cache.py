"""A cache of EVA layers whose memory is taken once: fixed addresses for `torch.compile` and CUDA graphs.

It is the buffer of `EvaCacheLayer` at its full size,

    [ room for all summaries | window_size - 1 tokens of the open window | nodes of one draft tree ]
                             ^ origin

so that eager calls (prefill, window borders) go on working through the inherited code, and a compiled step writes and
reads the same buffer at columns that it computes from a `StaticLayout`.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache

from .eva_attention import SequenceStates, Summarize, WindowStates
from .eva_cache import EvaCacheLayer, KeptPaths
from .eva_layout import EvaLayout
from .eva_static_layout import StaticLayout

COLUMNS_MULTIPLE = 8  # fused attention reads masks whose rows begin at multiples of 16 bytes


def buffer_columns(max_cache_len: int, tree_nodes: int, window_size: int, chunk_size: int) -> tuple[int, int]:
    """Columns of a layer's buffer before its origin, and altogether."""
    origin = max_cache_len // window_size * (window_size // chunk_size)
    columns = origin + window_size - 1 + tree_nodes
    return origin, -(-columns // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE


def static_cache_bytes(
    config: Any, batch_size: int, max_cache_len: int, tree_nodes: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Memory of an `EvaStaticCache` in bytes: layers * 2 * batch * hidden_size * columns * bytes per number.

    Args:
        config: the model's configuration.
        tree_nodes: nodes of a row's draft tree, the root included; 1 to decode byte by byte.
    """
    columns = buffer_columns(max_cache_len, tree_nodes, config.window_size, config.chunk_size)[1]
    numbers = config.num_hidden_layers * 2 * batch_size * config.num_attention_heads * columns * config.head_dim
    return numbers * dtype.itemsize


class EvaStaticCacheLayer(EvaCacheLayer):
    """An `EvaCacheLayer` of fixed size.

    The raw tokens of a window that closes are kept for `crop` only once `activate_past_recording` was called, and take
    memory of their own then.

    Args:
        max_cache_len: most tokens of a row.
        tree_nodes: nodes of the largest draft tree, the root included.
        window_size, chunk_size: the model's; by default learned from the first call.

    Raises:
        ValueError: before anything is written, for more tokens or nodes than there is room for; and for another number
            of rows.
    """

    # By inheritance it would take the dynamic layer's place; it is registered below.
    _layer_type: str | None = None  # type: ignore[assignment]
    is_compileable = True

    def __init__(
        self,
        max_cache_len: int,
        tree_nodes: int = 1,
        window_size: int | None = None,
        chunk_size: int | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__()
        self.max_cache_len, self.tree_nodes = max_cache_len, tree_nodes
        self.supports_early_init = window_size is not None and chunk_size is not None
        if window_size is not None and chunk_size is not None:
            self.window_size, self.chunk_size = window_size, chunk_size

    def get_max_length(self) -> int:
        return self.max_cache_len

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads, _, head_dim = key_states.shape
        sizes = (self.max_cache_len, self.tree_nodes, self.window_size, self.chunk_size)
        self.origin, columns = buffer_columns(*sizes)
        self.keys = key_states.new_zeros(batch, heads, columns, head_dim)
        self.values = value_states.new_zeros(batch, heads, columns, head_dim)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layout: EvaLayout | StaticLayout,
        summarize: Summarize,
    ) -> tuple[WindowStates | SequenceStates, None]:
        """As in the parent; under a `StaticLayout` the tokens are written but not counted until `count`."""
        if isinstance(layout, StaticLayout):
            self.keys[layout.rows, :, layout.places] = key_states.transpose(1, 2)
            self.values[layout.rows, :, layout.places] = value_states.transpose(1, 2)
            return WindowStates(self.keys, self.values), None
        self._check_room(layout)
        return super().update(key_states, value_states, layout, summarize)

    def open_column(self, past: Tensor) -> Tensor:
        """int64 [B], the column behind the tokens of rows of these lengths, where draft trees begin."""
        return self.origin + past % self.window_size

    def take_paths(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy columns `source` to columns `target`, both int64 [B, P], in each of the rows [B, 1]."""
        for states in (self.keys, self.values):
            states[rows, :, target] = states[rows, :, source]

    def count(self, kept: KeptPaths) -> None:
        self.check_length(max(length + count for length, count in zip(self.lengths, kept.counts, strict=True)))
        super().count(kept)

    def check_length(self, length: int) -> None:
        """Refuse a row of so many tokens if there is no room for it."""
        if length > self.max_cache_len:
            raise ValueError(
                f"The static cache has room for {self.max_cache_len} tokens a row, and {length} are needed: make it "
                "with a larger `max_cache_len` (in `generate`, a larger `max_length` or `max_cache_len`)."
            )

    def check_nodes(self, nodes: int) -> None:
        """Refuse trees of so many nodes if there is no room for them."""
        if nodes > self.tree_nodes:
            raise ValueError(
                f"The static cache has room for draft trees of {self.tree_nodes} nodes, and this one has {nodes}: make "
                f"it with `tree_nodes={nodes}`, or draft fewer."
            )

    def _check_room(self, layout: EvaLayout) -> None:
        if layout.tree is not None:
            self.check_nodes(layout.length)
        else:
            self.check_length(max(layout.new_lengths))

    def _reserve(self, summaries: int, tokens: int) -> None:
        """Nothing to do: there is room for all that `_check_room` lets pass."""

    def _set_aside(self, windows: deque[tuple[Tensor, Tensor]], keys: Tensor, values: Tensor) -> None:
        if self.record_past:
            super()._set_aside(windows, keys, values)

    def reset(self) -> None:
        """Forget everything; the buffer stays."""
        if self.is_initialized:
            self.lengths, self.slots, self.padding = (0,) * len(self.lengths), 0, None
            self.closed_windows = [deque() for _ in self.lengths]

    def _take_rows(self, rows: Tensor) -> None:
        if not self.is_initialized:
            return
        if rows.numel() != len(self.lengths):
            raise ValueError(
                f"A static cache keeps its {len(self.lengths)} rows, and {rows.numel()} are asked for: use a "
                "`DynamicCache`, or make a new static one."
            )
        keys, values = self.keys, self.values
        super()._take_rows(rows)
        keys.copy_(self.keys)
        values.copy_(self.values)
        self.keys, self.values = keys, values


# The layers that `StaticCache(config=model.config, ...)` makes. It passes them `max_cache_len` alone.
STATIC_LAYER_TYPE_MAPPING["eva_attention"] = EvaStaticCacheLayer


class EvaStaticCache(Cache):
    """An EvaByte model's cache of fixed size; `generate(cache_implementation="static")` makes one.

    Its memory is `static_cache_bytes(...)`, taken at the first call.

    Args:
        config: the model's configuration.
        max_cache_len: most tokens of a row.
        tree_nodes: nodes of the largest draft tree, the root included; 1 to decode byte by byte.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(self, config: Any, max_cache_len: int, tree_nodes: int = 1) -> None:
        for name, size in (("max_cache_len", max_cache_len), ("tree_nodes", tree_nodes)):
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        sizes = {"window_size": config.window_size, "chunk_size": config.chunk_size}
        layers = [EvaStaticCacheLayer(max_cache_len, tree_nodes, **sizes) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=layers)


def static_layers(cache: Any) -> list[EvaStaticCacheLayer]:
    """The layers of a cache if all of them are static EVA layers, else an empty list."""
    layers = getattr(cache, "layers", ())
    return list(layers) if layers and all(type(layer) is EvaStaticCacheLayer for layer in layers) else []


def reserve_nodes(cache: Any, nodes: int) -> None:
    """Make a cache that is not in use yet large enough for trees of so many nodes.

    Raises:
        ValueError: for a static cache that holds something and has less room.
    """
    for layer in static_layers(cache):
        if layer.is_initialized:
            layer.check_nodes(nodes)
        layer.tree_nodes = max(layer.tree_nodes, nodes)


def count_in_all(layers: Sequence[EvaStaticCacheLayer], kept: KeptPaths) -> bool:
    """Count written nodes as cached in all layers, and summarise the windows they fill.

    Returns:
        whether any window was filled.
    """
    first, past = layers[0], layers[0].lengths
    first.count(kept)
    for layer in layers[1:]:
        layer.lengths, layer.slots, layer.padding = first.lengths, first.slots, first.padding
    window = first.window_size
    closed = any(old // window < new // window for old, new in zip(past, first.lengths, strict=True))
    if closed:
        for layer in layers:
            layer.close_full_windows(past)
    return closed
