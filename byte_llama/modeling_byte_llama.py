"""Byte-level Llama: the in-tree Llama with subword embeddings in its input."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from evabyte.hub import SelfContainedMixin

from .configuration_byte_llama import ByteLlamaConfig
from .eva_layers import EvaLayersMixin, SummaryVectors
from .expanded_inputs import ExpandedGenerationMixin, ExpandedInputsMixin
from .prediction_heads import PredictionHeadsMixin


class UnusedRMSNorm(nn.Module):
    """A norm that stays in the checkpoint but is not applied.

    Args:
        size: of its weight.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class ByteLlamaPreTrainedModel(SelfContainedMixin, LlamaPreTrainedModel):
    config: ByteLlamaConfig
    # With `add_qk_norm` the attention is Qwen3's: Llama's, with a norm of each head's queries and keys.
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": [LlamaAttention, Qwen3Attention]}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SummaryVectors):
            init.zeros_(module.adaptive_mu_k)
            init.zeros_(module.adaptive_phi)


class ByteLlamaModel(ExpandedInputsMixin, EvaLayersMixin, ByteLlamaPreTrainedModel, LlamaModel):
    """The decoder without its output layer; see [`ExpandedInputsMixin`] and [`EvaLayersMixin`] for `forward`."""

    _auto_class = "AutoModel"

    def __init__(self, config: ByteLlamaConfig) -> None:
        super().__init__(config)
        if config.add_qk_norm:
            for index, layer in enumerate(self.layers):
                layer.self_attn = Qwen3Attention(config, index)
        self.add_eva_layers(self.layers)
        if config.skip_out_norm:
            self.norm = UnusedRMSNorm(config.hidden_size)
        if config.expand_input_ids:
            self.add_expansion(nn.Embedding)
        self.post_init()


class ByteLlamaForCausalLM(PredictionHeadsMixin, ExpandedGenerationMixin, ByteLlamaPreTrainedModel, LlamaForCausalLM):
    """Byte-level Llama with its prediction heads; see [`ExpandedInputsMixin`] for the arguments beyond Llama's."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: ByteLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # Llama's own would make a Llama decoder
        self.model = ByteLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._make_heads()
        self.post_init()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for models without `eva_layers`.

        Raises:
            NotImplementedError: with `eva_layers`, since a paged cache holds no summaries.
        """
        if self.config.eva_layers is not None:
            raise NotImplementedError(
                "Continuous batching (`generate_batch`) pages keys and values, and knows no summaries, which "
                "`eva_layers` needs. Use `generate` with a padded batch and an `attention_mask`."
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Any:
        if self.config.eva_layers is not None:
            raise ValueError("`cache_implementation`: `eva_layers` have no static cache here; leave it out.")
        return super()._prepare_static_cache(*args, **kwargs)


__all__ = ["ByteLlamaForCausalLM", "ByteLlamaModel", "ByteLlamaPreTrainedModel"]
