"""Drafters: what a byte-level model might write next, as trees.

A drafter sees the last forward's outputs and the bytes so far, and proposes a tree per row; it knows nothing of the
model, and whatever it proposes, the decoded bytes are the model's own. Any object with a `draft` method serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .byte_tree import PUBLISHED_TREES, ROOT, DraftTrees, TreeShape, placed_shape, published_tree


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may look at.

    Attributes:
        root: int64 [B], the byte emitted last, which the model has not read yet.
        head_logits: [B, heads, vocab], logits at the byte before the root of the heads that look beyond it: entry h
            predicts the byte h + 1 after the root. No heads for a model with one.
        texts: per row the ids so far, prompt first, root last, as lists on the host.
        rows: per row its number in the batch as it was passed; finished rows may have left.
        temperature: by which the heads' logits are to be divided before they rank drafts.
        cache: the run's cache, for drafters that run a part of the model themselves.
    """

    root: Tensor
    head_logits: Tensor
    texts: list[list[int]]
    rows: list[int]
    temperature: float = 1.0
    cache: Cache | None = None


@runtime_checkable
class Drafter(Protocol):
    """Proposes trees. A drafter that keeps state between steps goes by `DraftContext.rows`, and serves one run.

    It may have `resized(nodes)`, the same drafter with trees of another size, and `forget(row)`, which is called when a
    row will not come again.
    """

    def draft(self, context: DraftContext) -> DraftTrees:
        """One tree per row of `context.root`."""
        ...


class TreeBounds(NamedTuple):
    """How large the trees of a drafter are at most, for caches of fixed size.

    Attributes:
        nodes: of one row's tree, the root included.
        depth: of its deepest node.
    """

    nodes: int
    depth: int


DEFAULT_BOUNDS = TreeBounds(128, 127)


def tree_bounds(drafter: Drafter) -> TreeBounds:
    """A drafter's `bounds`, or what one without them may propose to a cache of fixed size."""
    return getattr(drafter, "bounds", DEFAULT_BOUNDS)


class Fill(Protocol):
    """Trees as `Drafter.draft` gives them, from what `DraftContext` describes under the same names.

    Made of tensor operations alone, and all trees have one size: this can be a part of a compiled step.
    """

    def __call__(self, root: Tensor, head_logits: Tensor, temperature: float | Tensor) -> DraftTrees: ...


@runtime_checkable
class TensorDrafter(Protocol):
    """A drafter of tensor operations alone. Hashable; equal drafters propose the same trees of the same size."""

    @property
    def bounds(self) -> TreeBounds:
        """The size of the trees."""
        ...

    def fill_on(self, device: torch.device, vocab_size: int) -> Fill:
        """What drafts, with whatever it needs on that device, from logits of so many ids."""
        ...


@dataclass(frozen=True)
class StaticDrafter:
    """A tree of one shape, filled with the most probable bytes of each head."""

    shape: TreeShape

    @property
    def bounds(self) -> TreeBounds:
        return TreeBounds(self.shape.nodes, self.shape.max_depth)

    def draft(self, context: DraftContext) -> DraftTrees:
        return placed_shape(self.shape, context.root.device)(context.root, context.head_logits)

    def fill_on(self, device: torch.device, vocab_size: int) -> Fill:
        return placed_shape(self.shape, device)


