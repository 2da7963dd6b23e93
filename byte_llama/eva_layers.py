"""EVA attention in place of a byte-level Llama's full attention, in the layers that `config.eva_layers` names.

The operator is EvaByte's (see `eva_math.py`), over the same query, key, value and output weights, so that a trained
Llama can be taken over and trained on. Windows and chunks are counted from each row's own first token.

Grouped heads: a summary is one more key and value, so there is one per key-value head, shared by the query heads of its
group as any other key is, and the two learned vectors are each key-value head's. Vectors of each query head would give
as many summaries as there are query heads, and undo what grouping saves in the cache. Both start at zero: a summary key
is then the mean of its chunk's keys, and a summary value that of its values, weighted by exp(-scale |k|^2 / 2).
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    repeat_kv,
)

from evabyte.eva_attention import cached_attention, default_backend, layout_attention, summarizer
from evabyte.eva_cache import EvaCacheLayer
from evabyte.eva_layout import EvaLayout

from .configuration_byte_llama import ByteLlamaConfig


class SummaryVectors(nn.Module):
    """The learned vectors of one layer's chunk summaries, [H_kv, D] each; calling it gives mu and phi.

    A module, since adapters train further modules by name, not parameters; and heads first, so that shards are of heads
    (of EvaByte's [1, H, 1, 1, D] one process would have all).
    """

    def __init__(self, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.adaptive_mu_k = nn.Parameter(torch.zeros(num_key_value_heads, head_dim))
        self.adaptive_phi = nn.Parameter(torch.zeros(num_key_value_heads, head_dim))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.adaptive_mu_k, self.adaptive_phi


class EvaLlamaAttention(LlamaAttention):
    """Llama's attention, or Qwen3's with `add_qk_norm`, computed by EVA."""

    def __init__(self, config: ByteLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in ("q_norm", "k_norm"):
            norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.add_qk_norm else nn.Identity()
            self.add_module(name, norm)
        self.summary = SummaryVectors(config.num_key_value_heads, self.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        eva_layout: EvaLayout,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, N, hidden_size] to the same shape, and no attention weights. The layout stands for the mask."""
        batch, length = hidden_states.shape[:2]
        query, key, value = (
            norm(projection(hidden_states).view(batch, length, -1, self.head_dim)).transpose(1, 2)
            for projection, norm in (
                (self.q_proj, self.q_norm),
                (self.k_proj, self.k_norm),
                (self.v_proj, nn.Identity()),
            )
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotary tables are in float32
        (mu, phi), backend = self.summary(), self._backend(query)
        # The operator takes as many key heads as query heads; the cache keeps, and summarises, each only once.
        mus, phis = (vector.repeat_interleave(self.num_key_value_groups, dim=0) for vector in (mu, phi))
        if past_key_values is None:
            output = layout_attention(query, self._repeat(key), self._repeat(value), mus, phis, eva_layout, backend)
        else:
            summarize = summarizer(mu, phi, eva_layout.chunk_size, backend, True)
            states, _ = past_key_values.update(key, value, self.layer_idx, eva_layout, summarize)
            states = type(states)(*(self._repeat(getattr(states, field.name)) for field in fields(states)))
            summarize = summarizer(mus, phis, eva_layout.chunk_size, backend, True)
            output = cached_attention(query, states, summarize, eva_layout, backend)
        return self.o_proj(output.transpose(1, 2).reshape(batch, length, -1)), None

    def _repeat(self, states: Tensor) -> Tensor:
        """[B, H_kv, N, D] -> [B, H, N, D]."""
        return repeat_kv(states, self.num_key_value_groups)

    def _backend(self, states: Tensor) -> str:
        """`attn_implementation` is that of the full layers; of these, "eager" asks for the specification."""
        chosen = self.config._attn_implementation
        return chosen if chosen in ("naive", "eager") else default_backend(states.device.type, states.dtype)


class EvaLayersMixin:
    """Tells a Llama decoder's EVA layers where each token stands, mixed in before its class."""

    config: ByteLlamaConfig

    def add_eva_layers(self, layers: nn.ModuleList) -> None:
        """Replace the attention of the decoder layers that the configuration names.

        Raises:
            ValueError: for layers that cannot be, since a field may have been set after the configuration was made.
        """
        self.config.validate_eva_layers()
        for number in self.config.eva_layer_numbers:
            layers[number].self_attn = EvaLlamaAttention(self.config, number)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        eva_layout: EvaLayout | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the in-tree decoder; with EVA layers,

        Args:
            attention_mask: None, or [B, N] or [B, cached slots + N], zero at padding.
            position_ids: as in EvaByte: a document starts wherever they are 0. By default each row's real tokens are
                counted on from what the cache holds of it.
            eva_layout: for draft trees, whose masks are 4D (see `tree_cache.py`).

        Raises:
            ValueError: for masks and caches that do not tell where each token stands.
        """
        if eva_layers := self.config.eva_layer_numbers:
            if kwargs.get("output_attentions"):
                raise ValueError("`output_attentions`: layers among `eva_layers` do not return their weights.")
            inputs = inputs_embeds if inputs_embeds is not None else input_ids
            if inputs is None:
                raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            if eva_layout is None:
                eva_layout = self._build_layout(inputs, attention_mask, position_ids, past_key_values)
            if position_ids is None:  # summaries depend on where rotary embeddings begin, which must be at the text
                position_ids = eva_layout.positions(inputs.device)
            if len(eva_layers) == self.config.num_hidden_layers:
                # No layer reads a mask: one with four dimensions is passed on, where others are filled up to N x N.
                attention_mask = torch.empty(1, 1, 0, 0, device=inputs.device)
            kwargs["eva_layout"] = eva_layout
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _build_layout(
        self, inputs: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> EvaLayout:
        batch, length = inputs.shape[:2]
        past, slots = None, 0
        if cache is not None:
            layer = eva_cache_layers(cache, self.config)[0]
            past, slots = layer.lengths or None, layer.slots
            if past is not None and len(past) != batch:
                raise ValueError(f"`past_key_values` holds {len(past)} rows, the input has {batch}.")
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor)
            or tuple(attention_mask.shape) not in ((batch, length), (batch, slots + length))
        ):
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(
                f"`attention_mask` must be 2D with `eva_layers`, of shape {(batch, slots + length)} (cached and new "
                f"tokens), got {shape}."
            )
        return EvaLayout.build(
            batch,
            length,
            window_size=self.config.eva_window_size,
            chunk_size=self.config.eva_chunk_size,
            past=past,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )


def eva_cache_layers(cache: Cache, config: ByteLlamaConfig) -> list[EvaCacheLayer]:
    """The EVA layers of a cache.

    Raises:
        ValueError: when the cache was not made for the configuration's `eva_layers`.
    """
    numbers = config.eva_layer_numbers
    layers: list[Any] = cache.layers[: config.num_hidden_layers]
    if len(layers) < config.num_hidden_layers or not all(is_eva(layers[number]) for number in numbers):
        raise ValueError(
            f"`past_key_values` ({type(cache).__name__}) lacks the layers that `eva_layers` need: create it with "
            "`DynamicCache(config=model.config)`, or leave it out."
        )
    return [layers[number] for number in numbers]


def is_eva(layer: Any) -> bool:
    """Whether a cache's layer is an EVA layer."""
    return getattr(layer, "_layer_type", None) == EvaCacheLayer._layer_type


__all__ = ["EvaLayersMixin", "EvaLlamaAttention", "SummaryVectors", "eva_cache_layers", "is_eva"]
