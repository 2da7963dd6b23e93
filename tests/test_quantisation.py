"""Weight-only quantisation by torchao, on the CPU: what stays right, and how small folders get."""

import pytest
import torch
from test_features import every_model, fresh_model, random_ids
from transformers import AutoModelForCausalLM, TorchAoConfig

quantization = pytest.importorskip("torchao.quantization")
# On the CPU torchao has four-bit weights in this form only: stored in bytes, so no smaller than eight-bit ones.
INT4 = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(16))
INT8 = quantization.Int8WeightOnlyConfig()


def folder_of(name, tmp_path):
    """A saved model whose layers are wide enough that their weights are most of it."""
    model = fresh_model(name, hidden_size=64, intermediate_size=512)
    model.save_pretrained(tmp_path / "full")
    return tmp_path / "full", model


def weight_bytes(folder) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check(name, config, allowed, tmp_path):
    """A quantised model computes nearly the same, decodes losslessly, and comes back from its folder as it was."""
    folder, model = folder_of(name, tmp_path)
    ids = random_ids(name, 2, 30)
    small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config))
    quantised = [
        m for m in small.modules() if isinstance(m, torch.nn.Linear) and type(m.weight) is not torch.nn.Parameter
    ]
    assert len(quantised) == 2 * 7  # all linear layers of both decoder layers; the output layer is left alone
    exact = model(ids).logits
    assert 0 < (small(ids).logits - exact).pow(2).mean().sqrt() < allowed * exact.std()
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert small.multi_byte_generate(ids, **how).tolist() == small.generate(ids, **how).tolist()
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "small")(ids).logits, small(ids).logits)
    return weight_bytes(tmp_path / "small") / weight_bytes(folder)


@every_model("torchao int8 weights")
def test_int8(name, tmp_path):
    assert check(name, INT8, 0.1, tmp_path) < 0.6


@every_model("torchao int4 weights")
def test_int4(name, tmp_path):
    check(name, INT4, 0.6, tmp_path)


@every_model("LoRA on int8 weights (QLoRA style)")
def test_lora_on_int8(name, tmp_path):
    peft = pytest.importorskip("peft")
    folder, _ = folder_of(name, tmp_path)
    small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(INT8))
    tuned = peft.get_peft_model(small, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = random_ids(name, 2, 30)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
