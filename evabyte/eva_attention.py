"""EVA attention: exact inside the open window, summaries of every chunk before it; and the choice of backend.

The mathematics is in `eva_math.py`, whose `naive_eva_attention` is the specification. A backend computes whole
sequences (in PyTorch `windowed_attention` of `eva_windowed.py`), new tokens against the cache, and summaries; here is
what brings padded, packed and cached rows into the form that it takes.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from .eva_layout import EvaLayout
from .eva_math import naive_eva_attention, summarize_chunks
from .eva_tree_attention import tree_attention_across_windows
from .eva_windowed import Attend, attend_naive, attend_sdpa, windowed_attention

logger = logging.get_logger(__name__)

Summarize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WindowStates:
    """What attention may read after new tokens that stay within the open window.

    Attributes:
        keys, values: [B, H, S + R + N, D], one slice of the cache's buffer: S summaries (a row with fewer has them at
            the end), the open window's R cached tokens and, at each row's own length, its N new ones.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class SequenceStates:
    """What attention may read after new tokens that reach past the open window.

    Attributes:
        summary_keys, summary_values: [B, H, S, D], the cached summaries, a row with fewer having them at the end; for a
            uniform call the summaries of the windows it closes follow, in order.
        token_keys, token_values: [B, H, R + N, D], the open window's cached tokens, then the new ones.
    """

    summary_keys: Tensor
    summary_values: Tensor
    token_keys: Tensor
    token_values: Tensor


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: EvaLayout,
    summarize: Summarize,
    windowed: Callable[..., Tensor],
    prior: tuple[Tensor, Tensor] | None = None,
    fp32_softmax: bool = True,
) -> Tensor:
    """EVA attention for rows that differ: padding, packed documents, a cache whose rows stand at different positions.

    Every document is gathered so that it starts at a window border, with documents of similar length side by side;
    the backend's `windowed` runs on each group and the results are put back.

    Args:
        query: [B, H, N, D], the new tokens.
        key, value: [B, H, R + N, D]: per row the R cached tokens of the open window (ragged, `layout` knows how many
            are real), then the new ones.
        prior: None, or summary keys and values [B, H, S, D] of each row's closed windows; a row that has fewer than S
            has them at the end.

    Returns:
        [B, H, N, D]; zero at padding.
    """
    batch, heads, length, head_dim = query.shape
    flat_query, flat_key, flat_value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = query.new_zeros(batch * length, heads, head_dim)

    def gather(flat: Tensor, group_index: Tensor) -> Tensor:  # [.., H, D], [G, M] -> [G, H, M, D]
        picked = flat.index_select(0, group_index.flatten())
        return picked.view(*group_index.shape, heads, head_dim).transpose(1, 2)

    for group in layout.groups(query.device):
        group_key, group_value = gather(flat_key, group.keys), gather(flat_value, group.keys)
        closed = (group_key.shape[2] - 1) // layout.window_size * layout.window_size
        summary_key, summary_value = summarize(group_key[:, :, :closed], group_value[:, :, :closed])
        prior_count, missing = 0, None
        if prior is not None and group.summaries is not None:
            prior_key, prior_value = (states.index_select(0, group.rows) for states in prior)
            prior_count = prior_key.shape[2]
            missing = prior_count - group.summaries
            summary_key = torch.cat((prior_key, summary_key), dim=2)
            summary_value = torch.cat((prior_value, summary_value), dim=2)
        result = windowed(
            gather(flat_query, group.queries),
            group_key,
            group_value,
            summary_key,
            summary_value,
            window_size=layout.window_size,
            chunk_size=layout.chunk_size,
            prior=prior_count,
            missing=missing,
            fp32_softmax=fp32_softmax,
        )
        flat_result = result.transpose(1, 2).flatten(0, 1).index_select(0, group.result)
        output = output.index_copy(0, group.destination, flat_result)
    return output.view(batch, length, heads, head_dim).transpose(1, 2)


