"""Positions, not slots: where each new token of a call stands in its own sequence.

Windows and chunks are counted from each document's own first token. An [`EvaLayout`] is built once per forward on the
host, from the attention mask, the position ids and what the cache already holds, and shared by all layers. It is
`uniform` when all rows stand at the same position and nothing is padded or packed: then everything is slices.
Otherwise the rows are cut into `Sequence`s, which are attended to in `SequenceGroup`s of similar length.
"""

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sequence:
    """A run of new tokens of one document.

    Attributes:
        row: row of the batch.
        slots: int64 [n], where in the row the tokens stand.
        past: tokens of the same document that the cache already holds.
    """

    row: int
    slots: Tensor
    past: int

    @property
    def length(self) -> int:
        return self.past + self.slots.numel()


@dataclass(frozen=True)
class SequenceGroup:
    """Index tensors that bring G sequences of similar length side by side, each starting at a window border.

    Attributes:
        queries: int64 [G, M] into the flattened [B * N] new tokens.
        keys: int64 [G, M] into the flattened [B * (R + N)] cached and new tokens.
        result: int64 [n] into the flattened [G * M] results; destination: int64 [n] into [B * N], the same tokens.
        rows: int64 [G], row of each sequence.
        summaries: int64 [G], cached summaries each sequence may see, or None when no sequence has any.
    """

    queries: Tensor
    keys: Tensor
    result: Tensor
    destination: Tensor
    rows: Tensor
    summaries: Tensor | None


@dataclass(frozen=True)
class PackedSequences:
    """Where the sequences lie that start in this call, for kernels that address them in place.

    Attributes:
        table: int32 [G, 6], as `eva_kernels.py` describes it.
        chunk_starts: int32 [B, S], slot of the first token of each chunk that needs a summary, those of a row's
            sequences one behind the other; -1 where a row has fewer than S.
        longest: tokens of the longest sequence.
    """

    table: Tensor
    chunk_starts: Tensor
    longest: int


@dataclass(frozen=True)
class DraftTree:
    """New tokens that are nodes of draft trees, not a chain.

    Attributes:
        mask: bool [B or 1, N, N]: entry [b, i, j] says that j is i or an ancestor of i.
        depth: int64 [B or 1, N]; the root's is 0.
        max_depth: no node is deeper; known on the host, so that the device need not be asked.
    """

    mask: Tensor
    depth: Tensor
    max_depth: int

    @classmethod
    def from_mask(cls, mask: Tensor, max_depth: int | None = None) -> "DraftTree":
        """The trees of a mask; `max_depth` is read from it unless it is known."""
        depth = mask.sum(-1) - 1
        return cls(mask, depth, int(depth.max()) if max_depth is None else max_depth)


