"""The model against the public reference's numbers."""

import pytest
import torch
from goldens_io import assert_close, load_golden

from evabyte import eva_attention
from evabyte.eva_math import summarize_chunks

BACKENDS = ["naive", "sdpa"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["fwd_w32_c4", "fwd_w64_c8", "fwd_w256_c16", "fwd_w2048_c16"])
def test_forward(case, backend):
    golden = load_golden(case)
    model = golden.model(attn_implementation=backend)
    tolerance = golden.facts["tolerance"]
    for n in golden.facts["lengths"]:
        if backend == "naive" and n > 2100:
            continue  # the specification takes N^2 memory
        ids = golden[f"in.input_ids_{n}"]
        positions = golden.tensors.get(f"in.positions_{n}", torch.arange(n))
        with torch.no_grad():
            output = model(ids, return_all_pred_logits=True, use_cache=False, output_hidden_states=True)
        close = {"atol": tolerance["logits_atol"], "rtol": tolerance["rtol"]}
        assert_close(output.logits[:, positions, 0], golden[f"out.logits_{n}"], **close)
        if f"out.logits_all_{n}" in golden.tensors:
            assert_close(output.logits[:, positions], golden[f"out.logits_all_{n}"], **close)
        if f"out.hidden_{n}" in golden.tensors:
            assert_close(output.hidden_states[-1], golden[f"out.hidden_{n}"], **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["flags_fp32", "flags_bf16"])
def test_flags(case, backend):
    golden = load_golden(case)
    tolerance = golden.facts["tolerance"]
    for variant in golden.facts["variants"]:
        model = golden.model(attn_implementation=backend, **variant["overrides"])
        with torch.no_grad():
            logits = model(golden["in.input_ids"], return_all_pred_logits=True).logits
        assert str(logits.dtype) == variant.get("logits_dtype", "torch.float32")
        actual, expected = logits[:, golden["in.positions"]].float(), golden[variant["tensor"]].float()
        if case == "flags_fp32":
            assert_close(actual, expected, atol=tolerance["logits_atol"], rtol=tolerance["rtol"])
        else:
            difference = actual - expected
            assert difference.abs().max() <= tolerance["logits_max_abs"]
            assert difference.square().mean().sqrt() <= tolerance["logits_rms"]


