"""`generate(cache_implementation="static")` for models with EVA attention: makes the cache, compiles the steps.

transformers compiles a model's whole `forward` and lets it count the cache's tokens; here the host counts, and only
what is the same at every step is compiled (see `static_decoding.py`).
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import CompileConfig, GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from .drafters import Drafter
from .eva_cache import KeptPaths
from .eva_static_cache import EvaStaticCache, count_in_all, static_layers
from .static_decoding import CompiledSteps, StaticVerifier, may_compile, next_byte_logits, verify_in_window
from .tree_verifier import TreeVerifier


class StaticGenerationMixin:
    """Static caches for a model with EVA attention; comes before `PreTrainedModel` among the bases."""

    def _prepare_static_cache(self, cache_implementation: str, max_cache_len: int, **kwargs: Any) -> EvaStaticCache:
        """A static cache of at least this length.

        Graphs are specialised for the size of the buffer, so the number of windows is rounded up to a power of two
        (which costs summaries only), and not less than at the last call.

        Raises:
            ValueError: for "offloaded_static".
        """
        if cache_implementation != "static":
            raise ValueError(
                f"`cache_implementation={cache_implementation!r}`: EvaByte's static cache stays on its device. Use "
                "'static', or 'offloaded' for a dynamic one on the CPU."
            )
        config: Any = self.config  # type: ignore[attr-defined]
        closed = max_cache_len // config.window_size
        rounded = (1 << (closed - 1).bit_length() if closed else 0) * config.window_size + config.window_size - 1
        length: int = max(rounded, getattr(self, "_previous_max_cache_length", 1))
        self._previous_max_cache_length = length
        return EvaStaticCache(config, length)

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The 2D mask as it is; transformers would make a 4D one for a static cache."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        """As in transformers, but a static cache is enough to compile, on a CPU too."""
        return bool(static_layers(model_kwargs.get("past_key_values"))) and may_compile(self, generation_config)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """`self.__call__`, compiled where `generate` reads one byte per row into a static cache."""
        return OneByteStep(self, compile_config)

    def _prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """As in transformers, but never compiled: prompts and their pieces differ in length."""
        eager = copy(generation_config)
        eager.disable_compile = True
        return super()._prefill(input_ids, eager, model_kwargs, **kwargs)  # type: ignore[misc]

    def _verify_static(
        self, cache: Cache, past: Tensor, ids: Tensor, parents: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the model over trees behind `past` int64 [B] tokens, within one graph.

        Args:
            ids, parents: int64 [B or 1, T].
            mask: bool [B or 1, T, T], see `DraftTrees.mask`.

        Returns:
            logits float32 [B, T, heads, vocab]; the parents, with nodes that the walk may not reach absent.
        """
        return verify_in_window(self, cache, past, ids, parents, mask)

    def _tree_verifier(self, cache: Cache, drafter: Drafter, generation_config: GenerationConfig) -> TreeVerifier:
        layers = static_layers(cache)
        if layers and {layer.device for layer in layers} == {self.device}:  # type: ignore[attr-defined]
            return StaticVerifier(self, cache, drafter, generation_config)
        return TreeVerifier(self, cache, drafter)


class OneByteStep:
    """`model.__call__` for the steps of `generate` on a static cache: compiled where one byte per row comes in."""

    def __init__(self, model: Any, config: CompileConfig | None) -> None:
        self.model, self.config = model, config
        self.run: CompiledSteps | None = None

    def __call__(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        cache = inputs.get("past_key_values")
        layers = static_layers(cache)
        others = {name for name, value in inputs.items() if value is not None and value is not False} - {
            "past_key_values", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep",
        }  # fmt: skip
        one_each = input_ids is not None and input_ids.shape[1] == 1
        if input_ids is None or not one_each or others or not layers or not layers[0].is_initialized:
            return self.model(input_ids=input_ids, **inputs)
        layer = layers[0]
        layer.check_length(max(layer.lengths) + 1)
        if self.run is None:
            self.run = CompiledSteps(self.model, self.config)
        positions = inputs.get("position_ids")
        key = (input_ids.shape, input_ids.dtype, None if positions is None else positions.shape)
        past = torch.tensor(layer.lengths, device=input_ids.device)
        logits = self.run(next_byte_logits, key, cache, past, input_ids, positions)
        count_in_all(layers, KeptPaths([[0]] * len(layer.lengths)))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
