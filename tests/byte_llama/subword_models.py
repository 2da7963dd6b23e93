"""Tiny random in-tree models with small tokenizers trained on the spot: what conversion starts from."""

import json
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Der flinke Fuchs springt über den faulen Hund.\n\nNaïve cafés: 42 €!",
    "the user asked the system, the model answered the user: 😀\t",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_TOKEN = (0xC0, 0xC1, 0xFF)  # bytes that the SentencePiece style vocabulary lacks, as none occurs in UTF-8
KINDS = ["llama", "gemma2"]


@cache
def byte_level_bpe() -> PreTrainedTokenizerBase:
    """Llama 3 style. Do not change it: tests share it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|start|>", "<|im_start|>", "<|im_end|>", "<|unused|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", backend.token_to_id("<|start|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|im_end|>", chat_template=CHATML
    )


@cache
def sentencepiece_bpe() -> PreTrainedTokenizerBase:
    """Gemma style: spaces written as U+2581, byte fallback beside characters. Do not change it: tests share it."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256) if byte not in WITHOUT_TOKEN]
    # As in Gemma 2, a newline stands before the byte-fallback tokens and other characters behind them.
    tokens = list(dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", "\n", *fallback, *model["vocab"]]))
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    parts = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **parts)


def subword_model(kind: str, num_layers: int = 3) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random model, in eval mode, and its tokenizer. Gemma 2 has a tied output layer, Llama one of its own.

    Either has more embeddings than tokens, as many published models do.
    """
    tokenizer = byte_level_bpe() if kind == "llama" else sentencepiece_bpe()
    sizes = {"vocab_size": len(tokenizer) + 5, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    common = {**sizes, **heads, **ends, "num_hidden_layers": num_layers, "pad_token_id": tokenizer.pad_token_id}
    if kind == "llama":
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False, rope_parameters=rope))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**common, sliding_window=12, query_pre_attn_scalar=16))
        model.set_attn_implementation("eager")  # others may leave its soft caps out
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval(), tokenizer
