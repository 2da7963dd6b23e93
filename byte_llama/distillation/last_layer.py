"""The last decoder layer once more, on the side: where the gradients of single losses are measured.

Weighting by gradient magnitude needs the gradient of every loss on the last layer's parameters. Taken from the model
itself, that would run backward through whatever wraps it (FSDP shards, gradient hooks) once a loss. A copy of the last
layer, the final norm and the output heads, fed with what the layer was fed, gives the same gradients and touches
nothing.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class LastLayerCopy:
    """Follows the last decoder layer of a byte-level causal model.

    Args:
        model: the model, before it is wrapped.
    """

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder()
        self._live = [decoder.layers[-1], decoder.norm, model.lm_head, model.draft_heads]
        self._copies: list[Any] = [copy.deepcopy(module) for module in self._live]
        self._copies[0].gradient_checkpointing = False
        self._predict: Callable[..., Tensor] = type(model).predict
        self._config = model.config
        self._fed: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._live[0].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            self._fed = args, kwargs

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The copy's parameters that learn, of the decoder layer alone."""
        return [parameter for parameter in self._copies[0].parameters() if parameter.requires_grad]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Last hidden states [B, S, H] and logits [B, S, heads, V] of what the layer was fed last."""
        if self._fed is None:
            raise RuntimeError("The model has not run in training since the copy was made.")
        self._follow()
        args, kwargs = (_detached(part) for part in self._fed)
        self._fed = None
        layer, norm, lm_head, draft_heads = self._copies
        hidden = norm(layer(*args, **{**kwargs, "past_key_values": None}))
        return hidden, self._predict(_Heads(lm_head, draft_heads, self._config), hidden)

    @torch.no_grad()
    def _follow(self) -> None:
        """Bring the copies' weights up to date; shards are gathered."""
        for live, copied in zip(self._live, self._copies, strict=True):
            copied.train(live.training)
            for theirs, ours in zip(live.parameters(), copied.parameters(), strict=True):
                full = theirs.full_tensor() if isinstance(theirs, DTensor) else theirs
                if ours.device != full.device:
                    copied.to(full.device)
                ours.data.copy_(full)


class _Heads:
    """What `predict` reads of a model."""

    def __init__(self, lm_head: nn.Module, draft_heads: nn.ModuleList, config: Any) -> None:
        self.lm_head, self.draft_heads, self.config = lm_head, draft_heads, config


def _detached(fed: Any) -> Any:
    if isinstance(fed, Tensor):
        return fed.detach()
    if isinstance(fed, dict):
        return {name: _detached(part) for name, part in fed.items()}
    return type(fed)(_detached(part) for part in fed) if isinstance(fed, tuple | list) else fed


__all__ = ["LastLayerCopy"]
