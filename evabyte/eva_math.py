"""The mathematics of EVA attention, in plain PyTorch.

The mathematics (Zheng et al., "Efficient Attention via Control Variates", arXiv 2302.04542, in EvaByte's form). A chunk
is `chunk_size` consecutive positions of one sequence; its summary is one key and one value, per head with two learned
vectors mu and phi and scale = head_dim ** -0.5:

    a_j = softmax_j(mu . k_j)                              K~ = sum_j a_j k_j
    b_j = softmax_j(scale * (phi . k_j - |k_j|^2 / 2))     V~ = sum_j b_j v_j

The query at position i attends, in one softmax with logits scale * q . key, to the keys j <= i of its own window
(i // window_size == j // window_size) and to the summaries of all chunks of earlier windows.
"""

import torch
from torch import Tensor


def chunk_weights(
    keys: Tensor, adaptive_mu_k: Tensor, adaptive_phi: Tensor, chunk_size: int, fp32_softmax: bool = True
) -> tuple[Tensor, Tensor]:
    """Weights with which each position enters its chunk's summary key and summary value.

    Args:
        keys: [B, H, n * chunk_size, D].
        adaptive_mu_k, adaptive_phi: any shape of H * D elements, such as the published [1, H, 1, 1, D].

    Returns:
        two tensors [B, H, n, chunk_size] that sum to one over the last dimension, in the keys' dtype.
    """
    heads, head_dim = keys.shape[1], keys.shape[3]
    learned = torch.stack((adaptive_mu_k.reshape(heads, head_dim), adaptive_phi.reshape(heads, head_dim)), dim=-1)
    precise = keys.to(torch.promote_types(keys.dtype, torch.float32)) if fp32_softmax else keys
    dots = precise @ learned.to(precise.dtype)  # [B, H, n * chunk_size, 2]
    half_square_norm = precise.square().sum(-1) / 2
    key_logits = dots[..., 0]
    value_logits = (dots[..., 1] - half_square_norm) * head_dim**-0.5
    key_weights = key_logits.unflatten(2, (-1, chunk_size)).softmax(dim=-1)
    value_weights = value_logits.unflatten(2, (-1, chunk_size)).softmax(dim=-1)
    return key_weights.to(keys.dtype), value_weights.to(keys.dtype)


def summarize_chunks(
    keys: Tensor,
    values: Tensor,
    adaptive_mu_k: Tensor,
    adaptive_phi: Tensor,
    chunk_size: int,
    fp32_softmax: bool = True,
) -> tuple[Tensor, Tensor]:
    """Summary key and value of every chunk.

    Args:
        keys, values: [B, H, n * chunk_size, D], rotated, starting at a chunk border.

    Returns:
        summary keys and summary values, each [B, H, n, D].
    """
    if keys.shape[2] == 0:
        return keys, values
    key_weights, value_weights = chunk_weights(keys, adaptive_mu_k, adaptive_phi, chunk_size, fp32_softmax)
    chunked_keys, chunked_values = (states.unflatten(2, (-1, chunk_size)) for states in (keys, values))
    summary_keys = (key_weights.unsqueeze(-2) @ chunked_keys).squeeze(-2)
    summary_values = (value_weights.unsqueeze(-2) @ chunked_values).squeeze(-2)
    return summary_keys, summary_values


def naive_eva_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    adaptive_mu_k: Tensor,
    adaptive_phi: Tensor,
    *,
    window_size: int,
    chunk_size: int,
    index: Tensor,
    document: Tensor,
    fp32_softmax: bool = True,
) -> Tensor:
    """The specification: the formulas of this module over all pairs of positions, with no regard for cost.

    Args:
        query, key, value: [B, H, N, D].
        index: int64 [B, N], each token's position counted from the first token of its own document.
        document: int64 [B, N], which document of its row a token belongs to; -1 for padding.

    Returns:
        [B, H, N, D]; zero at padding.
    """
    heads, length, head_dim = query.shape[1:]
    scale = head_dim**-0.5
    accumulate = torch.promote_types(query.dtype, torch.float32) if fp32_softmax else query.dtype
    mu, phi = (learned.reshape(heads, 1, head_dim).to(key.dtype) for learned in (adaptive_mu_k, adaptive_phi))
    index, document = index.to(query.device), document.to(query.device)
    window, chunk = index // window_size, index // chunk_size
    real = document >= 0

    same_document = (document[:, :, None] == document[:, None, :]) & real[:, None, :]
    same_chunk = same_document & (chunk[:, :, None] == chunk[:, None, :])  # [B, N, N]
    own_window = same_document & (window[:, :, None] == window[:, None, :]) & (index[:, :, None] >= index[:, None, :])
    # One summary a chunk: it stands in the column of the chunk's first position.
    summarised = (index % chunk_size == 0) & real
    earlier_window = same_document & (window[:, :, None] > window[:, None, :]) & summarised[:, None, :]

    def softmax_in_chunk(logits: Tensor) -> Tensor:  # [B, H, N] -> [B, H, N, N], row i: the weights in i's chunk
        logits = logits.to(accumulate)[:, :, None, :].expand(-1, -1, length, -1)
        weights = logits.masked_fill(~same_chunk[:, None], float("-inf")).softmax(dim=-1)
        return weights.nan_to_num(0.0).to(key.dtype)

    summary_key = softmax_in_chunk((mu * key).sum(-1)) @ key
    summary_value = softmax_in_chunk(scale * ((phi * key).sum(-1) - key.square().sum(-1) / 2)) @ value

    logits = torch.cat((query @ key.transpose(-1, -2), query @ summary_key.transpose(-1, -2)), dim=-1)
    visible = torch.cat((own_window, earlier_window), dim=-1)[:, None]
    logits = (logits.to(accumulate) * scale).masked_fill(~visible, float("-inf"))
    weights = logits.softmax(dim=-1).masked_fill(~real[:, None, :, None], 0.0).to(value.dtype)
    return weights @ torch.cat((value, summary_value), dim=2)
