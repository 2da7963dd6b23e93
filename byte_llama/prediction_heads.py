"""Several bytes per forward for byte-level Llama and Gemma 2: prediction heads, draft trees, drafters.

Head 0 is the model's own output layer. A further head h predicts the byte h + 1 places ahead, from the same last hidden
state: by a linear layer as EvaByte's, or with a residual block before it as Medusa's (Cai et al., arXiv 2401.10774,
equation 1), which starts as a copy of head 0. They can be added to a trained model and trained alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from evabyte.drafters import Drafter, LookupDrafter, UnionDrafter, make_drafter
from evabyte.eva_cache import KeptPaths
from evabyte.eva_layout import DraftTree
from evabyte.multibyte_generation import MultibyteGenerationMixin
from evabyte.multibyte_loss import multibyte_loss, shift_for_heads

from .self_speculation import SkipLayersDrafter
from .static_tree_cache import PromptCache, StaticTreeCache
from .static_trees import StaticTreesMixin
from .subword_drafter import SubwordDrafter, subwords_of
from .subword_expansion import parents_of
from .tree_cache import TreeCache

KINDS = ("linear", "residual")


@dataclass
class MultibyteCausalLMOutput(CausalLMOutputWithPast):
    """Output of a byte-level model.

    Attributes:
        loss: scalar, in nats, when labels were given: the mean over heads of each head's mean.
        logits: [B, N, vocab_size] of the next byte, or [B, N, num_pred_heads, vocab_size] of all heads.
        head_losses: None, or float32 [num_pred_heads], each head's own mean loss.
        last_hidden_state: [B, N, hidden_size], what the heads read.
    """

    head_losses: Tensor | None = None
    last_hidden_state: Tensor | None = None


class PredictionHead(nn.Module):
    """Logits [..., vocab_size] of hidden states [..., hidden_size].

    Args:
        kind: "linear", or "residual" for a block h + SiLU(W h + b) before the output layer.
    """

    def __init__(self, hidden_size: int, vocab_size: int, kind: str) -> None:
        super().__init__()
        self.block = nn.Linear(hidden_size, hidden_size) if kind == "residual" else None
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.block is not None:
            hidden_states = hidden_states + nn.functional.silu(self.block(hidden_states))
        return self.lm_head(hidden_states)


class PredictionHeadsMixin(StaticTreesMixin, MultibyteGenerationMixin):
    """Gives an in-tree causal model prediction heads and `multi_byte_generate`; comes before its class.

    `config.num_pred_heads` counts the model's own output layer; `config.pred_head_kind` is one of `KINDS`.
    """

    config: Any
    model: Any
    lm_head: nn.Linear
    draft_heads: nn.ModuleList
    _subwords: list[bytes | None] | None = None
    _skipped_layers: Sequence[int] = ()

    def _make_heads(self) -> None:
        count = self.config.num_pred_heads - 1
        sizes = (self.config.hidden_size, self.config.vocab_size, self.config.pred_head_kind)
        self.draft_heads = nn.ModuleList(PredictionHead(*sizes) for _ in range(count))

    @torch.no_grad()
    def add_prediction_heads(self, num_pred_heads: int, kind: str = "residual") -> None:
        """Give a trained model heads that predict the `num_pred_heads` next bytes; new ones begin as copies of head 0.

        Raises:
            ValueError: for fewer than two heads, another kind, or a model that has heads already.
        """
        if len(self.draft_heads):
            raise ValueError(f"The model has {len(self.draft_heads) + 1} prediction heads already.")
        if num_pred_heads < 2 or kind not in KINDS:
            raise ValueError(
                f"`num_pred_heads` must be at least 2 and `kind` one of {', '.join(KINDS)}; got {num_pred_heads} and "
                f"{kind!r}."
            )
        self.config.num_pred_heads, self.config.pred_head_kind = num_pred_heads, kind
        own = self.lm_head.weight
        self._make_heads()
        self.draft_heads.to(own.device, own.dtype)
        for head in self.draft_heads:
            for name, parameter in head.named_parameters():
                if name == "lm_head.weight":
                    parameter.copy_(own)
                else:
                    parameter.zero_()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers, of every head."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)  # type: ignore[misc]
        size = embeddings.weight.shape[0]
        for head in self.draft_heads:
            head.lm_head = self._get_resized_lm_head(head.lm_head, size, mean_resizing=mean_resizing)  # type: ignore[attr-defined]
        return embeddings

    def freeze_trunk(self) -> None:
        """Let only the prediction heads beyond the model's own learn."""
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            parameter.requires_grad_(name.startswith("draft_heads."))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, PredictionHead) and module.block is not None:
            init.zeros_(module.block.weight)
            init.zeros_(module.block.bias)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_all_pred_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        draft_tree: Tensor | DraftTree | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; as the in-tree class, and

        Args:
            labels: int64 [B, N], -100 ignored, shifted inside: every head learns its own byte, none across the border
                of a document (where `position_ids` are 0) or from padding.
            shift_labels: int64 [B, N], `labels` already shifted by one; by name.
            return_all_pred_logits: return the logits of all heads, [B, N, num_pred_heads, vocab_size].
            draft_tree: None, or bool [B or 1, N, N] (or a `DraftTree`): the new ids are nodes of draft trees on a
                `TreeCache`; row i marks node i and its ancestors.

        Raises:
            ValueError: for trees on a cache of another kind, or under an attention that takes no masks.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # in the signature, the Trainer would ask every batch for it
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs}
        learned = labels if shift_labels is None else shift_labels
        if draft_tree is not None:
            if not isinstance(past_key_values, TreeCache):
                raise ValueError("`draft_tree` needs a `TreeCache` as `past_key_values` (see `multi_byte_generate`).")
            outputs = self._verify(inputs, draft_tree, past_key_values)
        elif not return_all_pred_logits and (learned is None or self.config.num_pred_heads == 1):
            own = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return super().forward(  # type: ignore[misc]
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
                **inputs,
                **({} if learned is None else {name: value for name, value in own.items() if value is not None}),
            )
        else:
            outputs = self.model(
                attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values, **inputs
            )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        kept = slice(None) if isinstance(kept, int) else kept
        loss = head_losses = None
        if learned is not None:
            logits = self.predict(hidden_states)
            document = _documents(attention_mask, position_ids, learned)
            first = 1 if shift_labels is None else 0
            targets = shift_for_heads(learned, self.config.num_pred_heads, first, document)
            loss, head_losses = multibyte_loss(logits, targets, num_items_in_batch)
            logits = logits[:, kept] if return_all_pred_logits else logits[:, kept, 0]
        else:
            logits = self.predict(hidden_states[:, kept])
            logits = logits if return_all_pred_logits else logits[:, :, 0]
        return MultibyteCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            head_losses=head_losses,
            last_hidden_state=hidden_states,
        )

    def predict(self, hidden_states: Tensor) -> Tensor:
        """Logits of all heads, [..., num_pred_heads, vocab_size], of last hidden states [..., hidden_size]."""
        logits = torch.stack([head(hidden_states) for head in (self.lm_head, *self.draft_heads)], dim=-2)
        cap = getattr(self.config, "final_logit_softcapping", None)  # Gemma 2's
        return logits if cap is None else torch.tanh(logits / cap) * cap

    # -- draft trees ---------------------------------------------------------------------------------------------------

    def _verify(self, inputs: dict[str, Any], draft_tree: Tensor | DraftTree, cache: TreeCache) -> Any:
        """The decoder over the nodes of trees."""
        self._check_attention()
        tree = draft_tree if isinstance(draft_tree, DraftTree) else DraftTree.from_mask(draft_tree)
        ids = inputs["input_ids"]
        masks = cache.masks(tree, self.dtype, ids.device)  # type: ignore[attr-defined]
        eva_layout = cache.eva_layout(tree)
        if self.config.expand_input_ids:
            inputs = {**inputs, "parents": parents_of(tree.mask.to(ids.device))}
        outputs = self.model(
            **{**inputs, "use_cache": True},
            attention_mask=masks if "sliding_attention" in masks else masks.get("full_attention"),
            **({} if eva_layout is None else {"eva_layout": eva_layout}),
            position_ids=cache.rows.positions(tree, ids.device),
            past_key_values=cache,
        )
        if self.config.expand_input_ids:
            cache.note(self.model.subword_expansion.as_symbols(ids))
        return outputs

    def _check_attention(self) -> None:
        """Refuse attention that takes no masks."""
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"Draft trees need attention with a mask: attn_implementation='sdpa' or 'eager', not "
                f"{self.config._attn_implementation!r}."
            )

    def make_drafter(self, name: str | None, batch: int, nodes: int | None = None) -> Drafter:
        """The drafter called `name`: as for EvaByte, or "subword" (completions of the current word), "self" (this model
        without the layers that `skip_layers` named), each also with "+lookup".

        Without heads beyond the model's own, None stands for "lookup".
        """
        base, _, other = (name or ("dynamic" if len(self.draft_heads) else "lookup")).partition("+")
        drafter: Drafter
        if base == "subword" and self.config.expand_input_ids:
            if self._subwords is None:
                self._subwords = subwords_of(self.model.subword_expansion)
            drafter = SubwordDrafter(self._subwords, **({} if nodes is None else {"nodes": nodes}))
        elif base == "self" and getattr(self.config, "eva_layers", None) is not None:
            raise ValueError(f"`draft={name!r}` does not go with `eva_layers`: choose another draft.")
        elif base == "self" and self._skipped_layers:
            drafter = SkipLayersDrafter(self, self._skipped_layers)
        elif base in ("subword", "self"):
            missing = "a model with `expand_input_ids`" if base == "subword" else "`model.skip_layers(...)` beforehand"
            raise ValueError(f"`draft={name!r}` needs {missing}.")
        else:
            depth = self.config.num_pred_heads - 1
            return make_drafter("+".join(filter(None, (base, other))), depth, self.device, batch, nodes)  # type: ignore[attr-defined]
        if other not in ("", "lookup"):
            raise ValueError(f"`draft` can add 'lookup' to another drafter, as in 'subword+lookup'; got {name!r}.")
        return UnionDrafter(drafter, LookupDrafter()) if other else drafter

    def skip_layers(self, layers: Iterable[int]) -> None:
        """Say which layers `draft="self"` leaves out (see `layers_to_skip`)."""
        self._skipped_layers = SkipLayersDrafter(self, layers).skipped

    def _trees_follow(self, attention_mask: Tensor | None) -> bool:
        return attention_mask is None or bool((attention_mask.long().diff(dim=-1) >= 0).all())

    def _cache_for_trees(self, cache: Cache, attention_mask: Tensor | None) -> Cache:
        if not self._trees_follow(attention_mask):
            raise ValueError("`attention_mask`: multibyte decoding needs prompts padded on the left.")
        padding = [0] * cache.layers[0].keys.shape[0]
        if attention_mask is not None:
            padding = (attention_mask == 0).sum(-1).tolist()
        return StaticTreeCache(cache, padding) if isinstance(cache, PromptCache) else TreeCache(cache, padding)

    def _commit_paths(self, cache: Cache, kept: KeptPaths) -> None:
        cache.commit(kept)

    def _append_rows(self, cache: Cache, others: Sequence[Cache]) -> None:
        cache.append_rows(others)

    def _cache_after_trees(self, cache: Cache) -> Cache | None:
        return cache.restore()


def _documents(attention_mask: Tensor | None, position_ids: Tensor | None, like: Tensor) -> Tensor | None:
    """int64 [B, N], number of each position's document, -1 at padding; None when every row is one document."""
    if position_ids is None and (attention_mask is None or attention_mask.ndim != 2):
        return None
    document = torch.zeros_like(like)
    if position_ids is not None:
        document = (position_ids == 0).expand_as(like).cumsum(-1)
    if attention_mask is not None and attention_mask.ndim == 2:
        document = document.masked_fill(attention_mask[:, -like.shape[1] :] == 0, -1)
    return document


__all__ = ["MultibyteCausalLMOutput", "PredictionHead", "PredictionHeadsMixin"]