@dataclass(frozen=True)
class Backend:
    """How attention is computed.

    Attributes:
        within_window: attention of new tokens [B, H, N, D] over `WindowStates`, given their layout.
        windowed: attention of whole sequences; takes what `windowed_attention` takes but for `attend`.
        summarize: summaries of chunks; takes what `summarize_chunks` takes.
        packed: None, or attention of query, key, value [B, H, N, D] whose layout is `in_place`, without gathering.
    """

    within_window: Callable[[Tensor, WindowStates, EvaLayout, bool], Tensor]
    windowed: Callable[..., Tensor]
    summarize: Callable[..., tuple[Tensor, Tensor]] = summarize_chunks
    packed: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, EvaLayout], Tensor] | None = None


def attention_within_window(
    query: Tensor, states: WindowStates, layout: EvaLayout, fp32_softmax: bool, attend: Attend
) -> Tensor:
    """Attention of new tokens over one slice of the cache, under the layout's mask."""
    mask = layout.window_mask(query.device, query.dtype)
    return attend(query, states.keys, states.values, mask, query.shape[3] ** -0.5, fp32_softmax)


def _within_window_triton(query: Tensor, states: WindowStates, layout: EvaLayout, fp32_softmax: bool) -> Tensor:
    """The same by a Triton kernel; where gradients are recorded, by PyTorch."""
    if torch.is_grad_enabled() and (query.requires_grad or states.keys.requires_grad):
        return attention_within_window(query, states, layout, fp32_softmax, attend_sdpa)
    from .eva_triton import decode

    return decode(query, states.keys, states.values, *layout.window_bounds(query.device))


def _windowed_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summary_key: Tensor,
    summary_value: Tensor,
    *,
    window_size: int,
    chunk_size: int,
    prior: int = 0,
    missing: Tensor | None = None,
    fp32_softmax: bool = True,
) -> Tensor:
    """`windowed_attention` by Triton kernels, whose softmax is always taken in float32."""
    from .eva_triton import windowed

    table = None
    if missing is not None:
        table = missing.new_zeros(query.shape[0], 6)
        table[:, 0] = torch.arange(query.shape[0], device=query.device)
        table[:, 2], table[:, 4], table[:, 5] = key.shape[2], prior, missing
        table = table.to(torch.int32)
    sizes = (query.shape[2], prior, window_size, chunk_size)
    return windowed(query, key, value, summary_key, summary_value, table, *sizes)[0]


MOST_ELEMENTS = 16384  # of a chunk's keys, that one program of the summary kernel can hold


def _packed_triton(
    query: Tensor, key: Tensor, value: Tensor, adaptive_mu_k: Tensor, adaptive_phi: Tensor, layout: EvaLayout
) -> Tensor:
    """Attention of padded and packed rows [B, H, N, D] where they lie, by Triton kernels."""
    from .eva_triton import summarize, windowed

    packed, shape = layout.packed(query.device), (key.shape[1], key.shape[3])
    summaries = summarize(
        key, value, adaptive_mu_k.reshape(shape), adaptive_phi.reshape(shape), layout.chunk_size, packed.chunk_starts
    )
    sizes = (packed.longest, 0, layout.window_size, layout.chunk_size)
    return windowed(query, key, value, *summaries, packed.table, *sizes)[0]


def _summarize_triton(
    keys: Tensor,
    values: Tensor,
    adaptive_mu_k: Tensor,
    adaptive_phi: Tensor,
    chunk_size: int,
    fp32_softmax: bool = True,
) -> tuple[Tensor, Tensor]:
    """`summarize_chunks` by a Triton kernel, whose softmaxes are always taken in float32."""
    if chunk_size * keys.shape[3] > MOST_ELEMENTS:
        return summarize_chunks(keys, values, adaptive_mu_k, adaptive_phi, chunk_size)
    from .eva_triton import summarize

    shape = (keys.shape[1], keys.shape[3])
    return summarize(keys, values, adaptive_mu_k.reshape(shape), adaptive_phi.reshape(shape), chunk_size)