@dataclass
class EvaLayout:
    """Where the N new tokens of each of B rows stand; see the module's text.

    Attributes:
        length: N.
        past: per row, the number of tokens in the cache.
        valid: None, or bool [B, N] on the host, False at padding.
        sequences: the runs of new tokens, row by row; empty when `uniform`.
        tree: None, or the trees whose nodes the new tokens are; every root continues its row's cached sequence.
    """

    batch: int
    length: int
    window_size: int
    chunk_size: int
    past: tuple[int, ...]
    valid: Tensor | None = None
    sequences: list[Sequence] = field(default_factory=list)
    tree: DraftTree | None = None
    _groups: dict[torch.device, list[SequenceGroup]] = field(default_factory=dict)
    _packed: dict[torch.device, PackedSequences] = field(default_factory=dict)
    _bounds: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[torch.device, torch.dtype], Tensor | None] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        batch: int,
        length: int,
        *,
        window_size: int,
        chunk_size: int,
        past: SequenceOf[int] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> "EvaLayout":
        """Layout of a chain of `length` new tokens per row.

        Args:
            past: tokens per row that the cache holds; None for none.
            attention_mask: None, or [B, N] or [B, past slots + N], zero at padding; only its last N columns count.
            position_ids: None, or [B or 1, N]; a document starts wherever they are 0. All other values are left to the
                rotary embedding.
        """
        past = tuple(past) if past is not None else (0,) * batch
        layout = cls(batch, length, window_size, chunk_size, past)
        valid = None
        if attention_mask is not None:
            new_columns = attention_mask[:, attention_mask.shape[1] - length :]
            if not bool(new_columns.all()):
                valid = new_columns.bool().cpu()
        starts = None
        if position_ids is not None and length > 1:
            starts = (position_ids == 0).expand(batch, length)
            # A document that starts where its row starts, on an empty cache, needs no cutting.
            interior = starts[:, 1:] if not any(past) else starts
            starts = starts.cpu() if bool(interior.any()) else None
        if valid is None and starts is None and len(set(past)) == 1:
            return layout
        layout.valid = valid
        layout.sequences = _cut_into_sequences(batch, length, past, valid, starts)
        return layout

    @classmethod
    def for_tree(cls, tree: DraftTree, *, window_size: int, chunk_size: int, past: SequenceOf[int]) -> "EvaLayout":
        """Layout of draft nodes that continue each row's cached sequence, of `past` tokens per row."""
        return cls(len(past), tree.mask.shape[-1], window_size, chunk_size, tuple(past), tree=tree)

    @property
    def uniform(self) -> bool:
        """All rows stand at the same position, and no token is padding or starts another document."""
        return self.valid is None and not self.sequences and len(set(self.past)) <= 1

    @property
    def new_lengths(self) -> tuple[int, ...]:
        """Tokens per row that the cache holds after these: a row that starts another document keeps only that one.

        For trees, the most it may hold once a path is committed.
        """
        if self.tree is not None:
            return tuple(past + self.tree.max_depth + 1 for past in self.past)
        if self.valid is None and not self.sequences:
            return tuple(past + self.length for past in self.past)
        lengths = list(self.past)
        for sequence in self.sequences:
            lengths[sequence.row] = sequence.length
        return tuple(lengths)

    def crosses_window(self) -> bool:
        """Whether some row's new tokens reach past the window that is open in the cache, or start a document."""
        if self.tree is not None:
            reach = self.tree.max_depth + 1
            return any(past % self.window_size + reach > self.window_size for past in self.past)
        if self.uniform:
            return self.past[0] % self.window_size + self.length > self.window_size
        continued = {sequence.row: sequence.slots.numel() for sequence in self.sequences if sequence.past}
        return len(continued) < len(self.sequences) or any(
            self.past[row] % self.window_size + new > self.window_size for row, new in continued.items()
        )

    def positions(self, device: torch.device) -> Tensor:
        """int64 [B or 1, N], each token's position in its own document; 0 at padding."""
        if self.tree is not None:
            return self.tree.depth.to(device) + torch.tensor(self.past, device=device)[:, None]
        if self.uniform:
            return torch.arange(self.past[0], self.past[0] + self.length, device=device)[None]
        positions = torch.zeros(self.batch, self.length, dtype=torch.int64)
        for sequence in self.sequences:
            positions[sequence.row, sequence.slots] = torch.arange(sequence.past, sequence.length)
        return positions.to(device)

    def totals(self, device: torch.device) -> Tensor:
        """int64 [B or 1, N], the length that each token's document has reached at the end of this call."""
        if self.tree is not None:
            return self.positions(device) + 1
        if self.uniform:
            return torch.full((1, self.length), self.past[0] + self.length, device=device)
        totals = torch.ones(self.batch, self.length, dtype=torch.int64)
        for sequence in self.sequences:
            totals[sequence.row, sequence.slots] = sequence.length
        return totals.to(device)

    def documents(self) -> Tensor:
        """int64 [B, N] on the host, number of each token's document in its row; -1 at padding."""
        if self.uniform:
            return torch.zeros(self.batch, self.length, dtype=torch.int64)
        documents = torch.full((self.batch, self.length), -1, dtype=torch.int64)
        for number, sequence in enumerate(self.sequences):
            documents[sequence.row, sequence.slots] = number
        return documents

    def window_mask(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """What each new token sees of [S summaries | R cached tokens of the open window | N new tokens].

        For calls that stay within the open window; a row with fewer summaries has them at the end of the first part,
        and a row with fewer cached tokens has its new tokens directly behind them.

        Returns:
            additive mask (0 or -inf) of shape [B or 1, 1, N, S + R + N], or None when everything is visible.
        """
        key = (device, dtype)
        if key not in self._masks:
            self._masks[key] = self._build_window_mask(device, dtype)
        return self._masks[key]

    def _build_window_mask(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        same_past = len(set(self.past)) == 1
        if self.length == 1 and same_past and self.valid is None:
            return None
        pasts = self.past[:1] if same_past and self.valid is None else self.past
        chunks_per_window = self.window_size // self.chunk_size
        open_tokens = [past % self.window_size for past in pasts]
        summaries = [past // self.window_size * chunks_per_window for past in pasts]
        first_token, columns = max(summaries), max(summaries) + max(open_tokens) + self.length
        open_end = torch.tensor(open_tokens, device=device)[:, None] + first_token  # [rows, 1], behind the cached
        among_new = self._visible_among_new(device)  # [rows or 1, N, N]
        rows = max(len(pasts), among_new.shape[0])

        column = torch.arange(columns, device=device)
        cached = column < open_end
        if len(pasts) > 1:  # rows with fewer summaries have them at the end of the summaries
            cached &= column >= first_token - torch.tensor(summaries, device=device)[:, None]
        mask = torch.zeros(rows, self.length, columns, dtype=dtype, device=device)
        mask.masked_fill_(~cached[:, None], float("-inf"))
        new_columns = (open_end + torch.arange(self.length, device=device))[:, None]  # [rows, 1, N]
        hidden = torch.zeros(among_new.shape, dtype=dtype, device=device).masked_fill_(~among_new, float("-inf"))
        mask.scatter_(2, new_columns.expand(rows, self.length, -1), hidden.expand(rows, -1, -1))
        return mask[:, None]

    def window_bounds(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`window_mask` as a kernel reads it.

        Returns:
            int32 [B], the first column that each row sees; int32 [B], the column of its first new token; uint8
            [B or 1, N, N], which of the new tokens each new token sees.
        """
        if device not in self._bounds:
            chunks_per_window = self.window_size // self.chunk_size
            summaries = [past // self.window_size * chunks_per_window for past in self.past]
            ends = [max(summaries) + past % self.window_size for past in self.past]
            first = torch.tensor([max(summaries) - count for count in summaries], dtype=torch.int32, device=device)
            open_end = torch.tensor(ends, dtype=torch.int32, device=device)
            self._bounds[device] = (first, open_end, self._visible_among_new(device).to(torch.uint8).contiguous())
        return self._bounds[device]

    def _visible_among_new(self, device: torch.device) -> Tensor:
        """bool [rows or 1, N, N]: which of the new tokens, in the order they are written, each new token sees."""
        if self.tree is not None:
            return self.tree.mask.to(device)
        chain = torch.ones(self.length, self.length, dtype=torch.bool, device=device).tril_()[None]
        if self.valid is None:
            return chain
        place = self.written_at().to(device)[:, :, None].expand(-1, -1, self.length)
        return chain.expand(self.batch, -1, -1).gather(1, place)

    def written_at(self) -> Tensor:
        """int64 [B, N] on the host: place of each new token behind the cached ones, real tokens before padding."""
        if self.valid is None:
            return torch.arange(self.length).expand(self.batch, -1)
        real = self.valid.to(torch.int64)
        return torch.where(self.valid, real.cumsum(-1) - 1, real.sum(-1, keepdim=True) + (1 - real).cumsum(-1) - 1)

    def groups(self, device: torch.device) -> list[SequenceGroup]:
        """The sequences in groups of similar length, for `grouped_attention`."""
        if device not in self._groups:
            open_tokens = max(past % self.window_size for past in self.past)
            stride = open_tokens + self.length
            by_size = defaultdict(list)
            for sequence in self.sequences:
                by_size[(bool(sequence.past), self._aligned_length(sequence).bit_length())].append(sequence)
            self._groups[device] = [self._group(members, open_tokens, stride, device) for members in by_size.values()]
        return self._groups[device]

    @property
    def in_place(self) -> bool:
        """Whether every sequence starts in this call and its tokens lie one behind the other."""
        return not any(self.past) and all(
            int(sequence.slots[-1]) - int(sequence.slots[0]) == sequence.length - 1 for sequence in self.sequences
        )

    def packed(self, device: torch.device) -> PackedSequences:
        """The sequences of a layout that is `in_place`."""
        if device not in self._packed:
            table, starts = [], [torch.zeros(0, dtype=torch.int64) for _ in range(self.batch)]
            for sequence in self.sequences:
                row, slot = sequence.row, int(sequence.slots[0])
                table.append([row, slot, sequence.length, starts[row].numel(), 0, 0])
                closed = (sequence.length - 1) // self.window_size * self.window_size
                starts[row] = torch.cat((starts[row], torch.arange(slot, slot + closed, self.chunk_size)))
            self._packed[device] = PackedSequences(
                torch.tensor(table, dtype=torch.int32, device=device).view(-1, 6),
                nn.utils.rnn.pad_sequence(starts, batch_first=True, padding_value=-1).to(device, torch.int32),
                max((sequence.length for sequence in self.sequences), default=0),
            )
        return self._packed[device]

    def _aligned_length(self, sequence: Sequence) -> int:
        """Tokens of a sequence from the border of the window in which its new tokens begin."""
        return sequence.past % self.window_size + sequence.slots.numel()

    def _group(self, members: list[Sequence], open_tokens: int, stride: int, device: torch.device) -> SequenceGroup:
        longest = max(map(self._aligned_length, members))
        # Places that no token fills repeat some other token: causality keeps them out of sight of the real ones.
        queries = torch.zeros(len(members), longest, dtype=torch.int64)
        keys = torch.zeros(len(members), longest, dtype=torch.int64)
        result, destination = [], []
        for place, sequence in enumerate(members):
            cached, end = sequence.past % self.window_size, self._aligned_length(sequence)
            new_tokens = sequence.row * self.length + sequence.slots
            queries[place, cached:end] = new_tokens
            keys[place, :cached] = sequence.row * stride + torch.arange(cached)
            keys[place, cached:end] = sequence.row * stride + open_tokens + sequence.slots
            result.append(place * longest + torch.arange(cached, end))
            destination.append(new_tokens)
        summaries = [sequence.past // self.window_size * (self.window_size // self.chunk_size) for sequence in members]
        return SequenceGroup(
            queries.to(device),
            keys.to(device),
            torch.cat(result).to(device),
            torch.cat(destination).to(device),
            torch.tensor([sequence.row for sequence in members], device=device),
            torch.tensor(summaries, device=device) if any(summaries) else None,
        )


def _cut_into_sequences(
    batch: int, length: int, past: SequenceOf[int], valid: Tensor | None, starts: Tensor | None
) -> list[Sequence]:
    """Cut each row's real tokens at the starts of documents; the first run continues the cache unless it starts one."""
    sequences = []
    every_slot = torch.arange(length)
    for row in range(batch):
        slots = every_slot if valid is None else valid[row].nonzero().flatten()
        if slots.numel() == 0:
            continue
        borders = [] if starts is None else starts[row, slots].nonzero().flatten().tolist()
        continues = past[row] > 0 and (not borders or borders[0] > 0)
        cuts = sorted({0, *borders, slots.numel()})
        for begin, end in pairwise(cuts):
            sequences.append(Sequence(row, slots[begin:end], past[row] if continues and begin == 0 else 0))
    return sequences
