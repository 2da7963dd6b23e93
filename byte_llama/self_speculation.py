"""Drafts by the model itself with layers left out (Zhang et al., Draft & Verify, arXiv 2309.08168).

No other model and no training: the layers that run write their keys and values behind the text, draft by draft, and
verification overwrites them. Where the paper searches the layers to leave out by Bayesian optimisation of speed,
`layers_to_skip` takes them one by one, each time the one whose absence changes the next-byte distribution least.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evabyte.byte_tree import ROOT, DraftTrees
from evabyte.drafters import DraftContext
from evabyte.eva_layout import DraftTree

from .tree_cache import TreeCache


class _Absent(nn.Module):
    """Stands where a decoder layer is left out."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@contextmanager
def without_layers(model: Any, skipped: Iterable[int]) -> Iterator[None]:
    """Run a causal model's decoder without the layers of these numbers."""
    layers = model.model.layers
    taken = {number: layers[number] for number in skipped}
    absent = _Absent()
    try:
        for number in taken:
            layers[number] = absent
        yield
    finally:
        for number, layer in taken.items():
            layers[number] = layer


@torch.no_grad()
def layers_to_skip(model: Any, input_ids: Tensor, count: int) -> list[int]:
    """The layers whose absence changes the model's predictions on a text least, found one after the other.

    Args:
        model: a byte-level model.
        input_ids: int64 [B, N], some hundred bytes of text such as will be written.
        count: how many layers to leave out, fewer than there are.

    Returns:
        their numbers, in ascending order.

    Raises:
        ValueError: for a count that leaves no layer.
    """
    number_of_layers = len(model.model.layers)
    if not 0 < count < number_of_layers:
        raise ValueError(f"`count` must lie in 1..{number_of_layers - 1}, got {count}: the model has that many layers.")
    expected = model(input_ids, use_cache=False).logits.float().log_softmax(-1)
    skipped: list[int] = []
    for _ in range(count):
        divergence = {}
        for layer in set(range(number_of_layers)) - set(skipped):
            with without_layers(model, [*skipped, layer]):
                found = model(input_ids, use_cache=False).logits.float().log_softmax(-1)
            divergence[layer] = float((expected.exp() * (expected - found)).sum(-1).mean())
        skipped.append(min(divergence, key=divergence.__getitem__))
    return sorted(skipped)


class SkipLayersDrafter:
    """A chain of the most probable bytes, by the model without some of its layers.

    Args:
        model: the model that is decoding.
        skipped: numbers of the layers left out, see `layers_to_skip`.
        length: bytes drafted at most.
        min_probability: drafting ends where the shortened model is less sure of its byte than this.

    Raises:
        ValueError: for layers that the model does not have, or a length below 1.
    """

    def __init__(self, model: Any, skipped: Iterable[int], length: int = 6, min_probability: float = 0.4) -> None:
        self.model, self.skipped, self.length, self.min_probability = model, sorted(skipped), length, min_probability
        layers = len(model.model.layers)
        if not self.skipped or not all(0 <= number < layers for number in self.skipped):
            raise ValueError(f"`skipped` must name layers in 0..{layers - 1}, got {self.skipped}.")
        if length < 1:
            raise ValueError(f"`length` must be at least 1, got {length}.")

    def draft(self, context: DraftContext) -> DraftTrees:
        cache = context.cache
        if not isinstance(cache, TreeCache):
            raise ValueError(
                "Self-speculation drafts on the cache of the model it drafts for, a byte-level Llama or Gemma."
            )
        root = context.root[:, None]
        single = DraftTree.from_mask(torch.ones(1, 1, 1, dtype=torch.bool, device=root.device), 0)
        ids = root
        chain: list[Tensor] = []
        going = torch.ones_like(context.root, dtype=torch.bool)
        lengths = torch.zeros_like(context.root)
        with without_layers(self.model, self.skipped):
            while len(chain) < self.length:
                logits = self.model(input_ids=ids, draft_tree=single, past_key_values=cache).logits[:, -1]
                probability, best = logits.float().softmax(-1).max(-1)
                going &= probability >= self.min_probability
                if not bool(going.any()):
                    break
                cache.keep_pending(1)
                ids = best[:, None]
                chain.append(ids)
                lengths += going
        cache.forget_pending()
        lone_roots = DraftTrees(root, torch.full_like(root, ROOT), 0)
        return lone_roots.with_chains(torch.cat(chain, dim=1), lengths, source=0) if chain else lone_roots


__all__ = ["SkipLayersDrafter", "layers_to_skip", "without_layers"]
