"""Losses of all heads, under padding, packing, accumulation and checkpointing; a Trainer run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fresh_model, pad_rows, random_ids, tiny_model
from transformers import Trainer, TrainingArguments

from evabyte.multibyte_loss import multibyte_loss, shift_for_heads


def head_losses_by_hand(model, ids, labels):
    """Per head, the losses of one sequence [N], position by position."""
    with torch.no_grad():
        logits = model(ids[None], use_cache=False, return_all_pred_logits=True).logits[0]
    losses = [[] for _ in range(logits.shape[1])]
    for head, collected in enumerate(losses):
        for position in range(len(ids) - 1 - head):
            target = labels[position + 1 + head]
            if target != -100:
                collected.append(-logits[position, head].log_softmax(-1)[target].item())
    return losses


def mean_of_head_means(losses):
    means = [sum(head) / len(head) for head in losses if head]
    return sum(means) / len(means)


@settings(max_examples=15)
@given(length=st.integers(2, 40), ignored=st.sets(st.integers(0, 39), max_size=10))
def test_every_head_learns_its_own_byte(length, ignored):
    model, ids = tiny_model(), random_ids(length)
    labels = ids.clone()
    labels[[i for i in ignored if i < length - 1]] = -100
    output = model(ids[None], labels=labels[None])
    expected = head_losses_by_hand(model, ids, labels.tolist())
    assert math.isclose(output.loss.item(), mean_of_head_means(expected), rel_tol=1e-4)
    for loss, head in zip(output.head_losses.tolist(), expected, strict=True):
        assert math.isclose(loss, sum(head) / max(len(head), 1), rel_tol=1e-4, abs_tol=1e-6)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4), offset=st.integers(0, 6))
def test_padded_and_packed_documents_learn_as_if_alone(lengths, offset):
    model = tiny_model()
    rows = [random_ids(n, seed=row) for row, n in enumerate(lengths)]
    expected = [head_losses_by_hand(model, row, row.tolist()) for row in rows]
    per_head = [[loss for row in expected for loss in row[head]] for head in range(4)]
    if not any(per_head):
        return
    ids, mask = pad_rows(rows, [offset] * len(rows), max(lengths) + 2 * offset)
    padded = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    packed_ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(packed_ids, position_ids=positions, labels=packed_ids)
    assert math.isclose(padded.loss.item(), mean_of_head_means(per_head), rel_tol=1e-4)
    assert math.isclose(packed.loss.item(), mean_of_head_means(per_head), rel_tol=1e-4)


def test_parts_of_a_batch_add_up():
    """`num_items_in_batch` makes the losses of the parts sum to the loss of the whole, ragged parts too."""
    model, ids = tiny_model(), random_ids(4, 30)
    labels = ids.clone()
    labels[0, 5:] = labels[2, :12] = -100
    items = int((labels != -100).sum())
    whole = model(ids, labels=labels, num_items_in_batch=items).loss
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=torch.tensor(items)) for i in range(4)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole)


def test_labels_shifted_already():
    model, ids = tiny_model(), random_ids(2, 20)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)


def test_published_labels_average_over_pairs():
    logits = torch.randn(2, 7, 3, 11)
    targets = torch.randint(0, 11, (2, 7, 3))
    targets[0, 2:, 1] = -100
    loss, _ = multibyte_loss(logits, targets, average="pairs")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), targets.flatten())
    torch.testing.assert_close(loss, expected)


def test_nothing_to_learn_is_zero_not_nan():
    model, ids = fresh_model(), random_ids(1, 6)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0.0


def test_shift_for_heads():
    labels = torch.tensor([[10, 11, 12, 13]])
    assert shift_for_heads(labels, 2).tolist() == [[[11, 12], [12, 13], [13, -100], [-100, -100]]]
    document = torch.tensor([[0, 0, 1, -1]])
    expected = [[[11, -100], [-100, -100], [-100, -100], [-100, -100]]]
    assert shift_for_heads(labels, 2, document=document).tolist() == expected


@pytest.mark.parametrize("labels", [torch.zeros(1, 5), torch.zeros(1, 4, 3)])
def test_labels_of_wrong_shape(labels):
    with pytest.raises(ValueError, match="labels"):
        tiny_model()(random_ids(1, 4), labels=labels.long())


def test_gradient_checkpointing_changes_nothing():
    ids = random_ids(2, 40)
    gradients = []
    for checkpointing in (False, True):
        model = fresh_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_trains(dtype):
    model, ids = fresh_model(dtype=dtype).train(), random_ids(2, 40)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32 and all(parameter.grad.isfinite().all() for parameter in model.parameters())


class Rows(torch.utils.data.Dataset):
    def __init__(self, lengths):
        self.rows = [random_ids(n, seed=n) for n in lengths]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        pad = 30 - len(row)
        return {
            "input_ids": torch.nn.functional.pad(row, (0, pad)),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(row), (0, pad)),
            "labels": torch.nn.functional.pad(row, (0, pad), value=-100),
        }


def test_trainer_accumulation_equals_one_big_batch(tmp_path):
    """Four ragged rows in one batch, or one by one: the same reported loss, the same step."""
    results = []
    for batch_size, steps in ((4, 1), (1, 4)):
        model = fresh_model()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=steps,
                max_steps=2,
                learning_rate=1e-2,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                optim="sgd",
            ),
            train_dataset=Rows([30, 5, 17, 26]),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, [parameter.detach().clone() for parameter in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    for whole, parts in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


def test_the_trainer_evaluates(tmp_path):
    """The Trainer finds the labels by the signature, and reports a loss when a batch has them all."""
    ids = random_ids(4, 20)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    model = tiny_model()
    found = Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]
    with torch.no_grad():
        loss = model.eval()(ids, labels=ids, num_items_in_batch=ids[:, 1:].numel()).loss
    assert found == pytest.approx(float(loss), rel=1e-5)