def test_rope_scaling():
    golden = load_golden("rope_scaling")
    tolerance = golden.facts["tolerance"]
    for variant in golden.facts["variants"]:
        model = golden.model(rope_scaling=variant["rope_scaling"])
        # One model object for all lengths, the longest first: ours does not remember it.
        for n in (100, 65, 64, 40):
            with torch.no_grad():
                logits = model(golden["in.input_ids"][:, :n]).logits[:, golden[f"in.positions_{n}"]]
            expected = golden[variant["tensors"][str(n)]]
            assert_close(logits, expected, atol=tolerance["logits_atol"], rtol=tolerance["rtol"])
        generated = model.generate(golden["in.gen_prompt"], max_new_tokens=40, do_sample=False, eos_token_id=None)
        assert torch.equal(generated, golden[variant["generated"]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["decode_w32_c4", "decode_w64_c8", "decode_w128_c4"])
def test_greedy_decoding(case, backend):
    golden = load_golden(case)
    tolerance = golden.facts["tolerance"]
    model = golden.model(attn_implementation=backend)
    for call in golden.facts["calls"]:
        output = model.generate(
            golden[call["prompt"]],
            max_new_tokens=call["max_new_tokens"],
            eos_token_id=call["eos_token_id"],
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert torch.equal(output.sequences, golden[call["sequence"]])
        if "step_logits" in call:
            logits = torch.stack(output.logits, dim=1)
            assert_close(logits, golden[call["step_logits"]], tolerance["step_logits_atol"], tolerance["rtol"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["train_w32_c4", "train_w128_c4", "train_one_head"])
def test_training_step(case, backend):
    golden = load_golden(case)
    tolerance = golden.facts["tolerance"]
    model = golden.model(attn_implementation=backend).train()
    output = model(golden["in.input_ids"], labels=golden["in.labels"], return_all_pred_logits=True)
    labels = golden["in.labels"]
    losses = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 2), labels.flatten(), ignore_index=-100, reduction="none"
    ).view(labels.shape)
    assert_close(losses, golden["out.loss"], atol=tolerance["loss_atol"])
    assert_close(output.loss[None], golden["out.total"], atol=tolerance["total_atol"])
    output.loss.backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"out.grad.{name}"]
        limit = tolerance["grad_rel_to_largest_entry"] * expected.abs().max().item()
        assert_close(parameter.grad, expected, atol=max(limit, 1e-9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["attn_w32_c4", "attn_w128_c4"])
def test_bare_attention(case, backend):
    golden = load_golden(case)
    config, tolerance = golden.facts["config"], golden.facts["tolerance"]
    close = {"atol": tolerance["atol"], "rtol": tolerance["rtol"]}
    for n in golden.facts["lengths"]:
        names = ["q", "k", "v"]
        inputs = [golden[f"in.{name}_{n}"].clone().requires_grad_() for name in names]
        learned = [golden[f"in.{name}"].clone().requires_grad_() for name in ("adaptive_mu_k", "adaptive_phi")]
        output = eva_attention(
            *inputs, *learned, window_size=config["window_size"], chunk_size=config["chunk_size"], backend=backend
        )
        assert_close(output, golden[f"out.out_{n}"], **close)
        output.backward(golden[f"in.grad_out_{n}"])
        for name, tensor in zip(names, inputs, strict=True):
            assert_close(tensor.grad, golden[f"out.d_{name}_{n}"], **close)
        for name, tensor in zip(("adaptive_mu_k", "adaptive_phi"), learned, strict=True):
            gradient = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)  # no earlier window
            assert_close(gradient, golden[f"out.d_{name}_{n}"], **close)
        whole = n // config["chunk_size"] * config["chunk_size"]
        summaries = summarize_chunks(inputs[1][:, :, :whole], inputs[2][:, :, :whole], *learned, config["chunk_size"])
        assert_close(summaries[0], golden[f"out.summary_k_{n}"], **close)
        assert_close(summaries[1], golden[f"out.summary_v_{n}"], **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_attention(backend):
    """The reference's masks hide padding but count positions in slots, so rows are compared where both agree."""
    golden = load_golden("attn_masked_w128_c4")
    config, tolerance = golden.facts["config"], golden.facts["tolerance"]
    for row, (side, count) in enumerate(golden.facts["padding_per_row"]):
        if side == "left" and count % config["window_size"]:
            continue
        real = ~golden["in.padding"][row : row + 1]
        inputs = [golden[f"in.{name}"][row : row + 1].clone().requires_grad_() for name in ("q", "k", "v")]
        output = eva_attention(
            *inputs,
            golden["in.adaptive_mu_k"],
            golden["in.adaptive_phi"],
            window_size=config["window_size"],
            chunk_size=config["chunk_size"],
            backend=backend,
            attention_mask=real,
        )
        output.backward(golden["in.grad_out"][row : row + 1])
        close = {"atol": tolerance["atol"], "rtol": tolerance["rtol"]}
        keep = real[0]
        assert_close(output[:, :, keep], golden["out.out"][row : row + 1][:, :, keep], **close)
        for name, tensor in zip(("q", "k", "v"), inputs, strict=True):
            assert_close(tensor.grad[:, :, keep], golden[f"out.d_{name}"][row : row + 1][:, :, keep], **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_positions", [True, False])
def test_padding(backend, with_positions):
    """A padded row gives what the reference gives for the row without padding."""
    golden = load_golden("padding_w32_c4")
    tolerance = golden.facts["tolerance"]
    model = golden.model(attn_implementation=backend)
    for call in golden.facts["calls"]:
        row = call["row"]
        mask = golden[f"in.{row}.attention_mask"]
        with torch.no_grad():
            logits = model(
                golden[f"in.{row}.input_ids"],
                attention_mask=mask,
                position_ids=golden[f"in.{row}.position_ids"] if with_positions else None,
            ).logits
        real = logits[:, mask[0].bool()][:, golden[f"in.{row}.positions"]]
        assert_close(real, golden[f"out.{row}.unpadded_logits"], tolerance["unpadded_logits_atol"], tolerance["rtol"])
