"""One step of multibyte decoding up to the walk: draft a tree per row, run the model over it, keep a path of it.

What the loop of `multibyte_generation.py` asks of a model. `TreeVerifier` serves every model and cache, through
`forward(draft_tree=...)`; `static_decoding.py` has one for caches of fixed size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .byte_tree import DraftTrees
from .drafters import DraftContext, Drafter
from .eva_cache import KeptPaths
from .eva_layout import DraftTree


@dataclass
class Frontier:
    """Where the rows' texts end.

    Attributes:
        logits: [B, T, heads, vocab] at the nodes of the last trees.
        nodes: per row, the node at which its last byte was emitted.
        texts, rows, temperature: as in `DraftContext`.
    """

    logits: Tensor
    nodes: list[int]
    texts: list[list[int]]
    rows: list[int]
    temperature: float

    @property
    def roots(self) -> list[int]:
        """Per row, the byte emitted last."""
        return [text[-1] for text in self.texts]

    def context(self, cache: Cache) -> DraftContext:
        """What a drafter may look at."""
        device = self.logits.device
        nodes = torch.tensor(self.nodes, device=device)
        return DraftContext(
            root=torch.tensor(self.roots, device=device),
            head_logits=self.logits[torch.arange(len(self.nodes), device=device), nodes, 1:],
            texts=self.texts,
            rows=self.rows,
            temperature=self.temperature,
            cache=cache,
        )


class TreeVerifier:
    """Drafts and verifies trees against a cache that holds the prompts.

    Args:
        model: has `forward(draft_tree=...)` and the hooks of `MultibyteGenerationMixin`.
        cache: what the model's `_cache_for_trees` made of the prompts' cache.
    """

    # Whether rows that have ended may leave the batch; `select_rows` needs it.
    rows_may_leave = True

    def __init__(self, model: Any, cache: Cache, drafter: Drafter) -> None:
        self.model, self.cache, self.drafter = model, cache, drafter

    def step(self, frontier: Frontier) -> tuple[DraftTrees, Tensor]:
        """Trees, and the logits float32 [B, T, heads, vocab] at all their nodes, by one forward."""
        trees = self.draft(frontier)
        return trees, self.verify(trees)

    def draft(self, frontier: Frontier) -> DraftTrees:
        """One tree for every row in the batch."""
        return self.drafter.draft(frontier.context(self.cache))

    def verify(self, trees: DraftTrees) -> Tensor:
        """The logits at the nodes."""
        outputs = self.model(
            input_ids=trees.ids,
            draft_tree=DraftTree.from_mask(trees.mask, trees.max_depth),
            past_key_values=self.cache,
            return_all_pred_logits=True,
        )
        return outputs.logits.float()

    def commit(self, kept: KeptPaths) -> None:
        """Keep in the cache the nodes at which a byte was emitted: what was read, not what was emitted last."""
        self.model._commit_paths(self.cache, kept)

    def select_rows(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self.cache.batch_select_indices(torch.tensor(rows))

    def append_rows(self, others: Sequence[Cache]) -> None:
        """Let the rows of other caches, made as this one was, follow the batch's."""
        self.model._append_rows(self.cache, others)

    def finish(self) -> Cache | None:
        """The cache to return, for further calls of the model or `generate`."""
        return self.model._cache_after_trees(self.cache)
