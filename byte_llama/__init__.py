"""Byte-level Llama and Gemma 2 for Hugging Face transformers.

Importing the package makes the architectures known to transformers' Auto classes, under their own names and under those
of published checkpoints (`tpu_llama`, `tpu_gemma2`).
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_byte_llama import ByteGemma2Config, ByteLlamaConfig, TPUGemma2Config, TPULlamaConfig
from .modeling_byte_gemma2 import ByteGemma2ForCausalLM, ByteGemma2Model
from .modeling_byte_llama import ByteLlamaForCausalLM, ByteLlamaModel

for _config, _model, _causal_lm in (
    (ByteLlamaConfig, ByteLlamaModel, ByteLlamaForCausalLM),
    (ByteGemma2Config, ByteGemma2Model, ByteGemma2ForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
for _config in (TPULlamaConfig, TPUGemma2Config):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

__all__ = [
    "ByteGemma2Config",
    "ByteGemma2ForCausalLM",
    "ByteGemma2Model",
    "ByteLlamaConfig",
    "ByteLlamaForCausalLM",
    "ByteLlamaModel",
]
