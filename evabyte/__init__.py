"""EvaByte on Hugging Face transformers: byte-level language models with EVA attention and multibyte decoding."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_evabyte import EvaByteConfig
from .eva_attention import eva_attention
from .modeling_evabyte import EvaByteForCausalLM, EvaByteModel

__version__ = "0.1.0"

AutoConfig.register("evabyte", EvaByteConfig)
AutoModel.register(EvaByteConfig, EvaByteModel)
AutoModelForCausalLM.register(EvaByteConfig, EvaByteForCausalLM)

__all__ = ["EvaByteConfig", "EvaByteForCausalLM", "EvaByteModel", "eva_attention"]
