"""One prediction head at a time, for tools that take the output layer for one next-token head.

TRL's trainers, for one, compute log-probabilities from `lm_head.weight` themselves. EvaByte's holds all heads, one
behind the other, which such a tool would take for one large vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@contextmanager
def next_byte_only(model: Any) -> Iterator[Any]:
    """Within, an EvaByte model has its next-byte head alone; afterwards the others are back, unchanged.

        with next_byte_only(model):
            DPOTrainer(model=model, ...).train()

    What is saved within is a complete model of one head. The later heads read hidden states that training has moved:
    they draft a little worse than before, and multibyte decoding stays lossless.

    Args:
        model: an `EvaByteForCausalLM`, before it is wrapped (by `get_peft_model`, say).

    Yields:
        the same model.

    Raises:
        TypeError: when its output layer has been wrapped or quantised.
    """
    config, all_heads = model.config, model.lm_head
    if type(all_heads) is not nn.Linear or isinstance(all_heads.weight, DTensor):
        raise TypeError(
            f"`model`: the output layer is a {type(all_heads).__name__} that is wrapped, sharded or quantised; enter "
            "`next_byte_only` before that is done to it."
        )
    heads, weight = config.num_pred_heads, all_heads.weight
    alone = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
    alone.weight = nn.Parameter(weight.detach()[: config.vocab_size].clone(), requires_grad=weight.requires_grad)
    model.lm_head, config.num_pred_heads = alone, 1
    try:
        yield model
    finally:
        trained = alone.weight.detach()
        trained = trained.full_tensor() if isinstance(trained, DTensor) else trained
        all_heads.to(trained.device)
        with torch.no_grad():
            all_heads.weight[: config.vocab_size] = trained
        model.lm_head, config.num_pred_heads = all_heads, heads


class StackedHeadsMixin:
    """Refuses what would take several heads for one; mixed in before the model's class.

    TRL replaces `forward` by one that, asked for `fused_lm_head`, reads the output layer past the model.
    """

    config: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and self.config.num_pred_heads > 1:
            value = MethodType(_refuse_fused_head(value), self)  # bound, as accelerate expects it
        super().__setattr__(name, value)

    def _get_resized_lm_head(
        self, old_lm_head: nn.Linear, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Linear:
        """The rows of each prediction head resized as transformers resizes an output layer that has one."""
        resize = super()._get_resized_lm_head  # type: ignore[misc]
        if new_num_tokens is None or self.config.num_pred_heads == 1:
            return resize(old_lm_head, new_num_tokens, *args, **kwargs)
        resized, width = [], old_lm_head.in_features
        for weight in old_lm_head.weight.detach().chunk(self.config.num_pred_heads):
            head = nn.Linear(width, weight.shape[0], bias=False, device="meta")
            head.weight = nn.Parameter(weight)
            resized.append(resize(head, new_num_tokens, *args, **kwargs).weight.detach())
        heads = nn.Linear(width, len(resized) * new_num_tokens, bias=False, device="meta")
        heads.weight = nn.Parameter(torch.cat(resized))
        heads._is_hf_initialized = True  # type: ignore[assignment]  # so `post_init` keeps what was resized
        return heads


def _refuse_fused_head(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def checked(_: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head:
            raise ValueError(
                "`fused_lm_head`: TRL's own losses take the output layer for one next-token head, but this model has "
                "several. Train its next-byte head alone, `with evabyte.next_byte_only(model): ...`, or all heads by "
                "the model's own loss, as examples/sft.py does."
            )
        return forward(*args, **kwargs)

    # What `inspect` shows of a bound method lacks the first parameter: let that be the model, not `input_ids`.
    taken = inspect.signature(forward)
    model = inspect.Parameter("_", inspect.Parameter.POSITIONAL_ONLY)
    checked.__signature__ = taken.replace(parameters=[model, *taken.parameters.values()])  # type: ignore[attr-defined]
    return checked
