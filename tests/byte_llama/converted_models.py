"""Converted folders, read as a user reads them, and where their rows come from."""

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def expected_sources(kind, tokenizer, byte_tokenizer):
    """The subword id behind every entry of the byte vocabulary, by its name; None where there is none."""
    vocabulary = tokenizer.get_vocab()
    characters = bytes_to_unicode()
    sources = []
    for byte in range(256):
        if kind == "llama":
            sources.append(vocabulary[characters[byte]])
        else:
            as_text = {32: "▁"}.get(byte, chr(byte) if byte < 128 else None)
            sources.append(vocabulary.get(as_text, vocabulary.get(f"<0x{byte:02X}>")))
    return sources + [vocabulary[byte_tokenizer.decode([index])] for index in range(256, len(byte_tokenizer))]
