"""The same numbers on a CUDA device: the reference's goldens, the properties, decoding."""

import pytest
import torch
from goldens_io import assert_close, load_golden
from tiny import logits_alone, pad_left, random_ids, tiny_model
from transformers import DynamicCache

from evabyte import eva_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_products():
    """TensorFloat-32 would round the inputs of float32 products to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


BACKENDS = ["naive", "sdpa", "eva_triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["fwd_w32_c4", "fwd_w256_c16", "fwd_w2048_c16"])
def test_forward(case, backend):
    golden = load_golden(case)
    model, tolerance = golden.model(attn_implementation=backend).cuda(), golden.facts["tolerance"]
    for n in golden.facts["lengths"]:
        positions = golden.tensors.get(f"in.positions_{n}", torch.arange(n))
        with torch.no_grad():
            logits = model(golden[f"in.input_ids_{n}"].cuda(), use_cache=False).logits[:, positions.cuda()]
        assert_close(logits.cpu(), golden[f"out.logits_{n}"], tolerance["logits_atol"], tolerance["rtol"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["train_w32_c4", "train_w128_c4"])
def test_training_step(case, backend):
    golden = load_golden(case)
    model, tolerance = golden.model(attn_implementation=backend).cuda().train(), golden.facts["tolerance"]
    loss = model(golden["in.input_ids"].cuda(), labels=golden["in.labels"].cuda()).loss
    assert_close(loss.cpu()[None], golden["out.total"], atol=tolerance["total_atol"])
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"out.grad.{name}"]
        limit = tolerance["grad_rel_to_largest_entry"] * expected.abs().max().item()
        assert_close(parameter.grad.cpu(), expected, atol=max(limit, 1e-9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_operator_in_every_dtype(dtype, backend):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 300, 64)] * 3 + [(3, 64)] * 2
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    exact = eva_attention(*inputs, window_size=64, chunk_size=16, backend="naive")
    low = [i.to("cuda", dtype) for i in inputs]
    output = eva_attention(*low, window_size=64, chunk_size=16, backend=backend)
    error = (output.double().cpu() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 4 * torch.finfo(dtype).eps


def test_padded_batch_on_a_cache():
    model = tiny_model().to("cuda")
    try:
        rows = [random_ids(n, seed=n) for n in (40, 7, 23)]
        ids, mask = (tensor.cuda() for tensor in pad_left(rows))
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            first = model(ids[:, :21], attention_mask=mask[:, :21], past_key_values=cache).logits
            second = model(ids[:, 21:], attention_mask=mask, past_key_values=cache).logits
        logits = torch.cat((first, second), dim=1)
        for row, tokens in enumerate(rows):
            expected = logits_alone(model, tokens.cuda())[:, 0]
            torch.testing.assert_close(logits[row, -len(tokens) :], expected, atol=1e-4, rtol=1e-4)
    finally:
        model.to("cpu")


@pytest.mark.parametrize("draft", ["chain", "tree95", "dynamic", "dynamic+lookup"])
def test_multibyte_equals_generate(draft):
    golden = load_golden("multibyte_w256_c8")
    model = golden.model().cuda()
    ids, mask = (t.cuda() for t in pad_left([golden["in.p240.prompt"][0], golden["in.p3.prompt"][0]]))
    how = {"attention_mask": mask, "max_new_tokens": 60, "eos_token_id": None}
    greedy = model.generate(ids, do_sample=False, **how)
    assert torch.equal(model.multi_byte_generate(ids, do_sample=False, draft=draft, **how), greedy)
    one = {"max_new_tokens": 60, "eos_token_id": None, "do_sample": True, "top_p": 0.9}
    torch.manual_seed(3)
    expected = model.generate(ids[:1], **one)
    torch.manual_seed(3)
    assert torch.equal(model.multi_byte_generate(ids[:1], draft=draft, **one), expected)


@pytest.mark.parametrize("draft", [None, "chain", "dynamic", "lookup"])
def test_cuda_graphs_write_the_same_bytes(draft):
    golden = load_golden("multibyte_w256_c8")
    model = golden.model().cuda()
    ids, mask = (t.cuda() for t in pad_left([golden["in.p240.prompt"][0], golden["in.p3.prompt"][0]]))
    for count in (60, 300):  # the second in larger buffers, elsewhere
        how = {"attention_mask": mask, "max_new_tokens": count, "do_sample": False, "eos_token_id": None}
        static = {"cache_implementation": "static", **how}
        written = model.multi_byte_generate(ids, draft=draft, **static) if draft else model.generate(ids, **static)
        assert torch.equal(written, model.generate(ids, **how))


def test_one_synchronisation_a_step():
    """Drafting, verifying and committing wait for the device once."""
    golden = load_golden("multibyte_w256_c8")
    model, prompt = golden.model().cuda(), golden["in.p100.prompt"].cuda()
    how = {"do_sample": False, "eos_token_id": None, "draft": "dynamic", "return_acc_lengths": True}
    model.multi_byte_generate(prompt, max_new_tokens=20, **how)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    counts = {}
    for new in (20, 60):
        with torch.profiler.profile(activities=activities) as profiler:
            _, lengths = model.multi_byte_generate(prompt, max_new_tokens=new, **how)
        waits = sum(
            e.count for e in profiler.key_averages() if e.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize")
        )
        counts[lengths.shape[1]] = waits
    (few, waits_few), (many, waits_many) = sorted(counts.items())
    assert waits_many - waits_few <= many - few
