"""Models that spell what they are made to: the next id is a function of the last one."""

import sys
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent / "byte_llama"))
import small_models
import small_tokenizers
import tiny

from evabyte import EvaByteTokenizer

SOURCE = {"byte Llama": "llama3_1", "byte Gemma 2": "gemma2"}
KIND = {"byte Llama": "llama", "byte Gemma 2": "gemma2"}
# No byte occurs twice in all of these, so the last byte tells what comes next.
SPELLED = {"a": "é漢😀.", "b": "xyz", "c": "Qrs"}
ENDLESS = "b"


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of one of our models ("EvaByte", "byte Llama", "byte Gemma 2"), with a chat template."""
    return EvaByteTokenizer() if name == "EvaByte" else small_tokenizers.published(SOURCE[name])


@torch.no_grad()
def speller(name: str):
    """A model that writes `SPELLED[letter]` after a text that ends in the letter, and ends; "b" goes round for ever.

    To a chat it says what it says after "a".
    """
    tokenizer = tokenizer_of(name)
    after: dict[int, int] = {}
    for letter, text in SPELLED.items():
        ids = tokenizer.encode(letter + text, add_special_tokens=False)
        after.update(pairwise([*ids, ids[1] if letter == ENDLESS else tokenizer.eos_token_id]))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    after[prompt["input_ids"][-1]] = after[tokenizer.encode("a", add_special_tokens=False)[0]]

    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if name == "EvaByte":
        model = tiny.fresh_model(window_size=32, hidden_size=64, **special)
    else:
        sizes = {"hidden_size": 64, "vocab_size": len(tokenizer), "max_position_embeddings": 4096, **special}
        if name == "byte Gemma 2":
            sizes |= {"final_logit_softcapping": None, "tie_word_embeddings": False}
        model = small_models.fresh_model(KIND[name], **sizes)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("o_proj.weight", "down_proj.weight", "expand_embed_tokens.weight")):
            parameter.zero_()  # nothing but the last id reaches the output
        elif "norm" in parameter_name:
            parameter.fill_(1.0)
    embedded, heads = model.get_input_embeddings().weight, model.lm_head.weight.zero_()
    embedded.normal_(generator=torch.Generator().manual_seed(0))
    for last in after:
        following = last
        for first_row in range(0, len(heads), model.config.vocab_size):  # EvaByte's heads, one below the other
            following = after.get(following, following)
            heads[first_row + following] += embedded[last]
    return model
