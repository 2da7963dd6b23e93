"""EVA attention on Triton kernels, as custom operators that autograd, torch.compile and export understand.

Imported only when the backend "eva_triton" is used. With TRITON_INTERPRET=1 in the environment before that, the kernels
run on CPU tensors in Triton's interpreter.
"""

import math
from functools import cache

import torch
from torch import Tensor

from .eva_decode_kernels import eva_decode_fwd_kernel
from .eva_kernels import eva_windowed_bwd_dkv_kernel, eva_windowed_bwd_dq_kernel, eva_windowed_fwd_kernel, triton
from .eva_summary_kernels import eva_summary_bwd_kernel, eva_summary_fwd_kernel

# Also loaded as remote code, possibly beside the installed package: each copy registers operators of its own.
NAMESPACE = __name__.replace(".", "_").replace("-", "_")
INTERPRETED = not isinstance(eva_windowed_fwd_kernel, triton.runtime.jit.JITFunction)


def launch_sizes(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps; blocks shrink as the head dimension or the width of an element grows.

    Not tuned on a GPU yet: chosen so that nothing spills on sm_80 and sm_90 (see tests/evabyte/test_eva_kernels.py).
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    wide = block_d * dtype.itemsize
    if dtype.itemsize > 2:  # products in full precision are unrolled: small blocks, or they spill
        return {"BLOCK_D": block_d, "BM": 32 if wide <= 256 else 16, "BN": 16, "num_warps": 8, "num_stages": 1}
    if wide <= 128:
        return {"BLOCK_D": block_d, "BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2}
    if wide <= 256:
        return {"BLOCK_D": block_d, "BM": 128, "BN": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_D": block_d, "BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}


def _check(query: Tensor) -> None:
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


@torch.library.custom_op(f"{NAMESPACE}::windowed", mutates_args=())
def windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summary_key: Tensor,
    summary_value: Tensor,
    first_summary: Tensor,
    prior: int,
    window_size: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Attention of the last Q of N positions, as `eva_attention.windowed_attention` defines it.

    Args:
        query: [B, H, Q, D]; key, value: [B, H, N, D]; summary_key, summary_value: [B, H, S, D].
        first_summary: int32 [B], the first summary that a row has.

    Returns:
        [B, H, Q, D] in the query's dtype, and the log-sum-exp in base 2, float32 [B, H, Q].
    """
    _check(query)
    query, key, value, summary_key, summary_value = _rows(query, key, value, summary_key, summary_value)
    batch, heads, queries, head_dim = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    sizes = launch_sizes(head_dim, query.dtype)
    eva_windowed_fwd_kernel[(triton.cdiv(queries, sizes["BM"]), batch * heads)](
        query, key, value, summary_key, summary_value, first_summary, output, lse,
        *_strides(query, key, value, summary_key, summary_value, output),
        heads, queries, key.shape[2], summary_key.shape[2], prior, window_size, window_size // chunk_size,
        head_dim**-0.5 / math.log(2), D=head_dim, **sizes,
    )  # fmt: skip
    return output, lse


@windowed.register_fake
def _(query, key, value, summary_key, summary_value, first_summary, prior, window_size, chunk_size):  # type: ignore[no-untyped-def]
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        query.shape[:3], dtype=torch.float32
    )


@torch.library.custom_op(f"{NAMESPACE}::windowed_backward", mutates_args=())
def windowed_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summary_key: Tensor,
    summary_value: Tensor,
    first_summary: Tensor,
    output: Tensor,
    lse: Tensor,
    prior: int,
    window_size: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, summary_key and summary_value, each in its tensor's shape and dtype."""
    query, key, value, summary_key, summary_value = _rows(query, key, value, summary_key, summary_value)
    grad = grad.contiguous()
    batch, heads, queries, head_dim = query.shape
    delta = (grad.float() * output.float()).sum(-1)  # [B, H, Q]
    sizes, chunks = launch_sizes(head_dim, query.dtype), window_size // chunk_size
    scale = head_dim**-0.5
    query_grad = torch.empty_like(grad)
    eva_windowed_bwd_dq_kernel[(triton.cdiv(queries, sizes["BM"]), batch * heads)](
        query, key, value, summary_key, summary_value, first_summary, grad, lse, delta, query_grad,
        *_strides(query, key, value, summary_key, summary_value, grad),
        heads, queries, key.shape[2], summary_key.shape[2], prior, window_size, chunks, scale, scale / math.log(2),
        D=head_dim, **sizes,
    )  # fmt: skip
    grads = [query_grad]
    # Here the block of keys stays and blocks of queries pass by: their sizes change places.
    swapped = {**sizes, "BM": sizes["BN"], "BN": max(sizes["BM"] // 2, 16)}
    for keys, values, is_summary in ((key, value, False), (summary_key, summary_value, True)):
        key_grad, value_grad = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (keys, values))
        if keys.shape[2]:
            eva_windowed_bwd_dkv_kernel[(triton.cdiv(keys.shape[2], swapped["BN"]), batch * heads)](
                query, keys, values, first_summary, grad, lse, delta, key_grad, value_grad,
                *_strides(query, keys, values, grad, key_grad),
                heads, queries, key.shape[2], keys.shape[2], prior, window_size, chunks, scale, scale / math.log(2),
                IS_SUMMARY=is_summary, D=head_dim, **swapped,
            )  # fmt: skip
        grads += [key_grad, value_grad]
    return grads[0], grads[1], grads[2], grads[3], grads[4]


@windowed_backward.register_fake
def _(grad, query, key, value, summary_key, summary_value, *rest):  # type: ignore[no-untyped-def]
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (query, key, value, summary_key, summary_value)
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, prior, window_size, chunk_size = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.sizes = (prior, window_size, chunk_size)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    grads = windowed_backward(grad, *ctx.saved_tensors, *ctx.sizes)
    return (*grads, None, None, None, None)


windowed.register_autograd(_backward, setup_context=_save)


def _summary_sizes(chunk_size: int, head_dim: int) -> dict[str, int]:
    """About 2,048 elements of keys in a program."""
    block_c, block_d = triton.next_power_of_2(chunk_size), max(16, triton.next_power_of_2(head_dim))
    sizes = {"CHUNK": chunk_size, "BLOCK_C": block_c, "D": head_dim, "BLOCK_D": block_d}
    return sizes | {"BC": max(1, 2048 // (block_c * block_d)), "num_warps": 4}


@torch.library.custom_op(f"{NAMESPACE}::summarize", mutates_args=())
def summarize(
    keys: Tensor, values: Tensor, adaptive_mu_k: Tensor, adaptive_phi: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Summary keys and values [B, H, n, D] of keys and values [B, H, n * chunk_size, D].

    The learned vectors are [H, D]; softmaxes are taken in float32.
    """
    _check(keys)
    keys, values = _rows(keys, values)
    batch, heads, length, head_dim = keys.shape
    chunks = length // chunk_size
    summary_keys = keys.new_empty(batch, heads, chunks, head_dim)
    summary_values = torch.empty_like(summary_keys)
    if chunks:
        sizes = _summary_sizes(chunk_size, head_dim)
        eva_summary_fwd_kernel[(triton.cdiv(chunks, sizes["BC"]), batch * heads)](
            keys, values, adaptive_mu_k.float().contiguous(), adaptive_phi.float().contiguous(),
            summary_keys, summary_values, *_strides(keys, values, summary_keys),
            heads, chunks, head_dim**-0.5, **sizes,
        )  # fmt: skip
    return summary_keys, summary_values


@summarize.register_fake
def _(keys, values, adaptive_mu_k, adaptive_phi, chunk_size):  # type: ignore[no-untyped-def]
    shape = (*keys.shape[:2], keys.shape[2] // chunk_size, keys.shape[3])
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of keys, values and both learned vectors."""
    keys, values = _rows(keys, values)
    key_grad, value_grad = key_grad.contiguous(), value_grad.contiguous()
    batch, heads, _, head_dim = keys.shape
    chunks = key_grad.shape[2]
    keys_grad, values_grad = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (keys, values))
    sizes = _summary_sizes(chunk_size, head_dim)
    programs = triton.cdiv(chunks, sizes["BC"])
    mu_parts = torch.zeros(batch, heads, programs, head_dim, dtype=torch.float32, device=keys.device)
    phi_parts = torch.zeros_like(mu_parts)
    if chunks:
        eva_summary_bwd_kernel[(programs, batch * heads)](
            keys, values, adaptive_mu_k.float().contiguous(), adaptive_phi.float().contiguous(),
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
def _(key_grad, value_grad, keys, values, adaptive_mu_k, adaptive_phi, chunk_size):  # type: ignore[no-untyped-def]
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (keys, values, adaptive_mu_k, adaptive_phi)
    )


def _save_summaries(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _summaries_backward(ctx, key_grad, value_grad):  # type: ignore[no-untyped-def]
    return (*summarize_backward(key_grad, value_grad, *ctx.saved_tensors, ctx.chunk_size), None)


summarize.register_autograd(_summaries_backward, setup_context=_save_summaries)


def decode_sizes(head_dim: int, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Block sizes and warps of the decoding kernel, on the same grounds as `launch_sizes`."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    if dtype.itemsize > 2:
        return {"BLOCK_D": block_d, "BT": 16, "BN": 16, "num_warps": 8, "num_stages": 1}
    block_t = min(64, max(16, triton.next_power_of_2(tokens)))
    return {"BLOCK_D": block_d, "BT": block_t, "BN": 64 if block_d <= 128 else 32, "num_warps": 4, "num_stages": 2}


MIN_SPLIT = 256  # columns that a program of the decoding kernel reads at least


@torch.library.custom_op(f"{NAMESPACE}::decode", mutates_args=())
def decode(query: Tensor, keys: Tensor, values: Tensor, first: Tensor, open_end: Tensor, among_new: Tensor) -> Tensor:
    """Attention of new tokens [B, H, T, D] over a slice of the cache [B, H, K, D]; see `EvaLayout.window_bounds`."""
    _check(query)
    query, keys, values = _rows(query, keys, values)
    batch, heads, tokens, head_dim = query.shape
    columns = keys.shape[2]
    sizes = decode_sizes(head_dim, query.dtype, tokens)
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
        heads, tokens, columns, split, head_dim**-0.5 / math.log(2), D=head_dim, **sizes,
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
