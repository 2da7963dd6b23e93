"""Draft trees: several continuations of the same text, verified in one forward.

Node 0 is the root, the byte that was emitted last and that the model has not read yet; a node at depth d drafts the
d-th byte after it. Trees are given as lists of paths, a path being the rank chosen at each depth: (0, 1) is the second
most probable byte of the second head after the most probable one of the first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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
class ByteTree:
    """The shape of a draft tree; the bytes are filled in from the heads' logits at every step.

    Attributes:
        paths: path of every node but the root, in breadth-first order; the prefix of every path is a path.
    """

    paths: tuple[Path, ...]

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> "ByteTree":
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
    def from_children(cls, counts: Sequence[Sequence[int]]) -> "ByteTree":
        """A tree from the number of children of each node, depth by depth, node by node; missing counts are 0."""
        paths: list[Path] = []
        level: list[Path] = [()]
        for level_counts in counts:
            level = [(*path, rank) for path, count in zip(level, level_counts, strict=False) for rank in range(count)]
            paths.extend(level)
        return cls(tuple(paths))

    @classmethod
    def chain(cls, length: int) -> "ByteTree":
        """The single path of the most probable byte of each of `length` heads."""
        return cls(tuple((0,) * depth for depth in range(1, length + 1)))

    @classmethod
    def named(cls, name: str, max_depth: int) -> "ByteTree":
        """ "chain", "tree31" or "tree95", without the nodes deeper than `max_depth`."""
        if name == "chain":
            return cls.chain(max_depth)
        if name not in PUBLISHED_TREES:
            raise ValueError(f"`draft` must be 'chain', {', '.join(map(repr, PUBLISHED_TREES))}; got {name!r}.")
        whole = cls.from_children(PUBLISHED_TREES[name])
        return cls(tuple(path for path in whole.paths if len(path) <= max_depth))

    @property
    def nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.paths) + 1

    @cached_property
    def depths(self) -> Tensor:
        """int64 [nodes]."""
        return torch.tensor([0, *map(len, self.paths)])

    @property
    def max_depth(self) -> int:
        return int(self.depths.max())

    @cached_property
    def parents(self) -> list[int]:
        """Parent of every node, as a list; the root's is -1."""
        number = {(): 0} | {path: node for node, path in enumerate(self.paths, start=1)}
        return [-1] + [number[path[:-1]] for path in self.paths]

    @cached_property
    def children(self) -> list[list[int]]:
        """Children of every node."""
        children: list[list[int]] = [[] for _ in range(self.nodes)]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                children[parent].append(node)
        return children

    @cached_property
    def mask(self) -> Tensor:
        """bool [nodes, nodes]: entry [i, j] says that j is i or one of its ancestors."""
        mask = torch.eye(self.nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):  # parents come before their children
            mask[node] |= mask[parent]
        return mask

    def fill(self, root: Tensor, head_logits: Tensor) -> Tensor:
        """Ids of all nodes.

        Args:
            root: int64 [B].
            head_logits: [B, heads, vocab], of the heads that look beyond the root: entry h drafts depth h + 1.

        Returns:
            int64 [B, nodes].
        """
        if not self.paths:
            return root[:, None]
        ranks = torch.tensor([path[-1] for path in self.paths])
        best = head_logits[:, : self.max_depth].topk(int(ranks.max()) + 1, dim=-1).indices  # [B, depths, K]
        drafted = best[:, self.depths[1:] - 1, ranks]
        return torch.cat((root[:, None], drafted), dim=1)
