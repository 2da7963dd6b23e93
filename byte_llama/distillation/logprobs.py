"""Log-probabilities at chosen ids only, with the logits held in float32 a few rows at a time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class SequenceLogProbs(NamedTuple):
    """What losses need of a model's predictions on a batch of sequences; float32, or float64 from float64 states.

    Attributes:
        tokens: [B, T], log-probability of each id given those before it; 0 for the first, which nothing predicts.
        spaces: None, or [B, T], log-probability that a space-like id follows each id.
    """

    tokens: Tensor
    spaces: Tensor | None = None


def sequence_logprobs(
    states: Tensor,
    input_ids: Tensor,
    space_mask: Tensor | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
    chunk_size: int = 1024,
) -> SequenceLogProbs:
    """Log-probabilities of the given ids, and of space-like ones, from logits or from hidden states.

    Differentiable. Nothing of the size of the logits is kept for the backward pass, which computes each chunk of rows
    again; from hidden states the logits never exist as a whole.

    Args:
        states: [B, T, V] logits, or with a `head` [B, T, H] hidden states, of any floating-point type.
        input_ids: int64 [B, T].
        space_mask: None, or bool [V], the space-like ids (see `space_mask`); at least one.
        head: None, or what makes logits [N, V] of hidden states [N, H]: the output embedding, with soft caps and all.
        chunk_size: number of rows whose logits are held in float32 at a time.

    Raises:
        ValueError: shapes do not fit, or `chunk_size` is less than 1.
    """
    if states.shape[:2] != input_ids.shape:
        raise ValueError(
            f"states must be [B, T, ...] for input_ids {tuple(input_ids.shape)}, but are {tuple(states.shape)}."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}.")
    batch, length = input_ids.shape
    following = torch.cat((input_ids[:, 1:], input_ids[:, :1]), dim=1)  # after the last any id does: it is not used
    outputs = []
    # `split`, unlike indexing, gathers the gradients of all chunks in one tensor, once.
    for rows, targets in zip(
        states.flatten(0, 1).split(chunk_size), following.flatten().split(chunk_size), strict=True
    ):
        if torch.is_grad_enabled():
            outputs.append(
                checkpoint(
                    _chunk_logprobs, rows, targets, space_mask, head, use_reentrant=False, preserve_rng_state=False
                )
            )
        else:
            outputs.append(_chunk_logprobs(rows, targets, space_mask, head))
    tokens, *spaces = (torch.cat(parts).view(batch, length) for parts in zip(*outputs, strict=True))
    return SequenceLogProbs(torch.nn.functional.pad(tokens[:, :-1], (1, 0)), spaces[0] if spaces else None)


def _chunk_logprobs(
    rows: Tensor, targets: Tensor, space_mask: Tensor | None, head: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, ...]:
    """Log-probabilities [N] of the targets [N], and of all space-like ids together [N] if there is a mask."""
    logits = rows if head is None else head(rows)
    if space_mask is not None and space_mask.shape != logits.shape[-1:]:
        raise ValueError(
            f"space_mask must have one entry for each of the {logits.shape[-1]} logits, but has "
            f"{tuple(space_mask.shape)}: pass vocab_size when making it."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.logsumexp(-1)
    # Rounding must not make a probability larger than one.
    tokens = (logits.gather(-1, targets[:, None]).squeeze(-1) - total).clamp(max=0)
    if space_mask is None:
        return (tokens,)
    return tokens, (logits.masked_fill(~space_mask, float("-inf")).logsumexp(-1) - total).clamp(max=0)


__all__ = ["SequenceLogProbs", "sequence_logprobs"]
