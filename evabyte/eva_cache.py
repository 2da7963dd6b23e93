"""The cache of one EVA layer: raw keys and values of the open window, summaries of the closed ones.

Each row of a batch has its own length; everything is addressed by it. Keys lie in one buffer around a fixed `origin`,

    [ free | newest summaries ... oldest summaries | tokens of the open window | free ]
                                                   ^ origin

so that what a query may see is one slice, without copying: softmax attention does not mind the order of its keys.
When a window is full its chunks are summarised in front of the older summaries and its raw tokens are set aside, so
that `crop` can open it again.
"""

from collections import deque
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .eva_attention import SequenceStates, Summarize, WindowStates
from .eva_layout import EvaLayout


class KeptPaths:
    """The nodes to keep of the draft trees written last, the same for all layers.

    Args:
        paths: per row the nodes of one path, root first; empty to keep nothing.

    Attributes:
        paths: as given.
        counts: nodes to keep per row.
        nodes: int64 [B, longest path].
        in_place: the nodes to keep stand first already.
        padding: None, or bool [B, longest path], True beyond a row's path.
    """

    def __init__(self, paths: list[list[int]]) -> None:
        self.paths = paths
        self.counts = [len(path) for path in paths]
        self.in_place = all(path == list(range(len(path))) for path in paths)

    @cached_property
    def nodes(self) -> Tensor:
        most = max(self.counts)
        return torch.tensor([path + [0] * (most - len(path)) for path in self.paths], dtype=torch.int64)

    @cached_property
    def padding(self) -> Tensor | None:
        most = max(self.counts)
        return torch.arange(most) >= torch.tensor(self.counts)[:, None] if min(self.counts) < most else None


