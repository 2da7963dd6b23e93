"""Byte-level Llama: the in-tree Llama with subword embeddings in its input."""

import torch
from torch import Tensor, nn
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


class ByteLlamaModel(ExpandedInputsMixin, ByteLlamaPreTrainedModel, LlamaModel):
    """The decoder without its output layer; see [`ExpandedInputsMixin`] for `forward`."""

    _auto_class = "AutoModel"

    def __init__(self, config: ByteLlamaConfig) -> None:
        super().__init__(config)
        if config.add_qk_norm:
            for index, layer in enumerate(self.layers):
                layer.self_attn = Qwen3Attention(config, index)
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


__all__ = ["ByteLlamaForCausalLM", "ByteLlamaModel", "ByteLlamaPreTrainedModel"]
