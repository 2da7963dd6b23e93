"""Decoding steps on a static cache: one compiled function a step, for trees and for single bytes.

A step of multibyte decoding keeps the last trees' paths, drafts the next trees, and runs the model over them, in one
function whose inputs have fixed shapes and addresses: `torch.compile` makes one graph of it, on CUDA a CUDA graph. The
host sends one small tensor a step, which says where each row stands, and fetches one, the chosen bytes. What a model
does with the trees is its own (`_verify_static`).

With EVA attention steps never cross a window's border: nodes beyond it are made unreachable, so that the walk stops
there. When a row has reached the border the host, which knows all lengths, has its window summarised by a call of its
own, eagerly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import CompileConfig, GenerationConfig

from .byte_tree import ABSENT, DraftTrees, ancestor_mask
from .drafters import Drafter, Fill, TensorDrafter
from .eva_cache import KeptPaths
from .eva_static_cache import EvaStaticCacheLayer, count_in_all
from .eva_static_layout import StaticLayout
from .tree_verifier import Frontier, TreeVerifier

PAST, COUNT, ROOT_BYTE, LAST_NODE, PATH = range(5)  # columns of the tensor that the host sends at every step


@dataclass
class StepState:
    """What a step of trees reads and writes besides the cache.

    Attributes:
        logits: [B, most nodes, heads, vocab], of the last trees.
        temperature: float32 scalar, for drafting.
    """

    logits: Tensor
    temperature: Tensor


def _layout(layer: EvaStaticCacheLayer, past: Tensor, depth: Tensor, among_new: Tensor) -> Any:
    sizes = (layer.window_size, layer.chunk_size, layer.origin, layer.keys.shape[2], layer.max_cache_len)
    return StaticLayout(past, depth, among_new, *sizes)


def take_paths(layers: Sequence[Any], control: Tensor) -> Tensor:
    """Bring the nodes that are kept of the last trees behind the cached tokens; -> int64 [B], tokens with them."""
    past, count, path = control[:, PAST], control[:, COUNT], control[:, PATH:]
    rows = torch.arange(control.shape[0], device=control.device)[:, None]
    start = layers[0].open_column(past)[:, None]
    target = start + torch.arange(path.shape[1], device=control.device)
    for layer in layers:
        layer.take_paths(rows, start + path, target)
    return past + count


def verify_in_window(
    model: Any, cache: Cache, past: Tensor, ids: Tensor, parents: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """`_verify_static` with EVA attention: nodes beyond the window's border are absent from the parents returned."""
    depth = mask.sum(-1) - 1
    layer: Any = cache.layers[0]
    inside = (past % layer.window_size)[:, None] + depth < layer.window_size
    parents = torch.where(inside, parents, ABSENT)
    layout = _layout(layer, past, depth, mask)
    hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True, layout=layout).last_hidden_state
    return model.predict(hidden).float(), parents


