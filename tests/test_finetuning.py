"""Fine-tuning with the tools people use: PEFT, TRL; next-byte training of a model with several heads."""

import copy
import inspect
from contextlib import nullcontext

import pytest
import torch
from test_features import every_model, fresh_model, random_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from evabyte import EvaByteForCausalLM, EvaByteTokenizer
from evabyte.stacked_heads import next_byte_only


def next_byte_loss(model, ids) -> float:
    """Mean cross-entropy of head 0, nats per byte, from the logits themselves."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def learn(model, ids, steps: int = 15, rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@every_model("PEFT LoRA: train, save, load, merge")
def test_lora(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = fresh_model(name), random_ids(name, 2, 30)
    model.save_pretrained(tmp_path / "base")
    before, loss = model(ids).logits, next_byte_loss(model, ids)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    assert not [n for n, p in tuned.named_parameters() if p.requires_grad and "lora" not in n]
    learn(tuned, ids)
    after = tuned(ids).logits
    assert next_byte_loss(tuned, ids) < loss
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(loaded(ids).logits, after)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, after, atol=1e-4, rtol=1e-4)
    assert merged.multi_byte_generate(ids, max_new_tokens=9, do_sample=False).shape[0] == 2
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(ids).logits, before)


def only_head(model):
    """What a user of TRL does with a model of several heads in one output layer, and need not do with others."""
    return next_byte_only(model) if isinstance(model, EvaByteForCausalLM) else nullcontext()


def trl_rows(name):
    """Some texts to learn by heart."""
    return [{"input_ids": row.tolist()} for row in random_ids(name, 4, 24)]


@every_model("TRL SFTTrainer")
def test_sft_trainer(name, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows, model = trl_rows(name), fresh_model(name)
    ids = torch.tensor([row["input_ids"] for row in rows])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=15,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    tokenizer = EvaByteTokenizer()  # TRL asks it for a padding id only
    before = next_byte_loss(model, ids)
    others = model.lm_head.weight[model.config.vocab_size :].clone()
    with only_head(model):
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(before, rel=1e-3)
    assert next_byte_loss(model, ids) < 0.7 * before
    assert torch.equal(model.lm_head.weight[model.config.vocab_size :], others)


@every_model("TRL DPOTrainer")
def test_dpo_trainer(name, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = fresh_model(name)
    prompt, chosen, rejected = (random_ids(name, 4, n, seed=n).tolist() for n in (8, 6, 7))
    rows = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in zip(prompt, chosen, rejected, strict=True)
    ]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )

    class Encoded(trl.DPOTrainer):
        """Takes rows of ids as they are."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    def margin() -> float:
        """How much likelier the chosen answers are than the rejected ones, nats."""
        total = 0.0
        for row in rows:
            for sign, answer in ((1, row["chosen_ids"]), (-1, row["rejected_ids"])):
                ids = torch.tensor([row["prompt_ids"] + answer])
                with torch.no_grad():
                    logits = model(ids, use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1]
                total += sign * logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
        return total

    before, reference = margin(), copy.deepcopy(model)
    with only_head(model), only_head(reference):
        trainer = Encoded(
            model,
            reference,
            arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=EvaByteTokenizer(),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-3)  # the policy is its own reference
    assert losses[-1] < losses[0]
    assert margin() > before


@every_model("Trainer with label smoothing (next-byte head)")
def test_label_smoothing(name, tmp_path):
    model, ids, epsilon = fresh_model(name), random_ids(name, 2, 12), 0.2
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=epsilon, use_cpu=True, report_to=[])
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    log_probs = model(ids).logits[:, :-1].log_softmax(-1)
    exact = -log_probs.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(loss, (1 - epsilon) * exact - epsilon * log_probs.mean())


def test_several_heads_are_not_taken_for_one():
    trl_utils = pytest.importorskip("trl.trainer.utils")
    model, ids = fresh_model("EvaByte"), random_ids("EvaByte", 2, 12)
    expected = next_byte_loss(model, ids)
    trl_utils.add_fused_lm_head(model)
    with pytest.raises(ValueError, match="next_byte_only"):
        model(ids, labels=ids, fused_lm_head=True)
    assert model(ids).logits.shape == (2, 12, 320)
    with next_byte_only(model):
        trl_utils.add_fused_lm_head(model)
        assert model(ids, labels=ids, fused_lm_head=True).loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_replaced_forward_shows_its_parameters():
    model = fresh_model("EvaByte")
    shown = inspect.signature(model.forward)
    model.forward = model.forward  # as tools that wrap it do; the Trainer and exporters read the signature
    assert inspect.signature(model.forward) == shown and "input_ids" in shown.parameters


def test_next_byte_only_gives_the_heads_back(tmp_path):
    model, ids = fresh_model("EvaByte"), random_ids("EvaByte", 2, 20)
    all_logits = model(ids, return_all_pred_logits=True).logits
    with next_byte_only(model) as alone:
        torch.testing.assert_close(alone(ids, return_all_pred_logits=True).logits, all_logits[:, :, :1])
        alone.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(ids).logits, all_logits[:, :, 0])
        with torch.no_grad():
            alone.lm_head.weight.mul_(2)
    after = model(ids, return_all_pred_logits=True).logits
    torch.testing.assert_close(after[:, :, 0], 2 * all_logits[:, :, 0])
    torch.testing.assert_close(after[:, :, 1:], all_logits[:, :, 1:])


def test_next_byte_only_comes_before_adapters():
    peft = pytest.importorskip("peft")
    model = fresh_model("EvaByte")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"]), model)
    with pytest.raises(TypeError, match="before"), next_byte_only(model):
        pass
