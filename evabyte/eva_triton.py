"""EVA attention on Triton kernels, as custom operators that autograd, torch.compile and export understand.

Imported only when the backend "eva_triton" is used. With TRITON_INTERPRET=1 in the environment before that, the kernels
run on CPU tensors in Triton's interpreter.
"""

import math
from functools import cache

import torch
from torch import Tensor

from .eva_decode_kernels import eva_decode_fwd_kernel
from .eva_kernels import (
    eva_delta_kernel,
    eva_windowed_bwd_dkv_kernel,
    eva_windowed_bwd_dq_kernel,
    eva_windowed_fwd_kernel,
    triton,
)
from .eva_summary_kernels import eva_summary_bwd_kernel, eva_summary_fwd_kernel
from .eva_tuning import Blocks, Tuning, device_class, tuning

# Also loaded as remote code, possibly beside the installed package: each copy registers operators of its own.
NAMESPACE = __name__.replace(".", "_").replace("-", "_")
INTERPRETED = not isinstance(eva_windowed_fwd_kernel, triton.runtime.jit.JITFunction)


def launch(blocks: Blocks, head_dim: int) -> dict[str, int]:
    """Block sizes and warps as the kernels take them."""
    sizes = {"D": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}
    return sizes | {"BM": blocks.rows, "BN": blocks.columns, "num_warps": blocks.warps, "num_stages": blocks.stages}


def _tuning(query: Tensor) -> Tuning:
    return tuning(device_class(query.device), query.element_size(), query.shape[-1])


def _check(query: Tensor) -> None:
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"attn_implementation='eva_triton' computes in float32, float16 or bfloat16, not {query.dtype}: use 'sdpa'."
        )
    if query.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "attn_implementation='eva_triton' needs a GPU; on a CPU use 'sdpa', or set TRITON_INTERPRET=1 before the "
            "kernels are imported to run them in Triton's interpreter."
        )


def _rows(*tensors: Tensor) -> list[Tensor]:
    """The same tensors with a contiguous last dimension, as the kernels read them."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _like(tensor: Tensor) -> Tensor:
    """Uninitialised [B, H, N, D], laid out as [B, N, H, D]: what follows attention joins the heads without a copy."""
    batch, heads, length, head_dim = tensor.shape
    return tensor.new_empty(batch, length, heads, head_dim).transpose(1, 2)


@torch.library.custom_op(f"{NAMESPACE}::windowed", mutates_args=())
def windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summary_key: Tensor,
    summary_value: Tensor,
    sequences: Tensor | None,
    longest: int,
    prior: int,
    window_size: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Attention of sequences whose first key stands at a window border.

    Args:
        query: [B, H, Q, D], belonging to the last Q positions; key, value: [B, H, N, D].
        summary_key, summary_value: [B, H, S, D].
        sequences: None when every row is one sequence, else the int32 [G, 6] table that `eva_kernels.py` describes;
            output outside of the sequences is zero.
        longest: queries of the longest sequence.
        prior: without a table, summaries of windows before the first key.

    Returns:
        [B, H, Q, D] in the query's dtype, and the log-sum-exp in base 2, float32 [B, H, Q].
    """
    _check(query)
    query, key, value, summary_key, summary_value = _rows(query, key, value, summary_key, summary_value)
    batch, heads, queries, head_dim = query.shape
    output = _like(query)
    if sequences is not None:
        output.zero_()
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    sizes = launch(_tuning(query).forward, head_dim)
    blocks = triton.cdiv(longest, sizes["BM"])
    eva_windowed_fwd_kernel[(blocks * (batch if sequences is None else sequences.shape[0]), heads)](
        query, key, value, summary_key, summary_value, sequences, output, lse,
        *_strides(query, key, value, summary_key, summary_value, output),
        queries, key.shape[2], prior, window_size, window_size // chunk_size, blocks, head_dim**-0.5 / math.log(2),
        **sizes,
    )  # fmt: skip
    return output, lse


@windowed.register_fake
def _(query, key, value, summary_key, summary_value, *rest):  # type: ignore[no-untyped-def]
    return _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::windowed_backward", mutates_args=())