def summarizer(
    adaptive_mu_k: Tensor, adaptive_phi: Tensor, chunk_size: int, backend: str, fp32_softmax: bool
) -> Summarize:
    """The function that turns keys and values [B, H, n * chunk_size, D] into summaries [B, H, n, D]."""
    return partial(
        get_backend(backend).summarize,
        adaptive_mu_k=adaptive_mu_k,
        adaptive_phi=adaptive_phi,
        chunk_size=chunk_size,
        fp32_softmax=fp32_softmax,
    )


BACKENDS = {
    **{
        name: Backend(partial(attention_within_window, attend=attend), partial(windowed_attention, attend=attend))
        for name, attend in (("naive", attend_naive), ("eager", attend_naive), ("sdpa", attend_sdpa))
    },
    "eva_triton": Backend(_within_window_triton, _windowed_triton, _summarize_triton, _packed_triton),
}


def _registered_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`attend_naive` under transformers' attention signature, so that our names for `attn_implementation` are known."""
    return attend_naive(query, key, value, attention_mask, scaling, fp32_softmax=True).transpose(1, 2), None


for _name in ("naive", "eva_triton"):
    AttentionInterface.register(_name, _registered_attention_forward)


def default_backend(device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """ "eva_triton" on a GPU where Triton is installed, "sdpa" elsewhere and for float64."""
    has_triton = device_type == "cuda" and importlib.util.find_spec("triton") is not None
    return "eva_triton" if has_triton and dtype != torch.float64 else "sdpa"


def backend_for(name: str, states: Tensor) -> str:
    """The backend called `name`, or "sdpa" for layers that lie where its kernels do not run (offloaded to the CPU)."""
    if name == "eva_triton" and states.device.type == "cpu":
        from .eva_triton import INTERPRETED

        if not INTERPRETED:
            logger.warning_once(
                "The kernels of attn_implementation='eva_triton' need a GPU: on the CPU 'sdpa' is used."
            )
            return "sdpa"
    return name


def get_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        ValueError: for a name that EVA attention has no backend for.
    """
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(
            f"EVA attention has no backend {name!r}: choose attn_implementation among {', '.join(BACKENDS)}."
        )
    return backend


def layout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    adaptive_mu_k: Tensor,
    adaptive_phi: Tensor,
    layout: EvaLayout,
    backend: str,
    fp32_softmax: bool = True,
) -> Tensor:
    """EVA attention without a cache; query, key, value and result are [B, H, N, D]."""
    chosen = get_backend(backend)
    windowed, packed = chosen.windowed, chosen.packed
    if backend in ("naive", "eager"):
        return naive_eva_attention(
            query,
            key,
            value,
            adaptive_mu_k,
            adaptive_phi,
            window_size=layout.window_size,
            chunk_size=layout.chunk_size,
            index=layout.positions(query.device).expand(layout.batch, -1),
            document=layout.documents(),
            fp32_softmax=fp32_softmax,
        )

    summarize = summarizer(adaptive_mu_k, adaptive_phi, layout.chunk_size, backend, fp32_softmax)
    if not layout.uniform:
        if packed is not None and layout.in_place and layout.chunk_size * query.shape[3] <= MOST_ELEMENTS:
            return packed(query, key, value, adaptive_mu_k, adaptive_phi, layout)
        return grouped_attention(query, key, value, layout, summarize, windowed, fp32_softmax=fp32_softmax)
    closed = (layout.length - 1) // layout.window_size * layout.window_size
    return windowed(
        query,
        key,
        value,
        *summarize(key[:, :, :closed], value[:, :, :closed]),
        window_size=layout.window_size,
        chunk_size=layout.chunk_size,
        fp32_softmax=fp32_softmax,
    )


def cached_attention(
    query: Tensor,
    states: WindowStates | SequenceStates,
    summarize: Summarize,
    layout: EvaLayout,
    backend: str,
    fp32_softmax: bool = True,
) -> Tensor:
    """EVA attention of new tokens [B, H, N, D] over what the cache, given the same `summarize`, returned for them."""
    chosen = get_backend(backend)
    if isinstance(states, WindowStates):
        if layout.tree is not None and layout.crosses_window():
            return tree_attention_across_windows(
                query, states.keys, states.values, layout, layout.tree, summarize, fp32_softmax
            )
        return chosen.within_window(query, states, layout, fp32_softmax)
    prior = (states.summary_keys, states.summary_values)
    if not layout.uniform:
        return grouped_attention(
            query, states.token_keys, states.token_values, layout, summarize, chosen.windowed, prior, fp32_softmax
        )
    return chosen.windowed(
        query,
        states.token_keys,
        states.token_values,
        *prior,
        window_size=layout.window_size,
        chunk_size=layout.chunk_size,
        prior=layout.past[0] // layout.window_size * (layout.window_size // layout.chunk_size),
        fp32_softmax=fp32_softmax,
    )


def eva_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    adaptive_mu_k: Tensor,
    adaptive_phi: Tensor,
    *,
    window_size: int,
    chunk_size: int,
    backend: str | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    fp32_softmax: bool = True,
) -> Tensor:
    """EVA attention of whole sequences, as this module's text defines it; differentiable in all five tensors.

    Args:
        query, key, value: [B, H, N, D], any float dtype, rotary embedding already applied.
        adaptive_mu_k, adaptive_phi: [1, H, 1, 1, D] as published, or [H, D].
        window_size: positions that see each other exactly.
        chunk_size: positions per summary; divides `window_size`.
        backend: "naive" (the specification), "sdpa" (PyTorch's fused attention), "eva_triton" (Triton kernels; on a CPU
            only with TRITON_INTERPRET=1 in the environment), or None for the fastest that the tensors allow.
        attention_mask: None, or [B, N], zero at padding, anywhere in the row.
        position_ids: None, or [B or 1, N]; a document starts wherever they are 0 (packed rows).
        fp32_softmax: take logits and softmaxes in float32 at least.

    Returns:
        [B, H, N, D] in the query's dtype; zero at padding.

    Raises:
        ValueError: for shapes that do not fit, a chunk that does not divide the window, or an unknown backend.
    """
    if query.ndim != 4 or query.shape != key.shape or key.shape != value.shape:
        raise ValueError(
            "`query`, `key` and `value` must share one shape [batch, heads, length, head_dim]; got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    batch, heads, length, head_dim = query.shape
    for name, learned in (("adaptive_mu_k", adaptive_mu_k), ("adaptive_phi", adaptive_phi)):
        if tuple(learned.shape) not in ((heads, head_dim), (1, heads, 1, 1, head_dim)):
            raise ValueError(
                f"`{name}` must have shape {(heads, head_dim)} or {(1, heads, 1, 1, head_dim)}; got "
                f"{tuple(learned.shape)}."
            )
    if chunk_size < 1 or window_size < 1 or window_size % chunk_size:
        raise ValueError(f"`chunk_size` ({chunk_size}) must divide `window_size` ({window_size}) without remainder.")
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
        raise ValueError(f"`attention_mask` must have shape {(batch, length)}; got {tuple(attention_mask.shape)}.")
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(f"`position_ids` must have shape {(batch, length)}; got {tuple(position_ids.shape)}.")
    if length == 0:
        return query
    layout = EvaLayout.build(
        batch,
        length,
        window_size=window_size,
        chunk_size=chunk_size,
        attention_mask=attention_mask,
        position_ids=position_ids,
    )
    backend = backend or default_backend(query.device.type, query.dtype)
    return layout_attention(query, key, value, adaptive_mu_k, adaptive_phi, layout, backend, fp32_softmax)
