"""Log-probabilities at chosen ids against those of whole logits: values, gradients, precision and memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_llama.distillation import sequence_logprobs, sft_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 30), st.booleans(), st.integers(0, 10**6))
def test_logprobs_equal_log_softmax(batch, length, chunk_size, from_hidden, seed):
    """Values and gradients, from logits and from hidden states, for any size of the chunks."""
    torch.manual_seed(seed)
    vocab, space = 11, torch.arange(11) % 4 == 1
    ids = torch.randint(vocab, (batch, length))
    head = torch.nn.Linear(5, vocab)
    states = torch.randn(batch, length, 5 if from_hidden else vocab, requires_grad=True)
    inputs = [states, *head.parameters()] if from_hidden else [states]
    weights = torch.randn(2, batch, length)

    logprobs = sequence_logprobs(states, ids, space, head if from_hidden else None, chunk_size)
    full = (head(states) if from_hidden else states).log_softmax(-1)
    expected = torch.zeros(batch, length)
    for t in range(1, length):
        expected[:, t] = full[torch.arange(batch), t - 1, ids[:, t]]
    spaces = full.exp()[..., space].sum(-1).log()
    torch.testing.assert_close(logprobs.tokens, expected)
    torch.testing.assert_close(logprobs.spaces, spaces)

    gradients = torch.autograd.grad((weights[0] * logprobs.tokens + weights[1] * logprobs.spaces).sum(), inputs)
    plain = torch.autograd.grad((weights[0] * expected + weights[1] * spaces).sum(), inputs)
    torch.testing.assert_close(gradients, plain, rtol=1e-4, atol=1e-5)


def test_logprobs_without_a_space_mask_or_gradients():
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    with torch.no_grad():
        logprobs = sequence_logprobs(logits, ids, chunk_size=3)
    assert logprobs.spaces is None
    torch.testing.assert_close(logprobs.tokens, sequence_logprobs(logits, ids).tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    logits, ids = (torch.randn(2, 6, 300) * 4).to(dtype).requires_grad_(), torch.randint(300, (2, 6))
    space = torch.arange(300) < 9
    exact = logits.detach().float().requires_grad_()
    losses = []
    for states in (logits, exact):
        logprobs = sequence_logprobs(states, ids, space, chunk_size=5)
        assert logprobs.tokens.dtype == logprobs.spaces.dtype == torch.float32
        losses.append(logprobs.tokens.sum() + logprobs.spaces.sum())
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, states)[0] for loss, states in zip(losses, (logits, exact), strict=True)]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(gradients[0], gradients[1].to(dtype))


def test_impossible_spaces_stay_finite():
    logits = torch.tensor([[[0.0, -200.0, 3.0], [0.0, -200.0, 3.0]]], requires_grad=True)
    spaces = sequence_logprobs(logits, torch.tensor([[0, 2]]), torch.tensor([False, True, False])).spaces
    (gradient,) = torch.autograd.grad(spaces.sum(), logits)
    assert spaces[0, 0].item() == pytest.approx(-200 - math.log(1 + math.exp(3))) and gradient.isfinite().all()


def test_no_second_tensor_of_the_size_of_the_logits_is_kept():
    logits, ids = torch.randn(4, 64, 500, requires_grad=True), torch.randint(500, (4, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        sequence_logprobs(logits, ids, torch.arange(500) < 250, chunk_size=32)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    storages.pop(logits.untyped_storage().data_ptr(), None)
    assert sum(storages.values()) < logits.nbytes / 100


def test_sft_gradients_from_hidden_states():
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (2, 5))
    labels = ids.masked_fill(torch.tensor([0, 0, 1, 0, 1]) == 1, -100)

    def loss(hidden, weight):
        return sft_loss(sequence_logprobs(hidden, ids, None, lambda rows: rows @ weight.T, 4).tokens, labels)

    expected = torch.nn.functional.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss(hidden, weight), expected)
    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_errors():
    states, ids = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    for call, message in [
        (lambda: sequence_logprobs(states, ids[:, :4]), "input_ids"),
        (lambda: sequence_logprobs(states, ids, chunk_size=0), "chunk_size"),
        (lambda: sequence_logprobs(states, ids, torch.ones(3, dtype=torch.bool)), "each of the 4 logits"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
