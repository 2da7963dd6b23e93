"""The Triton kernels in Triton's CPU interpreter against the specification: values, gradients, odd shapes."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from test_eva_attention import operator_inputs
from tiny import logits_alone, pad_left, random_ids, tiny_model
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from transformers import DynamicCache

from evabyte import eva_attention, eva_triton
from evabyte.eva_attention import default_backend
from evabyte.eva_math import summarize_chunks

if not eva_triton.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1 (tests/gpu runs the kernels on a GPU)", allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    """Memory that a kernel does not write is NaN, rather than zeros left by chance."""
    patch = pytest.MonkeyPatch()
    get_torch_obj_rule_map()  # or Dynamo would list the stand-ins, and know the real functions in no later test
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    patch.setattr(eva_triton.torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    patch.setattr(eva_triton.torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    yield
    patch.undo()


def relative_error(actual, expected):
    floor = 0.1 * expected.numel() ** 0.5  # of a gradient that vanishes nothing but rounding is left
    return ((actual - expected).norm() / expected.norm().clamp(min=floor)).item()


@settings(max_examples=6)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 150),
    sizes=st.sampled_from([(16, 4), (48, 8), (5, 1), (64, 16), (40, 40)]),
    head_dim=st.sampled_from([16, 24, 64]),
)
def test_values_and_gradients(batch, length, sizes, head_dim):
    results = {}
    for backend in ("naive", "eva_triton"):
        inputs = [t.requires_grad_() for t in operator_inputs(batch, length, 1, 2, head_dim, torch.float32)]
        output = eva_attention(*inputs, window_size=sizes[0], chunk_size=sizes[1], backend=backend)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        (output * weights).sum().backward()
        results[backend] = [output, *(torch.zeros_like(t) if t.grad is None else t.grad for t in inputs)]
    for naive, kernel in zip(*results.values(), strict=True):
        assert relative_error(kernel, naive) < 1e-5


@settings(max_examples=6)
@given(
    documents=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=3), min_size=1, max_size=2),
    left=st.integers(0, 20),
    holes=st.booleans(),
)
def test_padding_and_packing(documents, left, holes):
    """Values and gradients where the rows lie (and, with holes in the rows, gathered) against the specification."""
    length = left + max(map(sum, documents)) + 3
    mask, positions = torch.zeros(len(documents), length).long(), torch.ones(len(documents), length).long()
    for row, lengths in enumerate(documents):
        place = left * (row == 0)
        for n in lengths:
            mask[row, place : place + n], positions[row, place : place + n] = 1, torch.arange(n)
            place += n
    if holes:
        mask[:, length // 2] = 0
    how = {"window_size": 16, "chunk_size": 4, "attention_mask": mask, "position_ids": positions}
    results = {}
    for backend in ("naive", "eva_triton"):
        inputs = [t.requires_grad_() for t in operator_inputs(len(documents), length, 1, 2, 16, torch.float32)]
        output = eva_attention(*inputs, **how, backend=backend)
        (output.sin() + output).sum().backward()
        results[backend] = [output, *(t.grad for t in inputs)]
    for naive, kernel in zip(*results.values(), strict=True):
        assert relative_error(kernel, naive) < 1e-5


def test_chunks_too_large_for_a_program(monkeypatch):
    monkeypatch.setattr(sys.modules["evabyte.eva_attention"], "MOST_ELEMENTS", 32)
    monkeypatch.delattr(eva_triton, "summarize")
    inputs, mask = operator_inputs(2, 50, dtype=torch.float32), torch.ones(2, 50).long()
    mask[0, :7] = 0
    for how in ({}, {"attention_mask": mask}):
        outputs = [
            eva_attention(*inputs, window_size=16, chunk_size=8, **how, backend=backend)
            for backend in ("eva_triton", "naive")
        ]
        torch.testing.assert_close(*outputs)


def test_half_precision_and_strides():
    exact = operator_inputs(2, 70, heads=3, head_dim=32)
    # Heads and positions exchanged in memory, as projections leave them.
    half = [t.half().transpose(1, 2).contiguous().transpose(1, 2) for t in exact[:3]] + [t.half() for t in exact[3:]]
    output = eva_attention(*half, window_size=16, chunk_size=4, backend="eva_triton")
    assert output.dtype == torch.float16
    reference = eva_attention(*(t.double() for t in half), window_size=16, chunk_size=4, backend="naive")
    assert relative_error(output.double(), reference) < 4 * torch.finfo(torch.float16).eps


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    nodes=st.integers(1, 40),
    min_split=st.sampled_from([16, 256]),
    seed=st.integers(0, 99),
)
def test_trees_on_ragged_rows(lengths, nodes, min_split, seed):
    """The decoding kernel, with the keys split or not, against the specification of the same calls."""
    generator = torch.Generator().manual_seed(seed)
    tree = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        tree[node] |= tree[int(torch.randint(max(0, node - 4), node, (), generator=generator))]
    rows = [random_ids(n, seed=n) for n in lengths]
    ids, mask = pad_left(rows)
    draft, logits = random_ids(len(rows), nodes, seed=seed), []
    for backend in ("naive", "eva_triton"):
        model = tiny_model(64, 4, backend=backend)
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(eva_triton, "MIN_SPLIT", min_split)
            model(ids, attention_mask=mask, past_key_values=cache)
            logits.append(model(draft, draft_tree=tree[None], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@settings(max_examples=10)
@given(
    batch=st.integers(1, 2),
    chunks=st.integers(0, 9),
    chunk_size=st.integers(1, 20),
    head_dim=st.sampled_from([8, 20, 64]),
)
def test_summaries(batch, chunks, chunk_size, head_dim):
    results = {}
    for function in (summarize_chunks, eva_triton.summarize):
        inputs = [
            t.requires_grad_() for t in operator_inputs(batch, chunks * chunk_size, 4, 2, head_dim, torch.float32)
        ]
        _, keys, values, mu, phi = inputs
        summaries = function(keys, values, mu, phi, chunk_size)
        (summaries[0].sin().sum() + summaries[1].cos().sum()).backward()
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (keys, values, mu, phi)]
        results[function] = [*summaries, *grads]
    for naive, kernel in zip(*results.values(), strict=True):
        assert naive.shape == kernel.shape
        assert naive.numel() == 0 or relative_error(kernel, naive) < 1e-5


@pytest.mark.parametrize("cut", [1, 7, 16, 33])
def test_a_model_on_a_cache(cut):
    model, ids = tiny_model(backend="eva_triton"), random_ids(2, 61)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(cut, dim=1)]
    for row in range(2):
        expected = logits_alone(tiny_model(backend="naive"), ids[row])[:, 0]
        torch.testing.assert_close(torch.cat(pieces, dim=1)[row], expected, atol=1e-4, rtol=1e-4)


def test_operators_are_what_torch_expects():
    query, key, value, _, _ = operator_inputs(1, 20, dtype=torch.float32)
    summaries = operator_inputs(1, 4, seed=3, dtype=torch.float32)[:2]
    learned = operator_inputs(1, 4, seed=3, dtype=torch.float32)[3:]
    how = {"test_utils": ("test_schema", "test_faketensor", "test_autograd_registration")}
    inputs = [t.requires_grad_() for t in (query, key, value, *summaries)]
    for table in (None, torch.tensor([[0, 3, 17, 0, 0, 0]], dtype=torch.int32)):
        torch.library.opcheck(eva_triton.windowed, (*inputs, table, 20 if table is None else 17, 0, 16, 4), **how)
    keys, values, mu, phi = (t.requires_grad_() for t in (key, value, *learned))
    for starts in (None, torch.tensor([[4, -1]], dtype=torch.int32)):
        torch.library.opcheck(eva_triton.summarize, (keys, values, mu, phi, 4, starts), **how)


def test_compile_and_export():
    """One graph without breaks, forward and backward, and a program that can be exported."""
    inputs = [t.requires_grad_() for t in operator_inputs(1, 40, dtype=torch.float32)]

    def attend(*tensors):
        return eva_attention(*tensors, window_size=16, chunk_size=4, backend="eva_triton")

    gradients = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        output = function(*inputs)
        gradients.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))

    class Attention(torch.nn.Module):
        def forward(self, *tensors):
            return attend(*tensors)

    exported = torch.export.export(Attention(), tuple(t.detach() for t in inputs))
    torch.testing.assert_close(exported.module()(*inputs), gradients[0][0])


def test_the_default_and_layers_off_the_gpu(monkeypatch):
    assert (default_backend("cuda"), default_backend("cuda", torch.float64)) == ("eva_triton", "sdpa")
    assert default_backend("cpu") == "sdpa"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = tiny_model()
    assert model.get_correct_attn_implementation(None) == "eva_triton"
    assert model.get_correct_attn_implementation("naive") == "naive"

    ids = random_ids(1, 40)
    offloaded, plain = tiny_model(backend="eva_triton"), tiny_model(backend="sdpa")
    monkeypatch.setattr(eva_triton, "INTERPRETED", False)
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="needs a GPU"):
        inputs = operator_inputs(1, 20, dtype=torch.float32)
        eva_attention(*inputs, window_size=16, chunk_size=4, backend="eva_triton")


def test_unsupported_dtype_is_named():
    with pytest.raises(ValueError, match=r"float64.*use 'sdpa'"):
        eva_attention(*operator_inputs(1, 20), window_size=16, chunk_size=4, backend="eva_triton")


def test_gradients_are_deterministic():
    gradients = []
    for _ in range(2):
        inputs = [t.requires_grad_() for t in operator_inputs(1, 100, dtype=torch.float32)]
        eva_attention(*inputs, window_size=32, chunk_size=4, backend="eva_triton").square().sum().backward()
        gradients.append([t.grad for t in inputs])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("eva_triton", marks=pytest.mark.slow)])
def test_a_whole_model_compiles_without_breaks(backend):
    model, ids = tiny_model(backend=backend), random_ids(2, 50)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [run(ids, labels=ids, use_cache=False).loss for run in (model, compiled)]
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
    assert torch.equal(*losses)
    assert all(torch.equal(eager, one_graph) for eager, one_graph in zip(*gradients, strict=True))
