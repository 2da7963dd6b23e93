"""Cross-tokenizer distillation (ALM, arXiv 2503.20083): a byte-level student learns from a subword teacher."""

from .alignment import align, alignment_matrix
from .chat_format import CHATML_FORMAT, GEMMA_FORMAT, LLAMA3_FORMAT, ChatFormat, chat_format_of
from .collation import DistillationCollator, pack_examples
from .data import DistillationDataset, hub_documents, read_documents
from .encoding import Example, ParallelEncoder, TokenSequence
from .logprobs import SequenceLogProbs, sequence_logprobs
from .losses import ChunkLogProbs, alm_loss, chunk_logprobs, latents_loss, sft_loss
from .objective import Objective
from .recipe import Recipe, distill, make_trainer
from .spelling import Spelling, space_mask
from .trainer import DistillationTrainer
from .weighting import gradient_norms, gradmag_weights, weighted_loss

__all__ = [
    "align",
    "alignment_matrix",
    "ChatFormat",
    "CHATML_FORMAT",
    "GEMMA_FORMAT",
    "LLAMA3_FORMAT",
    "chat_format_of",
    "ParallelEncoder",
    "Example",
    "TokenSequence",
    "DistillationCollator",
    "pack_examples",
    "DistillationDataset",
    "read_documents",
    "hub_documents",
    "SequenceLogProbs",
    "sequence_logprobs",
    "ChunkLogProbs",
    "chunk_logprobs",
    "sft_loss",
    "alm_loss",
    "latents_loss",
    "gradient_norms",
    "gradmag_weights",
    "weighted_loss",
    "Objective",
    "DistillationTrainer",
    "Recipe",
    "distill",
    "make_trainer",
    "Spelling",
    "space_mask",
]