@cache
def _rank_pairs(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs (i, r) that can be among the best `width` sums a_i + b_r of sorted lists: (i + 1) * (r + 1) <= width."""
    i, r = torch.meshgrid(torch.arange(width), torch.arange(width), indexing="ij")
    keep = (i + 1) * (r + 1) <= width
    return i[keep].to(device), r[keep].to(device)


@dataclass(frozen=True)
class DynamicDrafter:
    """The `nodes` most probable nodes, by the product of the heads' probabilities along each path.

    The heads are independent given the text, so a path's probability is that product (as in EAGLE-2's dynamic trees,
    arXiv 2406.16858, where a draft model conditions on the path). A path is never more probable than its prefix, so
    the best nodes form a tree.
    """

    nodes: int

    @property
    def bounds(self) -> TreeBounds:
        return TreeBounds(self.nodes + 1, self.nodes)

    def draft(self, context: DraftContext) -> DraftTrees:
        fill = self.fill_on(context.root.device, context.head_logits.shape[-1])
        return fill(context.root, context.head_logits, context.temperature)

    def resized(self, nodes: int) -> "DynamicDrafter":
        """The same drafter of so many nodes."""
        return DynamicDrafter(nodes)

    def fill_on(self, device: torch.device, vocab_size: int) -> Fill:
        width = min(self.nodes, vocab_size)
        return BestNodes(self.nodes, width, *_rank_pairs(width, device))


@dataclass(frozen=True)
class BestNodes:
    """`DynamicDrafter` on one device.

    Attributes:
        nodes: how many to take.
        width: how many paths of each length can be among them.
        above, rank: int64 [pairs], `_rank_pairs` of the width.
    """

    nodes: int
    width: int
    above: Tensor
    rank: Tensor

    def __call__(self, root: Tensor, head_logits: Tensor, temperature: float | Tensor) -> DraftTrees:
        batch, depths = head_logits.shape[:2]
        device = root.device
        parents = torch.full((batch, 1), ROOT, device=device)
        if depths == 0:
            return DraftTrees(root[:, None], parents, 0)
        log_probs = (head_logits / temperature).log_softmax(-1)
        width, above, rank = self.width, self.above, self.rank
        best, ids = log_probs.topk(width, dim=-1)  # [B, depths, width]
        # Depth by depth the best paths of that length; `chosen` says which pair each consists of.
        gains = best[:, 1:].index_select(2, rank)  # [B, depths - 1, pairs]
        scores, chosen = [best[:, 0]], []
        for depth in range(depths - 1):
            level, pairs = (scores[-1].index_select(1, above) + gains[:, depth]).topk(width, dim=-1)
            scores.append(level)
            chosen.append(pairs)
        ranks = torch.arange(width, device=device).expand(batch, 1, -1)
        parent_rank = torch.zeros_like(ranks)
        if chosen:
            pairs = torch.stack(chosen, dim=1)
            ranks, parent_rank = torch.cat((ranks, rank[pairs]), dim=1), torch.cat((parent_rank, above[pairs]), dim=1)
        level_ids = ids.gather(2, ranks).flatten(1)
        # Of all levels the best; the stable order keeps a parent before its children, even at equal scores.
        order = torch.cat(scores, dim=1).sort(dim=-1, descending=True, stable=True).indices
        kept = order[:, : self.nodes]
        numbers = torch.arange(order.shape[1], device=device)
        node = torch.empty_like(order).scatter_(1, order, (numbers + 1).expand_as(order))
        parent_place = (numbers // width - 1).clamp(min=0) * width + parent_rank.flatten(1)
        parent = torch.where(numbers < width, 0, node.gather(1, parent_place))
        return DraftTrees(
            torch.cat((root[:, None], level_ids.gather(1, kept)), dim=1),
            torch.cat((parents, parent.gather(1, kept)), dim=1),
            depths,
        )


@dataclass
class LookupDrafter:
    """The continuation of the longest suffix of the text that occurred in it before (prompt lookup, on bytes).

    Strong where text is copied: code, edits, quotations. Costs no forward and no training.

    Attributes:
        length: bytes proposed at most.
        suffixes: lengths of suffix that are looked for, longest first.
    """

    length: int = 24
    suffixes: tuple[int, ...] = (24, 16, 12, 8, 6, 4)
    _seen: dict[int, list[dict[tuple[int, ...], int]]] = field(default_factory=dict)
    _read: dict[int, int] = field(default_factory=dict)

    @property
    def bounds(self) -> TreeBounds:
        return TreeBounds(self.length + 1, self.length)

    def continuation(self, row: int, text: list[int]) -> list[int]:
        """Up to `length` bytes that followed the longest known suffix of `text`."""
        tables = self._seen.setdefault(row, [{} for _ in self.suffixes])
        # Every suffix that ends before the last byte is known by the place that follows it.
        for end in range(self._read.get(row, 1), len(text)):
            for size, table in zip(self.suffixes, tables, strict=True):
                if size <= end:
                    table[tuple(text[end - size : end])] = end
        self._read[row] = max(len(text), 1)
        for size, table in zip(self.suffixes, tables, strict=True):
            if size <= len(text):
                place = table.get(tuple(text[-size:]))
                if place is not None:
                    return text[place : place + self.length]
        return []

    def forget(self, row: int) -> None:
        """Drop what is known of a row that has ended for good."""
        self._seen.pop(row, None)
        self._read.pop(row, None)

    def chains(self, context: DraftContext) -> tuple[Tensor, Tensor]:
        """Continuations int64 [B, L] and their lengths [B]."""
        found = [self.continuation(row, text) for row, text in zip(context.rows, context.texts, strict=True)]
        longest = max(map(len, found))
        padded = torch.tensor([bytes_ + [0] * (longest - len(bytes_)) for bytes_ in found], dtype=torch.int64)
        lengths = torch.tensor([len(bytes_) for bytes_ in found])
        return padded.to(context.root.device), lengths.to(context.root.device)

    def draft(self, context: DraftContext) -> DraftTrees:
        lone_roots = DraftTrees(context.root[:, None], torch.full_like(context.root[:, None], ROOT), 0)
        chains, lengths = self.chains(context)
        return lone_roots.with_chains(chains, lengths, source=0) if chains.shape[1] else lone_roots


@dataclass
class UnionDrafter:
    """One tree from several drafters, without siblings that carry the same byte.

    Attributes:
        first: the drafter whose tree is the base.
        second: a drafter of chains, added to it.
    """

    first: Drafter
    second: LookupDrafter

    @property
    def bounds(self) -> TreeBounds:
        first, second = tree_bounds(self.first), self.second.bounds
        return TreeBounds(first.nodes + second.nodes - 1, max(first.depth, second.depth))

    def resized(self, nodes: int) -> "UnionDrafter":
        """The same drafter, the tree from the heads being of so many nodes."""
        return UnionDrafter(resized(self.first, nodes), self.second)

    def forget(self, row: int) -> None:
        """Drop what is known of a row that has ended for good."""
        self.second.forget(row)

    def draft(self, context: DraftContext) -> DraftTrees:
        trees = self.first.draft(context)
        chains, lengths = self.second.chains(context)
        return trees.with_chains(chains, lengths, source=1) if chains.shape[1] else trees


def resized(drafter: Drafter, nodes: int) -> Drafter:
    """A drafter with trees of so many nodes, if it is one whose trees have no size of their own."""
    resize = getattr(drafter, "resized", None)
    return drafter if resize is None else resize(nodes)


def default_nodes(device: torch.device, batch: int) -> int:
    """Nodes of a dynamic tree. On an accelerator about 256 tokens a forward are nearly free; a CPU pays for each."""
    return max(8, min(64, 256 // batch)) if device.type != "cpu" else max(4, 8 // batch)


def make_drafter(name: str, max_depth: int, device: torch.device, batch: int, nodes: int | None = None) -> Drafter:
    """The drafter called `name`.

    Args:
        name: "chain", "tree31", "tree95", "dynamic" or "lookup", or one of the first four + "lookup", as in
            "dynamic+lookup".
        max_depth: how far ahead the heads draft.
        nodes: size of a dynamic tree, without the root; None to go by device and batch size.

    Raises:
        ValueError: for another name, or `nodes` with a drafter that has a size of its own.
    """
    base, _, other = name.partition("+")
    if nodes is not None and base != "dynamic":
        raise ValueError(f"`draft_nodes` is the size of a dynamic tree; leave it out with draft={name!r}.")
    if nodes is not None and nodes < 1:
        raise ValueError(f"`draft_nodes` must be at least 1, got {nodes}.")
    drafter: Drafter
    if base == "chain":
        drafter = StaticDrafter(TreeShape.chain(max_depth))
    elif base in PUBLISHED_TREES:
        drafter = StaticDrafter(published_tree(base).up_to(max_depth))
    elif base == "dynamic":
        drafter = DynamicDrafter(default_nodes(device, batch) if nodes is None else nodes)
    elif base == "lookup" and not other:
        return LookupDrafter()
    else:
        known = ", ".join(repr(known) for known in ("chain", *PUBLISHED_TREES, "dynamic", "lookup"))
        raise ValueError(f"`draft` must be {known}, one of these + 'lookup', or a drafter; got {name!r}.")
    if other == "lookup":
        return UnionDrafter(drafter, LookupDrafter())
    if other:
        raise ValueError(f"`draft` can add 'lookup' to a tree of the heads, as in 'dynamic+lookup'; got {name!r}.")
    return drafter


def choose_drafter(
    model: Any,
    batch: int,
    draft: str | Drafter | None,
    draft_nodes: int | None,
    medusa_choices: Sequence[Sequence[int]] | None,
) -> Drafter:
    """The drafter that a caller of `multi_byte_generate` asked for.

    Args:
        model: has `make_drafter`, and a configuration with `num_pred_heads` and `vocab_size`.
        batch: rows.
        draft, draft_nodes, medusa_choices: as in `multi_byte_generate`.

    Raises:
        ValueError: for a tree deeper or wider than the heads reach, and what is no drafter.
    """
    heads, vocab_size = model.config.num_pred_heads, model.config.vocab_size
    if medusa_choices is not None:
        if draft is not None or draft_nodes is not None:
            raise ValueError("Pass `draft` or `medusa_choices`, not both: each names a draft tree.")
        shape = TreeShape.from_paths(medusa_choices)
        if shape.max_depth > heads - 1:
            raise ValueError(
                f"`medusa_choices` is {shape.max_depth} deep, but a model with {heads} prediction heads can draft "
                f"{heads - 1} bytes ahead; leave out the longer paths."
            )
        if shape.max_rank >= vocab_size:
            raise ValueError(f"`medusa_choices` has rank {shape.max_rank}, but there are {vocab_size} ids.")
        return StaticDrafter(shape)
    if draft is None or isinstance(draft, str):
        drafter: Drafter = model.make_drafter(draft, batch, draft_nodes)
        return drafter
    if not isinstance(draft, Drafter):
        raise ValueError(f"`draft` must be a name or an object with a `draft` method, got {type(draft).__name__}.")
    return draft
