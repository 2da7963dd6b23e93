"""What multibyte decoding returns beside the ids."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput


@dataclass(frozen=True)
class Step:
    """What one forward brought to one row.

    Attributes:
        bytes: ids it emitted; all but the last were drafted, the last is the model's own.
        sources: for each drafted one, which drafter proposed it (0 the first of a union, 1 the second).
        drafted: nodes of the row's tree, without the root.
    """

    bytes: list[int]
    sources: list[int]
    drafted: int


@dataclass
class MultibyteGenerateOutput(GenerateDecoderOnlyOutput):
    """What `multi_byte_generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: int64 [B, L], prompt and new bytes, padded on the right.
        acc_lengths: int64 [B, forwards], bytes that each forward brought, the prefill's single byte first.
        trace: with `return_trace`, per row a [`Step`] for every forward that brought it something.
        scores, logits: as `generate` returns them; zero where a row had already ended.
    """

    acc_lengths: Tensor | None = None
    trace: list[list[Step]] | None = None


def by_step(rows: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """One [B, vocab] tensor per new byte, zero where a row had ended."""
    if rows is None:
        return None
    blank = torch.zeros_like(next(row[0] for row in rows if row))
    longest = max(map(len, rows))
    return tuple(torch.stack([row[step] if step < len(row) else blank for row in rows]) for step in range(longest))
