"""EvaByte on Hugging Face transformers: byte-level language models with EVA attention and multibyte decoding.

Importing the package makes the architecture known to transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

# Without Pillow, and in transformers 5.17 without torchvision, the name in `transformers` only raises.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .byte_streamer import ByteIteratorStreamer, ByteStreamer
from .configuration_evabyte import EvaByteConfig
from .eva_attention import eva_attention
from .image_processing_evabyte import EvaByteImageProcessor
from .modeling_evabyte import EvaByteForCausalLM, EvaByteModel
from .processing_evabyte import EvaByteProcessor
from .stacked_heads import next_byte_only
from .tokenization_evabyte import EvaByteTokenizer

__version__ = "0.1.0"

AutoConfig.register("evabyte", EvaByteConfig, exist_ok=True)
AutoModel.register(EvaByteConfig, EvaByteModel, exist_ok=True)
AutoModelForCausalLM.register(EvaByteConfig, EvaByteForCausalLM, exist_ok=True)
# The Trainer, when it smooths labels, and pipelines know causal language models by these names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["evabyte"] = "EvaByteForCausalLM"
AutoTokenizer.register(EvaByteConfig, fast_tokenizer_class=EvaByteTokenizer, exist_ok=True)
AutoProcessor.register(EvaByteConfig, EvaByteProcessor, exist_ok=True)
AutoImageProcessor.register(
    EvaByteConfig,
    image_processor_classes={"pil": EvaByteImageProcessor, "torchvision": EvaByteImageProcessor},
    exist_ok=True,
)

__all__ = [
    "ByteIteratorStreamer",
    "ByteStreamer",
    "EvaByteConfig",
    "EvaByteForCausalLM",
    "EvaByteImageProcessor",
    "EvaByteModel",
    "EvaByteProcessor",
    "EvaByteTokenizer",
    "eva_attention",
    "next_byte_only",
]
