"""One tiny random model of every kind with a tokenizer that fits, for tests of evaluation."""

import sys
from functools import cache
from pathlib import Path

from tiny import fresh_model as fresh_evabyte

sys.path.insert(0, str(Path(__file__).parent / "byte_llama"))
import small_models
import subword_models

from byte_llama import byte_tokenizer_from
from evabyte import EvaByteTokenizer

KINDS = {"byte Llama": "llama", "byte Gemma 2": "gemma2", "subword Llama": "llama", "subword Gemma 2": "gemma2"}


@cache
def evaluated_model(name: str):
    """A model in eval mode and its tokenizer. Do not change them: tests share them."""
    if name == "EvaByte":
        return fresh_evabyte(max_position_embeddings=512), EvaByteTokenizer()
    kind = KINDS[name]
    if name.startswith("subword"):
        return subword_models.subword_model(kind)
    source = subword_models.byte_level_bpe() if kind == "llama" else subword_models.sentencepiece_bpe()
    special = {} if source.pad_token else {"pad_token": "<|unused|>"}
    tokenizer = byte_tokenizer_from(source, **special)
    ids = {part: getattr(tokenizer, part) for part in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return small_models.fresh_model(kind, vocab_size=len(tokenizer), max_position_embeddings=512, **ids), tokenizer
