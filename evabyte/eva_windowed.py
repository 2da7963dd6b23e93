"""EVA attention in plain PyTorch, window by window, on explicit products or PyTorch's fused attention."""

from typing import Protocol

import torch
from torch import Tensor, nn

MIN_QUERY_BLOCK = 128  # queries attended to at a time, at least: smaller products are slow


class Attend(Protocol):
    """Softmax attention of `query` [B, H, Q, D] over `key`, `value` [B, H, K, D]; returns [B, H, Q, D].

    `mask` is None or additive (0 or -inf), in the query's dtype, broadcastable to [B, H, Q, K].
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, fp32_softmax: bool
    ) -> Tensor: ...


def attend_naive(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, fp32_softmax: bool
) -> Tensor:
    """Attention by explicit matrix products; with `fp32_softmax` logits and softmax are taken in float32."""
    logits = query @ key.transpose(-1, -2)
    if fp32_softmax:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits * scale
    if mask is not None:
        logits = logits + mask
    return logits.softmax(dim=-1).to(value.dtype) @ value


def attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, fp32_softmax: bool
) -> Tensor:
    """Attention by PyTorch's fused kernels, which always accumulate in float32.

    In low precision on a CPU their backward pass is slower than plain products over the short rows of one window.
    """
    learning = torch.is_grad_enabled() and query.requires_grad
    if query.device.type == "cpu" and learning and query.dtype != torch.float32:
        return attend_naive(query, key, value, mask, scale, fp32_softmax)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summary_key: Tensor,
    summary_value: Tensor,
    *,
    window_size: int,
    chunk_size: int,
    attend: Attend,
    prior: int = 0,
    missing: Tensor | None = None,
    fp32_softmax: bool = True,
) -> Tensor:
    """EVA attention for sequences whose first key stands at a window border.

    Args:
        query: [B, H, Q, D], belonging to the last Q positions.
        key, value: [B, H, N, D], Q <= N.
        summary_key, summary_value: [B, H, prior + C, D]: first the summaries of windows before the first key, then, in
            order, those of the windows among the keys (all but the last one are needed).
        missing: None, or int64 [B], how many of the first `prior` summaries each row does not have.

    Returns:
        [B, H, Q, D].
    """
    length, first_query = key.shape[2], key.shape[2] - query.shape[2]
    scale = query.shape[3] ** -0.5
    prior_mask = None
    if missing is not None:
        hidden = torch.arange(prior, device=query.device) < missing[:, None]
        prior_mask = query.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]
    outputs = []
    block = max(window_size // 8, MIN_QUERY_BLOCK)
    begin = first_query // window_size * window_size
    spans = [(start, min(start + window_size, length)) for start in range(begin, length, window_size)]
    # Queries go block by block, so that little is computed of what causality hides.
    cuts = [list(range(max(start, first_query), stop, block)) for start, stop in spans]
    ends = [*(first for starts in cuts for first in starts), length][1:]
    # `split` has one gradient of full length; slices have one each, and as many additions.
    sizes = [last - first for first, last in zip([first_query, *ends], ends, strict=False)]
    block_queries = iter(zip(query.split(sizes, dim=2), ends, strict=True))
    token_keys, token_values = (states[:, :, begin:].split(window_size, dim=2) for states in (key, value))
    for (start, _), window_key, window_value, starts in zip(spans, token_keys, token_values, cuts, strict=True):
        visible = prior + start // chunk_size
        keys = torch.cat((summary_key[:, :, :visible], window_key), dim=2)
        values = torch.cat((summary_value[:, :, :visible], window_value), dim=2)
        for first in starts:
            block_query, last = next(block_queries)
            seen = visible + last - start
            mask = None
            if last - first > 1 or prior_mask is not None:
                mask = _causal_mask(last - first, seen, query)
                if prior_mask is not None:
                    mask = mask.expand(query.shape[0], 1, -1, -1).clone()
                    mask[..., :prior] += prior_mask
            whole = seen == keys.shape[2]
            seen_keys, seen_values = (keys, values) if whole else (keys[:, :, :seen], values[:, :, :seen])
            outputs.append(attend(block_query, seen_keys, seen_values, mask, scale, fp32_softmax))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _causal_mask(queries: int, keys: int, like: Tensor) -> Tensor:
    """Additive [1, 1, queries, keys] mask under which the last query sees all keys, the one before all but one, ..."""
    mask = torch.full((queries, keys), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(keys - queries + 1)[None, None]
