"""Muon for the weight matrices and AdamW for everything else, as one optimizer.

Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a hidden layer's matrix;
embeddings, output layers, norms and vectors are left to AdamW. PyTorch has had it since 2.9.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers behind one interface: `param_groups` are those of both, so schedulers and clipping work.

    Args:
        matrices: two-dimensional parameters for Muon.
        others: parameters for AdamW.
        matrix_learning_rate: Muon's, about ten times AdamW's.
        learning_rate, betas: AdamW's.
        weight_decay: of the matrices; the others have none.
    """

    def __init__(
        self,
        matrices: Iterable[Parameter],
        others: Iterable[Parameter],
        matrix_learning_rate: float,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(list(matrices), lr=matrix_learning_rate, weight_decay=weight_decay),
            torch.optim.AdamW(list(others), lr=learning_rate, betas=betas, weight_decay=0.0),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """The very groups of the parts, so that a change of one's learning rate is a change of the other's."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