def draft_and_verify(
    model: Any, cache: Any, state: StepState, control: Tensor, fill: Fill
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole step up to the walk, with a drafter made of tensor operations.

    Args:
        control: int64 [B, 4 + P]: tokens cached before the last trees, nodes kept of them, the byte emitted last, the
            node where it was emitted, and the numbers of the nodes that are kept.

    Returns:
        ids and parents int64 [B, T], and the mask bool [B or 1, T, T]; the logits are in `state`.
    """
    past = take_paths(cache.layers, control)
    rows = torch.arange(control.shape[0], device=control.device)
    trees = fill(control[:, ROOT_BYTE], state.logits[rows, control[:, LAST_NODE], 1:], state.temperature)
    known = trees.known_mask
    mask = ancestor_mask(trees.parents, trees.max_depth) if known is None else known
    logits, parents = model._verify_static(cache, past, trees.ids, trees.parents, mask)
    state.logits[:, : logits.shape[1]] = logits
    return trees.ids, parents, mask


def verify_given(
    model: Any, cache: Any, state: StepState, control: Tensor, ids: Tensor, parents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with trees that were drafted outside: ids, parents int64 [B, T]."""
    past = take_paths(cache.layers, control)
    mask = ancestor_mask(parents, ids.shape[1] - 1)
    logits, parents = model._verify_static(cache, past, ids, parents, mask)
    state.logits[:, : logits.shape[1]] = logits
    return ids, parents, mask


def next_byte_logits(model: Any, cache: Any, past: Tensor, ids: Tensor, position_ids: Tensor | None) -> Tensor:
    """Logits [B, 1, vocab] behind one more byte per row, ids int64 [B, 1], after `past` int64 [B] tokens."""
    one = torch.ones(1, 1, 1, dtype=torch.bool, device=ids.device)
    layout = _layout(cache.layers[0], past, torch.zeros_like(ids[:1]), one)
    hidden = model.model(
        input_ids=ids, past_key_values=cache, use_cache=True, layout=layout, position_ids=position_ids
    ).last_hidden_state
    return model.predict(hidden, all_heads=False)


# Every model's graphs; not an attribute, for models are copied and pickled.
_GRAPHS: WeakKeyDictionary[Any, dict[tuple, Callable[..., Any]]] = WeakKeyDictionary()

KEPT_GUARDS = {"GLOBAL_STATE", "GRAD_MODE", "SHAPE_ENV", "DEFAULT_DEVICE", "TORCH_FUNCTION_STATE"}


def _cheap_guards(entries: Sequence[Any]) -> list[bool]:
    """Of what Dynamo checks before every call: settings of PyTorch and tensors that come in, not the model."""
    return [
        entry.guard_type in KEPT_GUARDS
        or (entry.guard_type == "TENSOR_MATCH" and not isinstance(entry.value, nn.Parameter))
        for entry in entries
    ]


def model_state(model: Any) -> int | None:
    """What a graph of the model depends on, as one number; None where more than these things may change.

    Dynamo checks every module and parameter before every call, which takes longer than launching a CUDA graph. Looking
    at them once a run is enough: within one call of `generate` nobody changes the model.
    """
    facts: list[Any] = [model.config.to_json_string(), model.config._attn_implementation]
    own = type(model).__module__
    for module in model.modules():
        place = type(module).__module__
        plain = place == own or place.rpartition(".")[0] == (own.rpartition(".")[0] or own)
        plain = plain or place.startswith(("torch.nn.modules.", "transformers.activations", "transformers.models."))
        if not plain or module._forward_hooks or module._forward_pre_hooks:
            return None
        facts.append((type(module), module.training))
    facts += [(type(each), type(each.data), each.shape, each.dtype, each.device) for each in model.parameters()]
    return hash(tuple(facts))


def may_compile(model: Any, generation_config: GenerationConfig) -> bool:
    """Whether steps on a static cache are to be compiled: as transformers decides it, but on a CPU, too."""
    quantizer = getattr(model, "hf_quantizer", None)
    one_device = len(set((getattr(model, "hf_device_map", None) or {}).values())) <= 1
    compileable = one_device and (quantizer is None or quantizer.is_compileable)
    return compileable and not generation_config.disable_compile


class CompiledSteps:
    """A model's steps for one call of `generate`, compiled or not.

    Args:
        config: backend, mode and options; None for a CUDA graph of Inductor's kernels on CUDA, its kernels elsewhere.
    """

    def __init__(self, model: Any, config: CompileConfig | None, enabled: bool = True) -> None:
        self.model, self.enabled = model, enabled
        config = config or CompileConfig(mode="reduce-overhead" if model.device.type == "cuda" else "default")
        options = dict(config.options or {})
        if config.backend == "inductor" and not options:
            options = torch._inductor.list_mode_options(config.mode)
        self.state = model_state(model) if enabled else None
        if self.state is not None and hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):
            options["guard_filter_fn"] = _cheap_guards
        self.how = {"backend": config.backend, "options": options}
        self.settings = (self.state, config.backend, config.mode, str(config.options))

    def __call__(self, function: Callable[..., Any], key: tuple, cache: Any, *arguments: Any) -> Any:
        """`function(model, cache, *arguments)`; its graph is made at the first call with this key.

        Args:
            key: what the graph is specialised for, besides the cache, the model and tensors that come in.
        """
        if not self.enabled:
            return function(self.model, cache, *arguments)
        layer = cache.layers[0]
        sizes = (layer.keys.shape, layer.dtype, layer.origin, layer.max_cache_len, type(cache), cache.offloading)
        full_key = (function.__name__, *key, *sizes, *self.settings)
        graphs = _GRAPHS.setdefault(self.model, {})
        if full_key not in graphs:
            # Code of its own: Dynamo counts recompilations by code, and these are no recompilations but other graphs.
            plain: Any = function
            own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__)
            graphs[full_key] = torch.compile(own, fullgraph=True, dynamic=False, **self.how)
        torch.compiler.cudagraph_mark_step_begin()
        return graphs[full_key](self.model, cache, *arguments)


def _bucket(nodes: int) -> int:
    """The size that trees of so many nodes are padded to, so that few graphs serve all."""
    return max(8, 1 << (nodes - 1).bit_length())


