"""The training loss of several prediction heads: head h at position t learns the byte at t + 1 + h."""

import torch
from torch import Tensor, nn

IGNORE = -100


def shift_for_heads(labels: Tensor, num_heads: int, first: int = 1, document: Tensor | None = None) -> Tensor:
    """Targets of every head from one label per position.

    Args:
        labels: int64 [B, N]; -100 is ignored.
        num_heads: number of heads.
        first: how far ahead head 0 looks in `labels`: 1, or 0 when they are already shifted by one.
        document: None, or int64 [B, N], document of each position, negative at padding. No head learns across the
            border of a document, nor from a padding position.

    Returns:
        int64 [B, N, num_heads], -100 where there is nothing to learn.
    """
    length = labels.shape[1]
    padded = nn.functional.pad(labels, (0, num_heads), value=IGNORE)
    targets = torch.stack([padded[:, first + head : first + head + length] for head in range(num_heads)], dim=-1)
    if document is not None:
        document = document.to(labels.device)
        beyond = nn.functional.pad(document, (0, num_heads), value=IGNORE)
        ahead = torch.stack([beyond[:, 1 + head : 1 + head + length] for head in range(num_heads)], dim=-1)
        learnable = (ahead == document[..., None]) & (document >= 0)[..., None]
        targets = targets.masked_fill(~learnable, IGNORE)
    return targets


def multibyte_loss(
    logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None, average: str = "heads"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all heads.

    Args:
        logits: [B, N, heads, vocab], any float dtype; the loss is taken in float32.
        targets: int64 [B, N, heads], -100 ignored.
        num_items_in_batch: when a batch is spread over several steps or devices, its number of labels; every head's sum
            is divided by it, so that the parts add up to the loss of the whole.
        average: "heads", the mean over heads of each head's mean; or "pairs", the mean over all labelled
            (position, head) pairs.

    Returns:
        the scalar loss in nats, and float32 [heads], each head's own mean; both carry gradients.
    """
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(targets.shape)
    sums = losses.sum((0, 1))
    counts = (targets != IGNORE).sum((0, 1))
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, device=sums.device)
        head_losses = sums / items
        loss = head_losses.mean() if average == "heads" else sums.sum() / items
    else:
        head_losses = sums / counts.clamp(min=1)
        if average == "heads":
            loss = head_losses.sum() / (counts > 0).sum().clamp(min=1)  # a head without labels has no mean
        else:
            loss = sums.sum() / counts.sum().clamp(min=1)
    return loss, head_losses
