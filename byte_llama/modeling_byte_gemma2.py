"""Byte-level Gemma 2: the in-tree Gemma 2 with subword embeddings in its input."""

from functools import partial

from torch import nn
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma2PreTrainedModel,
    Gemma2TextScaledWordEmbedding,
)

from evabyte.hub import SelfContainedMixin

from .configuration_byte_llama import ByteGemma2Config
from .expanded_inputs import ExpandedGenerationMixin, ExpandedInputsMixin
from .prediction_heads import PredictionHeadsMixin


class ByteGemma2PreTrainedModel(SelfContainedMixin, Gemma2PreTrainedModel):
    config: ByteGemma2Config
    _supports_sdpa = False  # PyTorch's fused attention has no soft caps and would leave them out


class ByteGemma2Model(ExpandedInputsMixin, ByteGemma2PreTrainedModel, Gemma2Model):
    """The decoder without its output layer; see [`ExpandedInputsMixin`] for `forward`."""

    _auto_class = "AutoModel"

    def __init__(self, config: ByteGemma2Config) -> None:
        super().__init__(config)
        if config.expand_input_ids:
            # Each embedding is scaled, and so is their sum.
            scaled = partial(Gemma2TextScaledWordEmbedding, padding_idx=None, embed_scale=config.hidden_size**0.5)
            self.add_expansion(scaled)
        self.post_init()


class ByteGemma2ForCausalLM(
    PredictionHeadsMixin, ExpandedGenerationMixin, ByteGemma2PreTrainedModel, Gemma2ForCausalLM
):
    """Byte-level Gemma 2 with its prediction heads; see [`ExpandedInputsMixin`] for the arguments beyond Gemma 2's."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: ByteGemma2Config) -> None:
        super(Gemma2ForCausalLM, self).__init__(config)  # Gemma's own would make a Gemma decoder
        self.model = ByteGemma2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._make_heads()
        self.post_init()


__all__ = ["ByteGemma2ForCausalLM", "ByteGemma2Model", "ByteGemma2PreTrainedModel"]
