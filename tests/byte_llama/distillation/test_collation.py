"""Batches: padding, and packing, with which all losses are those of the same documents padded."""

from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_documents import CONTENT, CORPUS, byte_tokenizer, examples_of, subword_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from byte_llama.distillation import (
    DistillationCollator,
    ParallelEncoder,
    alm_loss,
    chunk_logprobs,
    latents_loss,
    pack_examples,
    sequence_logprobs,
    sft_loss,
    space_mask,
)


def test_collator():
    examples = examples_of(["the quick fox", "dog"])
    batch = DistillationCollator.from_tokenizers(byte_tokenizer(), subword_tokenizer(), teacher_length=40)(examples)
    names = {"input_ids", "labels", "chunks", "attention_mask"}
    assert batch.keys() == names | {f"teacher_{name}" for name in names}
    for prefix, side, pad in (
        ("", "student", byte_tokenizer().pad_token_id),
        ("teacher_", "teacher", subword_tokenizer().pad_token_id),
    ):
        length = 40 if prefix else max(len(example.student) for example in examples)
        for row, example in enumerate(examples):
            tokens = getattr(example, side)
            rest = length - len(tokens)
            ids = tokens.ids.tolist()
            assert batch[prefix + "input_ids"][row].tolist() == ids + [pad] * rest
            assert batch[prefix + "labels"][row].tolist() == [-100, *ids[1:]] + [-100] * rest
            assert batch[prefix + "chunks"][row].tolist() == tokens.chunks.tolist() + [-1] * rest
            assert batch[prefix + "attention_mask"][row].tolist() == [1] * len(ids) + [0] * rest
    packed = DistillationCollator(packed=True, student_length=30)(list(pack_examples(examples)))
    sizes = [*map(len, (example.student for example in examples))]
    assert packed["position_ids"].tolist() == [[*chain(*map(range, [*sizes, 30 - sum(sizes)]))]]
    starts = [0, sizes[0], *range(sum(sizes), 30)]
    assert (packed["labels"][0] == -100).nonzero().flatten().tolist() == starts
    alone = ParallelEncoder(byte_tokenizer())([{"text": "x"}])
    assert DistillationCollator()(alone).keys() == {"input_ids", "labels", "attention_mask"}
    with pytest.raises(ValueError, match="all have a teacher"):
        DistillationCollator()([*examples, *alone])
    with pytest.raises(ValueError, match="student_length is 3"):
        DistillationCollator(student_length=3)(examples)
    with pytest.raises(ValueError, match="packed=True"):
        DistillationCollator()(list(pack_examples(examples)))


@given(st.lists(CONTENT, max_size=12), st.integers(1, 4))
def test_packing_keeps_every_document(texts, open_rows):
    examples = examples_of(texts, max_student_length=40, max_teacher_length=20)
    rows = list(pack_examples(examples, 60, 24, open_rows))
    found = []
    for row in rows:
        assert len(row.student) <= 60 and len(row.teacher) <= 24
        starts = [np.flatnonzero(side.positions == 0).tolist() for side in (row.student, row.teacher)]
        assert len(starts[0]) == len(starts[1])
        done = 0
        for start, end, teacher_start, teacher_end in zip(
            starts[0], [*starts[0][1:], None], starts[1], [*starts[1][1:], None], strict=True
        ):
            chunks, teacher_chunks = row.student.chunks[start:end], row.teacher.chunks[teacher_start:teacher_end]
            shift = [np.where(part < 0, -1, part - done).tolist() for part in (chunks, teacher_chunks)]
            done = max(done, chunks.max() + 1)
            found.append(
                (row.student.ids[start:end].tolist(), row.teacher.ids[teacher_start:teacher_end].tolist(), *shift)
            )
    expected = [
        (e.student.ids.tolist(), e.teacher.ids.tolist(), e.student.chunks.tolist(), e.teacher.chunks.tolist())
        for e in examples
    ]
    assert sorted(found) == sorted(expected)


def test_packing_errors():
    with pytest.raises(ValueError, match="does not fit a row"):
        list(pack_examples(examples_of(["the quick fox"]), 5, 5))


@cache
def tiny_llama(vocab_size, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def losses_of(batch, teacher_mask, student_mask):
    sides = []
    for prefix, model, mask in (
        ("teacher_", tiny_llama(len(teacher_mask), 1), teacher_mask),
        ("", tiny_llama(len(student_mask), 2), student_mask),
    ):
        inputs = {
            name: batch[prefix + name]
            for name in ("input_ids", "attention_mask", "position_ids")
            if prefix + name in batch
        }
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        sides.append((sequence_logprobs(hidden, inputs["input_ids"], mask, model.lm_head), hidden))
    (teacher, teacher_hidden), (student, student_hidden) = sides
    ids = [batch[name] for name in ("teacher_chunks", "chunks", "teacher_labels", "labels")]
    return torch.stack(
        [
            sft_loss(student.tokens, batch["labels"]),
            alm_loss(chunk_logprobs(teacher, student, *ids), temperature=1.0),
            latents_loss(teacher_hidden, student_hidden, *ids[:2]),
        ]
    )


def test_packed_losses_equal_padded_ones():
    """All losses of packed rows, through real models, are those of the same documents padded."""
    texts = [*CORPUS, "the dog", "", "a fox and a dog", "x", "über den Hund"]
    examples = examples_of(texts, max_student_length=90, max_teacher_length=50)
    packed = list(pack_examples(examples, 100, 60, open_rows=2))
    assert len(packed) < len(examples)
    collator = DistillationCollator.from_tokenizers(byte_tokenizer(), subword_tokenizer())
    packing = DistillationCollator.from_tokenizers(byte_tokenizer(), subword_tokenizer(), 105, 64, packed=True)
    masks = space_mask(subword_tokenizer()), space_mask(byte_tokenizer())
    with torch.no_grad():
        together = losses_of(packing(packed), *masks)
        torch.testing.assert_close(together, losses_of(collator(examples), *masks), rtol=1e-4, atol=1e-5)
    assert (together > 0).all()
