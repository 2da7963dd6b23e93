"""`multi_byte_generate(cache_implementation="static")` for byte-level Llama and Gemma 2; see `static_decoding.py`.

Prompts are read into a dynamic cache, uncompiled, since they differ in length, and then moved to buffers of fixed size.
"""

from copy import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationConfig

from evabyte.byte_tree import ROOT
from evabyte.drafters import Drafter, tree_bounds
from evabyte.eva_cache import KeptPaths
from evabyte.static_decoding import StaticVerifier
from evabyte.tree_verifier import TreeVerifier

from .self_speculation import SkipLayersDrafter
from .static_tree_cache import PromptCache, StaticTreeCache


class StaticTreeVerifier(StaticVerifier):
    """Drafts and verifies trees on a `StaticTreeCache`, which has no windows to close."""

    cache: StaticTreeCache

    def commit(self, kept: KeptPaths) -> None:
        """Count the paths as cached; the next step brings them in place."""
        self.past, self.kept = self.cache.rows.lengths, kept
        self.cache.count(kept)


class StaticTreesMixin:
    """What multibyte decoding asks of a model besides, for caches of fixed size; before `MultibyteGenerationMixin`."""

    config: Any
    model: Any

    def _reserve_for_trees(self, cache: Cache | None, drafter: Drafter) -> Cache | None:
        """In place of the static cache that `generate` made, the one that prompts are read into.

        Raises:
            ValueError: for a static cache of the caller's own or one that is offloaded, and for a drafter that needs a
                growing cache.
        """
        if not isinstance(cache, StaticCache):
            return cache
        if getattr(cache, "_is_user_defined", False):
            raise ValueError(
                "`past_key_values`: a `StaticCache` has no room for draft trees. Pass cache_implementation='static' "
                "instead (and `max_cache_len`, for longer calls to come), or a `DynamicCache`."
            )
        if cache.offloading:
            raise ValueError(
                "`cache_implementation`: the static cache of draft trees stays on its device. Use 'static', or "
                "'offloaded' for a dynamic one on the CPU."
            )
        if any(isinstance(each, SkipLayersDrafter) for each in (drafter, getattr(drafter, "first", None))):
            raise ValueError("`draft='self'` drafts on a growing cache: leave out cache_implementation='static'.")
        if len(set((getattr(self, "hf_device_map", None) or {}).values())) > 1:
            return DynamicCache(config=self.config)
        self._check_attention()  # type: ignore[attr-defined]
        longest = self._previous_max_cache_length  # type: ignore[attr-defined]  # set by transformers, never lowered
        return PromptCache(self.config, longest, tree_bounds(drafter).nodes)

    def _verify_static(
        self, cache: StaticTreeCache, past: Tensor, ids: Tensor, parents: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the model over trees behind `past` int64 [B] slots, within one graph.

        Args:
            ids, parents: int64 [B, T], and [B or 1, T].
            mask: bool [B or 1, T, T], see `DraftTrees.mask`.

        Returns:
            logits float32 [B, T, heads, vocab]; the parents as they are.
        """
        depth = mask.sum(-1) - 1
        cache.rows.past.copy_(past[:, None])
        masks = cache.masks(mask, depth, self.dtype)  # type: ignore[attr-defined]
        expands = self.config.expand_input_ids
        hidden = self.model(
            input_ids=ids,
            attention_mask=masks if "sliding_attention" in masks else masks["full_attention"],
            position_ids=cache.rows.past - cache.rows.padding + depth,
            past_key_values=cache,
            use_cache=True,
            **({"parents": parents.clamp(min=ROOT)} if expands else {}),
        ).last_hidden_state
        if expands:
            cache.histories[0].note(self.model.subword_expansion.as_symbols(ids))
        return self.predict(hidden).float(), parents  # type: ignore[attr-defined]

    def _tree_verifier(self, cache: Cache, drafter: Drafter, generation_config: GenerationConfig) -> TreeVerifier:
        if not isinstance(cache, StaticTreeCache):
            return TreeVerifier(self, cache, drafter)
        if self.model.rotary_emb.rope_type in ("dynamic", "longrope"):  # which look at the positions' values
            generation_config = copy(generation_config)
            generation_config.disable_compile = True
        return StaticTreeVerifier(self, cache, drafter, generation_config)


__all__ = ["StaticTreeVerifier", "StaticTreesMixin"]