def windowed_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summary_key: Tensor,
    summary_value: Tensor,
    sequences: Tensor | None,
    output: Tensor,
    lse: Tensor,
    longest: int,
    prior: int,
    window_size: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, summary_key and summary_value, each in its tensor's shape and dtype."""
    grad, query, key, value, summary_key, summary_value = _rows(grad, query, key, value, summary_key, summary_value)
    batch, heads, queries, head_dim = query.shape
    chunks, scale = window_size // chunk_size, head_dim**-0.5
    scales, table_length = (scale, scale / math.log(2)), batch if sequences is None else sequences.shape[0]
    tuned = _tuning(query)

    delta = torch.empty_like(lse)
    sizes = launch(tuned.query_grad, head_dim)
    by_rows = {name: sizes[name] for name in ("D", "BLOCK_D", "BM", "num_warps")}
    eva_delta_kernel[(triton.cdiv(queries, sizes["BM"]), batch * heads)](
        output, grad, delta, *_strides(output, grad), heads, queries, **by_rows
    )
    query_grad, key_grad, value_grad = _like(query), _like(key), _like(value)
    # Summaries of the last window are seen by no query, keys outside of the sequences neither: no program writes them.
    summary_grads = [_like(states).zero_() for states in (summary_key, summary_value)]
    if sequences is not None:
        for gradient in (query_grad, key_grad, value_grad):
            gradient.zero_()
    blocks = triton.cdiv(longest, sizes["BM"])
    eva_windowed_bwd_dq_kernel[(blocks * table_length, heads)](
        query, key, value, summary_key, summary_value, sequences, grad, lse, delta, query_grad,
        *_strides(query, key, value, summary_key, summary_value, grad, query_grad),
        queries, key.shape[2], prior, window_size, chunks, blocks, *scales, **sizes,
    )  # fmt: skip

    sizes = launch(tuned.key_grad, head_dim)
    most_keys = longest + key.shape[2] - queries
    for keys, values, gradients, most, is_summary in (
        (key, value, (key_grad, value_grad), most_keys, False),
        (summary_key, summary_value, summary_grads, prior + (most_keys - 1) // window_size * chunks, True),
    ):
        if sequences is not None and is_summary:
            most = keys.shape[2]
        if most:
            blocks = triton.cdiv(most, sizes["BN"])
            eva_windowed_bwd_dkv_kernel[(blocks * table_length, heads)](
                query, keys, values, sequences, grad, lse, delta, *gradients,
                *_strides(query, keys, values, grad, gradients[0]),
                queries, key.shape[2], prior, window_size, chunks, blocks, *scales, IS_SUMMARY=is_summary, **sizes,
            )  # fmt: skip
    return query_grad, key_grad, value_grad, summary_grads[0], summary_grads[1]


@windowed_backward.register_fake
def _(grad, query, key, value, summary_key, summary_value, *rest):  # type: ignore[no-untyped-def]
    return tuple(_like(tensor) for tensor in (query, key, value, summary_key, summary_value))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.sizes = inputs[6:]


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    return (*windowed_backward(grad, *ctx.saved_tensors, *ctx.sizes), *[None] * 5)


windowed.register_autograd(_backward, setup_context=_save)


def summary_launch(chunk_size: int, head_dim: int) -> dict[str, int]:
    """About 2,048 elements of keys in a program."""
    block_c, block_d = triton.next_power_of_2(chunk_size), max(16, triton.next_power_of_2(head_dim))
    sizes = {"CHUNK": chunk_size, "BLOCK_C": block_c, "D": head_dim, "BLOCK_D": block_d}
    return sizes | {"BC": max(1, 2048 // (block_c * block_d)), "num_warps": 4 if block_c * block_d <= 4096 else 8}


@torch.library.custom_op(f"{NAMESPACE}::summarize", mutates_args=())
def summarize(
    keys: Tensor,
    values: Tensor,
    adaptive_mu_k: Tensor,
    adaptive_phi: Tensor,
    chunk_size: int,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summary keys and values [B, H, S, D] of the chunks of keys and values [B, H, N, D].

    The learned vectors are [H, D]; softmaxes are taken in float32. `starts`, int32 [B, S], is the slot of each chunk's
    first token, or -1 for none, whose summary is zero; without it chunks lie one behind the other, N = S * chunk_size.
    """
    _check(keys)
    keys, values = _rows(keys, values)
    batch, heads, length, head_dim = keys.shape
    chunks = length // chunk_size if starts is None else starts.shape[1]
    summary_keys = keys.new_empty(batch, heads, chunks, head_dim)
    summary_values = torch.empty_like(summary_keys)
    if chunks:
        sizes = summary_launch(chunk_size, head_dim)
        eva_summary_fwd_kernel[(triton.cdiv(chunks, sizes["BC"]), batch * heads)](
            keys, values, adaptive_mu_k.float().contiguous(), adaptive_phi.float().contiguous(), starts,
            summary_keys, summary_values, *_strides(keys, values, summary_keys),
            heads, chunks, head_dim**-0.5, **sizes,
        )  # fmt: skip
    return summary_keys, summary_values


@summarize.register_fake
def _(keys, values, adaptive_mu_k, adaptive_phi, chunk_size, starts=None):  # type: ignore[no-untyped-def]
    chunks = keys.shape[2] // chunk_size if starts is None else starts.shape[1]
    shape = (*keys.shape[:2], chunks, keys.shape[3])
    return keys.new_empty(shape), keys.new_empty(shape)


@torch.library.custom_op(f"{NAMESPACE}::summarize_backward", mutates_args=())
def summarize_backward(
    key_grad: Tensor,
    value_grad: Tensor,
    keys: Tensor,
    values: Tensor,
    adaptive_mu_k: Tensor,
    adaptive_phi: Tensor,
    chunk_size: int,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of keys, values and both learned vectors."""
    keys, values = _rows(keys, values)
    key_grad, value_grad = key_grad.contiguous(), value_grad.contiguous()
    batch, heads, _, head_dim = keys.shape
    chunks = key_grad.shape[2]
    keys_grad, values_grad = _like(keys), _like(values)
    if starts is not None:
        keys_grad.zero_()
        values_grad.zero_()
    sizes = summary_launch(chunk_size, head_dim)
    programs = triton.cdiv(chunks, sizes["BC"])
    mu_parts = torch.zeros(batch, heads, programs, head_dim, dtype=torch.float32, device=keys.device)
    phi_parts = torch.zeros_like(mu_parts)
    if chunks:
        eva_summary_bwd_kernel[(programs, batch * heads)](
            keys, values, adaptive_mu_k.float().contiguous(), adaptive_phi.float().contiguous(), starts,
            key_grad, value_grad, keys_grad, values_grad, mu_parts, phi_parts,
            *_strides(keys, values, key_grad, keys_grad), heads, chunks, head_dim**-0.5, **sizes,
        )  # fmt: skip
    return (
        keys_grad,
        values_grad,
        mu_parts.sum((0, 2)).to(adaptive_mu_k.dtype),
        phi_parts.sum((0, 2)).to(adaptive_phi.dtype),
    )


@summarize_backward.register_fake
def _(key_grad, value_grad, keys, values, adaptive_mu_k, adaptive_phi, chunk_size, starts=None):  # type: ignore[no-untyped-def]
    learned = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (adaptive_mu_k, adaptive_phi)]
    return _like(keys), _like(values), *learned


def _save_summaries(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk_size, starts = inputs
    ctx.save_for_backward(*tensors, starts)


def _summaries_backward(ctx, key_grad, value_grad):  # type: ignore[no-untyped-def]
    *tensors, starts = ctx.saved_tensors
    return (*summarize_backward(key_grad, value_grad, *tensors, ctx.chunk_size, starts), None, None)


summarize.register_autograd(_summaries_backward, setup_context=_save_summaries)


def decode_launch(blocks: Blocks, head_dim: int, tokens: int) -> dict[str, int]:
    """`launch` of the decoding kernel, whose blocks hold as many rows as there are new tokens, if not more than fit."""
    sizes = launch(blocks, head_dim)
    most = sizes.pop("BM")
    return sizes | {"BT": min(most, max(16, triton.next_power_of_2(tokens)))}


MIN_SPLIT = 256  # columns that a program of the decoding kernel reads at least


@torch.library.custom_op(f"{NAMESPACE}::decode", mutates_args=())
def decode(query: Tensor, keys: Tensor, values: Tensor, first: Tensor, open_end: Tensor, among_new: Tensor) -> Tensor:
    """Attention of new tokens [B, H, T, D] over a slice of the cache [B, H, K, D]; see `EvaLayout.window_bounds`."""
    _check(query)
    query, keys, values = _rows(query, keys, values)
    batch, heads, tokens, head_dim = query.shape
    columns = keys.shape[2]
    sizes = decode_launch(_tuning(query).decode, head_dim, tokens)
    token_blocks = triton.cdiv(tokens, sizes["BT"])
    programs = batch * heads * token_blocks
    wanted = max(1, min(2 * _processors(query.device) // programs, columns // MIN_SPLIT))
    split = triton.cdiv(triton.cdiv(columns, wanted), 64) * 64
    splits = triton.cdiv(columns, split)
    parts = torch.empty(batch, heads, splits, tokens, head_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, heads, splits, tokens, dtype=torch.float32, device=query.device)
    eva_decode_fwd_kernel[(token_blocks, splits, batch * heads)](
        query, keys, values, first, open_end, among_new, parts, lse,
        *_strides(query, keys, values), among_new.stride(0) if among_new.shape[0] > 1 else 0,
        heads, tokens, columns, split, head_dim**-0.5 / math.log(2), **sizes,
    )  # fmt: skip
    if splits == 1:
        return parts[:, :, 0].to(query.dtype)
    weights = torch.softmax(lse * math.log(2), dim=2)
    return torch.einsum("bhst,bhstd->bhtd", weights, parts).to(query.dtype)


@decode.register_fake
def _(query, keys, values, first, open_end, among_new):  # type: ignore[no-untyped-def]
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few in the interpreter, so that keys are split there too."""
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
