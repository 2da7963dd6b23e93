"""The operator: both implementations agree, gradients are right, padding and packing change nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evabyte import eva_attention


def operator_inputs(batch, length, seed=0, heads=2, head_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, head_dim)] * 3 + [(heads, head_dim)] * 2
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    sizes=st.sampled_from([(8, 4), (12, 3), (16, 16), (5, 1), (64, 8), (1, 1)]),
    seed=st.integers(0, 10),
)
def test_backends_agree(batch, length, sizes, seed):
    window_size, chunk_size = sizes
    outputs, gradients = [], []
    for backend in ("naive", "sdpa"):
        inputs = [tensor.requires_grad_() for tensor in operator_inputs(batch, length, seed)]
        output = eva_attention(*inputs, window_size=window_size, chunk_size=chunk_size, backend=backend)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append([torch.zeros_like(i) if i.grad is None else i.grad for i in inputs])
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=1e-8)
    for naive, sdpa in zip(*gradients, strict=True):
        torch.testing.assert_close(naive, sdpa, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("length", [3, 9, 13])
def test_gradients_are_finite_differences(backend, length):
    inputs = [tensor.requires_grad_() for tensor in operator_inputs(1, length, heads=1, head_dim=4)]

    def operator(*tensors):
        return eva_attention(*tensors, window_size=4, chunk_size=2, backend=backend)

    assert torch.autograd.gradcheck(operator, inputs)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_gradients_through_padding_and_packing(backend):
    inputs = [tensor.requires_grad_() for tensor in operator_inputs(2, 11, heads=1, head_dim=4)]
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = mask[1, 9:] = 0
    positions = torch.tensor([[0] * 3 + list(range(8)), [*range(5), *range(4), 0, 0]])

    def operator(*tensors):
        output = eva_attention(
            *tensors, window_size=4, chunk_size=2, backend=backend, attention_mask=mask, position_ids=positions
        )
        return output[mask[:, None].expand(-1, 1, -1).bool()]

    assert torch.autograd.gradcheck(operator, inputs)


@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3),
    gaps=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    sizes=st.sampled_from([(8, 4), (12, 3), (5, 1)]),
    backend=st.sampled_from(["naive", "sdpa"]),
)
def test_every_document_as_if_alone(lengths, gaps, sizes, backend):
    """Rows of several documents with padding before, after and between them."""
    window_size, chunk_size = sizes
    total = max(sum(row) for row in lengths) + sum(gaps)
    inputs = operator_inputs(len(lengths), total)
    mask = torch.zeros(len(lengths), total, dtype=torch.int64)
    positions = torch.zeros(len(lengths), total, dtype=torch.int64)
    places = []
    for row, documents in enumerate(lengths):
        start = 0
        for document, gap in zip(documents, gaps, strict=False):
            start += gap
            mask[row, start : start + document] = 1
            positions[row, start : start + document] = torch.arange(document)
            places.append((row, slice(start, start + document)))
            start += document
    sizes = {"window_size": window_size, "chunk_size": chunk_size}
    output = eva_attention(*inputs, **sizes, backend=backend, attention_mask=mask, position_ids=positions)
    for row, place in places:
        alone = [tensor[row : row + 1, :, place] for tensor in inputs[:3]]
        expected = eva_attention(*alone, *inputs[3:], **sizes, backend="naive")
        torch.testing.assert_close(output[row : row + 1, :, place], expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_low_precision_stays_near_float64(dtype, backend):
    inputs = operator_inputs(2, 50)
    sizes = {"window_size": 16, "chunk_size": 4}
    exact = eva_attention(*inputs, **sizes, backend="naive")
    output = eva_attention(*(tensor.to(dtype) for tensor in inputs), **sizes, backend=backend)
    assert output.dtype == dtype
    error = (output.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"chunk_size": 3}, "chunk_size"),
        ({"backend": "flash"}, "backend"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask"),
        ({"position_ids": torch.ones(3, 9)}, "position_ids"),
    ],
)
def test_bad_arguments(changes, names):
    arguments = {"window_size": 8, "chunk_size": 4, **changes}
    with pytest.raises(ValueError, match=names):
        eva_attention(*operator_inputs(2, 9), **arguments)


def test_bad_shapes():
    query, key, value, mu, phi = operator_inputs(2, 9)
    with pytest.raises(ValueError, match="query"):
        eva_attention(query[:, :, :3], key, value, mu, phi, window_size=8, chunk_size=4)
    with pytest.raises(ValueError, match="adaptive_phi"):
        eva_attention(query, key, value, mu, phi[:1], window_size=8, chunk_size=4)
