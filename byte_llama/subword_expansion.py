"""The longest subword that ends at each byte, looked up for all positions at once.

Ids are handled as symbols: the byte-vocabulary id plus 1, marked with `START` where a document begins, and 0 for what
is not there (padding, the time before the first id). A match reaches back over at most `maxlen` symbols of its own
document, and padding is passed over as if it were absent.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .subword_table import BUCKET_SHIFT, SLOT_SHIFT, SubwordTable

START = 1 << 40
_FEW = 4  # positions up to which a CPU is faster with a loop of its own than with some 25 tensor operations


@dataclass(frozen=True)
class TableSizes:
    """What a table's tensors need to be allocated: kept in a saved `config.json`, where the dictionary is not."""

    maxlen: int
    slots: int
    buckets: int
    num_symbols: int

    @classmethod
    def of(cls, table: SubwordTable) -> "TableSizes":
        return cls(len(table.multipliers) - 1, len(table.edges), len(table.displacements), table.num_symbols)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class SubwordExpansion(nn.Module):
    """Maps byte ids to the ids of the longest subwords ending there; see `subword_table.py` for the table.

    Exact, and a fixed number of tensor operations that never look at values on the host, so that it compiles with
    `fullgraph=True` and runs within CUDA graphs; but for the few new positions of a decoding step on CPU (`walk`). The
    tables are integer buffers, which casts of the model leave alone.

    Args:
        sizes: sizes of the tables.
        table: their content; None to leave them to a checkpoint.
    """

    multipliers: Tensor
    displacements: Tensor
    edges: Tensor
    outputs: Tensor

    def __init__(self, sizes: TableSizes, table: SubwordTable | None = None) -> None:
        super().__init__()
        self.maxlen, self.num_symbols = sizes.maxlen, sizes.num_symbols
        self.table = table
        self.register_buffer("multipliers", torch.zeros(sizes.maxlen + 1, dtype=torch.int64))
        self.register_buffer("displacements", torch.zeros(sizes.buckets, dtype=torch.int32))
        self.register_buffer("edges", torch.full((sizes.slots,), -1, dtype=torch.int32))
        self.register_buffer("outputs", torch.zeros(sizes.slots + 1, dtype=torch.int32))
        if table is not None:
            self.fill(table)

    @classmethod
    def from_table(cls, table: SubwordTable) -> "SubwordExpansion":
        """A module outside a model, ready for use."""
        return cls(TableSizes.of(table), table)

    def fill(self, table: SubwordTable) -> None:
        """Write the content of a table of these sizes into the buffers."""
        for name, tensor in self.named_buffers():
            init.copy_(tensor, torch.from_numpy(getattr(table, name)))

    def as_symbols(self, ids: Tensor, position_ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Ids as symbols, int64 [B, N].

        Args:
            ids: integers [B, N].
            position_ids: None, or int64 [B or 1, N]; a document starts wherever they are 0.
            real: None, or [B, N], zero at padding.
        """
        symbols = (ids.long() + 1).clamp_(max=self.num_symbols - 1)
        if position_ids is not None:
            symbols = torch.add(symbols, position_ids == 0, alpha=START)
        return symbols if real is None else symbols * real.bool()

    def forward(
        self, symbols: Tensor, past: Tensor | None = None, *, parents: Tensor | None = None, padded: bool = False
    ) -> Tensor:
        """Ids of the longest subwords, int64 [B, N]; 0 where no subword ends, and at padding.

        Args:
            symbols: int64 [B, N], of new ids (see `as_symbols`).
            past: None, or int64 [B, maxlen], the symbols before them, newest last and none of them padding in between.
            parents: None for a chain, or int64 [B or 1, N]: the new ids are nodes of trees, whose roots have parent -1
                and continue the past, and each is matched along its own ancestors (see `parents_of`).
            padded: whether some of the new symbols may be padding.

        Raises:
            ValueError: for parents of another shape, and for trees with padding.
        """
        if symbols.shape[1] == 0:
            return symbols
        if past is None:
            past = symbols.new_zeros(symbols.shape[0], self.maxlen)
        if parents is not None:
            if padded or parents.shape[1] != symbols.shape[1] or parents.shape[0] not in (1, symbols.shape[0]):
                raise ValueError(
                    f"`parents` must have the shape {tuple(symbols.shape)} of the ids, and these no padding; got "
                    f"{tuple(parents.shape)}{' and padding' if padded else ''}."
                )
            return self.lookup(_tree_windows(past, symbols, parents, self.maxlen + 1))
        text = torch.cat((past, symbols), dim=1)
        if symbols.numel() <= _FEW and not padded and _on_host(text):
            rows, new = text.tolist(), range(self.maxlen, text.shape[1])
            return symbols.new_tensor([[self.walk(row[end::-1]) for end in new] for row in rows])
        if not padded:
            return self._lookup_text(text)
        text, place = align_right(text, text.shape[1])
        subwords = self._lookup_text(text)
        place = place[:, self.maxlen :] - self.maxlen
        return subwords.gather(1, place.clamp(min=0)).masked_fill(symbols == 0, 0)

    def lookup(self, windows: Tensor) -> Tensor:
        """The longest subword at the start of each window.

        Args:
            windows: int64 [..., maxlen + 1] symbols, newest first. No subword is as long as a window, so that the walk
                through the trie always ends within it.

        Returns:
            int64 [...].
        """
        symbols = windows & (START - 1)
        return self._lookup(symbols, symbols.int(), windows < START)

    def _lookup_text(self, text: Tensor) -> Tensor:
        """The longest subwords at all but the first `maxlen` positions of a text [B, C]."""
        newest_first = text.flip(1)
        symbols = newest_first & (START - 1)
        # Windows overlap: what is done before they are cut is done once for each symbol, not `maxlen` times.
        tensors = (symbols, symbols.int(), newest_first < START)
        return self._lookup(*(each.unfold(1, self.maxlen + 1, 1) for each in tensors)).flip(1)

    def _lookup(self, symbols: Tensor, symbols32: Tensor, goes_on: Tensor) -> Tensor:
        """`lookup` of windows whose symbols are given without marks, as int64 and int32; False behind marked ones."""
        hashes = (symbols * self.multipliers).cumsum_(-1)
        # Slots and edges fit 32 bits, which halves the memory that passes through the processor's caches.
        slots = (hashes >> SLOT_SHIFT).int()
        hashes = (hashes >> BUCKET_SHIFT).bitwise_and_(len(self.displacements) - 1)
        slots = slots.add_(_take(self.displacements, hashes)).bitwise_and_(len(self.edges) - 1)
        path = nn.functional.pad(slots, (1, 0), value=len(self.edges))  # from the root on
        found = _take(self.edges, slots) == torch.add(symbols32, path[..., :-1], alpha=self.num_symbols)
        found[..., 1:] &= goes_on[..., :-1]
        # The first edge that is missing; in int32, as uint8 is miscompiled.
        depth = found.int().argmin(-1, keepdim=True)
        return _take(self.outputs, path.gather(-1, depth).squeeze(-1)).long()

    def walk(self, window: list[int]) -> int:
        """As `lookup`, of one window of at least `maxlen + 1` symbols, step by step in plain Python; for CPU alone."""
        edges, displacements = self.edges.numpy(), self.displacements.numpy()
        node, path_hash = len(edges), 0
        for symbol, multiplier in zip(window, self.multipliers.tolist(), strict=False):
            path_hash = _as_int64(path_hash + (symbol & (START - 1)) * multiplier)
            bucket = (path_hash >> BUCKET_SHIFT) & (len(displacements) - 1)
            slot = ((path_hash >> SLOT_SHIFT) + int(displacements[bucket])) & (len(edges) - 1)
            if edges[slot] != node * self.num_symbols + (symbol & (START - 1)):
                break
            node = slot
            if symbol >= START:
                break
        return int(self.outputs[node])

    def extra_repr(self) -> str:
        return f"maxlen={self.maxlen}, slots={self.edges.shape[0]}, num_symbols={self.num_symbols}"


def _as_int64(value: int) -> int:
    """The value as a tensor would hold it."""
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _on_host(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a graph that is being recorded."""
    recording = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(tensor) is not Tensor
    return tensor.device.type == "cpu" and not recording


def _take(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, by the kernel that is fastest on CPU."""
    return table.index_select(0, index.flatten()).view_as(index)


def align_right(symbols: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Each row's last `width` real symbols without the padding between them.

    Args:
        symbols: int64 [B, C].

    Returns:
        int64 [B, width], the newest last, 0 in front of shorter rows; int64 [B, C], the column where each symbol went,
        -1 where it did not.
    """
    real = symbols != 0
    counted = real.cumsum(-1)
    place = (width - 1 - (counted[:, -1:] - counted)).masked_fill(~real, -1).clamp(min=-1)
    aligned = symbols.new_zeros(symbols.shape[0], width + 1)  # column 0 takes what is left out
    return aligned.scatter(1, place + 1, symbols)[:, 1:], place


def _tree_windows(past: Tensor, nodes: Tensor, parents: Tensor, width: int) -> Tensor:
    """The symbols of each node's own path, int64 [B, N, width], newest first."""
    batch, before = past.shape[0], past.shape[1]
    text = torch.cat((past.new_zeros(batch, 1), past, nodes), dim=1)
    # Column 0 stands for the time before the past; from there one gets nowhere else.
    back = torch.arange(before + 1, device=past.device).sub(1).clamp(min=0).expand(batch, -1)
    step = torch.cat((back, (parents + before + 1).expand(batch, -1)), dim=1)
    path = torch.arange(before + 1, text.shape[1], device=past.device).expand(batch, -1)[..., None]
    while path.shape[-1] < width:  # `step` goes as far back as `path` is long
        path = torch.cat((path, step.gather(1, path.flatten(1)).view_as(path)), dim=-1)
        step = step.gather(1, step)
    path = path[..., :width]
    return text.gather(1, path.flatten(1)).view_as(path)


def parents_of(mask: Tensor) -> Tensor:
    """Parents int64 [B or 1, N], -1 for roots, of trees given by a mask of ancestors.

    Args:
        mask: bool [B or 1, N, N]; entry [b, i, j] says that node j is i or an ancestor of i. Ancestors stand before
            their descendants.
    """
    node = torch.arange(mask.shape[-1], device=mask.device)
    earlier = mask & (node < node[:, None])
    return torch.where(earlier, node, -1).amax(-1)


__all__ = ["SubwordExpansion", "TableSizes", "align_right", "parents_of"]