class StaticVerifier(TreeVerifier):
    """Drafts and verifies trees on a static cache; see the module's text.

    Rows that have ended stay in the batch, whose size is fixed.
    """

    rows_may_leave = False

    def __init__(self, model: Any, cache: Cache, drafter: Drafter, generation_config: GenerationConfig) -> None:
        super().__init__(model, cache, drafter)
        self.layers: list[Any] = cache.layers
        compile_steps = may_compile(model, generation_config)
        self.run = CompiledSteps(model, generation_config.compile_config, compile_steps)
        batch, device, config = len(self.layers[0].lengths), model.device, model.config
        shape = (batch, self.layers[0].tree_nodes, config.num_pred_heads, config.vocab_size)
        self.state = StepState(torch.zeros(shape, device=device), torch.ones((), device=device))
        self.temperature = 1.0
        self.max_depth = shape[1] - 1
        self.fill = None
        if isinstance(drafter, TensorDrafter):
            self.fill = drafter.fill_on(device, config.vocab_size)
            roots = torch.zeros(batch, dtype=torch.int64, device=device)
            self.max_depth = self.fill(roots, self.state.logits[:, 0, 1:], 1.0).max_depth
        if compile_steps:
            torch._dynamo.mark_static_address(self.state.logits)
            torch._dynamo.mark_static_address(self.state.temperature)
        self.kept: KeptPaths | None = None  # paths that the next step is to bring in place
        self.past = self.layers[0].lengths  # tokens before these paths
        self.started = False

    def step(self, frontier: Frontier) -> tuple[DraftTrees, Tensor]:
        if not self.started:
            self.state.logits[:, :1] = frontier.logits[:, -1:]
            self.started = True
        if frontier.temperature != self.temperature:
            self.state.temperature.fill_(frontier.temperature)
            self.temperature = frontier.temperature
        function: Callable[..., Any] = draft_and_verify
        arguments: tuple[Any, ...] = (self.fill,)
        key: tuple[Any, ...] = (self.drafter,)
        max_depth, sources = self.max_depth, None
        if self.fill is None:
            drafted = self.draft(frontier)
            arguments, max_depth, sources = self._padded(drafted), drafted.max_depth, drafted.sources
            function, key = verify_given, (arguments[0].shape[1],)
        control = self._control(frontier.roots, frontier.nodes)
        key = (*key, control.shape, self.state.logits.shape)
        ids, parents, mask = self.run(function, key, self.cache, self.state, control, *arguments)
        nodes = ids.shape[1]
        if sources is not None:
            sources = torch.nn.functional.pad(sources, (0, nodes - sources.shape[1]))
        return DraftTrees(ids, parents, max_depth, sources, known_mask=mask), self.state.logits[:, :nodes]

    def _control(self, roots: list[int], nodes: list[int]) -> Tensor:
        """What the host says at a step, see `draft_and_verify`."""
        width, table, kept = self.max_depth + 1, [], self.kept
        for row, past in enumerate(self.past):
            path = [] if kept is None else kept.paths[row]
            table.append([past, len(path), roots[row], nodes[row], *path, *range(len(path), width)])
        return torch.tensor(table, device=self.state.logits.device)

    def _padded(self, trees: DraftTrees) -> tuple[Tensor, Tensor]:
        """Ids and parents of trees with absent nodes up to a bucket's size."""
        batch, nodes = trees.ids.shape
        self.layers[0].check_nodes(nodes)
        more = min(_bucket(nodes), self.layers[0].tree_nodes) - nodes
        ids = torch.nn.functional.pad(trees.ids, (0, more))
        return ids, torch.nn.functional.pad(trees.parents.expand(batch, -1), (0, more), value=ABSENT)

    def commit(self, kept: KeptPaths) -> None:
        """Count the paths as cached; the next step brings them in place, unless they fill a window."""
        if not max(kept.counts):
            self.kept, self.past = None, self.layers[0].lengths
            return
        past, layer = self.layers[0].lengths, self.layers[0]
        fills = any((n % layer.window_size) + c >= layer.window_size for n, c in zip(past, kept.counts, strict=True))
        if fills:
            for each in self.layers:
                each.move(kept)
        count_in_all(self.layers, kept)
        self.kept, self.past = (None, layer.lengths) if fills else (kept, past)

    def finish(self) -> Cache | None:
        """The cache with the last paths in place."""
        if self.kept is not None:
            nothing = [0] * len(self.past)
            take_paths(self.layers, self._control(nothing, nothing))
        return super().finish()
