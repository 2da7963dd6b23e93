"""What attention.py measures with: a case and its exact result, the operators ours is set beside, timings and rows.

An operator is a function of query, key, value [B, H, N, D] and of mu and phi [1, H, 1, 1, D], like `eva_attention`.
"""

import importlib.util
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from measure import interleave, spread
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from evabyte import eva_attention

Operator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Run = Callable[[], Any]
INPUTS = ("query", "key", "value", "mu", "phi")
PUBLISHED_FILES = ("eva_pt_ref.py", "eva_cache.py", "eva_agg_kernel.py", "eva_prep_kv_kernel.py")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative, of output and gradients
ROUND_SECONDS = 0.05  # fast alternatives are called several times a round, so that launches overlap as in a model
COMPARE = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Case:
    """The sizes of a call of EVA attention."""

    batch: int
    heads: int
    length: int
    head_dim: int
    window: int
    chunk: int
    dtype: torch.dtype
    device: torch.device

    @property
    def chunks_per_window(self) -> int:
        return self.window // self.chunk

    @property
    def closed(self) -> int:
        """Positions in windows that another one follows: those whose summaries somebody sees."""
        return (self.length - 1) // self.window * self.window

    @property
    def visible_pairs(self) -> int:
        """Pairs, of one head, of a query and a key or summary that it sees."""
        windows, rest = divmod(self.length, self.window)
        exact = windows * self.window * (self.window + 1) // 2 + rest * (rest + 1) // 2
        earlier_windows = self.window * windows * (windows - 1) // 2 + rest * windows
        return exact + earlier_windows * self.chunks_per_window

    @property
    def useful_flops(self) -> int:
        """Of the forward pass: a product with the key and one with the value for every visible pair."""
        return 4 * self.head_dim * self.heads * self.batch * self.visible_pairs

    @property
    def summary_bytes(self) -> int:
        """What summarising the closed windows has to read and write: all keys and values, and the summaries."""
        rows = self.closed + self.closed // self.chunk
        return 2 * self.batch * self.heads * rows * self.head_dim * self.dtype.itemsize

    @property
    def decode_columns(self) -> int:
        """Keys and summaries that the last position sees."""
        last = self.length - 1
        return last // self.window * self.chunks_per_window + last % self.window + 1

    @property
    def decode_bytes(self) -> int:
        """What attention at the last position has to read and write: those keys and values, query and output."""
        rows = 2 * self.decode_columns + 2
        return self.batch * self.heads * rows * self.head_dim * self.dtype.itemsize

    def tensors(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """The five inputs, which require gradients, and the gradient of the output; the same values at every call.

        Positions lie before heads in memory, as projections leave them, and mu and phi are as small as they start out
        in training.
        """
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        states = [normal(self.batch, self.length, self.heads, self.head_dim).transpose(1, 2) for _ in range(4)]
        mu, phi = (normal(1, self.heads, 1, 1, self.head_dim).clamp(-1, 1) * self.head_dim**-0.5 for _ in range(2))
        return tuple(tensor.requires_grad_() for tensor in (*states[:3], mu, phi)), states[3]


def eva_operator(case: Case, backend: str) -> Operator:
    """Ours."""

    def run(query: Tensor, key: Tensor, value: Tensor, mu: Tensor, phi: Tensor) -> Tensor:
        return eva_attention(
            query, key, value, mu, phi, window_size=case.window, chunk_size=case.chunk, backend=backend
        )

    return run


def exact_results(case: Case) -> dict[str, Tensor]:
    """The output and the gradients of the five inputs: the specification in float64, head by head to save memory."""
    inputs, upstream = case.tensors()
    run = eva_operator(case, "naive")
    heads = []
    for head in range(case.heads):
        leaves = [tensor[:, head : head + 1].detach().double().requires_grad_() for tensor in inputs]
        output = run(*leaves)
        gradients = torch.autograd.grad(output, leaves, upstream[:, head : head + 1].double())
        heads.append((output.detach(), *gradients))
    return {name: torch.cat(parts, dim=1) for name, *parts in zip(("output", *INPUTS), *heads, strict=True)}


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((result.double() - expected).norm() / expected.double().norm()).item()


def relative_errors(run: Operator, case: Case, exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Errors of the output and of the gradient of every input that the operator uses."""
    inputs, upstream = case.tensors()
    output = run(*inputs)
    gradients = torch.autograd.grad(output, inputs, upstream, allow_unused=True)
    results = {"output": output.detach(), **dict(zip(INPUTS, gradients, strict=True))}
    return {name: relative_error(result, exact[name]) for name, result in results.items() if result is not None}


def require_exact(name: str, run: Operator, case: Case, exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors of output and gradients.

    Raises:
        WrongResult: when one is larger than rounding explains.
    """
    errors = relative_errors(run, case, exact)
    for result, error in errors.items():
        if not error <= TOLERANCE[case.dtype]:  # so that NaN is refused too
            raise WrongResult(f"{name} is wrong in {result}: relative error {error:.2g}, window {case.window}")
    return errors


def require_agreement(output: Tensor, expected: Tensor) -> None:
    """Raises `WrongResult` when a peer's output differs from ours by more than rounding explains."""
    error = relative_error(output, expected)
    if not error <= TOLERANCE[output.dtype]:
        raise WrongResult(f"its output differs from ours by {error:.2g}")


class WrongResult(Exception):
    """An operator that is not to be timed, since it computes something else."""


def full_attention(kernel: SDPBackend, case: Case) -> Operator:
    """Causal attention over all keys by one of PyTorch's fused kernels."""

    def run(query: Tensor, key: Tensor, value: Tensor, mu: Tensor, phi: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    return run


def as_full_attention(case: Case) -> Case:
    """The case in which EVA attention is full causal attention: everything in one window."""
    return replace(case, window=case.length)


def eva_mask_mod(case: Case, summaries: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Which of the columns [summaries of closed windows, keys] a query sees, as FlexAttention asks for it."""
    window_size, chunks_per_window = case.window, case.chunks_per_window  # numbers: the compiler reads no attributes

    def visible(batch: Tensor, head: Tensor, query: Tensor, column: Tensor) -> Tensor:
        position, window = column - summaries, query // window_size
        is_earlier_window = (column < summaries) & (column // chunks_per_window < window)
        is_own_window = (position >= 0) & (position <= query) & (position // window_size == window)
        return is_earlier_window | is_own_window

    return visible


def flex_windowed(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention of a query over keys and values [B, H, S + N, D] whose first S are the summaries.

    Compiled on a GPU; on a CPU it runs as it is, which is only good for checking.
    """
    summaries = case.closed // case.chunk
    on_gpu = case.device.type == "cuda"
    torch.compiler.reset()  # or the cases would use up the limit of recompilations, and the last ones run uncompiled
    attend = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention
    # Not compiled, the whole mask would lie in memory.
    create = torch.compile(create_block_mask, dynamic=False) if on_gpu else create_block_mask
    block_mask = create(
        eva_mask_mod(case, summaries), None, None, case.length, summaries + case.length, device=case.device
    )

    def run(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attend(query, keys, values, block_mask=block_mask)

    return run


def published_plain(folder: Path, case: Case) -> Operator:
    """The published operator in plain PyTorch, without its projections and rotary embedding.

    It runs as in a prefill, on a new cache of its own kind, which only keeps references: its branch without a cache,
    meant for training, fails on an undefined name. Gradients flow through this branch just as well. Masks are made
    beforehand, since a model makes them once for all its layers; they are those of whole windows.
    """
    source, new_cache = _load(folder, "eva_pt_ref"), _load(folder, "eva_cache").EvaCache
    source.apply_rotary_pos_emb = lambda query, key, *_: (query, key)
    config = SimpleNamespace(
        hidden_size=case.heads * case.head_dim,
        num_attention_heads=case.heads,
        max_position_embeddings=case.length,
        window_size=case.window,
        chunk_size=case.chunk,
        num_chunks=None,
        mixedp_attn=True,
    )
    with torch.device("meta"):
        module = source.EvaAttention(config, layer_idx=0)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        delattr(module, name)
    module.o_proj = nn.Identity()

    windows = torch.arange(case.length, device=case.device) // case.window
    hidden_chunks = windows[:, None] <= windows[None, :: case.chunk]
    hidden_keys = torch.ones(case.window, case.window, dtype=torch.bool, device=case.device).triu(1)
    masks = (hidden_keys[None, None, None], None, hidden_chunks[None, None], None)

    def run(query: Tensor, key: Tensor, value: Tensor, mu: Tensor, phi: Tensor) -> Tensor:
        flat = [states.transpose(1, 2).flatten(2) for states in (query, key, value)]
        module.q_proj, module.k_proj, module.v_proj = (lambda _, given=given: given for given in flat)
        learned = {"adaptive_mu_k": mu, "adaptive_phi": phi}
        how = {"attention_mask": masks, "use_cache": True, "past_key_value": new_cache()}
        output = torch.func.functional_call(module, learned, (flat[0],), how)[0]
        return output.unflatten(2, (case.heads, case.head_dim)).transpose(1, 2)

    return run


def published_triton(folder: Path, case: Case) -> Operator:
    """The published Triton kernels, called as the published layer does; they need whole chunks and a GPU."""
    summarize = _load(folder, "eva_prep_kv_kernel").eva_prep_kv_func_triton
    aggregate = _load(folder, "eva_agg_kernel").eva_agg_func_triton
    scale = case.head_dim**-0.5

    def run(query: Tensor, key: Tensor, value: Tensor, mu: Tensor, phi: Tensor) -> Tensor:
        summaries = summarize(key, value, mu, phi, None, scale, case.chunk)
        return aggregate(query, key, value, *summaries, None, None, scale, case.window, case.chunks_per_window)

    return run


def _load(folder: Path, name: str) -> ModuleType:
    """A module of the published code, on its own: these files import nothing from their package."""
    spec = importlib.util.spec_from_file_location(f"published_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder / name}.py cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forward(run: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> Run:
    """The forward pass alone, with nothing kept for a backward pass."""
    detached = [tensor.detach() for tensor in inputs]
    return torch.no_grad()(lambda: run(*detached))


def forward_and_backward(run: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> Run:
    """A forward pass and the gradients of all inputs."""
    return lambda: torch.autograd.grad(run(*inputs), inputs, upstream, allow_unused=True)


def backward(run: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> Run:
    """The backward pass alone, of one forward pass that is kept."""
    output = run(*inputs)
    return lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True, allow_unused=True)


def timings(alternatives: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of every alternative, round by round, as `interleave` times them; each is warmed up."""
    calls = {}
    for name, run in alternatives.items():
        run()
        seconds = interleave({name: lambda _, run=run: run()}, 1, device)[name][0]
        calls[name] = max(1, round(ROUND_SECONDS / seconds))

    def call(name: str, _: int) -> None:
        for _ in range(calls[name]):
            alternatives[name]()

    rounds = interleave({name: partial(call, name) for name in alternatives}, repeats, device)
    return {name: [seconds / calls[name] for seconds in rounds[name]] for name in alternatives}


def copying(mib: float, device: torch.device) -> tuple[Run, int]:
    """A copy of so many MiB, and the bytes that it reads and writes."""
    source = torch.zeros(int(mib * 2**20), dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source), 2 * source.numel()


def bandwidth_share(
    moved: int, seconds: Sequence[float], copied: int, copy_seconds: Sequence[float]
) -> dict[str, float]:
    """Percent of a copy's bytes per second that something reaches which has to move so many bytes."""
    return spread([100 * moved / s / (copied / c) for s, c in zip(seconds, copy_seconds, strict=True)])


def milliseconds(seconds: Mapping[str, Sequence[float]], *names: str) -> dict[str, dict[str, float]]:
    """`spread` of some of the timings."""
    return {name: spread([1e3 * each for each in seconds[name]]) for name in names}


def row(measure: str, case: Case, value: Mapping[str, float], aim: str | None = None, **details: Any) -> dict[str, Any]:
    """A row of results; `aim`, such as ">= 2", is met or not by the value's median."""
    result = {"measure": measure, "length": case.length, "window": case.window, "batch": case.batch, "value": value}
    if aim is not None:
        sign, bound = aim.split()
        result |= {"aim": aim, "met": COMPARE[sign](value["median"], float(bound))}
    return result | details
