"""A key-value cache on which draft trees can be verified: rows of unequal length, and nodes that are not kept.

Transformers' own layers hold rows of one length. When rows accept paths of different lengths they would need padding
after every step; here each row's tokens lie one behind the other, and a row's next nodes are written at its own length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from evabyte.eva_cache import KeptPaths
from evabyte.eva_layout import DraftTree, EvaLayout

from .byte_history import ByteHistory
from .eva_layers import is_eva


@dataclass
class TreeRows:
    """Where each row of a batch stands; shared by the layers of a `TreeCache`.

    Attributes:
        lengths: slots of each row that are filled, padding at its start included.
        padding: how many of them are padding.
        pending: nodes written behind every row's tokens by earlier calls, as a chain, and not committed.
    """

    lengths: list[int]
    padding: list[int]
    pending: int = 0
    _places: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    @property
    def even(self) -> bool:
        """Whether all rows are equally long, so that slices do."""
        return len(set(self.lengths)) == 1

    def places(self, count: int, device: torch.device) -> Tensor:
        """int64 [B, count], the slots that the next `count` nodes of each row go to."""
        key = (count, device)
        if key not in self._places:
            start = torch.tensor(self.lengths)[:, None] + self.pending
            self._places[key] = (start + torch.arange(count)).to(device)
        return self._places[key]

    def move(self, lengths: list[int], pending: int = 0) -> None:
        self.lengths, self.pending = lengths, pending
        self._places.clear()

    def positions(self, tree: DraftTree, device: torch.device) -> Tensor:
        """int64 [B, T], each node's position in its row's text."""
        return self._past(device) + tree.depth.to(device)

    def _past(self, device: torch.device) -> Tensor:
        past = [n - pads + self.pending for n, pads in zip(self.lengths, self.padding, strict=True)]
        return torch.tensor(past, device=device)[:, None]

    def mask(
        self, tree: DraftTree, dtype: torch.dtype, device: torch.device, first_slot: int, window: int | None
    ) -> Tensor:
        """What each node sees of the slots from `first_slot` on: the row's text, pending nodes, ancestors, itself.

        Args:
            window: None, or how many positions back a sliding layer looks, the node's own included.

        Returns:
            additive mask in `dtype`, [B, 1, T, slots].
        """
        slots = torch.arange(first_slot, max(self.lengths) + self.pending + tree.mask.shape[-1], device=device)
        padding = torch.tensor(self.padding, device=device)[:, None]
        ancestors, depth = tree.mask.to(device), tree.depth.to(device)
        return slot_mask(slots, self.places(1, device), padding, ancestors, depth, dtype, window)


def slot_mask(
    slots: Tensor,
    start: Tensor,
    padding: Tensor,
    ancestors: Tensor,
    depth: Tensor,
    dtype: torch.dtype,
    window: int | None,
) -> Tensor:
    """What each of T new nodes sees of S slots: its row's text, its ancestors, itself.

    Args:
        slots: int64 [S], their numbers.
        start: int64 [B, 1], the slot of each row's first new node; the others follow.
        padding: int64 [B, 1], how many slots at the row's start are padding.
        ancestors: bool [B or 1, T, T], see `DraftTree.mask`.
        depth: int64 [B or 1, T], of the nodes.
        window: None, or how many positions back a sliding layer looks, the node's own included.

    Returns:
        additive mask in `dtype`, [B, 1, T, S].
    """
    batch, nodes = start.shape[0], ancestors.shape[-1]
    behind = slots - start  # [B, S]; 0 at the row's first new node
    place = behind.clamp(0, nodes - 1)
    is_node = behind == place
    text = (slots >= padding) & (behind < 0)
    drafted = ancestors.expand(batch, -1, -1).gather(2, place[:, None].expand(-1, nodes, -1))
    visible = text[:, None] | (drafted & is_node[:, None])  # [B, T, S]
    if window is not None:
        position = start - padding + depth
        column = torch.where(is_node, position.gather(1, place), slots - padding)
        visible &= position[..., None] - column[:, None] < window
    mask = torch.zeros(visible.shape, dtype=dtype, device=slots.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


class TreeCacheLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, [B, H, slots, D] in a buffer that doubles; see the module's text.

    A layer that attends to a sliding window keeps what it held when the cache was made, and all that comes.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, rows: TreeRows, first_slot: int, window: int | None) -> None:
        super().__init__()
        self.keys, self.values, self.rows = keys, values, rows
        self.first_slot, self.window = first_slot, window
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a layer is made from one that holds the prompt."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new nodes [B, H, T, D] behind each row's tokens; -> all slots up to the longest row's last node."""
        rows, count = self.rows, key_states.shape[2]
        end = max(rows.lengths) + rows.pending + count - self.first_slot
        self._reserve(end)
        if rows.even:
            self.keys[:, :, end - count : end] = key_states
            self.values[:, :, end - count : end] = value_states
        else:
            row = torch.arange(len(rows.lengths), device=self.device)[:, None]
            place = rows.places(count, self.device) - self.first_slot
            self.keys[row, :, place] = key_states.transpose(1, 2)
            self.values[row, :, place] = value_states.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def commit(self, kept: KeptPaths, start: Tensor) -> None:
        """Move the nodes to keep behind each row's tokens, which end at slot `start` [B, 1]."""
        if kept.in_place:
            return
        start = start - self.first_slot
        nodes, most = kept.nodes.to(self.device), kept.nodes.shape[1]
        row = torch.arange(len(kept.counts), device=self.device)[:, None]
        target = start + torch.arange(most, device=self.device)
        for states in (self.keys, self.values):
            states[row, :, target] = states[row, :, start + nodes]

    def _reserve(self, slots: int) -> None:
        """Make room for so many slots; doubling makes copies rare."""
        missing = slots - self.keys.shape[2]
        if missing > 0:
            more = (0, 0, 0, max(missing, min(self.keys.shape[2], 4096)))
            self.keys = torch.nn.functional.pad(self.keys, more)
            self.values = torch.nn.functional.pad(self.values, more)

    def get_seq_length(self) -> int:
        return max(self.rows.lengths)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(self.rows.lengths) + query_length - self.first_slot, self.first_slot

    def select_rows(self, rows: Tensor) -> None:
        index = rows.to(self.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

    def append_rows(self, others: Sequence["TreeCacheLayer"], lengths: list[int]) -> None:
        """Let the rows of other layers follow this one's; `lengths` are all rows' then."""
        layers = (self, *others)
        first = min(layer.first_slot for layer in layers)
        if self.window is not None:
            first = max(first, min(lengths) - self.window + 1)  # no row looks back beyond it
        end = max(layer.first_slot + layer.keys.shape[2] for layer in layers)
        end = min(end, 2 * max(lengths))  # not what a much longer row that has left once needed
        # Columns that a row lacks in front are further back than it looks.
        more = [(0, 0, each.first_slot - first, end - each.first_slot - each.keys.shape[2]) for each in layers]
        pad = torch.nn.functional.pad
        self.keys = torch.cat([pad(layer.keys, room) for layer, room in zip(layers, more, strict=True)])
        self.values = torch.cat([pad(layer.values, room) for layer, room in zip(layers, more, strict=True)])
        self.first_slot = first


class TreeHistory(ByteHistory):
    """The byte ids before each row's next node, for the subword expansion of nodes; follows commits.

    Args:
        source: the history of the cache that held the prompts.
    """

    def __init__(self, source: ByteHistory) -> None:
        super().__init__([], source.width)
        tail = source.tail()
        self.recent = source.keys.new_zeros(source.keys.shape[0], self.width) if tail is None else tail
        self.pending = 0  # columns at the end of `recent` that are not committed
        self.written = self.recent[:, :0]  # the nodes written last
        self.committed: list[tuple[Tensor, list[int]]] = []

    def tail(self) -> Tensor:
        """As in the parent, pending nodes included."""
        return self.recent[:, -self.width :]

    def keep_pending(self, count: int) -> None:
        self.recent, self.pending = torch.cat((self.recent, self.written), dim=1), self.pending + count

    def forget_pending(self) -> None:
        self.recent, self.pending = self.recent[:, : self.recent.shape[1] - self.pending], 0

    def commit(self, kept: KeptPaths) -> None:
        """Append the nodes that are kept of those written last."""
        nodes = self.written.gather(1, kept.nodes.to(self.written.device))
        self.committed.append((nodes, kept.counts))
        if kept.padding is None:
            self.recent = torch.cat((self.recent, nodes), dim=1)[:, -self.width :]
            return
        text = torch.cat((self.recent[:, -self.width :], nodes), dim=1)
        end = torch.tensor(kept.counts, device=text.device)[:, None]
        self.recent = text.gather(1, end + torch.arange(self.width, device=text.device))

    def select_rows(self, rows: Tensor) -> None:
        index, order = rows.to(self.recent.device), rows.tolist()
        self.recent, self.written = self.recent.index_select(0, index), self.written.index_select(0, index)
        self.committed = [
            (nodes.index_select(0, index), [counts[row] for row in order]) for nodes, counts in self.committed
        ]

    def append_rows(self, others: Sequence["TreeHistory"]) -> None:
        self.recent = torch.cat([history.tail() for history in (self, *others)])
        self.written, self.committed = self.recent[:, :0], []

    def append_to(self, source: ByteHistory) -> None:
        """Add all that was committed, equally much in every row, to the history of the other cache."""
        if self.committed:
            rows = [
                torch.cat([nodes[row, : counts[row]] for nodes, counts in self.committed])
                for row in range(self.recent.shape[0])
            ]
            source.append(torch.stack(rows))


class TreeCache(Cache):
    """What `multi_byte_generate` verifies trees against, made of the cache that holds the prompts.

    Args:
        cache: a `DynamicCache` whose layers are full or sliding, or EVA's, which verify trees as they are.
        padding: per row, the slots of padding at its start.

    Raises:
        ValueError: for layers of other kinds.
    """

    def __init__(self, cache: Cache, padding: Sequence[int]) -> None:
        slots = cache.get_seq_length()
        self.rows = TreeRows([slots] * len(padding), list(padding))
        self.source: Cache | None = cache
        histories = [layer for layer in cache.layers if type(layer) is ByteHistory]
        decoder: list[Any] = [self._layer(layer) for layer in cache.layers if type(layer) is not ByteHistory]
        self.eva_layers = [layer for layer in decoder if is_eva(layer)]
        self.decoder_layers = [layer for layer in decoder if isinstance(layer, TreeCacheLayer)]
        self.histories = [TreeHistory(history) for history in histories]
        super().__init__(layers=[*decoder, *self.histories])

    def _layer(self, layer: CacheLayerMixin) -> CacheLayerMixin:
        if is_eva(layer):
            return layer
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"Multibyte decoding needs a `DynamicCache`; a layer of `past_key_values` is a {type(layer).__name__}. "
                "Leave `past_key_values` and `cache_implementation` out."
            )
        first_slot = self.rows.lengths[0] - layer.keys.shape[2]
        return TreeCacheLayer(layer.keys, layer.values, self.rows, first_slot, getattr(layer, "sliding_window", None))

    def masks(self, tree: DraftTree, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The mask of the nodes for each kind of layer: "full_attention", "sliding_attention"."""
        found: dict[str, Tensor] = {}
        for layer in self.decoder_layers:
            kind = "full_attention" if layer.window is None else "sliding_attention"
            if kind not in found:
                found[kind] = self.rows.mask(tree, dtype, device, layer.first_slot, layer.window)
        return found

    def eva_layout(self, tree: DraftTree) -> EvaLayout | None:
        """Where the nodes stand, for EVA layers; None when there are none."""
        if not self.eva_layers:
            return None
        layer = self.eva_layers[0]
        return EvaLayout.for_tree(tree, window_size=layer.window_size, chunk_size=layer.chunk_size, past=layer.lengths)

    def note(self, symbols: Tensor) -> None:
        """Remember the symbols [B, T] of the nodes just written, for the expansion of what follows them."""
        for history in self.histories:
            history.written = symbols

    def keep_pending(self, count: int) -> None:
        """Let the next call's nodes follow the `count` just written, which are a chain, without committing them.

        Raises:
            ValueError: with EVA layers, which take back what they hold only by windows.
        """
        if self.eva_layers:
            raise ValueError("Self-speculation (`draft='self'`) does not go with `eva_layers`: choose another draft.")
        self.rows.move(self.rows.lengths, self.rows.pending + count)
        for history in self.histories:
            history.keep_pending(count)

    def forget_pending(self) -> None:
        """Forget the nodes that `keep_pending` kept."""
        self.rows.move(self.rows.lengths)
        for history in self.histories:
            history.forget_pending()

    def commit(self, kept: KeptPaths) -> None:
        """Keep one path of each tree written last, and forget the other nodes."""
        for device, layers in self._by_device():
            start = self.rows.places(1, device)
            for layer in layers:
                layer.commit(kept, start)
        for eva_layer in self.eva_layers:
            eva_layer.commit(kept)
        for history in self.histories:
            history.commit(kept)
        self.rows.move([length + count for length, count in zip(self.rows.lengths, kept.counts, strict=True)])

    def _by_device(self) -> Iterator[tuple[torch.device, list[TreeCacheLayer]]]:
        for device in {layer.device for layer in self.decoder_layers}:
            yield device, [layer for layer in self.decoder_layers if layer.device == device]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, int64 indices."""
        for layer in self.decoder_layers:
            layer.select_rows(indices)
        for history in self.histories:
            history.select_rows(indices)
        for eva_layer in self.eva_layers:
            eva_layer.batch_select_indices(indices)
        kept = indices.tolist()
        self.rows.padding = [self.rows.padding[row] for row in kept]
        self.rows.move([self.rows.lengths[row] for row in kept])

    def append_rows(self, others: Sequence["TreeCache"]) -> None:
        """Let the rows of other caches of the same model follow this one's."""
        lengths = [length for cache in (self, *others) for length in cache.rows.lengths]
        for place, layer in enumerate(self.decoder_layers):
            layer.append_rows([cache.decoder_layers[place] for cache in others], lengths)
        for place, history in enumerate(self.histories):
            history.append_rows([cache.histories[place] for cache in others])
        for place, eva_layer in enumerate(self.eva_layers):
            eva_layer.append_rows([cache.eva_layers[place] for cache in others])
        self.source = None
        self.rows.padding = [pads for cache in (self, *others) for pads in cache.rows.padding]
        self.rows.move(lengths)

    def restore(self) -> Cache | None:
        """The cache this one was made of, holding what has been committed.

        None for rows of unequal length, and once rows of other caches have joined.
        """
        if self.source is None or not self.rows.even:
            return None
        histories = [layer for layer in self.source.layers if type(layer) is ByteHistory]
        decoder = [layer for layer in self.source.layers if type(layer) is not ByteHistory and not is_eva(layer)]
        for history, source in zip(self.histories, histories, strict=True):
            history.append_to(source)
        for layer, source in zip(self.decoder_layers, decoder, strict=True):
            end = self.rows.lengths[0] - layer.first_slot
            begin = 0 if layer.window is None else max(0, end - layer.window + 1)
            source.keys, source.values = layer.keys[:, :, begin:end], layer.values[:, :, begin:end]
            if layer.window is not None:
                source.cumulative_length = self.rows.lengths[0]
        return self.source
