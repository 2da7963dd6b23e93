"""Byte-level Llama and Gemma 2 for Hugging Face transformers.

Importing the package makes the architectures known to transformers' Auto classes, under their own names and under those
of published checkpoints (`tpu_llama`, `tpu_gemma2`).
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import tokenization_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_byte_llama import ByteGemma2Config, ByteLlamaConfig, TPUGemma2Config, TPULlamaConfig
from .modeling_byte_gemma2 import ByteGemma2ForCausalLM, ByteGemma2Model
from .modeling_byte_llama import ByteLlamaForCausalLM, ByteLlamaModel
from .self_speculation import SkipLayersDrafter, layers_to_skip
from .subword_drafter import SubwordDrafter
from .tokenization_byte_llama import ByteLlamaTokenizer, byte_tokenizer_from

for _config, _model, _causal_lm in (
    (ByteLlamaConfig, ByteLlamaModel, ByteLlamaForCausalLM),
    (ByteGemma2Config, ByteGemma2Model, ByteGemma2ForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
    # The Trainer, when it smooths labels, and pipelines know causal language models by these names.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _causal_lm.__name__
for _config in (TPULlamaConfig, TPUGemma2Config):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _config in (ByteLlamaConfig, ByteGemma2Config, TPULlamaConfig, TPUGemma2Config):
    AutoTokenizer.register(_config, tokenizer_class=ByteLlamaTokenizer, exist_ok=True)
    # Published folders name a class that would lose the bytes of their vocabulary: ours goes by the model type.
    tokenization_auto.TOKENIZER_MAPPING_NAMES[_config.model_type] = "ByteLlamaTokenizer"
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(_config.model_type)

__all__ = [
    "ByteGemma2Config",
    "ByteGemma2ForCausalLM",
    "ByteGemma2Model",
    "ByteLlamaConfig",
    "ByteLlamaForCausalLM",
    "ByteLlamaModel",
    "ByteLlamaTokenizer",
    "SkipLayersDrafter",
    "SubwordDrafter",
    "byte_tokenizer_from",
    "layers_to_skip",
]
