"""Draft trees: several continuations of the same text, verified in one forward.

Node 0 is the root, the byte that was emitted last and that the model has not read yet; a node at depth d drafts the
d-th byte after it. Parents come before their children.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

ROOT, ABSENT = -1, -2  # what stands in `parents` for the root, and for a place that no node fills

Path = tuple[int, ...]

# Children counts of the trees published with EvaByte, per depth, node by node in breadth-first order; missing counts
# are 0.
PUBLISHED_TREES = {
    "tree95": (
        (10,),
        (10, 8, 2, 2, 1, 1),
        (10, 4, 2, 1, 0, 0, 0, 0, 0, 0, 2, 1, 1, 0, 0, 0, 0, 0, 1),
        (8, 2, 2, 1, 0, 0, 0, 0, 0, 0, 1),
        (6, 2, 1, 1),
        (4, 2, 1, 1),
        (4, 2, 1),
    ),
    "tree31": ((4,), (3, 2, 1, 1), (3, 2, 1, 1), (2, 1, 1), (2, 1), (2, 1), (2, 1)),
}


@dataclass(frozen=True)
class DraftTrees:
    """One tree of bytes per row.

    Attributes:
        ids: int64 [B, T], byte id of every node; column 0 is the root.
        parents: int64 [B or 1, T], node number of every node's parent; `ROOT` at column 0, `ABSENT` where a row has no
            node (its id is any valid one, and nothing can step to it).
        max_depth: no node is deeper.
        sources: None, or which drafter proposed each node, int64 [B or 1, T], for tracing; the root's is 0.
        known_mask: None, or the mask, where it need not be derived from the parents.
    """

    ids: Tensor
    parents: Tensor
    max_depth: int
    sources: Tensor | None = None
    known_mask: Tensor | None = None

    @cached_property
    def mask(self) -> Tensor:
        """bool [B or 1, T, T]: entry [b, i, j] says that j is i or one of its ancestors."""
        return ancestor_mask(self.parents, self.max_depth) if self.known_mask is None else self.known_mask

    def with_chains(self, chains: Tensor, lengths: Tensor, source: int) -> "DraftTrees":
        """The union with one more path per row: bytes that the tree has already are not added again.

        Args:
            chains: int64 [B, L], bytes that follow the root.
            lengths: int64 [B], how many of them count.
            source: number under which the new nodes are traced.
        """
        batch, nodes = self.ids.shape
        parents = self.parents.expand(batch, -1)
        at = torch.zeros(batch, dtype=torch.int64, device=self.ids.device)
        steps = torch.arange(chains.shape[1], device=self.ids.device)
        wanted = steps < lengths[:, None]
        # Each byte hangs from the one before it; the first that the tree lacks from where the chain leaves the tree.
        new_parents = torch.where(wanted, nodes + steps - 1, ABSENT)
        for step in range(min(chains.shape[1], self.max_depth + 1)):  # beyond that the tree has no node
            same = (parents == at[:, None]) & (self.ids == chains[:, step, None])
            known = same.any(-1) & wanted[:, step]
            new_parents[:, step] = torch.where(wanted[:, step] & ~known, at, ABSENT)
            at = torch.where(known, same.to(torch.int8).argmax(-1), nodes + step)
        sources = self.sources if self.sources is not None else torch.zeros_like(parents)
        added = torch.full_like(chains, source)
        return DraftTrees(
            torch.cat((self.ids, chains), dim=1),
            torch.cat((parents, new_parents), dim=1),
            max(self.max_depth, chains.shape[1]),
            torch.cat((sources.expand(batch, -1), added), dim=1),
        )


def walk_tree(
    ids: Sequence[int], parents: Sequence[int], pick: Callable[[int], int], emit: Callable[[int], bool]
) -> list[int]:
    """Step from the root on to the child that carries the byte picked, as long as there is one.

    Args:
        ids, parents: of one row's nodes, as in `DraftTrees`.
        pick: the byte to take at a node.
        emit: takes it; says whether the text ends there.

    Returns:
        the nodes at which a byte was picked, root first.
    """
    children = {(parent, byte): node for node, (parent, byte) in enumerate(zip(parents, ids, strict=True))}
    path: list[int] = []
    node: int | None = 0
    while node is not None:
        path.append(node)
        byte = pick(node)
        node = None if emit(byte) else children.get((node, byte))
    return path


def ancestor_mask(parents: Tensor, max_depth: int) -> Tensor:
    """bool [B, T, T] from parents [B, T]: who is whose ancestor, each node its own included."""
    nodes = parents.shape[1]
    reach = torch.eye(nodes, device=parents.device).repeat(parents.shape[0], 1, 1)
    reach.scatter_add_(2, parents.clamp(min=0)[..., None], (parents >= 0).float()[..., None])
    covered = 1
    while covered < max_depth:  # squaring doubles the distance that is covered
        reach = (reach @ reach).clamp_(max=1.0)
        covered *= 2
    return reach > 0


@dataclass(frozen=True)
class TreeShape:
    """The shape of a static draft tree; ranks of the heads' bytes instead of bytes.

    Attributes:
        paths: path of every node but the root, in breadth-first order: the rank chosen at each depth, so that (0, 1) is
            the second most probable byte of the second head after the most probable one of the first. The prefix of
            every path is a path.
    """

    paths: tuple[Path, ...]

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> "TreeShape":
        """A tree from a user's list of paths, in any order.

        Raises:
            ValueError: for an empty, negative or repeated path, or one whose prefix is missing.
        """
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        known: set[Path] = {()}
        for path in ordered:
            if not path or not all(isinstance(rank, int) and rank >= 0 for rank in path):
                raise ValueError(f"A path of a draft tree is a non-empty tuple of ranks 0, 1, ...; got {path!r}.")
            if path in known:
                raise ValueError(f"The draft tree contains the path {path!r} twice.")
            if path[:-1] not in known:
                raise ValueError(f"The draft tree contains {path!r} but not its prefix {path[:-1]!r}; add that path.")
            known.add(path)
        return cls(tuple(ordered))

    @classmethod
    def from_children(cls, counts: Sequence[Sequence[int]]) -> "TreeShape":
        """A tree from the number of children of each node, depth by depth, node by node; missing counts are 0."""
        paths: list[Path] = []
        level: list[Path] = [()]
        for level_counts in counts:
            level = [(*path, rank) for path, count in zip(level, level_counts, strict=False) for rank in range(count)]
            paths.extend(level)
        return cls(tuple(paths))

    @classmethod
    def chain(cls, length: int) -> "TreeShape":
        """The single path of the most probable byte of each of `length` heads."""
        return cls(tuple((0,) * depth for depth in range(1, length + 1)))

    def up_to(self, max_depth: int) -> "TreeShape":
        """The same tree without the nodes deeper than `max_depth`."""
        return TreeShape(tuple(path for path in self.paths if len(path) <= max_depth))

    @property
    def nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.paths) + 1

    @property
    def max_depth(self) -> int:
        return max(map(len, self.paths), default=0)

    @property
    def max_rank(self) -> int:
        return max((max(path) for path in self.paths), default=0)

    @cached_property
    def depths(self) -> Tensor:
        """int64 [nodes]."""
        return torch.tensor([0, *map(len, self.paths)])

    @cached_property
    def parents(self) -> Tensor:
        """int64 [nodes]."""
        number = {(): 0} | {path: node for node, path in enumerate(self.paths, start=1)}
        return torch.tensor([ROOT] + [number[path[:-1]] for path in self.paths])

    @cached_property
    def mask(self) -> Tensor:
        """bool [1, nodes, nodes]; see `DraftTrees.mask`."""
        return ancestor_mask(self.parents[None], self.max_depth)


@dataclass(frozen=True)
class PlacedShape:
    """The shape of a static tree as tensors on one device; called, it gives the tree with the heads' best bytes.

    Attributes:
        ranks, heads: int64 [nodes - 1], which of the best bytes of which head every node but the root takes.
        parents, mask: as in `DraftTrees`, of a single row.
    """

    ranks: Tensor
    heads: Tensor
    parents: Tensor
    mask: Tensor
    max_rank: int
    max_depth: int

    def __call__(self, root: Tensor, head_logits: Tensor, temperature: float | Tensor = 1.0) -> DraftTrees:
        """The shape's trees.

        Args:
            root: int64 [B].
            head_logits: [B, heads, vocab]; entry h drafts depth h + 1.
            temperature: taken for the sake of other drafters; it does not change the order of bytes.
        """
        ids = root[:, None]
        if self.max_depth:
            best = head_logits[:, : self.max_depth].topk(self.max_rank + 1, dim=-1).indices  # [B, depths, K]
            ids = torch.cat((ids, best[:, self.heads, self.ranks]), dim=1)
        return DraftTrees(ids, self.parents, self.max_depth, known_mask=self.mask)


@cache
def placed_shape(shape: TreeShape, device: torch.device) -> PlacedShape:
    """A shape's tensors on a device, made once: copying them there at every step would stall it."""
    return PlacedShape(
        ranks=torch.tensor([path[-1] for path in shape.paths], dtype=torch.int64, device=device),
        heads=torch.tensor([len(path) - 1 for path in shape.paths], dtype=torch.int64, device=device),
        parents=shape.parents[None].to(device),
        mask=shape.mask.to(device),
        max_rank=shape.max_rank,
        max_depth=shape.max_depth,
    )


@cache
def published_tree(name: str) -> TreeShape:
    """ "tree95" or "tree31"."""
    return TreeShape.from_children(PUBLISHED_TREES[name])
