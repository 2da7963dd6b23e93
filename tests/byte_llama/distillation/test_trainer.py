"""The trainer: losses fall, weights equal those taken from the model itself, a resumed run is the same run."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments, set_seed

from byte_llama import (
    ByteGemma2Config,
    ByteGemma2ForCausalLM,
    ByteLlamaConfig,
    ByteLlamaForCausalLM,
    byte_tokenizer_from,
)
from byte_llama.distillation import (
    DistillationCollator,
    ParallelEncoder,
    gradient_norms,
    gradmag_weights,
    space_mask,
    weighted_loss,
)
from byte_llama.distillation.last_layer import LastLayerCopy
from byte_llama.distillation.objective import Objective
from byte_llama.distillation.trainer import DistillationTrainer

TEXTS = [f"The {a} {b} over the {c} river, and {d}." for a in ("quick", "slow") for b in ("fox", "hare", "bear")
         for c in ("wide", "deep") for d in ("sings", "sleeps")]  # fmt: skip
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def parts():
    """Teacher, tokenizers, masks, examples."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXTS, trainer)
    subword = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    byte = byte_tokenizer_from(subword)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(subword), initializer_range=0.2)).eval()
    encoder = ParallelEncoder(byte, subword, max_student_length=96, max_teacher_length=48)
    return teacher, subword, byte, encoder([{"text": text} for text in TEXTS])


class Examples(Dataset):
    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def student(byte, heads=3, kind="llama"):
    set_seed(1)
    if kind == "gemma2":
        gemma = {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 32, "num_pred_heads": heads}
        return ByteGemma2ForCausalLM(ByteGemma2Config(**SIZES, **gemma, vocab_size=len(byte)))
    return ByteLlamaForCausalLM(ByteLlamaConfig(**SIZES, vocab_size=len(byte), num_pred_heads=heads))


def objective_of(parts, losses=("sft", "alm", "latents", "heads")):
    _, subword, byte, _ = parts
    return Objective(losses, student_spaces=space_mask(byte), teacher_spaces=space_mask(subword))


def trainer_of(
    parts,
    folder,
    model=None,
    losses=("sft", "alm", "latents", "heads"),
    weights="gradmag",
    shard_teacher=False,
    **arguments,
):
    teacher, subword, byte, examples = parts
    collator = DistillationCollator.from_tokenizers(byte, subword)
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], seed=3, disable_tqdm=True,
        **{"per_device_train_batch_size": 4, "max_steps": 12, "logging_steps": 4, "learning_rate": 3e-3,
           "save_strategy": "no", "remove_unused_columns": False, "max_grad_norm": 0.0, **arguments},
    )  # fmt: skip
    return DistillationTrainer(
        model or student(byte),
        teacher,
        objective_of(parts, losses),
        weights=weights,
        shard_teacher=shard_teacher,
        heldout=[collator(examples[:6])],
        args=args,
        train_dataset=Examples(examples),
        data_collator=collator,
    )


def test_every_loss_falls_and_is_logged(parts, tmp_path):
    few = (*parts[:3], parts[3][:4])  # so few that a small student can learn even random latents
    trainer = trainer_of(few, tmp_path, max_steps=60, logging_steps=10, learning_rate=1e-2)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_bits_per_byte"] < 0.75 * before["eval_bits_per_byte"]
    assert after["eval_teacher_bits_per_byte"] == before["eval_teacher_bits_per_byte"]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss_sft", "loss_alm", "loss_latents", "loss_heads"):
        assert logs[-1][name] < logs[0][name], name
    assert all(entry["bytes_per_second"] > 0 for entry in logs)
    for entry in logs:
        shares = [entry[f"time_{part}"] for part in ("teacher", "student", "backward", "other")]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0


def test_weights_are_those_of_the_model_itself(parts):
    teacher, subword, byte, examples = parts
    model, objective = student(byte).train(), objective_of(parts)
    batch = DistillationCollator.from_tokenizers(byte, subword)(examples[:3])
    copied = LastLayerCopy(model)
    with torch.no_grad():  # the copy follows what the model has become since
        for parameter in model.parameters():
            parameter.mul_(1.1)
    view = objective.look(teacher, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = model(**inputs, use_cache=False, return_all_pred_logits=True)
    losses = objective(outputs.last_hidden_state, outputs.logits, batch, view)
    expected = gradient_norms(list(losses.values()), model.model.layers[-1].parameters())
    side = objective(*copied.forward(), batch, view)
    torch.testing.assert_close(torch.stack(list(side.values())), torch.stack(list(losses.values())))
    torch.testing.assert_close(gradient_norms(list(side.values()), copied.parameters), expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="not run"):
        copied.forward()


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        pytest.param("gemma2", marks=pytest.mark.compatibility("Byteification (distillation)", "byte Gemma 2")),
    ],
)
def test_one_step_is_the_weighted_sum(kind, parts, tmp_path):
    teacher, subword, byte, examples = parts
    model = student(byte, kind=kind).train()
    trainer = trainer_of(parts, tmp_path, model=model)
    batch = DistillationCollator.from_tokenizers(byte, subword)(examples[:4])
    loss = trainer.compute_loss(model, batch)
    objective = objective_of(parts)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = model(**inputs, use_cache=False, return_all_pred_logits=True)
    losses = objective(outputs.last_hidden_state, outputs.logits, batch, objective.look(teacher, batch))
    norms = gradient_norms(list(losses.values()), model.model.layers[-1].parameters())
    torch.testing.assert_close(loss, weighted_loss(list(losses.values()), gradmag_weights(norms)))


def test_a_resumed_run_is_the_same_run(parts, tmp_path):
    how = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    whole = trainer_of(parts, tmp_path / "run", **how)
    whole.train()
    again = trainer_of(parts, tmp_path / "run", **how)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, again)]
    assert losses[0] == losses[1]
    for ours, theirs in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_heads_alone_on_a_frozen_trunk(parts, tmp_path):
    model = student(parts[2])
    model.freeze_trunk()
    trunk = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = trainer_of(parts, tmp_path, model=model, losses=("heads",), weights={"heads": 1.0}, max_steps=4)
    trainer.teacher = None  # needs none
    trainer.train()
    assert all(torch.equal(p, trunk[name]) for name, p in model.named_parameters() if name in trunk)


def test_the_saved_student_loads(parts, tmp_path):
    trainer = trainer_of(parts, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    assert json.loads((tmp_path / "student" / "config.json").read_text())["num_pred_heads"] == 3
    again = ByteLlamaForCausalLM.from_pretrained(tmp_path / "student")
    for ours, theirs in zip(trainer.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_is_named(parts, tmp_path):
    with pytest.raises(ValueError, match="losses"):
        Objective(("sfd",))
    with pytest.raises(ValueError, match="space_mask"):
        Objective(("alm",))
    with pytest.raises(ValueError, match="weights"):
        trainer_of(parts, tmp_path, weights={"sft": 1.0})
    with pytest.raises(ValueError, match="remove_unused_columns"):
        trainer_of(parts, tmp_path, remove_unused_columns=True)
    with pytest.raises(RuntimeError, match="shard_teacher"):
        trainer_of(parts, tmp_path, shard_teacher=True)
    with pytest.raises(ValueError, match="teacher"):
        DistillationTrainer(student(parts[2]), None, objective_of(parts))
