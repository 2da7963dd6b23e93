"""Weights of losses against the reference's, and its optimizer and schedule by those of torch and transformers."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import get_linear_schedule_with_warmup

from byte_llama.distillation import gradient_norms, gradmag_weights, sequence_logprobs, sft_loss, weighted_loss

GOLDENS = Path(__file__).parents[2] / "goldens" / "byte_llama" / "alm"


@cache
def tensors(case):
    return load_file(GOLDENS / f"{case}.safetensors")


@pytest.mark.parametrize("preserve_magnitude", [False, True])
def test_golden_gradmag(preserve_magnitude):
    """Losses linear in the parameters, whose gradients are those of the golden."""
    data = tensors("gradmag")
    gradients = {name[3:]: value for name, value in data.items() if name.startswith(("in.last.", "in.rest."))}
    parameters = {name: torch.zeros_like(value[0], requires_grad=True) for name, value in gradients.items()}
    losses = [
        data["in.loss_values"][k] + sum((parameters[name] * gradients[name][k]).sum() for name in parameters)
        for k in range(3)
    ]
    last = [parameter for name, parameter in parameters.items() if name.startswith("last.")]
    norms = gradient_norms(losses, last)
    torch.testing.assert_close(norms, data["out.global_grad_norm"], rtol=1e-5, atol=1e-8)

    loss = weighted_loss(losses, gradmag_weights(norms, preserve_magnitude))
    loss.backward()
    case = "approx_gradmag_preserve_mag" if preserve_magnitude else "approx_gradmag"
    torch.testing.assert_close(loss[None], data[f"out.{case}.loss"], rtol=1e-5, atol=1e-8)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, data[f"out.{case}.{name}"], rtol=1e-5, atol=1e-8)


def test_norms_leave_everything_as_it_was():
    """With layers and logits that are computed again for each backward pass, as in training."""
    torch.manual_seed(0)
    first, last, frozen = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 7)
    frozen.requires_grad_(False)
    first.weight.grad = last.weight.grad = torch.ones(4, 4)
    ids = torch.randint(7, (2, 5))

    def losses():
        hidden = checkpoint(last, first(torch.ones(2, 5, 4).cumsum(1)), use_reentrant=False)
        tokens = sequence_logprobs(hidden, ids, head=frozen, chunk_size=3).tokens
        return [sft_loss(tokens, ids), hidden.square().mean(), 3 * hidden.square().mean()]

    current = losses()
    norms = gradient_norms(current, [*last.parameters(), *frozen.parameters()])
    for k, norm in enumerate(norms):
        gradients = torch.autograd.grad(losses()[k], list(last.parameters()))
        torch.testing.assert_close(norm, torch.cat([part.flatten() for part in gradients]).norm())
    assert not norms.requires_grad
    assert torch.equal(first.weight.grad, torch.ones(4, 4)) and last.weight.grad is first.weight.grad
    assert last.bias.grad is None

    # The graph is still there, and under the weights all gradients are equally large.
    weights = gradmag_weights(norms)
    assert weights.sum().item() == pytest.approx(1)
    assert weights[1].item() == pytest.approx(3 * weights[2].item(), rel=1e-5)
    parts = [
        torch.autograd.grad(weights[k] * loss, last.weight, retain_graph=True)[0] for k, loss in enumerate(current)
    ]
    (gradient,) = torch.autograd.grad(weighted_loss(current, weights), last.weight)
    torch.testing.assert_close(gradient, sum(parts))


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), st.lists(st.just(0.0), max_size=2))
def test_losses_without_gradients_leave_the_others_alone(norms, zeros):
    for preserve_magnitude in (False, True):
        alone = gradmag_weights(torch.tensor(norms), preserve_magnitude)
        weights = gradmag_weights(torch.tensor(norms + zeros), preserve_magnitude)
        torch.testing.assert_close(weights, torch.cat((alone, torch.zeros(len(zeros)))))
        torch.testing.assert_close(
            alone * torch.tensor(norms), (alone * torch.tensor(norms)).mean().expand(len(norms)), rtol=0.02, atol=0
        )


def test_loss_without_a_graph():
    parameter = torch.ones(2, requires_grad=True)
    losses = [parameter.sum(), torch.tensor(3.0), torch.ones(1, requires_grad=True).sum()]
    assert gradient_norms(losses, [parameter]).tolist() == pytest.approx([2**0.5, 0, 0])
    assert gradmag_weights(torch.zeros(2)).tolist() == [0, 0]


def test_fixed_weights():
    losses = [torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)]
    weights = torch.tensor([1.0, 0.5], requires_grad=True)
    for total in (weighted_loss(losses, [1.0, 0.5]), weighted_loss(losses, weights)):
        assert total.item() == 3.5
        gradients = torch.autograd.grad(total, [*losses, weights], allow_unused=True)
        assert gradients[0].item() == 1 and gradients[1].item() == 0.5 and gradients[2] is None


def test_errors():
    with pytest.raises(ValueError, match="parameters must hold"):
        gradient_norms([torch.zeros(())], [torch.zeros(2)])
    with pytest.raises(ValueError, match="weights must hold one number for each of the 1 losses"):
        weighted_loss([torch.zeros(())], [1.0, 2.0])


# -- optimizer and schedule: those of torch and transformers are the published ones ------------------------------------


def optim_record():
    return json.loads((GOLDENS / "optim.json").read_text())


@pytest.mark.parametrize("case", optim_record()["schedule"]["values"], ids=lambda case: f"{case['steps']} steps")
def test_golden_schedule(case):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=case["lr"])
    scheduler = get_linear_schedule_with_warmup(optimizer, case["warmup_steps"], case["steps"])
    (rate,) = scheduler.lr_lambdas
    values = torch.tensor([case["lr"] * rate(step) for step in case["at"]], dtype=torch.float64)
    torch.testing.assert_close(values, torch.tensor(case["value"], dtype=torch.float64), rtol=3e-4, atol=1e-12)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_golden_optimizer(accumulated):
    data, settings = tensors("optim"), optim_record()["optimizer"]
    parameters = {name[9:]: value.clone() for name, value in data.items() if name.startswith("in.param.")}
    trained = {
        name: value.requires_grad_() for name, value in parameters.items() if name not in settings["not_trained"]
    }
    decayed = [value for name, value in trained.items() if name not in settings["no_weight_decay"]]
    others = [trained[name] for name in settings["no_weight_decay"]]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(settings["b1"], settings["b2"]),
        eps=settings["eps"],
    )
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 10)
    for step in range(6):
        for name, parameter in trained.items():
            gradient = data[f"in.grad.{step}.{name}"] / accumulated
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
        if (step + 1) % accumulated == 0:
            torch.nn.utils.clip_grad_norm_(trained.values(), settings["max_grad_norm"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        for name, parameter in parameters.items():
            expected = data[f"out.acc{accumulated}.step{step}.{name}"]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
