"""Attention of draft trees that reach past the window that is open in the cache.

A node beyond the border no longer sees the raw tokens of the open window but its chunks' summaries, and the chunks that
contain drafted bytes differ from path to path. This happens once in `window_size` positions, so plain PyTorch serves
every backend. Trees within the window need none of this: they are ordinary attention under a mask.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .eva_layout import DraftTree, EvaLayout


def tree_attention_across_windows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: EvaLayout,
    tree: DraftTree,
    summarize: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    fp32_softmax: bool,
) -> Tensor:
    """EVA attention of draft nodes, each as if its path were the row's continuation.

    Args:
        query: [B, H, N, D], the nodes.
        keys, values: [B, H, S + R + N, D], as `EvaLayout.window_mask` describes them.
        summarize: keys and values [B, H, n * chunk_size, D] -> summaries [B, H, n, D].

    Returns:
        [B, H, N, D].
    """
    most_summaries = max(layout.past) // layout.window_size * (layout.window_size // layout.chunk_size)
    rows = []
    for row, past in enumerate(layout.past):
        # Only what is this row's own: its summaries, its open tokens, its nodes.
        first = most_summaries - past // layout.window_size * (layout.window_size // layout.chunk_size)
        last = most_summaries + past % layout.window_size + layout.length
        own_tree = row if tree.mask.shape[0] > 1 else 0
        rows.append(
            _one_row(
                query[row : row + 1],
                keys[row : row + 1, :, first:last],
                values[row : row + 1, :, first:last],
                past % layout.window_size,
                tree.mask[own_tree].to(query.device),
                tree.depth[own_tree].to(query.device),
                layout,
                summarize,
                fp32_softmax,
            )
        )
    return torch.cat(rows)


def _one_row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    open_tokens: int,
    tree: Tensor,
    depth: Tensor,
    layout: EvaLayout,
    summarize: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    fp32_softmax: bool,
) -> Tensor:
    """One row: keys [1, H, S + open_tokens + N, D], tree [N, N], depth [N]; positions count from the open window."""
    window_size, chunk_size, nodes = layout.window_size, layout.chunk_size, layout.length
    summaries = keys.shape[2] - open_tokens - nodes
    position = open_tokens + depth
    window = position // window_size  # [N], 0: the open window
    token_position = torch.cat((torch.arange(open_tokens, device=keys.device), position))
    on_path = torch.cat((tree.new_ones(nodes, open_tokens), tree), dim=1)  # [N, open_tokens + N]
    token_keys, token_values = keys[:, :, summaries:], values[:, :, summaries:]

    # The chunks that hold committed tokens only are the same for all nodes; every later one is each node's own.
    shared_end = open_tokens // chunk_size * chunk_size
    own_end = max(int(window.max()) * window_size, shared_end)
    shared = summarize(token_keys[:, :, :shared_end], token_values[:, :, :shared_end])
    own_position = torch.arange(shared_end, own_end, device=keys.device)
    # token_at[i, p]: the token that stands at position p on node i's path; any token where the path does not reach.
    standing = on_path[:, None] & (token_position == own_position[:, None])  # [N, P, open_tokens + N]
    token_at = standing.to(torch.int64).argmax(-1)
    own = summarize(*(states[:, :, token_at.flatten()] for states in (token_keys, token_values)))
    own_keys, own_values = (states.unflatten(2, (nodes, -1)) for states in own)  # [1, H, N, P / c, D]

    sees_token = on_path & (token_position // window_size == window[:, None])
    sees_shared = (window > 0)[:, None].expand(-1, shared_end // chunk_size)
    sees_own = own_position[::chunk_size] // window_size < window[:, None]
    visible = torch.cat((tree.new_ones(nodes, summaries), sees_token, sees_shared, sees_own), dim=1)

    logits = torch.cat(
        (
            query @ keys.transpose(-1, -2),
            query @ shared[0].transpose(-1, -2),
            torch.einsum("bhnd,bhnpd->bhnp", query, own_keys),
        ),
        dim=-1,
    )
    if fp32_softmax:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = (logits * query.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    weights = logits.softmax(-1).to(values.dtype)
    common, own_weights = weights.split((weights.shape[-1] - own_keys.shape[3], own_keys.shape[3]), dim=-1)
    return common @ torch.cat((values, shared[1]), dim=2) + torch.einsum("bhnp,bhnpd->bhnd", own_weights, own_values)
