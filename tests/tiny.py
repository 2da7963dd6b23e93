"""Tiny random models whose predictions are far from uniform, and the inputs to try them on."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from evabyte import EvaByteConfig, EvaByteForCausalLM

FIRST_BYTE = 64


@cache
def tiny_model(
    window_size: int = 16,
    chunk_size: int = 4,
    num_pred_heads: int = 4,
    backend: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> EvaByteForCausalLM:
    """The same model for the same arguments, in eval mode. Do not change it: tests share it."""
    return fresh_model(window_size, chunk_size, num_pred_heads, backend, dtype, **config)


def fresh_model(
    window_size: int = 16,
    chunk_size: int = 4,
    num_pred_heads: int = 4,
    backend: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> EvaByteForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, **config}
    model = EvaByteForCausalLM(
        EvaByteConfig(
            window_size=window_size,
            chunk_size=chunk_size,
            num_pred_heads=num_pred_heads,
            attn_implementation=backend,
            **sizes,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "adaptive" in name or "embed" in name else 0.3
            parameter.normal_(0.0, scale, generator=generator)
    return model.to(dtype).eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """int64 ids of bytes."""
    return torch.randint(FIRST_BYTE, 320, shape, generator=torch.Generator().manual_seed(seed))


def pad_rows(rows: list[Tensor], offsets: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Rows placed at the given offsets of a [B, length] batch of padding, and its attention mask."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, (tokens, offset) in enumerate(zip(rows, offsets, strict=True)):
        ids[row, offset : offset + len(tokens)] = tokens
        mask[row, offset : offset + len(tokens)] = 1
    return ids, mask


def pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    return pad_rows(rows, [longest - len(row) for row in rows], longest)


@torch.no_grad()
def logits_alone(model: EvaByteForCausalLM, ids: Tensor) -> Tensor:
    """Logits [N, heads, vocab] of one sequence [N], in one forward without a cache."""
    return model(ids[None], use_cache=False, return_all_pred_logits=True).logits[0]
