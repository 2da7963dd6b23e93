"""Weights of several losses, from the size of their gradients (GradMag in ALM, arXiv 2503.20083).

Normalising the gradient of each loss takes a backward pass through the whole model for each of them. The gradients of
the last decoder layer's parameters alone, which are nearly free, stand in for all.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def gradient_norms(
    losses: Sequence[Tensor],
    parameters: Iterable[Tensor],
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """Norm of the gradient of each loss over all the parameters together, float32 [K].

    Leaves `.grad` as it is, and the graph of the losses as well, for the backward pass through their weighted sum.

    Args:
        losses: K scalars.
        parameters: those of the last decoder layer, usually; frozen ones are passed over.
        average: of a gradient over all devices, so that the norms are those of their batches together.

    Raises:
        ValueError: no parameter needs a gradient.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("parameters must hold at least one that needs a gradient.")
    norms = []
    for loss in losses:
        gradients: Sequence[Tensor] = [torch.zeros_like(parameter) for parameter in trained]
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)
        sizes = [torch.linalg.vector_norm(average(part), dtype=torch.float32) for part in gradients]
        norms.append(torch.linalg.vector_norm(torch.stack(sizes)))
    return torch.stack(norms).detach()


def gradmag_weights(norms: Tensor, preserve_magnitude: bool = True, epsilon: float = 1e-8) -> Tensor:
    """Weights [K] under which the gradients of all losses have the same size, given their norms [K].

    A loss without any gradient (a batch without chunks, say) has weight 0 and leaves those of the others alone.

    Args:
        norms: float [K], from `gradient_norms`.
        preserve_magnitude: let the weights add up to 1, so that the sum of losses keeps its size. Else they are
            1 / norm.
        epsilon: added to the norms.
    """
    weights = torch.where(norms > 0, 1 / (norms + epsilon), 0.0)
    if preserve_magnitude:
        weights = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return weights


def weighted_loss(losses: Sequence[Tensor], weights: Tensor | Sequence[float]) -> Tensor:
    """Sum of the losses, each times its weight, a scalar; no gradient flows through the weights.

    Args:
        losses: K scalars.
        weights: K numbers, fixed ones or those of `gradmag_weights`.

    Raises:
        ValueError: there are not as many weights as losses.
    """
    if len(losses) != len(weights):
        raise ValueError(
            f"weights must hold one number for each of the {len(losses)} losses, but holds {len(weights)}."
        )
    stacked = torch.stack(list(losses))
    return (stacked * torch.as_tensor(weights, dtype=stacked.dtype, device=stacked.device).detach()).sum()


__all__ = ["gradient_norms", "gradmag_weights", "weighted_loss"]
