"""EvaByte on Hugging Face transformers: byte-level language models with EVA attention and multibyte decoding.

Importing the package makes the architecture known to transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .byte_streamer import ByteIteratorStreamer, ByteStreamer
from .configuration_evabyte import EvaByteConfig
from .eva_attention import eva_attention
from .modeling_evabyte import EvaByteForCausalLM, EvaByteModel
from .tokenization_evabyte import EvaByteTokenizer

__version__ = "0.1.0"

AutoConfig.register("evabyte", EvaByteConfig, exist_ok=True)
AutoModel.register(EvaByteConfig, EvaByteModel, exist_ok=True)
AutoModelForCausalLM.register(EvaByteConfig, EvaByteForCausalLM, exist_ok=True)
AutoTokenizer.register(EvaByteConfig, fast_tokenizer_class=EvaByteTokenizer, exist_ok=True)

__all__ = [
    "ByteIteratorStreamer",
    "ByteStreamer",
    "EvaByteConfig",
    "EvaByteForCausalLM",
    "EvaByteModel",
    "EvaByteTokenizer",
    "eva_attention",
]