class EvaCacheLayer(CacheLayerMixin):
    """Dynamic cache of one EVA layer; `DynamicCache(config=model.config)` makes one per decoder layer.

    Holds, per row at length N, less than two windows of raw keys and values (the open window and the last closed one,
    kept for `crop`) and N // chunk_size summaries, in a buffer at most twice as large.

    Raises:
        ValueError: from `crop`, when more is to be taken back than the layer kept.
    """

    _layer_type = "eva_attention"
    keys: Tensor
    values: Tensor
    dtype: torch.dtype
    device: torch.device
    window_size: int
    chunk_size: int
    is_croppable = True
    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]  # until the first update
        self.is_initialized = False
        self.lengths: tuple[int, ...] = ()
        self.slots = 0
        self.padding: Tensor | None = None  # bool [B, slots] on the host, once some slot was padding
        self.origin = 0
        self.closed_windows: list[deque[tuple[Tensor, Tensor]]] = []
        self.keeps_closed_windows = True

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def open_tokens(self) -> list[int]:
        """Per row, the raw tokens in the open window."""
        return [length % self.window_size for length in self.lengths]

    @property
    def summaries(self) -> list[int]:
        """Per row, the summaries of closed windows."""
        return [length // self.window_size * self.chunks_per_window for length in self.lengths]

    @property
    def chunks_per_window(self) -> int:
        return self.window_size // self.chunk_size

    @property
    def batch_size(self) -> int:
        return len(self.lengths) if self.lengths else -1

    def get_seq_length(self) -> int:
        """Slots seen so far, padding included, as `generate` counts."""
        return self.slots

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    # -- writing -------------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(batch, heads, 0, head_dim)
        self.values = value_states.new_zeros(batch, heads, 0, head_dim)
        self.lengths = (0,) * batch
        self.closed_windows = [deque() for _ in range(batch)]
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layout: EvaLayout,
        summarize: Summarize,
    ) -> tuple[WindowStates | SequenceStates, None]:
        """Store the new tokens and return what their queries may read.

        Args:
            key_states, value_states: [B, H, N, D], rotated.
            layout: where the tokens stand; draft trees are written behind the cached tokens but not counted until
                `commit`.
            summarize: turns keys and values [B, H, n * chunk_size, D] into summaries [B, H, n, D].

        Returns:
            the states, and None in place of separate values, since `Cache.update` hands on a pair.
        """
        self.window_size, self.chunk_size = layout.window_size, layout.chunk_size
        self.summarize = summarize
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if layout.tree is not None:
            return self._write_in_window(key_states, value_states, layout), None
        self._count_slots(layout)
        if not layout.crosses_window():
            states: WindowStates | SequenceStates = self._write_in_window(key_states, value_states, layout)
            self.lengths = layout.new_lengths
            self.close_full_windows(layout.past)
        elif layout.uniform:
            states = self._write_across_windows(key_states, value_states, layout)
        else:
            states = self._write_ragged(key_states, value_states, layout)
        return states, None

    def _write_in_window(self, keys: Tensor, values: Tensor, layout: EvaLayout) -> WindowStates:
        """Put new tokens behind each row's cached ones."""
        open_tokens, summaries = self.open_tokens, max(self.summaries)
        behind = max(open_tokens) + layout.length
        self._reserve(summaries, behind)
        self._detach_from_graph(keys)
        if len(set(open_tokens)) == 1:
            place = slice(self.origin + open_tokens[0], self.origin + behind)
            self.keys[:, :, place] = keys
            self.values[:, :, place] = values
        else:
            start = torch.tensor(open_tokens, device=keys.device)[:, None] + self.origin
            column = start + layout.written_at().to(keys.device)
            row = torch.arange(keys.shape[0], device=keys.device)[:, None]
            self.keys[row, :, column] = keys.transpose(1, 2)
            self.values[row, :, column] = values.transpose(1, 2)
        view = slice(self.origin - summaries, self.origin + behind)
        return WindowStates(self.keys[:, :, view], self.values[:, :, view])

    def _write_across_windows(self, keys: Tensor, values: Tensor, layout: EvaLayout) -> SequenceStates:
        """Prefill of rows that stand at the same position: close all windows that fill up, keep the rest as open."""
        cached, summaries = self.open_tokens[0], self.summaries[0]
        token_keys, token_values = keys, values
        if cached:
            open_window = slice(self.origin, self.origin + cached)
            token_keys = torch.cat((self.keys[:, :, open_window], keys), dim=2)
            token_values = torch.cat((self.values[:, :, open_window], values), dim=2)
        count = token_keys.shape[2]
        closing = count // self.window_size * self.window_size
        new_keys, new_values = self.summarize(token_keys[:, :, :closing], token_values[:, :, :closing])
        old = slice(self.origin - summaries, self.origin)
        summary_keys = torch.cat((self.keys[:, :, old], new_keys), dim=2)
        summary_values = torch.cat((self.values[:, :, old], new_values), dim=2)

        first_kept = 0 if self.record_past else closing - self.window_size
        for row, windows in enumerate(self.closed_windows):
            for start in range(first_kept, closing, self.window_size):
                window = slice(start, start + self.window_size)
                self._set_aside(windows, token_keys[row, :, window], token_values[row, :, window])
        self.lengths = layout.new_lengths
        self._reserve(summaries + new_keys.shape[2], count - closing)
        self._detach_from_graph(keys)
        front = slice(self.origin - summaries - new_keys.shape[2], self.origin - summaries)
        behind = slice(self.origin, self.origin + count - closing)
        self.keys[:, :, front], self.values[:, :, front] = self._newest_first(new_keys), self._newest_first(new_values)
        self.keys[:, :, behind], self.values[:, :, behind] = token_keys[:, :, closing:], token_values[:, :, closing:]
        return SequenceStates(
            summary_keys=summary_keys, summary_values=summary_values, token_keys=token_keys, token_values=token_values
        )

    def _write_ragged(self, keys: Tensor, values: Tensor, layout: EvaLayout) -> SequenceStates:
        """Prefill of rows that differ: each row keeps its last document; attention summarises group by group."""
        open_tokens, summaries = max(self.open_tokens), max(self.summaries)
        open_window = slice(self.origin, self.origin + open_tokens)
        old = slice(self.origin - summaries, self.origin)
        states = SequenceStates(
            summary_keys=self.keys[:, :, old].clone(),
            summary_values=self.values[:, :, old].clone(),
            token_keys=torch.cat((self.keys[:, :, open_window], keys), dim=2),
            token_values=torch.cat((self.values[:, :, open_window], values), dim=2),
        )
        self.lengths = layout.new_lengths
        last = {sequence.row: sequence for sequence in layout.sequences}
        self._reserve(max(self.summaries), max(self.open_tokens))
        self._detach_from_graph(keys)
        for row, sequence in last.items():
            slots = sequence.slots.to(keys.device) + open_tokens
            cached = sequence.past % self.window_size
            picked = torch.cat((torch.arange(cached, device=keys.device), slots))
            if not sequence.past:
                self.closed_windows[row].clear()
            self._refill_row(
                row,
                states.token_keys[row].index_select(1, picked),
                states.token_values[row].index_select(1, picked),
                sequence.past // self.window_size * self.chunks_per_window,
            )
        return states

    def _refill_row(self, row: int, keys: Tensor, values: Tensor, summaries: int) -> None:
        """Set a row's tokens from its window border on to `keys`, `values` [H, n, D], closing all full windows."""
        count = keys.shape[1]
        closing = count // self.window_size * self.window_size
        if closing:
            new_keys, new_values = self.summarize(keys[None, :, :closing], values[None, :, :closing])
            front = slice(self.origin - summaries - new_keys.shape[2], self.origin - summaries)
            self.keys[row, :, front] = self._newest_first(new_keys)[0]
            self.values[row, :, front] = self._newest_first(new_values)[0]
            for start in range(0 if self.record_past else closing - self.window_size, closing, self.window_size):
                window = slice(start, start + self.window_size)
                self._set_aside(self.closed_windows[row], keys[:, window], values[:, window])
        behind = slice(self.origin, self.origin + count - closing)
        self.keys[row, :, behind], self.values[row, :, behind] = keys[:, closing:], values[:, closing:]

    def close_full_windows(self, past: tuple[int, ...]) -> None:
        """After tokens were written behind the `past` ones: summarise the windows they filled, move the rest up."""
        for row, (before, after) in enumerate(zip(past, self.lengths, strict=True)):
            windows = after // self.window_size - before // self.window_size
            if windows:
                self._reserve(max(self.summaries), self.keys.shape[2] - self.origin)
                tokens = slice(self.origin, self.origin + before % self.window_size + after - before)
                summaries = before // self.window_size * self.chunks_per_window
                # Cloned, because attention still reads the buffer that is overwritten.
                self._detach_from_graph(self.keys)
                self._refill_row(row, self.keys[row, :, tokens].clone(), self.values[row, :, tokens].clone(), summaries)

    def commit(self, kept: KeptPaths) -> None:
        """Keep one path of each draft tree written last, and forget the other nodes."""
        if max(kept.counts):
            past = self.lengths
            self.move(kept)
            self.count(kept)
            self.close_full_windows(past)

    def move(self, kept: KeptPaths) -> None:
        """Bring the nodes to keep directly behind each row's tokens."""
        if kept.in_place:
            return
        nodes, open_tokens, most = kept.nodes.to(self.keys.device), self.open_tokens, max(kept.counts)
        if len(open_tokens) == 1:
            start = self.origin + open_tokens[0]
            for states in (self.keys, self.values):
                states[:, :, start : start + most] = states.index_select(2, nodes[0] + start)
        else:
            start_of_row = torch.tensor(open_tokens, device=nodes.device)[:, None] + self.origin
            source, target = start_of_row + nodes, start_of_row + torch.arange(most, device=nodes.device)
            row = torch.arange(len(open_tokens), device=nodes.device)[:, None]
            for states in (self.keys, self.values):
                states[row, :, target] = states[row, :, source]

    def count(self, kept: KeptPaths) -> None:
        """Count nodes that stand directly behind each row's tokens as cached."""
        self._append_padding(kept.padding, max(kept.counts))
        self.lengths = tuple(length + count for length, count in zip(self.lengths, kept.counts, strict=True))

    def _newest_first(self, summaries: Tensor) -> Tensor:
        """[B, H, n * chunks_per_window, D] with the order of the windows reversed."""
        return summaries.unflatten(2, (-1, self.chunks_per_window)).flip(2).flatten(2, 3)

    def _set_aside(self, windows: deque[tuple[Tensor, Tensor]], keys: Tensor, values: Tensor) -> None:
        """Remember the raw tokens of a window that closes, and of no earlier one unless the past is recorded."""
        if not self.record_past:
            windows.clear()
        if self.keeps_closed_windows:
            windows.append((keys.detach().clone(), values.detach().clone()))

    def _reserve(self, summaries: int, tokens: int) -> None:
        """Make room for so many summaries before the origin and tokens behind it; doubling makes copies rare."""
        behind = self.keys.shape[2] - self.origin
        if summaries <= self.origin and tokens <= behind:
            return
        new_origin = (
            self.origin if summaries <= self.origin else max(summaries, 2 * self.origin, self.chunks_per_window)
        )
        new_behind = behind if tokens <= behind else max(tokens, min(2 * behind, self.window_size), 16)
        more = (0, 0, new_origin - self.origin, new_behind - behind)
        self.keys = torch.nn.functional.pad(self.keys, more)
        self.values = torch.nn.functional.pad(self.values, more)
        self.origin = new_origin

    def _detach_from_graph(self, states: Tensor) -> None:
        """When gradients are recorded, write into a copy: the buffer may be saved for an earlier call's backward."""
        if torch.is_grad_enabled() and (states.requires_grad or self.keys.requires_grad):
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def _count_slots(self, layout: EvaLayout) -> None:
        self._append_padding(None if layout.valid is None else ~layout.valid, layout.length)

    def _append_padding(self, padding: Tensor | None, count: int) -> None:
        """Count `count` slots more; `padding` bool [B, count] marks those that hold nothing."""
        if self.padding is not None or padding is not None:
            before = (
                self.padding
                if self.padding is not None
                else torch.zeros(len(self.lengths), self.slots, dtype=torch.bool)
            )
            after = padding if padding is not None else torch.zeros(len(self.lengths), count, dtype=torch.bool)
            self.padding = torch.cat((before, after), dim=1)
        self.slots += count

    # -- going back ----------------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Set aside every window that closes until the next `crop`, which may then reach back across all of them."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` slots of every row, as if they had never been seen.

        Args:
            tokens_to_remove: zero or negative, as transformers' caches take it. Removing a whole window's worth is
                always possible; more only as far as windows were set aside (see `activate_past_recording`).

        Raises:
            ValueError: for a positive number, and when the cache did not keep what would be needed.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` takes minus the number of tokens to remove, got {tokens_to_remove}; pass a number <= 0."
            )
        removed = min(-tokens_to_remove, self.slots)
        if removed and self.is_initialized:
            rows = len(self.lengths)
            real = [removed] * rows
            if self.padding is not None:
                real = (~self.padding[:, self.slots - removed :]).sum(-1).tolist()
                self.padding = self.padding[:, : self.slots - removed]
            lengths = tuple(length - count for length, count in zip(self.lengths, real, strict=True))
            self._check_kept(lengths)
            for row in range(rows):
                self._reopen(row, lengths[row])
            self.lengths = lengths
            self.slots -= removed
        if self.record_past:
            for windows in self.closed_windows:
                while len(windows) > 1:
                    windows.popleft()

    def _check_kept(self, lengths: tuple[int, ...]) -> None:
        for row, (old, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            reopened = old // self.window_size - new // self.window_size
            if new % self.window_size and reopened > len(self.closed_windows[row]):
                raise ValueError(
                    f"`crop` cannot go back from {old} to {new} tokens in row {row}: the raw keys of the window that "
                    f"would be open again were summarised and dropped (window_size {self.window_size}). Call "
                    "`activate_past_recording()` on the cache beforehand, or `reset()` it and run the prompt again."
                )

    def _reopen(self, row: int, length: int) -> None:
        """Bring a row's window that contains position `length` back as the open one."""
        windows, reopened = self.closed_windows[row], self.lengths[row] // self.window_size - length // self.window_size
        if not reopened:
            return
        for _ in range(min(reopened, len(windows))):
            keys, values = windows.pop()
        count = length % self.window_size
        if count:  # then the window was set aside, as `_check_kept` made sure
            self._reserve(self.origin, count)
            place = slice(self.origin, self.origin + count)
            self.keys[row, :, place], self.values[row, :, place] = keys[:, :count], values[:, :count]

    def reset(self) -> None:
        """Forget everything; the next update starts anew."""
        self._forget()

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _take_rows(self, rows: Tensor) -> None:
        if not self.is_initialized:
            return
        index = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        order = rows.tolist()
        self.lengths = tuple(self.lengths[row] for row in order)
        self.closed_windows = [self.closed_windows[row].copy() for row in order]
        if self.padding is not None:
            self.padding = self.padding[rows.cpu()]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row b continue what row `beam_idx[b]` was."""
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._take_rows(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows: int64 indices, or a bool mask over the rows."""
        self._take_rows(torch.arange(len(self.lengths))[indices.cpu()])

    def append_rows(self, others: Sequence["EvaCacheLayer"]) -> None:
        """Let the rows of other layers follow this one's.

        Where padding stood is forgotten (all of it is taken to stand in front), and so are the raw tokens of closed
        windows, from here on: a batch that rows join and leave is not cropped.

        Raises:
            ValueError: for layers that hold nothing yet, and those of fixed size.
        """
        layers = (self, *others)
        if not all(layer.is_initialized and not layer.is_compileable for layer in layers):
            raise ValueError(
                "`append_rows` joins layers of dynamic caches that hold tokens: run the model on each first."
            )
        origin = max(layer.origin for layer in layers)
        behind = max(layer.keys.shape[2] - layer.origin for layer in layers)
        room = [(0, 0, origin - layer.origin, behind + layer.origin - layer.keys.shape[2]) for layer in layers]
        pad = torch.nn.functional.pad
        self.keys = torch.cat([pad(layer.keys, more) for layer, more in zip(layers, room, strict=True)])
        self.values = torch.cat([pad(layer.values, more) for layer, more in zip(layers, room, strict=True)])
        self.origin = origin
        self.lengths = tuple(length for layer in layers for length in layer.lengths)
        self.slots = max(self.lengths)
        missing = self.slots - torch.tensor(self.lengths)[:, None]
        self.padding = torch.arange(self.slots) < missing if bool(missing.any()) else None
        self.closed_windows, self.keeps_closed_windows = [deque() for _ in self.lengths], False


def eva_layers(cache: Cache, num_layers: int) -> list[EvaCacheLayer]:
    """The EVA layers of a cache.

    Raises:
        ValueError: when the cache was not made for an EvaByte model.
    """
    layers = cache.layers
    if len(layers) != num_layers or not all(isinstance(layer, EvaCacheLayer) for layer in layers):
        raise ValueError(
            f"`past_key_values` ({type(cache).__name__}) does not hold EVA layers: create it with "
            "`DynamicCache(config=model.config)`, or leave it out."
        )
    return layers
