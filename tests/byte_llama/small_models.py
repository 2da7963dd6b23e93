"""Models of the goldens, and tiny random ones over an alphabet so small that matches are frequent and long."""

from functools import cache

import torch
from goldens_io import load_golden
from torch import Tensor

from byte_llama import ByteGemma2Config, ByteGemma2ForCausalLM, ByteLlamaConfig, ByteLlamaForCausalLM

CLASSES = {"llama": (ByteLlamaConfig, ByteLlamaForCausalLM), "gemma2": (ByteGemma2Config, ByteGemma2ForCausalLM)}
KINDS = list(CLASSES)
LETTERS, PAD, VOCABULARY, SUBWORDS = 4, 6, 8, 50


def golden_model(case: str):
    """A golden and its model, in eval mode."""
    golden = load_golden(case, "byte_llama/model")
    config_class, model_class = CLASSES[case.split("_")[0]]
    model = model_class(config_class.from_dict(dict(golden.facts["config"])))
    weights = {name.removeprefix("weights."): t for name, t in golden.tensors.items() if name.startswith("weights.")}
    absent, unknown = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert not unknown and {name for name in absent if "subword_expansion" not in name} == tied
    return golden, model.eval()


@cache
def dictionary() -> list:
    """Paths of up to 6 letters, in the published form; short ones are missing here and there."""
    generator = torch.Generator().manual_seed(3)
    paths = [torch.randint(1, LETTERS + 1, (1 + n % 6,), generator=generator).tolist() for n in range(SUBWORDS - 1)]
    return [{",".join(map(str, path)): 2 + subword for subword, path in enumerate(paths)}, []]


def fresh_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **overrides):
    """A random model whose predictions hang on the subwords, in eval mode."""
    config_class, model_class = CLASSES[kind]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    special = {"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": PAD}
    expansion = {
        "expand_input_ids": True,
        "expand_input_ids_vocab_size": SUBWORDS,
        "expand_input_ids_dict": dictionary(),
    }
    own = {"sliding_window": 12} if kind == "gemma2" else {}
    config = config_class(**{**sizes, **heads, **special, **expansion, **own, **overrides})
    model = model_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = {"expand_embed_tokens": 1.0, "embed_tokens": 0.3}.get(name.split(".")[-2], 0.25)
            parameter.normal_(0.0, scale, generator=generator)
    return model.to(dtype).eval()


@cache
def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **overrides):
    """`fresh_model`, the same object for the same arguments. Do not change it: tests share it."""
    return fresh_model(kind, dtype, **overrides)


def letters(*shape: int, seed: int = 0) -> Tensor:
    """int64 ids that occur in subwords."""
    return torch.randint(0, LETTERS, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_alone(model, ids: Tensor) -> Tensor:
    """Logits [N, vocabulary] of one sequence [N], in one forward without a cache."""
    return model(ids[None], use_cache=False).logits[0]
